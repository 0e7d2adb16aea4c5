# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "craftax>=1.6",
#   "hydra-core>=1.3.2", "omegaconf>=2.3", "orbax-checkpoint>=0.11", "safetensors>=0.5",
#   "matplotlib>=3.8", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN with an LSTM (Gallici et al., ICLR 2025, arXiv 2407.04811) on Craftax, in one file. Docs: docs/pqn_craftax_rnn.md

    python pqn_craftax_rnn.py +alg=pqn_craftax_rnn                       # Craftax-Symbolic, the published recipe
    python pqn_craftax_rnn.py +alg=pqn_craftax_classic_rnn               # Craftax-Classic, at a scale for CPUs
    python pqn_craftax_rnn.py alg.NUM_RNN_LAYERS=0                       # the feed-forward agent
    python pqn_craftax_rnn.py RESUME=latest                              # go on with a run that was stopped

From Python, or after pasting this file into a notebook cell: `out = run(Config(**RECIPE | {"TOTAL_TIMESTEPS": 1e8}))`.
"""

import csv
import dataclasses
import importlib.metadata
import io
import os
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

with suppress(RuntimeError):  # JAX has started already: in a notebook, say
    if jax.config.jax_num_cpu_devices < 1:  # each CPU core a device, so that seeds train side by side
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores)

SCRIPT = "pqn_craftax_rnn"
# What the published recipe sets beside Config's neutral defaults. A run for which no recipe is named has it, too.
RECIPE = {"ADD_LAST_ACTION": True, "NORM_INPUT": True}
MAX_RETURN = {"Craftax-Symbolic-v1": 226, "Craftax-Classic-Symbolic-v1": 22}  # every achievement unlocked


class UserError(ValueError):
    """A mistake of the user's: its message is one line with the key, the value and what is allowed."""


@dataclass
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; counts may be written 1e7. Raises UserError if wrong."""

    ENV_NAME: str = "Craftax-Symbolic-v1"  # or Craftax-Classic-Symbolic-v1
    ENV_KWARGS: dict = field(default_factory=dict)  # fields of the environment's EnvParams or StaticEnvParams
    USE_OPTIMISTIC_RESETS: bool = True  # make new worlds in blocks smaller than NUM_ENVS; the episodes are the same
    OPTIMISTIC_RESET_RATIO: float = 16  # a block is NUM_ENVS / OPTIMISTIC_RESET_RATIO worlds
    ALG_NAME: str = "pqn_craftax_rnn"  # a label for logs
    TOTAL_TIMESTEPS: float = 1e9  # environment steps of one seed
    TOTAL_TIMESTEPS_DECAY: float | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: float = 1024  # environments in parallel, N
    NUM_STEPS: float = 128  # steps of each environment between updates, T
    MEMORY_WINDOW: float = 0  # steps before each rollout that are trained on again, W; at most NUM_STEPS
    NUM_MINIBATCHES: float = 4  # gradient steps per epoch, each on whole sequences; must divide NUM_ENVS
    NUM_EPOCHS: float = 4  # passes over a rollout
    EPS_START: float = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: float = 0.005  # and at the end
    EPS_DECAY: float = 0.1  # fraction of the schedule after which EPS_FINISH is reached
    LR: float = 3e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = True  # linearly to 0 over the schedule
    MAX_GRAD_NORM: float = 0.5  # clipping of the gradient's global norm
    GAMMA: float = 0.99  # discount
    LAMBDA: float = 0.5  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 1.0  # scales the rewards learned from, never those reported
    HIDDEN_SIZE: float = 512  # units of each hidden layer, and of the LSTM
    NUM_LAYERS: float = 1  # hidden layers before the LSTM
    NUM_RNN_LAYERS: float = 1  # LSTM layers; 0: a feed-forward agent
    ADD_LAST_ACTION: bool = False  # the LSTM also sees the action before
    NORM_TYPE: str = "batch_norm"  # after each hidden layer: batch_norm (batch renormalisation), layer_norm or none
    NORM_INPUT: bool = False  # batch-renormalise observations
    LOG_ACHIEVEMENTS: bool = False  # log how often each was unlocked in training, too; evaluations always do
    TEST_DURING_TRAINING: bool = True  # evaluate every TEST_INTERVAL; a run ends with an evaluation either way
    TEST_INTERVAL: float = 0.01  # as a fraction of all updates
    TEST_NUM_ENVS: float = 512  # episodes per evaluation
    TEST_NUM_STEPS: float | None = 1e4  # at most this many steps each; null: the environment's time limit
    EPS_TEST: float = 0.0  # exploration in evaluation

    def __post_init__(self):
        check_numbers(self)
        make_env(self)
        norms = ("layer_norm", "batch_norm", "none")
        check(self, "NORM_TYPE", self.NORM_TYPE in norms, "layer_norm, batch_norm or none")
        divides, divisor = self.NUM_ENVS % self.NUM_MINIBATCHES == 0, f"a divisor of NUM_ENVS = {self.NUM_ENVS}"
        check(self, "NUM_MINIBATCHES", divides, divisor)
        check(self, "MEMORY_WINDOW", self.MEMORY_WINDOW <= self.NUM_STEPS, f"at most NUM_STEPS = {self.NUM_STEPS}")

    @property
    def TASK(self):
        """What is learned, as folders and titles name it."""
        return self.ENV_NAME

    @property
    def NUM_UPDATES(self):
        """Updates of one run; each takes NUM_ENVS * NUM_STEPS environment steps."""
        return self.TOTAL_TIMESTEPS // (self.NUM_ENVS * self.NUM_STEPS)


def check(config, key, valid, allowed):
    """Raise a UserError that names the key, its value and what is allowed, unless valid."""
    if not valid:
        name = f"alg.{key}" if isinstance(config, Config) else key
        raise UserError(f"{name}={getattr(config, key)!r} is not allowed: must be {allowed}")


def check_numbers(config):
    """Check types and ranges of a Config's fields, and make its counts integers."""
    counts = "TOTAL_TIMESTEPS TOTAL_TIMESTEPS_DECAY NUM_ENVS NUM_STEPS NUM_MINIBATCHES NUM_EPOCHS "
    counts += "TEST_NUM_ENVS TEST_NUM_STEPS TEST_ENVS HIDDEN_SIZE NUM_LAYERS "
    counts += "NUM_RNN_LAYERS MEMORY_WINDOW OPTIMISTIC_RESET_RATIO"
    fractions = "EPS_START EPS_FINISH EPS_DECAY EPS_TEST GAMMA LAMBDA".split()
    for key, kind in ((f.name, f.type) for f in fields(config)):
        value = getattr(config, key)
        if value is None and kind == (float | None):
            continue
        if kind in (float, float | None):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
            check(config, key, number, "a finite number")
        else:
            check(config, key, isinstance(value, kind), f"of type {getattr(kind, '__name__', kind)}")
        if key in counts.split():
            least = 0 if key in ("NUM_RNN_LAYERS", "MEMORY_WINDOW") else 1
            check(config, key, value >= least and value == int(value), f"a whole number of at least {least}")
            setattr(config, key, int(value))
        check(config, key, key not in fractions or 0 <= value <= 1, "between 0 and 1")
        positive = key in ("LR", "MAX_GRAD_NORM", "TEST_INTERVAL", "OBS_DIVISOR")
        check(config, key, not positive or value > 0, "greater than 0")
        check(config, key, key != "TEST_INTERVAL" or value <= 1, "a fraction of the run, at most 1")
    batch = config.NUM_ENVS * config.NUM_STEPS
    divides, divisor = batch % config.NUM_MINIBATCHES == 0, f"a divisor of NUM_ENVS * NUM_STEPS = {batch}"
    check(config, "NUM_MINIBATCHES", divides, divisor)
    for key in ("TOTAL_TIMESTEPS", "TOTAL_TIMESTEPS_DECAY"):
        enough = getattr(config, key) is None or getattr(config, key) >= batch
        check(config, key, enough, f"at least one rollout, NUM_ENVS * NUM_STEPS = {batch}")


def make_env(config):
    """The environment of a Config, which does not reset by itself, and its parameters; ENV_KWARGS sets fields of both."""
    check(config, "ENV_NAME", config.ENV_NAME in MAX_RETURN, f"one of {', '.join(MAX_RETURN)}")
    from craftax.craftax_env import make_craftax_env_from_name  # takes seconds

    env = make_craftax_env_from_name(config.ENV_NAME, auto_reset=False)
    parts = env.static_env_params, env.default_params
    known = [{f.name for f in fields(part)} for part in parts]
    if unknown := set(config.ENV_KWARGS) - known[0] - known[1]:
        allowed = f"it takes {', '.join(sorted(known[0] | known[1]))}"
        raise UserError(f"alg.ENV_KWARGS={config.ENV_KWARGS}: {config.ENV_NAME} has no {', '.join(unknown)}; {allowed}")
    values = {key: like(value, parts, key) for key, value in config.ENV_KWARGS.items()}
    changes = [{key: values[key] for key in names & set(values)} for names in known]
    static, params = (part.replace(**change) for part, change in zip(parts, changes, strict=True))
    env = type(env)(static)
    try:
        _ = changes[0] and jax.eval_shape(env.reset_env, jax.random.key(0), params)  # not all sizes make a world
    except Exception as error:
        reason = f"{config.ENV_NAME} makes no world of these sizes: {str(error).splitlines()[0]}"
        raise UserError(f"alg.ENV_KWARGS={config.ENV_KWARGS} is not allowed: {reason}") from None
    return env, params


def like(value, parts, key):
    """A value of ENV_KWARGS in the type of the environment's own. Raises UserError where that would change it."""
    default = next(getattr(part, key) for part in parts if hasattr(part, key))
    values, defaults = (x if isinstance(x, (list, tuple)) else (x,) for x in (value, default))

    def fits(x, y):  # y: the environment's own; None stands for any number
        number = isinstance(x, (bool, int, float)) and 0 <= x < np.inf and isinstance(x, bool) <= isinstance(y, bool)
        return number and (y is None or type(y)(x) == x)

    same = isinstance(value, (list, tuple)) == isinstance(default, tuple) and len(values) == len(defaults)
    if not (same and all(map(fits, values, defaults))):
        raise UserError(f"alg.ENV_KWARGS.{key}={value!r} is not allowed: must be like {default!r}, and not negative")
    values = [x if y is None else type(y)(x) for x, y in zip(values, defaults, strict=True)]
    return tuple(values) if isinstance(default, tuple) else values[0]


class BatchRenorm(nn.Module):
    """Batch renormalisation (arXiv 1702.03275): the scale and shift [C] for x [..., C], x * scale + shift.

    When acting by the running statistics; in training by the batch's, pulled towards the running ones (r and d) once
    those have seen 1,000 batches. Momentum, epsilon and the bounds of r and d are those of the published agent.
    """

    @nn.compact
    def __call__(self, x, train):
        gamma = self.param("scale", nn.initializers.ones, x.shape[-1:])
        beta = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        running_var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        batches = self.variable("batch_stats", "batches", jnp.int32, 0)
        mean, std = running_mean.value, jnp.sqrt(running_var.value + 1e-3)
        if not train:
            return gamma / std, beta - mean * gamma / std
        axes = tuple(range(x.ndim - 1))
        batch_mean = x.mean(axes)
        batch_var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(batch_mean), 0)
        batch_std = jnp.sqrt(batch_var + 1e-3)
        warm = batches.value >= 1000
        r = jax.lax.stop_gradient(jnp.where(warm, jnp.clip(batch_std / std, 1 / 3, 3), 1))
        d = jax.lax.stop_gradient(jnp.where(warm, jnp.clip((batch_mean - mean) / std, -5, 5), 0))
        running_mean.value = 0.999 * mean + 0.001 * batch_mean
        running_var.value = 0.999 * running_var.value + 0.001 * batch_var
        batches.value += 1
        scale = gamma * r / batch_std
        return scale, beta + gamma * d - batch_mean * scale


class AffineDense(nn.Module):
    """nn.Dense of x * scale + shift, without ever writing that: it would take as much memory as the observations."""

    features: int

    @nn.compact
    def __call__(self, x, scale, shift):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ (kernel * scale[:, None]) + (shift @ kernel + bias)


class LSTM(nn.Module):
    """nn.OptimizedLSTMCell over time: the state (c, h), each [N, H], and x [T, N, C] -> the state after, h [T, N, H].

    Where reset [T, N] is true, the state is zero before the step. The inputs' products are taken for all steps at once.
    """

    features: int

    @nn.compact
    def __call__(self, state, x, reset):
        def orthogonal(key, shape):  # for each of the four gates
            return jnp.concatenate([nn.initializers.orthogonal()(k, shape) for k in jax.random.split(key, 4)], 1)

        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 4 * self.features))
        recurrent_kernel = self.param("recurrent_kernel", orthogonal, (self.features, self.features))
        bias = self.param("bias", nn.initializers.zeros, (4 * self.features,))

        def step(state, inputs):
            x, reset = inputs
            c, h = jax.tree.map(lambda s: jnp.where(reset[:, None], 0.0, s), state)
            i, f, g, o = jnp.split(x + h @ recurrent_kernel, 4, -1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        return jax.lax.scan(step, state, (x @ kernel + bias, reset))


class QNetwork(nn.Module):
    """Q(s, .) over time: hidden, obs [T, N, C], reset [T, N], last_action [T, N] -> hidden after, q_values [T, N, A].

    reset: obs is the first of its episode; last_action: -1 there. hidden: of `initial_hidden`, or what this returned.
    """

    num_actions: int
    norm_type: str = "layer_norm"
    norm_input: bool = False
    hidden_size: int = 512
    num_layers: int = 1
    num_rnn_layers: int = 1
    add_last_action: bool = False

    @nn.compact
    def __call__(self, hidden, obs, reset, last_action, train=False):
        def batch_renorm(x):
            scale, shift = BatchRenorm()(x, train)
            return x * scale + shift

        norm = {"layer_norm": lambda x: nn.LayerNorm()(x), "batch_norm": batch_renorm, "none": lambda x: x}
        dense = partial(nn.Dense, self.hidden_size)
        x = AffineDense(self.hidden_size)(obs, *BatchRenorm()(obs, train)) if self.norm_input else dense()(obs)
        x = nn.relu(norm[self.norm_type](x))
        for _ in range(self.num_layers - 1):
            x = nn.relu(norm[self.norm_type](dense()(x)))
        if self.add_last_action:
            x = jnp.concatenate([x, jax.nn.one_hot(last_action, self.num_actions)], -1)
        hidden_after = []
        for state in hidden:
            state, x = LSTM(self.hidden_size)(state, x, reset)
            hidden_after.append(state)
        return tuple(hidden_after), nn.Dense(self.num_actions)(x)

    def initial_hidden(self, num_envs):
        """The hidden state before anything was seen: (c, h) for each LSTM layer."""
        return tuple((jnp.zeros((num_envs, self.hidden_size)),) * 2 for _ in range(self.num_rnn_layers))


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]; the first three are what the network sees."""

    obs: jax.Array
    reset: jax.Array  # obs is the first of its episode
    last_action: jax.Array  # -1 there
    action: jax.Array
    reward: jax.Array
    done: jax.Array  # the episode ended: death or Craftax's own time limit, which it does not tell apart


class TrainState(struct.PyTreeNode):
    """All that one seed needs to go on; what a checkpoint holds."""

    key: jax.Array
    update_steps: jax.Array
    params: Any
    batch_stats: Any  # running statistics of batch renormalisation; empty without it
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [N, ...]
    reset: jax.Array  # [N], and so on: see Transition
    last_action: jax.Array
    hidden: Any  # before obs
    window: Transition  # the last MEMORY_WINDOW steps, [W, N, ...]; at least one, as orbax saves no empty array
    window_hidden: Any  # before the window's first step
    episode_return: jax.Array  # [N], of the episodes under way
    episode_length: jax.Array


def epsilon_greedy(key, q_values, epsilon):
    """A random action with probability epsilon, else the greedy one. q_values: [..., A] -> actions [...]."""
    explore, choice = jax.random.uniform(key, (2, *q_values.shape[:-1]))
    random_action = (choice * q_values.shape[-1]).astype(jnp.int32)
    return jnp.where(explore < epsilon, random_action, q_values.argmax(-1))


def q_lambda_targets(reward, discount, next_value, trace):
    """Q(lambda) returns (Peng's; arXiv 2407.04811, section 4), all arguments and the result [T, N].

    G_t = r_t + discount_t * ((1 - trace_t) * V(s'_t) + trace_t * G_{t+1}), with V(s'_t) for G_{t+1} at the last step.
    next_value: V(s'_t) = max_a Q(s'_t, a) of the state the action led to, before any reset;
    discount: gamma * (1 - terminated); trace: lambda * (1 - done), done = terminated or truncated.
    """

    def step(next_return, t):
        reward_t, discount_t, next_value_t, trace_t = t
        target = reward_t + discount_t * ((1 - trace_t) * next_value_t + trace_t * next_return)
        return target, target

    return jax.lax.scan(step, next_value[-1], (reward, discount, next_value, trace), reverse=True)[1]


def make_network(config):
    """The Q-network of a Config."""
    env, _ = make_env(config)
    sizes = config.HIDDEN_SIZE, config.NUM_LAYERS, config.NUM_RNN_LAYERS
    return QNetwork(env.num_actions, config.NORM_TYPE, config.NORM_INPUT, *sizes, config.ADD_LAST_ACTION)


def make_train(config):
    """Build `train(keys)`: a whole run for each key, compiled as one program, seeds vmapped (see its docstring)."""
    env, env_params = make_env(config)
    env_reset, env_step = jax.vmap(env.reset_env, (0, None)), jax.vmap(env.step_env, (0, 0, 0, None))
    block = -(-config.NUM_ENVS // config.OPTIMISTIC_RESET_RATIO) if config.USE_OPTIMISTIC_RESETS else config.NUM_ENVS
    network = make_network(config)
    decay_updates = (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) // (config.NUM_ENVS * config.NUM_STEPS)
    eps_updates = max(1, config.EPS_DECAY * decay_updates)
    grad_steps = config.NUM_EPOCHS * config.NUM_MINIBATCHES  # of one update
    epsilon_schedule = optax.linear_schedule(config.EPS_START, config.EPS_FINISH, eps_updates)
    lr_schedule = optax.linear_schedule(
        config.LR, 0.0 if config.LR_LINEAR_DECAY else config.LR, decay_updates * grad_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.MAX_GRAD_NORM), optax.radam(lr_schedule))

    def q_function(state, hidden, obs, reset, last_action):
        """One step of acting, [N, ...] -> hidden after, q_values [N, A]."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        hidden, q_values = network.apply(variables, hidden, obs[None], reset[None], last_action[None])
        return hidden, q_values[0]

    def restart(key, done, obs, env_state):
        """Put new worlds where `done`, `block` at a time until all are served: usually none or one does."""

        def serve(carry):
            key, waiting, worlds = carry
            key, key_reset = jax.random.split(key)
            served = jnp.nonzero(waiting, size=block, fill_value=config.NUM_ENVS)[0]
            new = env_reset(jax.random.split(key_reset, block), env_params)
            worlds = jax.tree.map(lambda x, y: x.at[served].set(y, mode="drop"), worlds, new)
            return key, waiting.at[served].set(False, mode="drop"), worlds

        return jax.lax.while_loop(lambda carry: carry[1].any(), serve, (key, done, (obs, env_state)))[2]

    def achievements(info):
        """What was unlocked in the episodes that ended, in percent."""
        return {key: x for key, x in info.items() if key.startswith("Achievements/")}

    def init(key):
        key, key_network, key_reset = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(key_reset, config.NUM_ENVS), env_params)
        zeros, hidden = jnp.zeros(config.NUM_ENVS), network.initial_hidden(config.NUM_ENVS)
        start = Transition(obs, zeros == 0, jnp.full(config.NUM_ENVS, -1), jnp.int32(zeros), zeros, zeros > 0)
        window = jax.tree.map(lambda x: jnp.broadcast_to(x, (max(1, config.MEMORY_WINDOW), *x.shape)), start)
        variables = network.init(key_network, hidden, *(x[None] for x in start[:3]))
        return TrainState(
            key=key, update_steps=jnp.int32(0), params=variables["params"],
            batch_stats=variables.get("batch_stats", {}), opt_state=optimizer.init(variables["params"]),
            env_state=env_state, obs=obs, reset=start.reset, last_action=start.last_action, hidden=hidden,
            window=window, window_hidden=hidden, episode_return=zeros, episode_length=zeros,
        )  # fmt: skip

    # ROLLOUT
    def rollout(state):
        """The state after it; what is trained on, [W + T + 1, N, ...], where observations are written once, of the last
        step only what is seen; and means over the episodes that ended."""
        epsilon = epsilon_schedule(state.update_steps)

        def step(carry, inputs):
            (state, sequence, window_hidden), (t, key_act, key_step, key_reset) = carry, inputs
            hidden, q_values = q_function(state, state.hidden, state.obs, state.reset, state.last_action)
            action = epsilon_greedy(key_act, q_values, epsilon)
            keys_step = jax.random.split(key_step, config.NUM_ENVS)
            obs, env_state, reward, done, info = env_step(keys_step, state.env_state, action, env_params)
            obs, env_state = restart(key_reset, done, obs, env_state)
            transition = Transition(state.obs, state.reset, state.last_action, action, reward, done)
            write = lambda x, y: x.at[config.MEMORY_WINDOW + t].set(y)  # noqa: E731
            sequence = jax.tree.map(write, sequence, transition)
            returns, lengths = state.episode_return + reward, state.episode_length + 1
            episodes = {"returned_episode_returns": returns, "returned_episode_lengths": lengths}
            episodes |= achievements(info) if config.LOG_ACHIEVEMENTS else {}
            starts_window = t == config.NUM_STEPS - config.MEMORY_WINDOW - 1
            window_hidden = jax.tree.map(partial(jnp.where, starts_window), hidden, window_hidden)
            state = state.replace(env_state=env_state, obs=obs, reset=done, last_action=jnp.where(done, -1, action))
            state = state.replace(hidden=hidden, episode_return=returns * ~done, episode_length=lengths * ~done)
            return (state, sequence, window_hidden), (episodes, done)

        key, *keys = jax.random.split(state.key, 4)
        inputs = jnp.arange(config.NUM_STEPS), *(jax.random.split(k, config.NUM_STEPS) for k in keys)
        window = jax.tree.map(lambda x: x[: config.MEMORY_WINDOW], state.window)
        extend = lambda x: jnp.concatenate([x, jnp.zeros((config.NUM_STEPS + 1, *x.shape[1:]), x.dtype)])  # noqa: E731
        carry = state.replace(key=key), jax.tree.map(extend, window), state.hidden
        (state, sequence, window_hidden), (episodes, done) = jax.lax.scan(step, carry, inputs)
        last = (x.at[-1].set(y) for x, y in zip(sequence[:3], (state.obs, state.reset, state.last_action), strict=True))
        sequence = Transition(*last, *sequence[3:])
        window = jax.tree.map(lambda x: x[config.NUM_STEPS : -1], sequence) if config.MEMORY_WINDOW else state.window
        episodes = {key: jnp.sum(x * done) / jnp.sum(done) for key, x in episodes.items()}  # NaN where none ended
        return state.replace(window=window, window_hidden=window_hidden), sequence, episodes

    # TARGETS
    def targets(sequence, q_values):
        """Of all steps but the last of a sequence [W + T + 1, M, ...], by the training pass's own values."""
        next_value = jax.lax.stop_gradient(q_values.max(-1))[1:]
        going_on = 1.0 - sequence.done[:-1]
        reward = config.REW_SCALE * sequence.reward[:-1]
        return q_lambda_targets(reward, config.GAMMA * going_on, next_value, config.LAMBDA * going_on)

    # LEARNING
    def learn(state, minibatch):
        hidden, sequence = minibatch
        trained = jnp.arange(len(sequence.obs) - 1) >= jnp.where(state.update_steps == 0, config.MEMORY_WINDOW, 0)

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            apply = partial(network.apply, train=True, mutable=["batch_stats"])
            (_, q_values), updated = apply(variables, hidden, *sequence[:3])
            q_action = jnp.sum(q_values * jax.nn.one_hot(sequence.action, q_values.shape[-1]), -1)[:-1]
            td_loss = 0.5 * jnp.square(q_action - targets(sequence, q_values))
            td_loss, qvals = (jnp.mean(x.mean(1) * trained) / trained.mean() for x in (td_loss, q_action))
            return td_loss, (qvals, updated.get("batch_stats", {}))

        (td_loss, (qvals, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(
            params=optax.apply_updates(state.params, changes), batch_stats=batch_stats, opt_state=opt_state
        )
        return state, {"td_loss": td_loss, "qvals": qvals, "grad_norm": optax.tree.norm(grads)}

    # ONE UPDATE
    def update(state):
        metrics = {
            "epsilon": epsilon_schedule(state.update_steps),
            "learning_rate": lr_schedule(state.update_steps * grad_steps),
        }
        hidden = state.window_hidden
        state, sequence, episodes = rollout(state)

        def learn_from(state, envs):  # gathers a minibatch by rows: the rollout is never copied or transposed whole
            steps = jnp.arange(len(sequence.obs))[:, None]
            minibatch = jax.tree.map(lambda x: x[envs], hidden), jax.tree.map(lambda x: x[steps, envs], sequence)
            return learn(state, minibatch)

        def epoch(state, key):
            order = jax.random.permutation(key, config.NUM_ENVS)
            return jax.lax.scan(learn_from, state, order.reshape(config.NUM_MINIBATCHES, -1))

        key, key_shuffle = jax.random.split(state.key)
        state, losses = jax.lax.scan(epoch, state.replace(key=key), jax.random.split(key_shuffle, config.NUM_EPOCHS))
        state = state.replace(update_steps=state.update_steps + 1)
        metrics |= jax.tree.map(jnp.mean, losses) | episodes
        return state, metrics | {"update_steps": state.update_steps}

    # EVALUATION
    def evaluate(state, key):
        num_envs, max_return = config.TEST_NUM_ENVS, MAX_RETURN[config.ENV_NAME]
        key, key_reset = jax.random.split(key)
        keys_reset, zeros, action = jax.random.split(key_reset, num_envs), jnp.zeros(num_envs), jnp.full(num_envs, -1)
        obs, env_state = env_reset(keys_reset, env_params)
        info = jax.eval_shape(lambda: env_step(keys_reset, env_state, action, env_params)[4])
        episodes = {key: zeros for key in ["returned_episode_returns", "returned_episode_lengths", *achievements(info)]}

        def step(carry):
            t, key, obs, env_state, action, hidden, ended, episodes = carry
            key, key_act, key_step = jax.random.split(key, 3)
            hidden, q_values = q_function(state, hidden, obs, ended, action)
            action = epsilon_greedy(key_act, q_values, config.EPS_TEST)
            keys_step = jax.random.split(key_step, num_envs)
            obs, env_state, reward, done, info = env_step(keys_step, env_state, action, env_params)
            seen = {"returned_episode_returns": reward, "returned_episode_lengths": 1.0} | achievements(info)
            episodes = {key: x + seen[key] * ~ended for key, x in episodes.items()}
            return t + 1, key, obs, env_state, action, hidden, ended | done, episodes

        def playing(carry):
            return (carry[0] < (config.TEST_NUM_STEPS or env_params.max_timesteps)) & ~carry[6].all()

        carry = 0, key, obs, env_state, action, network.initial_hidden(num_envs), zeros > 0, episodes
        *_, ended, episodes = jax.lax.while_loop(playing, step, carry)
        metrics = {f"test/{key}": jnp.sum(x * ended) / jnp.sum(ended) for key, x in episodes.items()}
        metrics["test/percent_of_maximum"] = 100 * metrics["test/returned_episode_returns"] / max_return
        return metrics | {"test/unfinished": jnp.sum(~ended).astype(jnp.float32)}

    evaluate_seeds = jax.jit(jax.vmap(evaluate))  # jitted here and below, it is traced once

    def test(state):
        """An evaluation of every seed, after training: [num_seeds] each."""
        keys = jax.vmap(partial(jax.random.fold_in, data=2**31 - 1))(state.key)  # a child that no split makes
        return evaluate_seeds(state, keys)

    # THE WHOLE RUN: a scan over updates of all seeds, so that "evaluate now?" stays a branch
    @jax.jit
    def update_seeds(state):
        # On a CPU device seeds take turns: as fast, and they do not wait for each other. Elsewhere they are vmapped.
        state, metrics = jax.lax.map(update, state) if jax.default_backend() == "cpu" else jax.vmap(update)(state)
        keys = jax.vmap(jax.random.split)(state.key)
        if config.TEST_DURING_TRAINING:
            tests = partial(evaluate_seeds, state, keys[:, 1])
            test_updates = max(1, int(config.NUM_UPDATES * config.TEST_INTERVAL))
            due = (config.NUM_UPDATES - state.update_steps[0]) % test_updates == 0
            metrics |= jax.lax.cond(due, tests, lambda: nan_like(jax.eval_shape(tests)))
        return state.replace(key=keys[:, 0]), metrics

    def updates(state, active):
        _, shapes = jax.eval_shape(update_seeds, state)
        idle = lambda state: (state, nan_like(shapes))  # noqa: E731
        return jax.lax.scan(lambda state, active: jax.lax.cond(active, update_seeds, idle, state), state, active)

    @cache
    def compiled(mesh):
        seeds, rows = PartitionSpec("seed"), PartitionSpec(None, "seed")
        specs = {"in_specs": (seeds, PartitionSpec()), "out_specs": (seeds, rows), "check_vma": False}
        return jax.jit(jax.vmap(init)), jax.jit(jax.shard_map(updates, mesh=mesh, **specs), donate_argnums=0)

    def train(keys=None, state=None, num_updates=config.NUM_UPDATES, length=None):
        """Train one agent per key (`keys` [num_seeds]), or go on from `state`, which is consumed, for `num_updates`.

        Returns {"runner_state": every leaf [num_seeds, ...], "metrics": each [num_seeds, num_updates]}. Seeds are spread
        over the local devices. Calls of equal `length` >= num_updates share one compiled program.
        """
        mesh = seed_mesh(len(jax.tree.leaves(state if keys is None else keys)[0]))
        init_seeds, update_many = compiled(mesh)
        state = jax.device_put(init_seeds(keys) if state is None else state, NamedSharding(mesh, PartitionSpec("seed")))
        state, metrics = update_many(state, jnp.arange(length or num_updates) < num_updates)
        return {"runner_state": state, "metrics": jax.tree.map(lambda x: x[:num_updates].T, metrics)}

    vars(train).update(init=init, restart=restart, rollout=rollout, targets=targets, learn=learn, update=update)
    vars(train).update(evaluate=evaluate, test=test)
    return train


def counters(config, update_steps):
    """Steps after so many updates, counted in Python: exact at any length."""
    env_step = update_steps * config.NUM_ENVS * config.NUM_STEPS
    return {"env_step": env_step, "grad_steps": update_steps * config.NUM_EPOCHS * config.NUM_MINIBATCHES}


def nan_like(shapes):
    """A tree of NaN, 0 where integer, of the given shapes."""
    value = {True: jnp.nan, False: 0}
    return jax.tree.map(lambda x: jnp.full(x.shape, value[jnp.issubdtype(x.dtype, jnp.floating)], x.dtype), shapes)


def seed_mesh(num_seeds):
    """A mesh of as many local devices as divide the seeds."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if num_seeds % n == 0)
    return Mesh(np.array(devices[:count]), ("seed",))


# RUNNING, LOGGING AND SAVING: nothing of the algorithm below this line

CHECKPOINT_SECONDS = 600  # no more than this is lost, whatever CHECKPOINT_INTERVAL is


@dataclass
class Settings:
    """The arguments of `run`, root keys on the command line. Raises UserError if wrong."""

    SEED: int = 0  # seed i of a run trains with jax.random.split(jax.random.key(SEED), NUM_SEEDS)[i]
    NUM_SEEDS: int = 1  # trained together in one program
    SAVE_PATH: str | None = "runs"  # where the run's folder is made; null: nothing is written
    RESUME: str | None = None  # a run's folder, or latest; its configuration is the folder's
    LOG_INTERVAL: int | None = None  # in updates, a logged row is their mean; null: a 1,000th of the run
    CHECKPOINT_INTERVAL: int | None = None  # in updates, null: a 20th of the run; every ten minutes, too
    WANDB_MODE: str = "disabled"  # online, offline or disabled
    ENTITY: str | None = None  # wandb's
    PROJECT: str = "pqn"  # wandb's
    WANDB_LOG_ALL_SEEDS: bool = False  # each seed's curves as rng<i>/... beside their mean
    COMPILATION_CACHE: str | None = "~/.cache/pqn"  # folder of JAX's persistent cache, if it has none; null: no cache

    def __post_init__(self):
        self.SAVE_PATH, self.RESUME = (path and str(path) for path in (self.SAVE_PATH, self.RESUME))
        check(self, "SEED", not isinstance(self.SEED, int) or self.SEED < 2**63, "below 2**63")
        for key, low in {"SEED": 0, "NUM_SEEDS": 1, "LOG_INTERVAL": 1, "CHECKPOINT_INTERVAL": 1}.items():
            value = getattr(self, key)
            valid = isinstance(value, int) and value >= low or value is None and key.endswith("INTERVAL")
            check(self, key, valid, f"a whole number of at least {low}")
        modes = ("online", "offline", "disabled")
        check(self, "WANDB_MODE", self.WANDB_MODE in modes, "online, offline or disabled")


class Agent(NamedTuple):
    """A trained agent: `network.apply(jax.tree.map(lambda x: x[i], variables), ...)` is QNetwork with seed i's parameters."""

    config: Config
    network: nn.Module
    variables: Any  # {"params": ..., "batch_stats": ...}, every leaf [num_seeds, ...]


def load(folder):
    """The Agent in a run's folder. Raises UserError where none can be read."""
    from safetensors.numpy import load_file

    config = Config(**read_settings(folder)["alg"])
    try:
        flat = load_file(Path(folder) / "params.safetensors")
    except Exception as error:
        raise UserError(f"{folder}: params.safetensors cannot be read ({error})") from None
    return Agent(config, make_network(config), traverse_util.unflatten_dict(flat, sep="."))


def read_settings(folder):
    """The config.yaml of a run's folder. Raises UserError where it cannot be read."""
    from omegaconf import OmegaConf

    try:
        saved = OmegaConf.to_container(OmegaConf.load(Path(folder) / "config.yaml"))
        if saved["script"] != SCRIPT:
            raise UserError(f"{folder} is a run of {saved['script']}, not of {SCRIPT}")
        return saved | {"alg": asdict(Config(**saved["alg"]))}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} is not the folder of a run: its config.yaml cannot be read ({error})") from None


def write_settings(folder, config, settings):
    """Write config.yaml, with command, versions and device, and a copy of this script beside it."""
    from omegaconf import OmegaConf

    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    about = {"script": SCRIPT, "task": config.TASK, "command": shlex.join(sys.argv)}
    about |= {"device": jax.devices()[0].device_kind, "versions": versions}
    if settings.RESUME:  # what began it stays on record
        began = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        about |= {"command": began["command"], "resumed": [*began.get("resumed", []), about["command"]]}
    OmegaConf.save(asdict(settings) | {"alg": asdict(config)} | about, folder / "config.yaml.new")
    os.replace(folder / "config.yaml.new", folder / "config.yaml")
    if "__file__" in globals() and not (folder / f"{SCRIPT}.py").exists():
        shutil.copy(__file__, folder / f"{SCRIPT}.py")


def run_folder(config, settings):
    """The folder to resume, or a new one, <SAVE_PATH>/<script>_<task>_s<SEED>/<time>_<unique>, or None."""
    if settings.RESUME == "latest":
        folders = [path.parent for path in Path(settings.SAVE_PATH or "runs").glob(f"{SCRIPT}_*/*/config.yaml")]
        if not folders:
            raise UserError(f"RESUME=latest: there is no run of {SCRIPT} in SAVE_PATH={settings.SAVE_PATH}")
        return max(folders, key=lambda folder: folder.name)
    if settings.RESUME or not settings.SAVE_PATH:
        return Path(settings.RESUME) if settings.RESUME else None
    try:
        parent = Path(settings.SAVE_PATH) / f"{SCRIPT}_{config.TASK}_s{settings.SEED}"
        folder = parent / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        return folder
    except OSError as error:
        raise UserError(f"SAVE_PATH={settings.SAVE_PATH} cannot be written: {error.strerror}") from None


def resumed(folder, config, given):
    """The Config and Settings of the run in `folder`. Raises UserError where those given contradict it."""
    saved = read_settings(folder)
    if (folder / "metrics.csv").exists() and not (folder / "checkpoints").exists():
        raise UserError(f"RESUME={folder}: its checkpoints are gone")
    pairs = {key: (given[key], saved[key]) for key in ("SEED", "NUM_SEEDS") if key in given}
    pairs |= {key: (value, saved["alg"][key]) for key, value in (asdict(config) if config else {}).items()}
    for key, (value, before) in pairs.items():
        if value != before and (key != "TOTAL_TIMESTEPS" or value < before):
            allowed = "only TOTAL_TIMESTEPS may change, to train for longer"
            raise UserError(f"{key}={value!r} contradicts {folder}, which has {before!r}: {allowed}")
    settings = {f.name: saved[f.name] for f in fields(Settings) if f.name not in ("SAVE_PATH", "RESUME")}
    return config or Config(**saved["alg"]), Settings(**settings | given)


def attempt(what, function, *args, **kwargs):
    """Call what must not harm training where it fails (a log, a save, a plot): the failure becomes a warning."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        print(f"Warning: {what} failed, training goes on: {type(error).__name__}: {reason}", file=sys.stderr)


def save(folder, checkpoints, state, rows):
    """Bring metrics.csv, params.safetensors and the checkpoints up to date, each by an atomic rename."""
    import orbax.checkpoint as ocp
    from safetensors.numpy import save_file

    save_metrics(folder, rows)
    variables = jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})
    save_file(traverse_util.flatten_dict(variables, sep="."), folder / "params.safetensors.new")
    os.replace(folder / "params.safetensors.new", folder / "params.safetensors")
    checkpoints.save(int(state.update_steps[0]), args=ocp.args.StandardSave(state))


def save_metrics(folder, rows):
    """Write metrics.csv."""
    table = {"seed": np.tile(np.arange(len(rows[0]["td_loss"])), len(rows))}
    table |= {name: values.T.flatten() for name, values in columns(rows).items()}
    with open(folder / "metrics.csv.new", "w", newline="") as file:
        csv.writer(file).writerows([table, *zip(*table.values(), strict=True)])
    os.replace(folder / "metrics.csv.new", folder / "metrics.csv")


def columns(rows):
    """Logged rows by name, each [num_seeds, rows], NaN where a row lacks one: a final evaluation is only in the last."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.stack([row.get(name, np.full_like(row["td_loss"], np.nan)) for row in rows], 1) for name in names}


def restore(folder, checkpoints, state):
    """The newest checkpoint that can be read, and the rows of metrics.csv up to it."""
    import orbax.checkpoint as ocp

    args = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    steps = sorted(checkpoints.all_steps(), reverse=True)
    for newer, step in enumerate(steps):
        if restored := attempt(f"reading checkpoint {step}", checkpoints.restore, step, args=args):
            for unreadable in steps[:newer]:  # orbax saves nothing that is older than its newest
                checkpoints.delete(unreadable)
            return restored, attempt("reading metrics.csv", read_metrics, folder, step, len(state.key)) or []
    if steps:
        raise UserError(f"RESUME={folder}: none of its checkpoints can be read")
    print(f"{folder} has no checkpoint yet: starting over")
    return state, []


def read_metrics(folder, step, num_seeds):
    """The rows of metrics.csv up to an update."""
    read = {"delimiter": ",", "names": True, "dtype": None, "deletechars": "", "replace_space": " "}
    table = np.atleast_1d(np.genfromtxt(folder / "metrics.csv", **read))
    table = table[table["update_steps"] <= step].reshape(-1, num_seeds)
    values = {key: table[key] for key in table.dtype.names if key != "seed"}
    values = {key: x.astype(np.int64 if x.dtype.kind == "i" else np.float32) for key, x in values.items()}
    return [{key: x[i] for key, x in values.items()} for i in range(len(table))]


def nanmean(x, axis=None):
    """The mean of what is not NaN, NaN where nothing is."""
    count = np.sum(~np.isnan(x), axis)
    return np.where(count > 0, np.nansum(x, axis) / np.maximum(count, 1), np.nan).astype(x.dtype)


def logged(metrics):
    """What is logged of some updates, [num_seeds, updates] -> [num_seeds]: means, of episodes where any ended (else NaN),
    and the last evaluation."""
    tested = np.flatnonzero(np.isfinite(metrics.get("test/unfinished", [[]])).all(0))[-1:]
    tests = {key: x[:, tested] for key, x in metrics.items() if key.startswith("test/")}
    means = {key: np.mean if key in ("td_loss", "qvals", "grad_norm") else nanmean for key in metrics}
    return {key: means[key](x, axis=1) for key, x in (metrics | tests).items() if key != "update_steps"}


def start_wandb(config, folder, settings):
    """Open the run's wandb log: offline if wandb cannot be reached, the same one again after RESUME."""
    import wandb

    name = "_".join(folder.resolve().parts[-2:]) if folder else None
    options = {"project": settings.PROJECT, "entity": settings.ENTITY, "name": name, "id": name, "resume": "allow"}
    options |= {"dir": folder, "config": asdict(settings) | asdict(config)}
    try:
        return wandb.init(mode=settings.WANDB_MODE, **options)
    except Exception as error:
        print(f"Warning: wandb cannot be reached, logging offline: {error}", file=sys.stderr)
        return wandb.init(mode="offline", **options)


def log_wandb(log, row, all_seeds):
    """Log means over seeds, and each seed's values as rng<i>/... where asked for; never NaN."""
    values = {key: nanmean(column) for key, column in row.items()}
    values |= {f"rng{i}/{key}": x for key, column in row.items() for i, x in enumerate(column) if all_seeds}
    log.log({key: float(x) for key, x in values.items() if np.isfinite(x)}, step=int(row["update_steps"][0]))


def learning_curve(metrics, title):
    """A PNG of returns against steps: interquartile mean over seeds, with a 95% bootstrap confidence band."""
    from matplotlib.figure import Figure
    from scipy.stats import trim_mean

    figure, num_seeds = Figure(figsize=(7, 4.5), layout="constrained"), len(metrics["env_step"])
    axes, resamples = figure.subplots(), np.random.default_rng(0).integers(num_seeds, size=(200, num_seeds))
    won = "returned_won_episode" in metrics  # what a battle is about
    name, shown = ("returned_won_episode", "battles won") if won else ("returned_episode_returns", "episode return")
    for key, label in ((name, "training"), (f"test/{name}", "evaluation")):
        known = np.flatnonzero(np.isfinite(metrics.get(key, np.full((1, 1), np.nan))).all(0))
        points = np.array_split(known, max(1, min(len(known), 200)))  # at most 200, each of adjacent rows
        steps = [metrics["env_step"][0, point].mean() for point in points if len(known)]
        values = np.array([metrics[key][:, point].mean(1) for point in points if len(known)]).reshape(-1, num_seeds)
        (line,) = axes.plot(steps, trim_mean(values, 0.25, axis=1), label=label, marker=".")
        band = np.percentile(trim_mean(values[:, resamples], 0.25, axis=2), (2.5, 97.5), axis=1)
        axes.fill_between(steps, *band, color=line.get_color(), alpha=0.25, linewidth=0)
    ylabel = shown + (f" (IQM and 95% CI of {num_seeds} seeds)" if num_seeds > 1 else "")
    axes.set(title=title, xlabel="environment steps", ylabel=ylabel)
    axes.legend(), axes.grid(alpha=0.3)
    figure.savefig(png := io.BytesIO(), format="png", dpi=120)
    return png.getvalue()


def print_scores(columns):
    """A line per metric: its mean over seeds, and the first ten seeds' values; columns: name -> [num_seeds]."""
    for name, values in columns.items():
        each = ", ".join(f"{x:.2f}" for x in values[:10]) + (", ..." if len(values) > 10 else "")
        print(f"{name:30} {nanmean(values):10.2f}" + (f"  over seeds: {each}" if len(values) > 1 else ""))


@contextmanager
def catch_signals():
    """Collect Ctrl-C, SIGTERM and SIGUSR2 (SLURM's, before the time is up) in a list; the second one stops at once."""
    received, previous = [], {}

    def handler(number, _):
        received.append(number)
        ignored = previous[number] == signal.SIG_IGN  # of a script's background jobs
        signal.signal(number, signal.default_int_handler if ignored else previous[number])
        print("\nStopping after this interval, then saving; once more to stop at once", file=sys.stderr)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR2", signal.SIGTERM)}
    if threading.current_thread() is threading.main_thread():
        previous.update({number: signal.signal(number, handler) for number in numbers})
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def run(config: Config | None = None, **settings):
    """Train, log, save and evaluate: what the command line does. `settings`: see Settings.

    Returns `train`'s dictionary, metrics as logged [num_seeds, rows], with "score" (the mean over seeds of the last
    evaluation), "folder" and "interrupted" (the signal that stopped the run, or None). Raises UserError, one line.
    """
    given, settings = settings, Settings(**settings)
    config = config or (None if settings.RESUME else Config(**RECIPE))
    folder = run_folder(config, settings)
    if settings.RESUME:
        config, settings = resumed(folder, config, given)
    if settings.COMPILATION_CACHE and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.COMPILATION_CACHE))
    num_updates, num_seeds = config.NUM_UPDATES, settings.NUM_SEEDS
    log_interval = settings.LOG_INTERVAL or max(1, num_updates // 1000)
    checkpoint_interval = settings.CHECKPOINT_INTERVAL or max(1, num_updates // 20)
    if (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) < config.TOTAL_TIMESTEPS:
        print(f"Note: the schedules end at TOTAL_TIMESTEPS_DECAY={config.TOTAL_TIMESTEPS_DECAY}, before the run does")

    train, rows, checkpoints, log, start = make_train(config), [], None, None, time.time()
    keys = jax.random.split(jax.random.key(settings.SEED), num_seeds)
    state = train(keys, num_updates=0, length=log_interval)["runner_state"]
    print(f"Compiled in {time.time() - start:.1f} s for {jax.local_device_count()} x {jax.devices()[0].device_kind}")
    if folder:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        checkpoints = ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)
        state, rows = restore(folder, checkpoints, state) if settings.RESUME else (state, rows)
        attempt("writing config.yaml", write_settings, folder, config, settings)
        print(f"Run folder: {folder}")
    if settings.WANDB_MODE != "disabled":
        log = attempt("starting wandb", start_wandb, config, folder, settings)

    done, steps = int(state.update_steps[0]), counters(config, 1)["env_step"] * num_seeds  # of one update
    finite, start = np.full(num_seeds, True), time.time() - (rows[-1]["time"][0] if rows else 0)
    saved = time.time()
    progress = {"total": num_updates * steps, "initial": done * steps, "unit": "step", "unit_scale": True}
    with tqdm(desc=config.TASK, **progress) as bar, catch_signals() as interrupted:
        while done < num_updates and not interrupted:
            chunk, before = min(log_interval, num_updates - done), time.time()
            out = train(state=state, num_updates=chunk, length=log_interval)
            while not out["metrics"]["td_loss"].is_ready():  # waiting in Python, where signals are heard
                time.sleep(5e-4)
            state, metrics = out["runner_state"], jax.tree.map(np.asarray, out["metrics"])
            due, now = (done + chunk) // checkpoint_interval > done // checkpoint_interval, time.time()
            done, due = done + chunk, due or now - saved > CHECKPOINT_SECONDS
            row = {"update_steps": done}
            row |= {"time": np.float32(now - start), "sps": np.float32(chunk * steps / (now - before))}
            row = {key: np.full(num_seeds, value) for key, value in (counters(config, done) | row).items()}
            row |= logged(metrics)
            rows.append(row)
            bar.update(chunk * steps)
            bar.set_postfix({"return": f"{nanmean(row['returned_episode_returns']):.2f}"})
            for seed in np.flatnonzero(finite & ~np.isfinite(row["td_loss"])):
                warning = f"Warning: the loss of seed {seed} is {row['td_loss'][seed]} from update {done} on"
                bar.write(warning, file=sys.stderr)
            finite &= np.isfinite(row["td_loss"])
            if log:
                attempt("logging to wandb", log_wandb, log, row, settings.WANDB_LOG_ALL_SEEDS)
            if checkpoints and (due or interrupted or done == num_updates):
                if not (folder / "config.yaml").exists():  # the disk was full
                    attempt("writing config.yaml", write_settings, folder, config, settings)
                attempt("saving", save, folder, checkpoints, state, rows)
                saved = time.time()
    if interrupted:
        print(f"Stopped after {done} of {num_updates} updates" + (f"; go on with RESUME={folder}" if folder else ""))

    if rows and not interrupted and np.isnan(rows[-1].get("test/returned_episode_returns", np.nan)).any():
        final = lambda: jax.tree.map(np.asarray, train.test(state))  # noqa: E731
        rows[-1] |= attempt("the final evaluation", final) or {}
        if log:
            attempt("logging to wandb", log_wandb, log, rows[-1], settings.WANDB_LOG_ALL_SEEDS)
        if folder:
            attempt("saving the final evaluation", save_metrics, folder, rows)
    metrics = columns(rows)
    scores = {key: x[:, -1] for key, x in metrics.items() if key.startswith(("returned_", "test/"))}
    print_scores(scores)
    png = attempt("drawing the learning curve", learning_curve, metrics, f"{config.ALG_NAME} on {config.TASK}")
    if png and folder:
        attempt("saving the learning curve", (folder / "learning_curve.png").write_bytes, png)
    if png and "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(png))
    if log:
        attempt("closing wandb", log.finish)
    score = float(nanmean(scores.get("test/returned_episode_returns", np.array(np.nan))))
    out = {"runner_state": state, "metrics": metrics, "score": score, "folder": folder}
    return out | {"interrupted": interrupted[0] if interrupted else None}


def main():
    """The command line: Hydra composes Settings and, under `alg`, the Config."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(Config)  # a Config itself is made below, where its errors are caught
    named = any(word.lstrip("+").startswith("alg=") for word in sys.argv)
    default = schema if named else OmegaConf.merge(schema, RECIPE)
    alg = ("alg", Any, field(default_factory=lambda: default))
    quiet = {"root": {"level": "WARNING"}, "handlers": {"file": {"filename": os.devnull}}}  # the run folder has it all
    sweep = {"dir": "runs/sweeps/${now:%Y-%m-%d_%H-%M-%S}", "subdir": "."}
    output = {"run": {"dir": "."}, "output_subdir": None, "sweep": sweep, "job_logging": quiet}
    store, configs = ConfigStore.instance(), Path(__file__).resolve().parent / "configs"
    store.store(name="settings", node=dataclasses.make_dataclass("Schema", [alg], bases=(Settings,)))
    store.store(name="schema", node={"defaults": ["settings", "_self_"], "hydra": output})
    path, name = (configs, "config") if (configs / "config.yaml").exists() else (configs.parent, "schema")
    if name == "schema":  # this file alone
        store.store(group="alg", name=Config.ALG_NAME, node=OmegaConf.merge(schema, RECIPE))

    @hydra.main(version_base="1.3", config_path=str(path), config_name=name)
    def train_once(cfg):
        settings = OmegaConf.to_container(cfg)
        alg = settings.pop("alg")
        try:
            if cfg.RESUME:  # what is not overridden is the folder's
                keys = [override.lstrip("+~").split("=")[0] for override in HydraConfig.get().overrides.task]
                given = {".".join(key.split(".")[:2]) for key in keys}
                saved = read_settings(run_folder(None, Settings(**settings)))["alg"]
                settings = {key: settings[key] for key in settings if key in given | {"SAVE_PATH", "RESUME"}}
                recipe = set(alg) - {"TOTAL_TIMESTEPS"} if "alg" in given else set()  # that is set by name alone
                alg = {key: alg[key] if key in recipe or f"alg.{key}" in given else saved[key] for key in alg}
            out = run(Config(**alg), **settings)
        except UserError as error:
            sys.exit(f"Error: {error}")
        except KeyboardInterrupt:  # before training began, or again after it
            sys.exit(128 + signal.SIGINT)
        if out["interrupted"]:
            sys.exit(128 + out["interrupted"])
        return out["score"]

    train_once()


if __name__ == "__main__" and "__file__" in globals():  # a notebook cell only defines
    importlib.import_module(Path(__file__).stem).main()  # by name: Hydra's launchers send it to other processes
