# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "gymnax>=1.0.1", "six",
#   "hydra-core>=1.3.2", "omegaconf>=2.3", "orbax-checkpoint>=0.11", "safetensors>=0.5",
#   "matplotlib>=3.8", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN (Gallici et al., ICLR 2025, arXiv 2407.04811) on MinAtar, in one file. Documentation: docs/pqn_minatar.md

    python pqn_minatar.py                                                # Breakout with the defaults of Config
    python pqn_minatar.py +alg=pqn alg.ENV_NAME=Asterix-MinAtar NUM_SEEDS=3
    python pqn_minatar.py -m alg.LR=1e-3,5e-4 SEED=0,1                   # a sweep
    python pqn_minatar.py RESUME=latest                                  # go on with a run that was stopped

From Python, or after pasting this file into a notebook cell: `out = run(Config(TOTAL_TIMESTEPS=1e6), NUM_SEEDS=3)`.
"""

import csv
import dataclasses
import importlib.metadata
import inspect
import io
import math
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
import gymnax  # noqa: E402 (it starts JAX)

SCRIPT = "pqn_minatar"
# What the published recipe sets beside Config's neutral defaults. A run for which no recipe is named has it, too.
RECIPE = {}


class UserError(ValueError):
    """A mistake of the user's: its message is one line with the key, the value and what is allowed."""


@dataclass
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; counts may be written 1e7. Raises UserError if wrong."""

    ENV_NAME: str = "Breakout-MinAtar"  # Asterix-, Breakout-, Freeway-, Seaquest- or SpaceInvaders-MinAtar
    ENV_KWARGS: dict = field(default_factory=dict)  # for the environment's constructor or its parameters
    ALG_NAME: str = "pqn"  # a label for logs
    TOTAL_TIMESTEPS: float = 1e7  # environment steps of one seed
    TOTAL_TIMESTEPS_DECAY: float | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: float = 128  # environments in parallel, N
    NUM_STEPS: float = 32  # steps of each environment between updates, T
    NUM_MINIBATCHES: float = 32  # gradient steps per epoch; must divide N * T
    NUM_EPOCHS: float = 2  # passes over a rollout
    EPS_START: float = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: float = 0.05  # and at the end
    EPS_DECAY: float = 0.1  # fraction of the schedule after which EPS_FINISH is reached
    LR: float = 5e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = True  # linearly to 0 over the schedule
    MAX_GRAD_NORM: float = 10.0  # clipping of the gradient's global norm
    GAMMA: float = 0.99  # discount
    LAMBDA: float = 0.65  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 1.0  # scales the rewards learned from, never those reported
    NORM_TYPE: str = "layer_norm"  # after each hidden layer: layer_norm, batch_norm or none
    NORM_INPUT: bool = False  # batch-normalise observations
    OBS_DIVISOR: float = 1.0  # observations are divided by it; the authors' code has 255: see docs, Ablation
    TEST_DURING_TRAINING: bool = True  # evaluate every TEST_INTERVAL; a run ends with an evaluation either way
    TEST_INTERVAL: float = 0.05  # as a fraction of all updates
    TEST_NUM_ENVS: float = 128  # episodes per evaluation
    TEST_NUM_STEPS: float | None = None  # at most this many steps each; null: the environment's time limit
    EPS_TEST: float = 0.0  # exploration in evaluation

    def __post_init__(self):
        check_numbers(self)
        games = [name for name in gymnax.registered_envs if name.endswith("-MinAtar")]
        check(self, "ENV_NAME", self.ENV_NAME in games, f"one of {', '.join(games)}")
        make_env(self)
        norms = ("layer_norm", "batch_norm", "none")
        check(self, "NORM_TYPE", self.NORM_TYPE in norms, "layer_norm, batch_norm or none")

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
    """The environment of a Config and its parameters; each of ENV_KWARGS goes to the one that knows it."""
    check(config, "ENV_NAME", config.ENV_NAME in gymnax.registered_envs, f"one of {', '.join(gymnax.registered_envs)}")
    kwargs = config.ENV_KWARGS
    try:
        arguments = set(inspect.signature(gymnax.registration._registry[config.ENV_NAME]).parameters)
        env, params = gymnax.make(config.ENV_NAME, **{key: kwargs[key] for key in arguments & set(kwargs)})
        settable = {f.name for f in fields(params)}
        if unknown := set(kwargs) - arguments - settable:
            raise TypeError(f"unknown {', '.join(unknown)}; it takes {', '.join(sorted(arguments | settable))}")
        for key in settable & set(kwargs):
            kind = (int, float) if isinstance(getattr(params, key), float) else type(getattr(params, key))
            if not isinstance(kwargs[key], kind) or key == "max_steps_in_episode" and kwargs[key] < 1:
                raise TypeError(f"{key}={kwargs[key]!r} must be like {getattr(params, key)!r}")
        return env, params.replace(**{key: kwargs[key] for key in settable & set(kwargs)})
    except Exception as error:
        raise UserError(f"alg.ENV_NAME={config.ENV_NAME} alg.ENV_KWARGS={kwargs} cannot be made: {error}") from None


class Conv(nn.Module):
    """A convolution without padding, [C, H, W, B] -> [features, H', W', B], with nn.Conv's parameters.

    Written as one matrix product over shifted slices: nn.Conv's gradient is slow inside a loop on CPU (JAX issue
    12868), and under a vmap over seeds it becomes a grouped convolution, slow on GPU (JAX issue 13800).
    """

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        def he_normal(key, shape):  # a matrix: on CPU random numbers in four dimensions compile for a second
            return nn.initializers.he_normal()(key, (math.prod(shape[:-1]), shape[-1])).reshape(shape)

        kernel = self.param("kernel", he_normal, (self.size, self.size, len(x), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        height, width = (n - self.size + 1 for n in x.shape[1:3])
        patches = jnp.concatenate([x[:, :, j : j + width : self.stride] for j in range(self.size)])
        patches = jnp.concatenate([patches[:, i : i + height : self.stride] for i in range(self.size)])
        shape = (self.features, *patches.shape[1:])
        x = kernel.reshape(-1, self.features).T @ patches.reshape(len(patches), -1) + bias[:, None]
        return x.reshape(shape)


class Dense(nn.Module):
    """nn.Dense over the leading axis, [C, B] -> [features, B]."""

    features: int
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (len(x), self.features))
        return kernel.T @ x + self.param("bias", nn.initializers.zeros, (self.features,))[:, None]


class LayerNorm(nn.Module):
    """nn.LayerNorm over the leading axis, [C, ...] -> [C, ...]."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (len(x),))
        bias = self.param("bias", nn.initializers.zeros, (len(x),))
        return layer_norm(x.reshape(len(x), -1), scale, bias).reshape(x.shape)


@jax.custom_vjp
def layer_norm(x, scale, bias):
    """Normalise x [C, B] over C. Means are matrix products, and the gradient needs two: reductions are slow on CPU."""
    return layer_norm_forward(x, scale, bias)[0]


def layer_norm_forward(x, scale, bias):
    """The function, and what its gradient needs."""
    mean = partial(jnp.dot, jnp.full(len(x), 1 / len(x)), precision="highest")
    x = x - mean(x)
    rate = jax.lax.rsqrt(mean(x * x) + 1e-6)
    return x * rate * scale[:, None] + bias[:, None], (x * rate, rate, scale)


def layer_norm_backward(residuals, grad):
    """The gradients for x, scale and bias."""
    x, rate, scale = residuals
    scaled_mean, product = partial(jnp.dot, scale / len(x), precision="highest"), grad * x
    grad_x = rate * (grad * scale[:, None] - scaled_mean(grad) - x * scaled_mean(product))
    return grad_x, product.sum(1), grad.sum(1)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)


class QNetwork(nn.Module):
    """Q(s, .): [..., H, W, C] -> [..., A]. A normalisation layer stands between each hidden layer and its ReLU.

    Inside, features lead and the batch is last: products and normalisation then run along long rows, fast on CPU.
    """

    num_actions: int
    norm_type: str = "layer_norm"
    norm_input: bool = False
    obs_divisor: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        batch_norm = partial(nn.BatchNorm, use_running_average=not train, axis=0)
        norm = {"layer_norm": LayerNorm, "batch_norm": batch_norm, "none": lambda: lambda x: x}[self.norm_type]
        batch = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:]).transpose(3, 1, 2, 0).astype(jnp.float32) / self.obs_divisor
        x = batch_norm()(x) if self.norm_input else x
        x = nn.relu(norm()(Conv(16)(x)))
        x = x.reshape(-1, x.shape[-1])
        x = nn.relu(norm()(Dense(128, nn.initializers.he_normal())(x)))
        return Dense(self.num_actions)(x).T.reshape(*batch, -1)


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array  # the environment ended the episode
    truncated: jax.Array  # a time limit did
    value: jax.Array  # max_a Q(s_t, a), by the parameters that acted


class TrainState(struct.PyTreeNode):
    """All that one seed needs to go on; what a checkpoint holds."""

    key: jax.Array
    update_steps: jax.Array
    params: Any
    batch_stats: Any  # running statistics of BatchNorm; empty without it
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [N, ...]
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


def shuffle_minibatches(key, batch, num_minibatches):
    """Shuffle [T, N, ...] along both axes, all leaves alike: [num_minibatches, T * N / num_minibatches, ...]."""
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    order = jnp.argsort(jax.random.bits(key, len(jax.tree.leaves(batch)[0]))).reshape(num_minibatches, -1)
    return jax.tree.map(lambda x: x[order], batch)


def make_network(config):
    """The Q-network of a Config."""
    env, _ = make_env(config)
    return QNetwork(env.num_actions, config.NORM_TYPE, config.NORM_INPUT, config.OBS_DIVISOR)


def make_train(config):
    """Build `train(keys)`: a whole run for each key, compiled as one program, seeds vmapped (see its docstring)."""
    env, env_params = make_env(config)
    env_reset, env_step = jax.vmap(env.reset, (0, None)), jax.vmap(env.step, (0, 0, 0, None))
    time_limit = int(getattr(env_params, "max_steps_in_episode", 1))
    network = make_network(config)
    decay_updates = (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) // (config.NUM_ENVS * config.NUM_STEPS)
    eps_updates = max(1, config.EPS_DECAY * decay_updates)
    grad_steps = config.NUM_EPOCHS * config.NUM_MINIBATCHES  # of one update
    epsilon_schedule = optax.linear_schedule(config.EPS_START, config.EPS_FINISH, eps_updates)
    lr_schedule = optax.linear_schedule(
        config.LR, 0.0 if config.LR_LINEAR_DECAY else config.LR, decay_updates * grad_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.MAX_GRAD_NORM), optax.radam(lr_schedule))

    def q_function(state, obs):
        return network.apply({"params": state.params, "batch_stats": state.batch_stats}, obs)

    def init(key):
        key, key_network, key_reset = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(key_reset, config.NUM_ENVS), env_params)
        variables = network.init(key_network, obs)
        params, zeros = variables["params"], jnp.zeros(config.NUM_ENVS)
        return TrainState(
            key=key, update_steps=jnp.int32(0), params=params, batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params), env_state=env_state, obs=obs, episode_return=zeros, episode_length=zeros,
        )  # fmt: skip

    # An environment truncates at most once in any `time_limit` steps. So one final observation per environment and
    # block of that many steps is kept, and evaluated once, instead of one per step.
    block = min(time_limit, config.NUM_STEPS)
    num_blocks = -(-config.NUM_STEPS // block)

    # ROLLOUT
    def rollout(state):
        epsilon = epsilon_schedule(state.update_steps)

        def step(carry, inputs):
            (state, final_obs), (t, key_act, keys_step) = carry, inputs
            q_values = q_function(state, state.obs)
            action = epsilon_greedy(key_act, q_values, epsilon)
            obs, env_state, reward, terminated, truncated, info = env_step(
                keys_step, state.env_state, action, env_params
            )
            transition = Transition(state.obs, action, reward, terminated, truncated, q_values.max(-1))
            where_truncated = truncated.reshape(-1, *[1] * (obs.ndim - 1))
            kept = jnp.where(where_truncated, info["final_observation"], final_obs[t // block])
            final_obs = final_obs.at[t // block].set(kept)
            done, returns, lengths = terminated | truncated, state.episode_return + reward, state.episode_length + 1
            state = state.replace(env_state=env_state, obs=obs)
            state = state.replace(episode_return=returns * ~done, episode_length=lengths * ~done)
            return (state, final_obs), (transition, (done, returns, lengths))

        key, key_act, key_step = jax.random.split(state.key, 3)
        keys_act = jax.random.split(key_act, config.NUM_STEPS)
        keys_step = jax.random.split(key_step, (config.NUM_STEPS, config.NUM_ENVS))
        final_obs = jnp.zeros((num_blocks, *state.obs.shape), state.obs.dtype)
        carry, inputs = (state.replace(key=key), final_obs), (jnp.arange(config.NUM_STEPS), keys_act, keys_step)
        (state, final_obs), (trajectory, episodes) = jax.lax.scan(step, carry, inputs)
        return state, trajectory, final_obs, episodes

    # TARGETS
    def targets(state, trajectory, final_obs):
        value = q_function(state, jnp.concatenate([state.obs[None], final_obs])).max(-1)
        next_value = jnp.concatenate([trajectory.value[1:], value[:1]])
        final_value = jnp.repeat(value[1:], block, axis=0)[: config.NUM_STEPS]
        next_value = jnp.where(trajectory.truncated, final_value, next_value)
        discount = config.GAMMA * (1.0 - trajectory.terminated)
        trace = config.LAMBDA * (1.0 - (trajectory.terminated | trajectory.truncated))
        return q_lambda_targets(config.REW_SCALE * trajectory.reward, discount, next_value, trace)

    # LEARNING
    def learn(state, minibatch):
        obs, action, target = minibatch

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            q_values, updated = network.apply(variables, obs, train=True, mutable=["batch_stats"])
            q_action = jnp.sum(q_values * jax.nn.one_hot(action, q_values.shape[-1]), -1)
            return 0.5 * jnp.square(q_action - target).mean(), (q_action.mean(), updated.get("batch_stats", {}))

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
        state, trajectory, final_obs, (done, returns, lengths) = rollout(state)
        batch = (trajectory.obs, trajectory.action, targets(state, trajectory, final_obs))
        key, key_shuffle = jax.random.split(state.key)

        def epoch(state, key):
            return jax.lax.scan(learn, state, shuffle_minibatches(key, batch, config.NUM_MINIBATCHES))

        state, losses = jax.lax.scan(epoch, state.replace(key=key), jax.random.split(key_shuffle, config.NUM_EPOCHS))
        state = state.replace(update_steps=state.update_steps + 1)
        metrics |= jax.tree.map(jnp.mean, losses)
        metrics["returned_episode_returns"] = jnp.sum(returns * done) / jnp.sum(done)  # NaN where no episode ended
        metrics["returned_episode_lengths"] = jnp.sum(lengths * done) / jnp.sum(done)
        return state, metrics | {"update_steps": state.update_steps}

    # EVALUATION
    def evaluate(state, key):
        keys = jax.random.split(key, config.TEST_NUM_ENVS + 1)
        obs, env_state = env_reset(keys[1:], env_params)
        zeros = jnp.zeros(config.TEST_NUM_ENVS)

        def step(carry):
            t, key, obs, env_state, ended, returns, lengths = carry
            keys = jax.random.split(key, config.TEST_NUM_ENVS + 2)  # the next key, one to act, one for each environment
            action = epsilon_greedy(keys[1], q_function(state, obs), config.EPS_TEST)
            obs, env_state, reward, terminated, truncated, _ = env_step(keys[2:], env_state, action, env_params)
            returns, lengths = returns + reward * ~ended, lengths + ~ended
            return t + 1, keys[0], obs, env_state, ended | terminated | truncated, returns, lengths

        def playing(carry):
            return (carry[0] < (config.TEST_NUM_STEPS or time_limit)) & ~carry[4].all()

        carry = jax.lax.while_loop(playing, step, (0, keys[0], obs, env_state, zeros > 0, zeros, zeros))
        ended, returns, lengths = carry[4:]
        return {
            "test/returned_episode_returns": jnp.sum(returns * ended) / jnp.sum(ended),
            "test/returned_episode_lengths": jnp.sum(lengths * ended) / jnp.sum(ended),
            "test/unfinished": jnp.sum(~ended).astype(jnp.float32),
        }

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

    vars(train).update(
        init=init, rollout=rollout, targets=targets, learn=learn, update=update, evaluate=evaluate, test=test
    )
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
