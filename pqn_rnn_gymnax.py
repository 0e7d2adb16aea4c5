# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "gymnax>=1.0.1", "six", "hydra-core>=1.3.2",
#   "omegaconf>=2.3", "pydantic>=2.10", "orbax-checkpoint>=0.11", "safetensors>=0.5", "pandas>=2.2", "seaborn>=0.13",
#   "matplotlib>=3.8", "scipy>=1.15", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN with a GRU (Gallici et al., ICLR 2025, arXiv 2407.04811) on gymnax, in one file. Documentation: docs/pqn_rnn_gymnax.md

python pqn_rnn_gymnax.py +alg=pqn_rnn_cartpole_positions NUM_SEEDS=5            # CartPole without velocities
python pqn_rnn_gymnax.py +alg=pqn_rnn_memory_chain alg.ENV_KWARGS.memory_length=30
python pqn_rnn_gymnax.py RESUME=latest                                          # go on with a run that was stopped
out = run(Config(), NUM_SEEDS=5)                                                # in a notebook, below a cell with this file
"""

import inspect
import os
import re
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import gymnax
import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
import seaborn as sns
from flax import traverse_util
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, JsonValue, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from safetensors.numpy import load_file, save_file
from scipy.stats import trim_mean
from tqdm import tqdm

CHECKED = {"extra": "forbid", "allow_inf_nan": False, "validate_assignment": True}
Fraction = Annotated[float, Field(ge=0, le=1)]
plain = partial(jax.tree.map, lambda x: x.item() if hasattr(x, "item") else x)  # numpy's numbers become Python's
Kwargs = Annotated[dict[str, JsonValue], BeforeValidator(plain)]


@dataclass(config=CHECKED)
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; the defaults are the published recurrent recipe for CartPole."""

    ENV_NAME: str = "CartPole-v1"  # any gymnax environment with discrete actions
    ENV_KWARGS: Kwargs = Field(default_factory=dict)  # for the environment's constructor or its parameters
    ALG_NAME: str = "pqn_rnn_cartpole"  # a label for logs
    TOTAL_TIMESTEPS: PositiveInt = 500_000  # environment steps of one seed
    TOTAL_TIMESTEPS_DECAY: PositiveInt | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: PositiveInt = 32  # environments in parallel, N
    NUM_STEPS: PositiveInt = 64  # steps of each environment between updates, T
    MEMORY_WINDOW: Annotated[int, Field(ge=0)] = 4  # steps before a rollout that are trained on again, W; at most T
    NUM_MINIBATCHES: PositiveInt = 16  # gradient steps per epoch, each on whole sequences; must divide N
    NUM_EPOCHS: PositiveInt = 4  # passes over a rollout
    EPS_START: Fraction = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: Fraction = 0.2  # and at the end
    EPS_DECAY: Fraction = 0.2  # fraction of the schedule after which EPS_FINISH is reached
    LR: PositiveFloat = 1e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = True  # linearly to 0 over the schedule
    MAX_GRAD_NORM: PositiveFloat = 10.0  # clipping of the gradient's global norm
    GAMMA: Fraction = 0.99  # discount
    LAMBDA: Fraction = 0.95  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 0.1  # scales the rewards learned from, never those reported
    HIDDEN_SIZE: PositiveInt = 256  # units of each hidden layer, and of the GRU
    NUM_LAYERS: PositiveInt = 2  # hidden layers before the GRU
    NUM_RNN_LAYERS: Annotated[int, Field(ge=0)] = 1  # GRU layers; 0: a feed-forward agent
    ADD_LAST_ACTION: bool = True  # what follows the hidden layers also sees the action before
    NORM_TYPE: Literal["layer_norm", "batch_norm", "none"] = "layer_norm"  # before the ReLU of each hidden layer
    NORM_INPUT: bool = False  # batch-normalise observations
    TEST_DURING_TRAINING: bool = True  # evaluate every TEST_INTERVAL, not only at the end
    TEST_INTERVAL: Annotated[Fraction, Field(gt=0)] = 0.05  # as a fraction of all updates
    TEST_NUM_ENVS: PositiveInt = 128  # episodes per evaluation
    TEST_NUM_STEPS: PositiveInt | None = None  # at most this many steps each; null: the environment's time limit
    EPS_TEST: Fraction = 0.0  # exploration in evaluation

    TASK = property(lambda config: re.sub(r"[^\w.-]", "-", config.ENV_NAME))  # as folders and titles name it
    NUM_UPDATES = property(lambda config: config.TOTAL_TIMESTEPS // (config.NUM_ENVS * config.NUM_STEPS))

    def __post_init__(self):
        check_counts(self)
        if self.NUM_ENVS % self.NUM_MINIBATCHES:
            raise ValueError(f"NUM_MINIBATCHES={self.NUM_MINIBATCHES} must divide NUM_ENVS={self.NUM_ENVS}")
        if self.MEMORY_WINDOW > self.NUM_STEPS:
            raise ValueError(f"MEMORY_WINDOW={self.MEMORY_WINDOW} must be at most NUM_STEPS={self.NUM_STEPS}")
        if "CartPolePositions-v1" not in gymnax.registered_envs:  # here: a launcher's process runs functions only
            gymnax.registration.register("CartPolePositions-v1", CartPolePositions)
        make_env(self)


def check_counts(config):
    """Raise ValueError where a Config's counts do not fit each other."""
    batch = config.NUM_ENVS * config.NUM_STEPS
    if batch % config.NUM_MINIBATCHES:
        raise ValueError(f"NUM_MINIBATCHES={config.NUM_MINIBATCHES} must divide NUM_ENVS * NUM_STEPS = {batch}")
    if (steps := min(config.TOTAL_TIMESTEPS, config.TOTAL_TIMESTEPS_DECAY or batch)) < batch:
        raise ValueError(f"TOTAL_TIMESTEPS[_DECAY]={steps} must be at least NUM_ENVS * NUM_STEPS = {batch}")


def override(config, **values):
    """A copy of a Config with other values, which are not checked and so may be traced: vmap over them is a sweep."""
    changed = object.__new__(type(config))
    vars(changed).update(vars(config) | values)
    return changed


class CartPolePositions(gymnax.environments.CartPole):
    """CartPole without velocities: an agent must remember where the cart and the pole were."""

    def get_obs(self, state, params=None, key=None):
        return super().get_obs(state)[::2]

    def observation_space(self, params):
        high = super().observation_space(params).high[::2]
        return gymnax.environments.spaces.Box(-high, high, (2,))


def make_env(config):
    """The environment of a Config and its parameters; each of ENV_KWARGS goes to the one of the two that has it."""
    name, kwargs, key = config.ENV_NAME, dict(config.ENV_KWARGS), jax.random.key(0)
    if name not in gymnax.registered_envs:
        raise ValueError(f"ENV_NAME={name} is not registered with gymnax, as are {', '.join(gymnax.registered_envs)}")
    try:
        arguments = inspect.signature(gymnax.registration._registry[name]).parameters.keys() & kwargs
        env, params = gymnax.make(name, **{argument: kwargs.pop(argument) for argument in arguments})
        params = params.replace(**kwargs)
        obs, env_state = jax.eval_shape(env.reset, key, params)
        _, env_state, reward, terminated, truncated, _ = jax.eval_shape(env.step, key, env_state, 0, params)
        _ = obs.shape, env.action_space(params).n
    except Exception as error:
        given = f"ENV_NAME={name} ENV_KWARGS={config.ENV_KWARGS} must have gymnax 1.0's interface, discrete actions"
        raise ValueError(f"{given} and observations of one array: {type(error).__name__}: {error}") from error
    limit = getattr(params, "max_steps_in_episode", config.TEST_NUM_STEPS)
    if limit is None or limit < 1 or limit % 1:
        raise ValueError(f"max_steps_in_episode={limit} must be a whole number of steps, or TEST_NUM_STEPS without it")
    return env, params


def gru(state, gates, reset, recurrent_kernel, bias):
    """nn.GRUCell over time: state [N, H], and gates [T, N, 3 * H], the inputs' products of all steps, taken at once -> the
    state after, h [T, N, H]. Where reset [T, N] is true, the state is zero before the step."""

    def step(h, inputs):
        gates, reset = inputs
        h = jnp.where(reset[:, None], 0.0, h)
        (r, z, n), (hr, hz, hn) = jnp.split(gates, 3, -1), jnp.split(h @ recurrent_kernel, 3, -1)
        r, z = nn.sigmoid(r + hr), nn.sigmoid(z + hz)
        h = (1 - z) * jnp.tanh(n + r * (hn + bias)) + z * h
        return h, h

    return jax.lax.scan(step, state, (gates, reset))


class QNetwork(nn.Module):
    """Q(s, .) over time: obs [T, N, *obs_shape], reset and last_action [T, N], hidden -> (q_values [T, N, A], hidden after)."""

    config: Config
    num_actions: int
    obs_space: Any

    @nn.compact
    def __call__(self, obs, reset, last_action, hidden, train=False):
        # Of vmapped seeds in turn: LAPACK's batched QR can wait for its own threads for ever.
        @jax.custom_batching.sequential_vmap
        def recurrent(key):  # for each of the GRU's three gates
            return jnp.concatenate([nn.initializers.orthogonal()(k, (size, size)) for k in jax.random.split(key, 3)], 1)

        size, hidden, batch = self.config.HIDDEN_SIZE, list(hidden), partial(nn.BatchNorm, not train)
        norm = {"layer_norm": nn.LayerNorm, "batch_norm": batch, "none": lambda: lambda x: x}[self.config.NORM_TYPE]
        x = jax.nn.one_hot(obs, self.obs_space.n) if hasattr(self.obs_space, "n") else obs  # a discrete observation
        x = x.reshape(*obs.shape[:2], -1).astype(jnp.float32)
        x = batch()(x) if self.config.NORM_INPUT else x
        for _ in range(self.config.NUM_LAYERS):
            x = nn.relu(norm()(nn.Dense(size)(x)))
        if self.config.ADD_LAST_ACTION:
            x = jnp.concatenate([x, jax.nn.one_hot(last_action, self.num_actions)], -1)
        for i, state in enumerate(hidden):
            kernel = self.param(f"recurrent_kernel_{i}", recurrent)
            bias = self.param(f"recurrent_bias_{i}", nn.initializers.zeros, size)
            hidden[i], x = gru(state, nn.Dense(3 * size)(x), reset, kernel, bias)
        return nn.Dense(self.num_actions)(x), tuple(hidden)

    def initial_hidden(self, num_envs):
        """The hidden state before anything was seen, of each GRU layer."""
        return (jnp.zeros((num_envs, self.config.HIDDEN_SIZE)),) * self.config.NUM_RNN_LAYERS


def make_network(config):
    """The Q-network of a Config."""
    env, env_params = make_env(config)
    return QNetwork(config, env.action_space(env_params).n, env.observation_space(env_params))


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]; the first three are what the network sees."""

    obs: jax.Array
    reset: jax.Array  # obs is the first of its episode,
    last_action: jax.Array  # and this -1
    action: jax.Array
    reward: jax.Array
    done: jax.Array  # the episode ended
    mask: jax.Array  # learned from: the step was played, and not cut by a time limit, which hides the state it led to
    returns: jax.Array  # of the episode so far, this step included
    lengths: jax.Array


class TrainState(NamedTuple):
    """All that one seed needs to go on; what a checkpoint holds."""

    key: jax.Array
    variables: Any  # the network's "params" and, where it has BatchNorm, its running "batch_stats"
    opt_state: Any
    env_state: Any
    now: Transition  # [N, ...], the step to be played next: what the network sees, the episode's return and length before it
    hidden: Any  # the GRU's state before that; empty without it
    window: tuple  # the last MEMORY_WINDOW steps as one Transition, [W, N, ...]; empty without
    window_hidden: Any  # the GRU's state before those


def epsilon_greedy(key, q_values, epsilon):
    """A random action with probability epsilon, else the greedy one. q_values: [..., A] -> actions [...]."""
    explore, choice = jax.random.uniform(key, (2, *q_values.shape[:-1]))
    return jnp.where(explore < epsilon, (choice * q_values.shape[-1]).astype(jnp.int32), q_values.argmax(-1))


def q_lambda_targets(reward, discount, next_value, trace):
    """Q(lambda) returns (Peng's; arXiv 2407.04811, section 4), all arguments and the result [T, N].

    G_t = r_t + discount_t * ((1 - trace_t) * V(s'_t) + trace_t * G_{t+1}), with V(s'_t) for G_{t+1} at the last step;
    next_value: V(s'_t) = max_a Q(s'_t, a) of the state that the action led to (any value where an episode terminated),
    discount: gamma * (1 - terminated), trace: lambda * (1 - done).
    """

    def step(next_return, t):
        reward_t, discount_t, next_value_t, trace_t = t
        target = reward_t + discount_t * ((1 - trace_t) * next_value_t + trace_t * next_return)
        return target, target

    return jax.lax.scan(step, next_value[-1], (reward, discount, next_value, trace), reverse=True, unroll=16)[1]


def take_sequences(hidden, parts, envs):
    """A minibatch of some environments: the hidden state before, and a window, a rollout and the step after it as one
    sequence [W + T + 1, len(envs), ...]. By rows, so that the rollout is neither copied nor transposed whole."""
    parts = [jax.tree.map(lambda x: x[jnp.arange(len(x))[:, None], envs], part) for part in parts]
    return jax.tree.map(lambda x: x[envs], hidden), jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def make_pqn(config):
    """PQN for one seed, as pure functions: init(key), update(state, i) of update number i, and evaluate(state, key)."""
    config = override(config)  # a copy: what is traced later does not see edits of the original
    env, env_params = make_env(config)
    env_reset, env_step = jax.vmap(env.reset, (0, None)), jax.vmap(env.step, (0, 0, 0, None))
    network = make_network(config)
    decay = (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) // (config.NUM_ENVS * config.NUM_STEPS)  # updates
    grad_steps = config.NUM_EPOCHS * config.NUM_MINIBATCHES  # of one update
    epsilon_schedule = optax.linear_schedule(config.EPS_START, config.EPS_FINISH, max(1, config.EPS_DECAY * decay))
    lr_schedule = optax.linear_schedule(config.LR, config.LR * (not config.LR_LINEAR_DECAY), decay * grad_steps)
    optimizer = optax.radam(lr_schedule)
    as_vector = ravel_pytree if jax.default_backend() != "cpu" else lambda tree: (tree, lambda tree: tree)

    def init(key, num_envs=config.NUM_ENVS):
        key, key_network, key_reset = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(key_reset, num_envs), env_params)
        zeros, no, integers = (jnp.zeros(num_envs, kind) for kind in (float, bool, int))
        now = Transition(obs, ~no, integers - 1, integers, zeros, no, no, zeros, zeros)
        hidden = network.initial_hidden(num_envs)
        window = jax.tree.map(lambda x: jnp.stack([x] * config.MEMORY_WINDOW), (now,) * (config.MEMORY_WINDOW > 0))
        variables = network.init(key_network, *(x[None] for x in now[:3]), hidden)
        return TrainState(key, variables, optimizer.init(variables["params"]), env_state, now, hidden, window, hidden)

    def play(state, keys, epsilon):
        """One step of every environment, keys: [1 + N]. The state after it, and the Transition."""
        now = state.now
        q_values, hidden = network.apply(state.variables, *(x[None] for x in now[:3]), state.hidden)
        action = epsilon_greedy(keys[0], q_values[0], epsilon)
        obs, env_state, reward, terminated, truncated, _ = env_step(keys[1:], state.env_state, action, env_params)
        done, returns, lengths = terminated | truncated, now.returns + reward, now.lengths + 1
        transition = Transition(*now[:3], action, jnp.float32(reward), done, terminated | ~truncated, returns, lengths)
        now = now._replace(obs=obs, reset=done, last_action=jnp.where(done, -1, action))
        now = now._replace(returns=returns * ~done, lengths=lengths * ~done)
        return state._replace(env_state=env_state, now=now, hidden=hidden), transition

    @jax.jit  # traced once, though `update` asks for its shapes, too
    def evaluate(state, key):
        """Means over the first episode of each of TEST_NUM_ENVS environments, as far as it got."""
        key_reset, key_play = jax.random.split(key)
        fresh = init(key_reset, config.TEST_NUM_ENVS)._replace(variables=state.variables, opt_state=(), window=())

        def step(carry):
            t, state, playing, returns, lengths = carry
            keys = jax.random.split(jax.random.fold_in(key_play, t), 1 + config.TEST_NUM_ENVS)
            state, transition = play(state, keys, config.EPS_TEST)
            return t + 1, state, playing & ~transition.done, returns + transition.reward * playing, lengths + playing

        limit = config.TEST_NUM_STEPS or env_params.max_steps_in_episode
        loop = partial(jax.lax.while_loop, lambda carry: (carry[0] < limit) & carry[2].any(), step)
        *_, playing, returns, lengths = loop((0, fresh, ~fresh.now.mask, fresh.now.returns, fresh.now.lengths))
        tests = {"returned_episode_returns": returns, "returned_episode_lengths": lengths, "unfinished": playing}
        return {f"test/{name}": x.mean() for name, x in tests.items()}

    def targets(steps, value):
        """Targets from the training pass's values, all [T, N]. Where the mask is false, G_t = V(s_t)."""
        goes_on = steps.mask & ~steps.done
        next_value = jnp.where(steps.mask, jnp.roll(value, -1, 0), value)
        reward = config.REW_SCALE * steps.reward * steps.mask
        discount = jnp.where(steps.mask, config.GAMMA * goes_on, 1.0)
        return q_lambda_targets(reward, discount, next_value, config.LAMBDA * goes_on)

    def learn(carry, minibatch, unravel):
        """One gradient step. On a GPU, where each kernel costs its launch, what it changes is one vector."""
        (variables, opt_state), (hidden, steps) = unravel(carry), minibatch

        def loss(params):
            apply = partial(network.apply, variables | {"params": params}, train=True, mutable=["batch_stats"])
            (q_values, _), updated = apply(*steps[:3], hidden)
            q_action = jnp.sum(q_values * jax.nn.one_hot(steps.action, q_values.shape[-1]), -1)  # faster than to index
            target, mask = targets(steps, jax.lax.stop_gradient(q_values.max(-1))), steps.mask
            squared, count = jnp.sum(jnp.square(q_action - target), where=mask), jnp.maximum(mask.sum(), 1)
            return 0.5 * squared / count, (jnp.sum(q_action, where=mask) / count, updated)  # 0 where all is masked

        (td_loss, (qvals, updated)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        norm = optax.tree.norm(as_vector(grads)[0])
        grads = optax.tree.scale(jnp.minimum(1.0, config.MAX_GRAD_NORM / norm), grads)
        changes, opt_state = optimizer.update(grads, opt_state)
        variables = variables | updated | {"params": optax.apply_updates(variables["params"], changes)}
        return as_vector((variables, opt_state))[0], jnp.stack([td_loss, qvals, norm])

    def update(state, i):
        """Update number i: a rollout, epochs of minibatches, and an evaluation if one is due."""
        key, key_rollout, key_epochs, key_test = jax.random.split(state.key, 4)
        window, hidden, epsilon = state.window, state.window_hidden, epsilon_schedule(i)

        def step(state, t):
            state, transition = play(state, keys_play[t], epsilon)
            keep = partial(jnp.where, t == config.NUM_STEPS - config.MEMORY_WINDOW - 1)
            return state._replace(window_hidden=jax.tree.map(keep, state.hidden, state.window_hidden)), transition

        keys_play = jax.random.split(key_rollout, (config.NUM_STEPS, 1 + config.NUM_ENVS))
        state, trajectory = jax.lax.scan(step, state._replace(window_hidden=state.hidden), jnp.arange(config.NUM_STEPS))
        parts = *window, trajectory, jax.tree.map(lambda x: x[None], state.now)
        state = state._replace(window=jax.tree.map(lambda x: x[-config.MEMORY_WINDOW :], (trajectory,) * len(window)))
        carry, unravel = as_vector((state.variables, state.opt_state))  # its counts are exact below 2**24
        keys = jax.random.split(key_epochs, config.NUM_EPOCHS)
        envs = jax.vmap(partial(jax.random.permutation, x=config.NUM_ENVS))(keys).reshape(grad_steps, -1)
        take = partial(take_sequences, hidden, parts)
        carry, losses = jax.lax.scan(lambda carry, envs: learn(carry, take(envs), unravel), carry, envs)
        variables, opt_state = unravel(carry)
        state = state._replace(key=key, variables=variables, opt_state=opt_state)
        metrics = {"epsilon": epsilon, "learning_rate": lr_schedule(i * grad_steps)}
        metrics |= dict(zip(("td_loss", "qvals", "grad_norm"), losses.mean(0), strict=True))
        for name in ("returns", "lengths"):  # of the episodes that ended; NaN where none did
            metrics[f"returned_episode_{name}"] = jnp.mean(getattr(trajectory, name), where=trajectory.done)
        interval = max(1, int(config.NUM_UPDATES * config.TEST_INTERVAL))  # the last evaluation follows the last update
        due = (config.NUM_UPDATES - i - 1) % (interval if config.TEST_DURING_TRAINING else config.NUM_UPDATES) == 0
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), jax.eval_shape(evaluate, state, key_test))
        return state, metrics | jax.lax.cond(due, evaluate, lambda *_: nothing, state, key_test)

    return init, update, evaluate


def make_train(config):
    """train(key): a whole run of one seed as one program, to be called as jax.jit(jax.vmap(train))(keys)."""
    (init, update, _), num_updates = make_pqn(config), config.NUM_UPDATES

    def train(key):
        state, metrics = jax.lax.scan(update, init(key), jnp.arange(num_updates))
        return {"runner_state": state, "metrics": metrics}

    return train


# RUNNING, LOGGING AND SAVING: nothing of the algorithm below this line
SCRIPT = re.sub(r"[^\w.-]", "-", Path(globals().get("__file__", "pqn_rnn_gymnax.py")).stem)  # copies have their own
FIXED = "SEED NUM_SEEDS alg.ENV_NAME alg.NUM_ENVS alg.NUM_STEPS alg.NUM_EPOCHS alg.NUM_MINIBATCHES".split()  # on RESUME
Folder = Annotated[str, BeforeValidator(lambda path: path and str(path))]
Saved = Annotated[str, BeforeValidator(lambda path: path and os.path.abspath(str(path))), Field(pattern=r"^[^\[\]]*$")]


@dataclass(config=CHECKED)
class Settings:
    """The arguments of `run`, root keys on the command line."""

    SEED: Annotated[int, Field(ge=0, lt=2**32)] = 0  # seed i has the key jax.random.split(key(SEED), NUM_SEEDS)[i]
    NUM_SEEDS: PositiveInt = 1  # trained together in one program
    SAVE_PATH: Saved = Field("runs", validate_default=True)  # of runs' folders; orbax cannot read below one with [ or ]
    RESUME: Folder | None = None  # a run's folder, or latest: its configuration, with what is overridden
    LOG_INTERVAL: PositiveInt | None = None  # in updates; null: a 1,000th of the run
    CHECKPOINT_INTERVAL: PositiveInt | None = None  # in updates; null: a 20th of the run, 30 s at least
    WANDB_MODE: Literal["online", "offline", "disabled"] = "disabled"
    ENTITY: str | None = None  # wandb's
    PROJECT: str = "pqn"  # wandb's
    WANDB_LOG_ALL_SEEDS: bool = False  # each seed's curves as rng<i>/... beside their mean
    COMPILATION_CACHE: Folder | None = "~/.cache/pqn"  # JAX's persistent cache, if it has none yet; null: none


def start_seeds(config, keys):
    """The state of one seed per key, every leaf [num_seeds, ...], and update(state, i) compiled for all of them.
    Seeds are spread over as many devices as divide them, and vmapped there; on a CPU they take turns, which is faster."""
    init, update, _ = make_pqn(config)
    count = max(n for n in range(1, jax.local_device_count() + 1) if len(keys) % n == 0)
    mesh, seeds = jax.sharding.Mesh(jax.local_devices()[:count], "seed"), jax.P("seed")
    state = jax.device_put(jax.jit(partial(jax.lax.map, init))(keys), jax.NamedSharding(mesh, seeds))

    @partial(jax.jit, donate_argnums=0)
    @partial(jax.shard_map, mesh=mesh, in_specs=(seeds, jax.P()), out_specs=seeds, check_vma=False)
    def update_seeds(state, i):
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda state: update(state, i), state)
        return jax.vmap(update, (0, None))(state, i)

    return state, update_seeds.lower(state, 0).compile()


def run(config=None, **settings):
    """Train, log, save and evaluate: what the command line does. `settings`: see Settings, with RESUME by default that run's.
    Returns {"runner_state": every leaf [NUM_SEEDS, ...], "metrics": the table of what was logged, "score": the mean over
    seeds of the last evaluation, "folder"}. On Ctrl-C or SIGTERM it saves, then raises KeyboardInterrupt or SystemExit."""
    if folder := settings.get("RESUME"):
        folder, saved_config, saved, _ = read_run(folder, settings.get("SAVE_PATH", "runs"))
        config, settings = config or saved_config, vars(saved) | settings
    config, settings = config or Config(), Settings(**settings)
    num_seeds, num_updates, steps = settings.NUM_SEEDS, config.NUM_UPDATES, config.NUM_ENVS * config.NUM_STEPS
    if settings.COMPILATION_CACHE and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.COMPILATION_CACHE))
    if (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) < config.TOTAL_TIMESTEPS:
        print(f"Note: the schedules end at TOTAL_TIMESTEPS_DECAY={config.TOTAL_TIMESTEPS_DECAY}, before the run does")
    print(f"Compiling for {jax.local_device_count()} x {jax.devices()[0].device_kind} ...", flush=True)
    state, update_seeds = start_seeds(config, jax.random.split(jax.random.key(settings.SEED), num_seeds))
    now = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{time.time_ns() % 10**9:09}"  # unique
    folder = folder or Path(settings.SAVE_PATH, f"{SCRIPT}_{config.TASK}_s{settings.SEED}", now).resolve()
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    checkpoints = ocp.CheckpointManager(folder / "checkpoints", options=options)
    i, rows, pending, diverged = checkpoints.latest_step() or 0, [], [], np.full(num_seeds, False)  # i updates done
    if i:
        state = checkpoints.restore(i, args=ocp.args.StandardRestore(state))
        table = pd.read_csv(folder / "metrics.csv").query("update_steps <= @i")
        rows = [table.astype({name: np.float32 for name in table.select_dtypes("float")})]  # as they were written
    write_run(folder, config, settings)
    log = attempt(start_wandb, config, settings, folder) if settings.WANDB_MODE != "disabled" else None
    stop, last, start = False, time.time(), time.time() - (float(rows[0].time.max()) if rows else 0)
    counts = {"initial": i * steps * num_seeds, "total": num_updates * steps * num_seeds, "unit_scale": True}
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # a log file: a line a minute
        counts |= {"mininterval": 60, "bar_format": "{l_bar}{bar:10}{r_bar}\n"}
    with catch_signals() as signals, tqdm(desc=config.TASK, unit="step", **counts) as bar:
        while i < num_updates and not stop:
            state, metrics = update_seeds(state, i)
            jax.block_until_ready(pending[-1:])  # the update before: two at most are under way, a signal is soon heard
            i, pending, stop = i + 1, [*pending, jax.jit(jnp.stack)([*metrics.values()])], bool(signals)
            if i % (settings.LOG_INTERVAL or max(1, num_updates // 1000)) and i < num_updates and not stop:
                continue
            values, now, n = average(metrics, jax.device_get(pending)), time.time(), len(pending) * steps * num_seeds
            row = {"seed": range(num_seeds), "update_steps": i, "env_step": i * steps, "time": np.float32(now - start)}
            row |= {"grad_steps": i * config.NUM_EPOCHS * config.NUM_MINIBATCHES, "sps": np.float32(n / (now - last))}
            rows.append(pd.DataFrame(row | values))
            if not np.isnan(shown := rows[-1].returned_episode_returns.mean()):  # else what was known last stays
                bar.set_postfix_str(f"return {shown:.2f}", refresh=False)
            bar.update(n)
            if (news := ~np.isfinite(values["td_loss"]) & ~diverged).any():
                bar.write(f"Warning: update {i}: the loss of seed {np.flatnonzero(news)} is not finite", sys.stderr)
                diverged |= news
            if log:
                attempt(log_wandb, log, rows[-1], settings.WANDB_LOG_ALL_SEEDS)
            interval = settings.CHECKPOINT_INTERVAL or max(num_updates / 20, 30 * i / (now - start))  # updates of 30 s
            if i - (checkpoints.latest_step() or 0) >= interval or i == num_updates or stop:
                attempt(save, folder, checkpoints, state, rows, i)
            pending, last = [], time.time()
    checkpoints.close()
    if signals:
        print(f"Stopped after {i} of {num_updates} updates; go on with", shlex.quote(f'RESUME="{folder}"'))
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    table = pd.concat(rows, ignore_index=True)
    attempt(draw, table, f"{config.ALG_NAME} on {config.TASK}", folder / "learning_curve.png")
    last, test = table.groupby("seed").last(), table[table.update_steps == i].set_index("seed").filter(like="test/")
    final = last.filter(regex="^returned").join(test)  # of training what is known last, of tests the last one
    print(final.agg(["mean", "min", "max"]).T.to_string(float_format="%.2f"), f"Run folder: {folder}", sep="\n")
    score = float(test["test/returned_episode_returns"].mean())
    return {"runner_state": state, "metrics": table, "score": score, "folder": folder}


def average(names, updates):
    """What is logged of some updates, {name: [num_seeds]}: means without NaN (a NaN loss stays one), and the last test."""
    tables = dict(zip(names, map(pd.DataFrame, np.stack(updates, 1)), strict=True))  # one array each: GPUs copy slowly
    means = {name: table.mean(skipna=name != "td_loss").to_numpy() for name, table in tables.items()}
    return means | {name: x.ffill().to_numpy()[-1] for name, x in tables.items() if name.startswith(("test/", "env_"))}


def write_run(folder, config, settings):
    """Write config.yaml and, at first, this script into a run's folder."""
    about = {"script": SCRIPT, "task": config.TASK, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    begun = (folder / "config.yaml").exists()
    about["commands"] = [*(read_run(folder)[-1]["commands"] if begun else ()), shlex.join(sys.argv)]
    content = vars(settings) | {"RESUME": None, "alg": vars(config), "about": about}
    OmegaConf.save(OmegaConf.create(content), folder / "config.yaml")
    if "__file__" in globals() and not begun:
        Path(folder, f"{SCRIPT}.py").write_bytes(Path(__file__).read_bytes())


def read_run(folder, save_path="", changes=()):
    """A run's folder (or the latest one's), Config, Settings and facts, with changes (("alg.LR", 1e-3), ...) merged."""
    if folder == "latest":
        configs = sorted(Path(save_path).glob(f"{SCRIPT}_*/*/config.yaml"), key=lambda path: path.parent.name)
        if not configs:
            raise FileNotFoundError(f"RESUME=latest: there is no run of {SCRIPT} in SAVE_PATH={save_path}")
        folder = configs[-1].parent
    values = OmegaConf.load(Path(folder, "config.yaml"))
    for key, value in changes:
        before = OmegaConf.select(values, key)
        if key in FIXED and value != before or key == "alg.TOTAL_TIMESTEPS" and value < before:
            raise ValueError(f"{key}={value} contradicts RESUME={folder}, which has {before}")
        OmegaConf.update(values, key, value, force_add=True)
    values = OmegaConf.to_container(values)
    alg, about = values.pop("alg"), values.pop("about")
    return Path(folder).resolve(), Config(**alg), Settings(**values), about


def save(folder, checkpoints, state, rows, done):
    """Bring metrics.csv, params.safetensors and the checkpoints up to date."""
    pd.concat(rows).to_csv(folder / "metrics.csv.new", index=False)
    save_file(traverse_util.flatten_dict(jax.device_get(state.variables), sep="."), folder / "params.safetensors.new")
    for name in ("metrics.csv", "params.safetensors"):  # whole or not at all
        os.replace(folder / f"{name}.new", folder / name)
    checkpoints.save(done, args=ocp.args.StandardSave(state), force=True)


def load(folder):
    """The Config of a run, its QNetwork and that network's variables, every leaf [num_seeds, ...]."""
    _, config, *_ = read_run(folder)
    variables = load_file(Path(folder) / "params.safetensors")
    return config, make_network(config), traverse_util.unflatten_dict(variables, sep=".")


def start_wandb(config, settings, folder):
    """Open the run's wandb log, the same one again after RESUME."""
    import wandb

    options = {"project": settings.PROJECT, "entity": settings.ENTITY, "mode": settings.WANDB_MODE, "dir": folder}
    options |= {"name": folder.parent.name, "id": folder.name, "resume": "allow", "reinit": "finish_previous"}
    return wandb.init(config=vars(settings) | vars(config), **options)


def log_wandb(log, row, all_seeds):
    """Log means over seeds, and each seed's values as rng<i>/... where asked for; never NaN."""
    each = row.set_index("seed").unstack().dropna() if all_seeds else {}
    values = row.drop(columns="seed").mean().dropna().to_dict()
    log.log(values | {f"rng{seed}/{name}": x for (name, seed), x in each.items()}, step=int(values["update_steps"]))


def draw(table, title, path):
    """A PNG of returns (or wins) against steps: interquartile mean over seeds, with a 95% bootstrap interval."""
    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    name = "returned_won_episode" if "returned_won_episode" in table else "returned_episode_returns"
    table = table.assign(step=pd.cut(table.env_step, 100).map(lambda interval: interval.mid))  # at most 100 points
    points = table.melt(["seed", "step"], [name, f"test/{name}"]).groupby(["variable", "seed", "step"], observed=True)
    options = {"hue": "variable", "estimator": partial(trim_mean, proportiontocut=0.25), "n_boot": 200, "marker": "."}
    sns.lineplot(points.mean().reset_index(), x="step", y="value", ax=axes, **options)
    axes.set(title=title, xlabel="environment steps", ylabel="mean over episodes (IQM and 95% CI over seeds)")
    axes.figure.savefig(path, dpi=120)
    if "ipykernel" in sys.modules:  # a notebook
        sys.modules["IPython"].display.display(sys.modules["IPython"].display.Image(filename=path))


def attempt(function, *args):
    """Call what must not harm training where it fails (a log, a save, a plot): the failure becomes a warning."""
    try:
        return function(*args)
    except Exception as error:
        print(f"Warning: {function.__name__} failed, training goes on: {error!r}", file=sys.stderr)


@contextmanager
def catch_signals():
    """Collect Ctrl-C, SIGTERM and SLURM's SIGUSR2 in a list: a run saves before it ends; the second one ends it at once."""
    received, in_main = [], threading.current_thread() is threading.main_thread()
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR2", signal.SIGTERM)}

    def handler(number, _):
        received.append(number)
        signal.signal(number, previous[number])
        print("\nStopping after this update, then saving; once more to stop at once", file=sys.stderr)

    previous = {number: signal.signal(number, handler) for number in numbers if in_main}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


CONFIGS = Path(globals().get("__file__", "")).resolve().parent / "configs"
FOUND = {"config_path": str(CONFIGS), "config_name": "config"} if CONFIGS.exists() else {"config_name": "schema"}
HYDRA = {"run": {"dir": "."}, "output_subdir": None}  # the run's folder has it all
HYDRA |= {"sweep": {"dir": "runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "."}}
HYDRA |= {"job_logging": {"root": {"level": "WARNING"}, "handlers": {"file": {"filename": os.devnull}}}}
SCHEMA = vars(Settings()) | {"alg": vars(Config()), "hydra": HYDRA}
hydra.core.config_store.ConfigStore.instance().store(name="schema", node=SCHEMA)


@hydra.main(version_base="1.3", **FOUND)
def main(cfg):
    """The command line. A mistake is one line; in a sweep the other jobs go on."""
    try:
        if cfg.RESUME:  # the run's configuration, with what is overridden by name; a recipe is ignored
            overrides = hydra.core.hydra_config.HydraConfig.get().overrides.task
            keys = {override.lstrip("+").split("=")[0] for override in overrides} - {"alg"}
            changes = [(key, OmegaConf.select(cfg, key)) for key in sorted(keys)]
            folder, config, settings, _ = read_run(cfg.RESUME, cfg.SAVE_PATH, changes)
            settings.RESUME = folder
            print("Resuming with", dict(changes))
        else:
            values = OmegaConf.to_container(cfg)
            config, settings = Config(**values.pop("alg")), Settings(**values)
            os.makedirs(settings.SAVE_PATH, exist_ok=True)
    except (ValueError, OSError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = "".join(f"{key}={first['input']!r}: " for key in first["loc"][:1])
        raise hydra.errors.CompactHydraException(f"Error: {key}{first['msg'].removeprefix('Value error, ')}") from None
    try:
        return run(config, **vars(settings))["score"]
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__" and "__file__" in globals():  # a notebook cell only defines
    main()
