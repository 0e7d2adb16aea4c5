# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "craftax>=1.6", "hydra-core>=1.3.2",
#   "omegaconf>=2.3", "pydantic>=2.10", "orbax-checkpoint>=0.11", "safetensors>=0.5", "pandas>=2.2", "seaborn>=0.13",
#   "matplotlib>=3.8", "scipy>=1.15", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN with an LSTM (Gallici et al., ICLR 2025, arXiv 2407.04811) on Craftax, in one file. Documentation: docs/pqn_craftax_rnn.md

python pqn_craftax_rnn.py NUM_SEEDS=3                                # Craftax-Symbolic; +alg=pqn_craftax: without LSTM
python pqn_craftax_rnn.py -m +alg=pqn_craftax_classic_rnn SEED=0,1   # Craftax-Classic, at a scale for CPUs; a sweep
python pqn_craftax_rnn.py RESUME=latest                              # go on with a run that was stopped
out = run(Config(TOTAL_TIMESTEPS=1e8), NUM_SEEDS=3)                  # in a notebook, below a cell with this file
"""

import os
import re
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import InitVar
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import hydra
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
import seaborn as sns
from craftax.craftax.constants import Achievement
from craftax.craftax_classic.constants import Achievement as ClassicAchievement
from craftax.craftax_env import make_craftax_env_from_name
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
# Achievements, and the return of an episode in which all are unlocked.
GAMES = {"Craftax-Symbolic-v1": (Achievement, 226), "Craftax-Classic-Symbolic-v1": (ClassicAchievement, 22)}


@dataclass(config=CHECKED)
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; the defaults are the published recipe."""

    ENV_NAME: Literal["Craftax-Symbolic-v1", "Craftax-Classic-Symbolic-v1"] = "Craftax-Symbolic-v1"
    ENV_KWARGS: Kwargs = Field(default_factory=dict)  # fields of the environment's EnvParams or StaticEnvParams
    USE_OPTIMISTIC_RESETS: bool = True  # make new worlds in blocks smaller than NUM_ENVS; the episodes are the same
    OPTIMISTIC_RESET_RATIO: PositiveInt = 16  # a block is NUM_ENVS / OPTIMISTIC_RESET_RATIO worlds
    ALG_NAME: str = "pqn_craftax_rnn"  # a label for logs
    TOTAL_TIMESTEPS: PositiveInt = 1_000_000_000  # environment steps of one seed
    TOTAL_TIMESTEPS_DECAY: PositiveInt | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: PositiveInt = 1024  # environments in parallel, N
    NUM_STEPS: PositiveInt = 128  # steps of each environment between updates, T
    MEMORY_WINDOW: Annotated[int, Field(ge=0)] = 0  # steps before a rollout that are trained on again, W; at most T
    NUM_MINIBATCHES: PositiveInt = 4  # gradient steps per epoch, each on whole sequences; must divide N
    NUM_EPOCHS: PositiveInt = 4  # passes over a rollout
    EPS_START: Fraction = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: Fraction = 0.005  # and at the end
    EPS_DECAY: Fraction = 0.1  # fraction of the schedule after which EPS_FINISH is reached
    LR: PositiveFloat = 3e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = True  # linearly to 0 over the schedule
    MAX_GRAD_NORM: PositiveFloat = 0.5  # clipping of the gradient's global norm
    GAMMA: Fraction = 0.99  # discount
    LAMBDA: Fraction = 0.5  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 1.0  # scales the rewards learned from, never those reported
    HIDDEN_SIZE: PositiveInt = 512  # units of each hidden layer, and of the LSTM
    NUM_LAYERS: PositiveInt = 1  # hidden layers before the LSTM
    NUM_RNN_LAYERS: Annotated[int, Field(ge=0)] = 1  # LSTM layers; 0: a feed-forward agent
    ADD_LAST_ACTION: bool = True  # what follows the hidden layers also sees the action before
    NORM_TYPE: Literal["layer_norm", "batch_norm", "none"] = "layer_norm"  # batch_norm: batch renormalisation
    NORM_INPUT: bool = True  # batch-renormalise observations
    LOG_ACHIEVEMENTS: bool = False  # log how often each was unlocked in training, too; evaluations always do
    TEST_DURING_TRAINING: bool = False  # evaluate every TEST_INTERVAL, not only at the end
    TEST_INTERVAL: Annotated[Fraction, Field(gt=0)] = 0.01  # as a fraction of all updates
    TEST_NUM_ENVS: PositiveInt = 512  # episodes per evaluation
    TEST_NUM_STEPS: PositiveInt | None = 10_000  # at most this many steps each; null: the environment's time limit
    EPS_TEST: Fraction = 0.0  # exploration in evaluation
    Q_LAMBDA: InitVar[bool | None] = None  # purejaxql's, in its feed-forward recipe alone: no LSTM; if false, LAMBDA 0
    WANDB_LOG_INTERVAL: InitVar[int | None] = None  # purejaxql's; here the root key LOG_INTERVAL is

    TASK = property(lambda config: re.sub(r"[^\w.-]", "-", config.ENV_NAME))  # as folders and titles name it
    NUM_UPDATES = property(lambda config: config.TOTAL_TIMESTEPS // (config.NUM_ENVS * config.NUM_STEPS))

    def __post_init__(self, Q_LAMBDA, _):
        if Q_LAMBDA is not None:
            vars(self).update(NUM_RNN_LAYERS=0, ADD_LAST_ACTION=False, LAMBDA=self.LAMBDA * Q_LAMBDA)
        check_counts(self)
        if self.NUM_ENVS % self.NUM_MINIBATCHES:
            raise ValueError(f"NUM_MINIBATCHES={self.NUM_MINIBATCHES} must divide NUM_ENVS={self.NUM_ENVS}")
        if self.MEMORY_WINDOW > self.NUM_STEPS:
            raise ValueError(f"MEMORY_WINDOW={self.MEMORY_WINDOW} must be at most NUM_STEPS={self.NUM_STEPS}")
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


def make_env(config):
    """The environment of a Config, which does not reset by itself, and its parameters; ENV_KWARGS sets fields of both."""
    env, kwargs = make_craftax_env_from_name(config.ENV_NAME, auto_reset=False), config.ENV_KWARGS
    parts = env.static_env_params, env.default_params
    known = vars(parts[0]) | vars(parts[1])
    if unknown := kwargs.keys() - known:
        raise ValueError(f"ENV_KWARGS={kwargs}: {', '.join(unknown)} must be among {', '.join(known)}")
    values = {key: like(key, value, known[key]) for key, value in kwargs.items()}
    static, params = (part.replace(**{key: values[key] for key in vars(part).keys() & values}) for part in parts)
    try:
        env = type(env)(static)
        _ = kwargs and jax.eval_shape(env.reset_env, jax.random.key(0), params)
    except Exception as error:
        raise ValueError(f"ENV_KWARGS={kwargs} must be sizes of which Craftax makes a world: {error}") from error
    return env, params


def like(key, value, default):
    """A value of ENV_KWARGS in the type of the environment's own, `default`, where None stands for any number."""
    new, own = np.asarray(value), np.asarray(default)
    kind = new.dtype if own.dtype == object else own.dtype
    number = new.shape == own.shape and (new.dtype.kind in "if" or new.dtype.kind == own.dtype.kind == "b")
    if not number or not (np.isfinite(new) & (new >= 0)).all() or (new.astype(kind) != new).any():
        raise ValueError(f"ENV_KWARGS.{key}={value!r} must be like {default!r}, and not negative")
    return tuple(new.astype(kind).tolist()) if own.shape else new.astype(kind).item()


class BatchRenorm(nn.Module):
    """Batch renormalisation (arXiv 1702.03275): the scale and shift [C] for x [..., C], x * scale + shift. When acting by
    the running statistics; in training by the batch's, pulled towards the running ones (r and d) once those have seen
    1,000 batches. Momentum, epsilon and the bounds of r and d are those of the published agent."""

    @nn.compact
    def __call__(self, x, train):
        axes, shape = tuple(range(x.ndim - 1)), x.shape[-1:]
        gamma, beta = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        batches = self.variable("batch_stats", "batches", jnp.int32, 0)
        mean, std = running_mean.value, jnp.sqrt(running_var.value + 1e-3)
        if not train:
            return gamma / std, beta - mean * gamma / std
        batch_mean = x.mean(axes)
        batch_var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(batch_mean), 0)
        batch_std, warm = jnp.sqrt(batch_var + 1e-3), batches.value >= 1000
        r = jax.lax.stop_gradient(jnp.where(warm, jnp.clip(batch_std / std, 1 / 3, 3), 1))
        d = jax.lax.stop_gradient(jnp.where(warm, jnp.clip((batch_mean - mean) / std, -5, 5), 0))
        running_mean.value = 0.999 * mean + 0.001 * batch_mean
        running_var.value = 0.999 * running_var.value + 0.001 * batch_var
        batches.value += 1
        scale = gamma * r / batch_std
        return scale, beta + gamma * d - batch_mean * scale


def lstm(state, gates, reset, recurrent_kernel):
    """nn.OptimizedLSTMCell over time: state (c, h), each [N, H], and gates [T, N, 4 * H], the inputs' products of all steps,
    taken at once -> the state after, h [T, N, H]. Where reset [T, N] is true, the state is zero before the step."""

    def step(state, inputs):
        gates, reset = inputs
        c, h = jax.tree.map(lambda s: jnp.where(reset[:, None], 0.0, s), state)
        i, f, g, o = jnp.split(gates + h @ recurrent_kernel, 4, -1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return jax.lax.scan(step, state, (gates, reset))


class QNetwork(nn.Module):
    """Q(s, .) over time: obs [T, N, C], reset and last_action [T, N], hidden -> (q_values [T, N, A], hidden after). Features
    stay last, as nn.Dense has them: to transpose Craftax's observations would copy them."""

    config: Config
    num_actions: int

    @nn.compact
    def __call__(self, obs, reset, last_action, hidden, train=False):
        def norm(x):
            scale, shift = BatchRenorm()(x, train) if self.config.NORM_TYPE == "batch_norm" else (1, 0)
            return nn.LayerNorm()(x) if self.config.NORM_TYPE == "layer_norm" else x * scale + shift

        # Of vmapped seeds in turn: LAPACK's batched QR can wait for its own threads for ever.
        @jax.custom_batching.sequential_vmap
        def recurrent(key):  # for each of the LSTM's four gates
            return jnp.concatenate([nn.initializers.orthogonal()(k, (size, size)) for k in jax.random.split(key, 4)], 1)

        size, inputs, hidden = self.config.HIDDEN_SIZE, obs.shape[-1], list(hidden)
        kernel = self.param("kernel", nn.linear.default_kernel_init, (inputs, size))
        bias = self.param("bias", nn.initializers.zeros, (size,))
        scale, shift = BatchRenorm()(obs, train) if self.config.NORM_INPUT else (jnp.ones(inputs), jnp.zeros(inputs))
        # Of obs * scale + shift, but without writing that: it would take as much memory as the observations.
        x = nn.relu(norm(obs @ (kernel * scale[:, None]) + (shift @ kernel + bias)))
        for _ in range(self.config.NUM_LAYERS - 1):
            x = nn.relu(norm(nn.Dense(size)(x)))
        if self.config.ADD_LAST_ACTION:
            x = jnp.concatenate([x, jax.nn.one_hot(last_action, self.num_actions)], -1)
        for i, state in enumerate(hidden):
            hidden[i], x = lstm(state, nn.Dense(4 * size)(x), reset, self.param(f"recurrent_kernel_{i}", recurrent))
        return nn.Dense(self.num_actions)(x), tuple(hidden)

    def initial_hidden(self, num_envs):
        """The hidden state before anything was seen: (c, h) for each LSTM layer."""
        return tuple((jnp.zeros((num_envs, self.config.HIDDEN_SIZE)),) * 2 for _ in range(self.config.NUM_RNN_LAYERS))


def make_network(config):
    """The Q-network of a Config."""
    return QNetwork(config, make_env(config)[0].num_actions)


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]; the first three are what the network sees."""

    obs: jax.Array
    reset: jax.Array  # obs is the first of its episode,
    last_action: jax.Array  # and this -1
    action: jax.Array
    reward: jax.Array
    done: jax.Array  # the episode ended, which is terminal: Craftax does not tell its time limit from death
    mask: jax.Array  # the step was played, so it is learned from
    returns: jax.Array  # of the episode so far, this step included
    lengths: jax.Array


class TrainState(NamedTuple):
    """All that one seed needs to go on; what a checkpoint holds."""

    key: jax.Array
    variables: Any  # the network's "params" and, with batch renormalisation, its running "batch_stats"
    opt_state: Any
    env_state: Any
    now: Transition  # [N, ...], the step to be played next: what the network sees, the episode's return and length before it
    hidden: Any  # the LSTM's state before that; empty without it
    window: tuple  # the last MEMORY_WINDOW steps as one Transition, [W, N, ...]; empty without
    window_hidden: Any  # the LSTM's state before those


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


# x.any(), of all seeds together where they are vmapped. As the condition of a loop that does nothing to a seed which is
# ready, it saves the copy of all that the loop carries by which vmap would keep that seed's.
any_seed = jax.custom_batching.custom_vmap(lambda x: x.any())
any_seed.def_vmap(lambda axis_size, in_batched, x: (any_seed(x), False))


def make_pqn(config):
    """PQN for one seed, as pure functions: init(key), update(state, i) of update number i, and evaluate(state, key)."""
    config = override(config)  # a copy: what is traced later does not see edits of the original
    (env, env_params), (achievements, max_return) = make_env(config), GAMES[config.ENV_NAME]
    env_reset, env_step = jax.vmap(env.reset_env, (0, None)), jax.vmap(env.step_env, (0, 0, 0, None))
    block = -(-config.NUM_ENVS // config.OPTIMISTIC_RESET_RATIO) if config.USE_OPTIMISTIC_RESETS else config.NUM_ENVS
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

    def play(state, key, epsilon):
        """One step of every environment: the state after it, and the Transition. Worlds that ended stay, see `restart`."""
        (key_act, key_step), now = jax.random.split(key), state.now
        q_values, hidden = network.apply(state.variables, *(x[None] for x in now[:3]), state.hidden)
        action = epsilon_greedy(key_act, q_values[0], epsilon)
        keys_step = jax.random.split(key_step, len(action))
        obs, env_state, reward, done, _ = env_step(keys_step, state.env_state, action, env_params)
        returns, lengths, mask = now.returns + reward, now.lengths + 1, jnp.ones_like(done)
        transition = Transition(*now[:3], action, reward, done, mask, returns, lengths)
        now = now._replace(obs=obs, reset=done, last_action=jnp.where(done, -1, action))
        now = now._replace(returns=returns * ~done, lengths=lengths * ~done)
        return state._replace(env_state=env_state, now=now, hidden=hidden), transition

    def report(transition, env_state, names=achievements):
        """What is logged of episodes, {name: [N]}; in percent, which achievements are unlocked."""
        episode = {"returned_episode_returns": transition.returns, "returned_episode_lengths": transition.lengths}
        return episode | {f"Achievements/{x.name.lower()}": 100.0 * env_state.achievements[:, x.value] for x in names}

    def restart(state, key):
        """Put new worlds where an episode ended, `block` at a time until all have theirs: usually none or one does."""

        def serve(carry):
            waiting, worlds = carry
            served = jnp.nonzero(waiting, size=block, fill_value=config.NUM_ENVS)[0]
            new = env_reset(jax.random.split(jax.random.fold_in(key, waiting.sum()), block), env_params)
            worlds = jax.tree.map(lambda x, y: x.at[served].set(y, mode="drop"), worlds, new)
            return waiting.at[served].set(False, mode="drop"), worlds

        carry = state.now.reset, (state.now.obs, state.env_state)
        _, (obs, env_state) = jax.lax.while_loop(lambda carry: any_seed(carry[0]), serve, carry)
        return state._replace(env_state=env_state, now=state.now._replace(obs=obs))

    @jax.jit  # traced once, though `update` asks for its shapes, too
    def evaluate(state, key):
        """Means over the first episode of each of TEST_NUM_ENVS environments, as far as it got."""
        key_reset, key_play = jax.random.split(key)
        fresh = init(key_reset, config.TEST_NUM_ENVS)._replace(variables=state.variables, opt_state=(), window=())

        def step(carry):
            t, state, playing, episode = carry
            state, transition = play(state, jax.random.fold_in(key_play, t), config.EPS_TEST)
            episode = jax.tree.map(partial(jnp.where, playing), report(transition, state.env_state), episode)
            return t + 1, state, playing & ~transition.done, episode

        limit = config.TEST_NUM_STEPS or env_params.max_timesteps
        carry = 0, fresh, ~fresh.now.mask, report(fresh.now, fresh.env_state)
        *_, playing, episode = jax.lax.while_loop(lambda carry: (carry[0] < limit) & any_seed(carry[2]), step, carry)
        episode |= {"unfinished": playing, "percent_of_maximum": 100 / max_return * episode["returned_episode_returns"]}
        return {f"test/{name}": x.mean() for name, x in episode.items()}

    def targets(steps, value):
        """Targets from the training pass's values, all [T, N]. Where no step was played, as after the rollout, G_t = V(s_t)."""
        next_value, trace = jnp.where(steps.mask, jnp.roll(value, -1, 0), value), config.LAMBDA * (1.0 - steps.done)
        discount = jnp.where(steps.mask, config.GAMMA * (1.0 - steps.done), 1.0)
        return q_lambda_targets(config.REW_SCALE * steps.reward, discount, next_value, trace)

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
            key_play, key_restart = jax.random.split(jax.random.fold_in(key_rollout, t))
            state, transition = play(state, key_play, epsilon)
            episode = report(transition, state.env_state, achievements if config.LOG_ACHIEVEMENTS else ())
            keep = partial(jnp.where, t == config.NUM_STEPS - config.MEMORY_WINDOW - 1)
            state = state._replace(window_hidden=jax.tree.map(keep, state.hidden, state.window_hidden))
            return restart(state, key_restart), (transition, episode)

        state = state._replace(window_hidden=state.hidden)
        state, (trajectory, episodes) = jax.lax.scan(step, state, jnp.arange(config.NUM_STEPS))
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
        metrics |= {name: x.mean(where=trajectory.done) for name, x in episodes.items()}  # NaN: none ended
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
SCRIPT = re.sub(r"[^\w.-]", "-", Path(globals().get("__file__", "pqn_craftax_rnn.py")).stem)  # copies have their own
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
