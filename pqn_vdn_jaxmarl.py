# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "jaxmarl>=0.2", "six",
#   "hydra-core>=1.3.2", "omegaconf>=2.3", "orbax-checkpoint>=0.11", "safetensors>=0.5",
#   "matplotlib>=3.8", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN (Gallici et al., ICLR 2025, arXiv 2407.04811) with value decomposition (VDN, Sunehag et al., arXiv 1706.05296) for
the teams of JaxMARL, in one file. Documentation: docs/pqn_vdn_jaxmarl.md

    python pqn_vdn_jaxmarl.py                                            # MPE simple_spread with the defaults of Config
    python pqn_vdn_jaxmarl.py +alg=pqn_vdn_smax alg.MAP_NAME=3s5z NUM_SEEDS=5
    python pqn_vdn_jaxmarl.py +alg=pqn_vdn_overcooked alg.ENV_KWARGS.layout=coord_ring
    python pqn_vdn_jaxmarl.py RESUME=latest                              # go on with a run that was stopped

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
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
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
with redirect_stdout(io.StringIO()), redirect_stderr(sys.stderr):  # importing JaxMARL prints, and changes both
    import jaxmarl  # it starts JAX
from jaxmarl.environments.overcooked import overcooked_layouts  # noqa: E402
from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO  # noqa: E402

SCRIPT = "pqn_vdn_jaxmarl"
# What the published recipe sets beside Config's neutral defaults. A run for which no recipe is named has it, too.
RECIPE = {}
# The environments of teams. In those marked True all agents are given the team's reward; in the others each has its own,
# and the team's is the sum.
ENVIRONMENTS = {
    "HeuristicEnemySMAX": True, "overcooked": True, "hanabi": True, "switch_riddle": True,
    "MPE_simple_spread_v3": False, "MPE_simple_reference_v3": False, "MPE_simple_speaker_listener_v4": False,
}  # fmt: skip
MPE_OPTIONS = (
    "rad moveable silent collide mass accel max_speed u_noise c_noise damping contact_force contact_margin".split()
)


class UserError(ValueError):
    """A mistake of the user's: its message is one line with the key, the value and what is allowed."""


@dataclass
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; counts may be written 1e7. Raises UserError if wrong."""

    ENV_NAME: str = "MPE_simple_spread_v3"  # one of ENVIRONMENTS
    MAP_NAME: str | None = None  # of HeuristicEnemySMAX, null: 2s3z; the others have none
    ENV_KWARGS: dict = field(default_factory=dict)  # for the environment's constructor; overcooked: layout, by name
    ALG_NAME: str = "pqn_vdn_mpe"  # a label for logs
    NETWORK: str = "mlp"  # rnn: with a GRU; cnn: observations are images; mlp
    TOTAL_TIMESTEPS: float = 1e7  # environment steps of one seed
    TOTAL_TIMESTEPS_DECAY: float | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: float = 256  # environments in parallel, N
    NUM_STEPS: float = 16  # steps of each environment between updates, T
    MEMORY_WINDOW: float = 0  # rnn: steps before a rollout that are trained on again, W
    NUM_MINIBATCHES: float = 16  # gradient steps per epoch; must divide N * T, with rnn N
    NUM_EPOCHS: float = 4  # passes over a rollout
    EPS_START: float = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: float = 0.1  # and at the end
    EPS_DECAY: float = 0.1  # fraction of the schedule after which EPS_FINISH is reached
    LR: float = 5e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = False  # linearly to 0 over the schedule
    MAX_GRAD_NORM: float = 1.0  # clipping of the gradient's global norm
    GAMMA: float = 0.9  # discount
    LAMBDA: float = 0.3  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 1.0  # scales the rewards learned from, never those reported
    REW_SHAPING_HORIZON: float | None = None  # steps over which the shaped reward fades out; null: none is added
    HIDDEN_SIZE: float = 256  # units of each hidden layer
    NUM_LAYERS: float = 2  # hidden layers, after the convolutions, before the GRU
    DUELING: bool = False  # Q = value + advantages, less their mean
    NORM_TYPE: str = "layer_norm"  # after each hidden layer: layer_norm, batch_norm or none
    NORM_INPUT: bool = False  # batch-normalise observations
    TEST_DURING_TRAINING: bool = True  # evaluate every TEST_INTERVAL; a run ends with an evaluation either way
    TEST_INTERVAL: float = 0.05  # as a fraction of all updates
    TEST_NUM_ENVS: float = 512  # episodes per evaluation
    TEST_NUM_STEPS: float | None = None  # at most this many steps each; null: the environment's time limit
    EPS_TEST: float = 0.0  # exploration in evaluation

    def __post_init__(self):
        check_numbers(self)
        if self.ENV_NAME == "HeuristicEnemySMAX":
            self.MAP_NAME = self.MAP_NAME or "2s3z"
        kinds, norms = ("rnn", "cnn", "mlp"), ("layer_norm", "batch_norm", "none")
        check(self, "NETWORK", self.NETWORK in kinds, "rnn, cnn or mlp")
        check(self, "NORM_TYPE", self.NORM_TYPE in norms, "layer_norm, batch_norm or none")
        longest = self.NUM_STEPS if self.NETWORK == "rnn" else 0
        check(self, "MEMORY_WINDOW", self.MEMORY_WINDOW <= longest, f"at most {longest}: NUM_STEPS with rnn, else 0")
        divides = self.NETWORK != "rnn" or self.NUM_ENVS % self.NUM_MINIBATCHES == 0
        check(self, "NUM_MINIBATCHES", divides, f"a divisor of NUM_ENVS = {self.NUM_ENVS} with NETWORK=rnn")
        horizon, env = self.REW_SHAPING_HORIZON, make_env(self)
        check(self, "ENV_KWARGS", env.time_limit > 1, "with max_steps of at least 1")
        check(self, "REW_SHAPING_HORIZON", horizon is None or horizon > 0, "greater than 0, or null")
        try:
            valid = env.has_shaped_reward() or horizon is None
        except Exception as error:  # JaxMARL looks at some of its options in a step only
            reason = str(error).splitlines()[0]
            raise UserError(f"alg.ENV_KWARGS={self.ENV_KWARGS} cannot be used for {self.ENV_NAME}: {reason}") from None
        check(self, "REW_SHAPING_HORIZON", valid, f"null: {self.ENV_NAME} has no shaped reward")
        shapes = [x.shape for x in env.observations().values()]
        check(self, "NETWORK", self.NETWORK != "cnn" or {len(x) for x in shapes} == {3}, "rnn or mlp: no images here")

    @property
    def NUM_UPDATES(self):
        """Updates of one run; each takes NUM_ENVS * NUM_STEPS environment steps."""
        return self.TOTAL_TIMESTEPS // (self.NUM_ENVS * self.NUM_STEPS)

    @property
    def TASK(self):
        """The task in folder names and titles: environment, map or layout, and its numbers of agents and the like."""
        places = {"HeuristicEnemySMAX": self.MAP_NAME, "overcooked": self.ENV_KWARGS.get("layout", "cramped_room")}
        place = [places[self.ENV_NAME]] if self.ENV_NAME in places else []
        sizes = [f"{key.removeprefix('num_')}{x}" for key, x in self.ENV_KWARGS.items() if key.startswith("num_")]
        return "_".join([self.ENV_NAME, *place, *sizes])


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


class TeamEnv:
    """A JaxMARL environment with the agents in an axis, A, and one reward.

    JaxMARL's CTRolloutManager does the same for dictionaries, but blanks agents that have ended after the automatic
    reset, too, and with them the first observations of the next episode.
    """

    def __init__(self, env, share_reward, flatten):
        self.env, self.agents, self.share_reward, self.flatten = env, env.agents, share_reward, flatten
        self.num_actions = int(max(env.action_space(agent).n for agent in env.agents))
        self.size = max(x.size for x in self.observations().values())
        self.time_limit = getattr(env, "max_steps", 100) + 1  # MPE ends one step late
        bonus = getattr(env, "won_battle_bonus", 0)
        self.win = bonus if bonus >= 1 else None  # SMAX: only a reward that includes it is as high, damage is at most 1

    def observations(self):
        """Shapes of the environment's own observations."""
        shapes, _ = jax.eval_shape(self.env.reset, jax.random.key(0))
        return {agent: shapes[agent] for agent in self.agents}

    def stack(self, obs):
        """Observations [A, ...]: images as they are; else flat, padded to the longest, with the agent's id one-hot."""
        obs = [obs[agent] for agent in self.agents]
        if not self.flatten:
            return jnp.stack(obs)
        obs = jnp.stack([jnp.pad(x.reshape(-1).astype(jnp.float32), (0, self.size - x.size)) for x in obs])
        return jnp.concatenate([obs, jnp.eye(len(self.agents))], 1)

    def reset(self, key):
        """Observations [A, ...] and a state."""
        obs, state = self.env.reset(key)
        return self.stack(obs), state

    def has_shaped_reward(self):
        """Whether the environment reports one."""
        key, actions = jax.random.key(0), dict.fromkeys(self.agents, jnp.int32(0))
        return "shaped_reward" in jax.eval_shape(lambda: self.env.step(key, self.env.reset(key)[1], actions)[4])

    def step(self, key, state, action):
        """Actions [A] -> observations, state, the team's reward, its shaped reward, and whether the episode has ended."""
        obs, state, reward, done, info = self.env.step(key, state, dict(zip(self.agents, action, strict=True)))
        obs, team_done = self.stack(obs), done["__all__"]
        gone = jnp.array([done[agent] for agent in self.agents]) & ~team_done  # a new episode has all agents again
        obs = jnp.where(gone.reshape(-1, *[1] * (obs.ndim - 1)), 0, obs)
        rewards = [reward[agent] for agent in self.agents]
        shaped_reward = sum(info["shaped_reward"].values()) if "shaped_reward" in info else 0.0
        return obs, state, rewards[0] if self.share_reward else sum(rewards), shaped_reward, team_done

    def available(self, state):
        """Which actions each agent can take, [A, num_actions]; those it does not have are never available."""
        try:
            moves = getattr(self.env, "get_legal_moves", self.env.get_avail_actions)(state)  # Hanabi has its own name
        except NotImplementedError:
            moves = {agent: jnp.ones(self.env.action_space(agent).n) for agent in self.agents}
        moves = [jnp.asarray(moves[agent], bool) for agent in self.agents]
        return jnp.stack([jnp.pad(x, (0, self.num_actions - len(x))) for x in moves])


def make_env(config):
    """The TeamEnv of a Config."""
    check(config, "ENV_NAME", config.ENV_NAME in ENVIRONMENTS, f"one of {', '.join(ENVIRONMENTS)}")
    kwargs = dict(config.ENV_KWARGS)
    smax = config.ENV_NAME == "HeuristicEnemySMAX"
    check(config, "MAP_NAME", smax or config.MAP_NAME is None, f"null: {config.ENV_NAME} has no maps")
    if smax:
        check(config, "MAP_NAME", config.MAP_NAME in MAP_NAME_TO_SCENARIO, f"one of {', '.join(MAP_NAME_TO_SCENARIO)}")
        fixed = "scenario num_allies num_enemies smacv2_position_generation smacv2_unit_type_generation".split()
        check(config, "ENV_KWARGS", not {*fixed} & {*kwargs}, f"without {', '.join(fixed)}: MAP_NAME sets them")
        mode = kwargs.get("attack_mode", "closest")
        check(config, "ENV_KWARGS", mode in ("closest", "random"), "with attack_mode closest or random")
        kwargs["scenario"] = MAP_NAME_TO_SCENARIO[config.MAP_NAME]
    if config.ENV_NAME == "overcooked":
        layout, layouts = kwargs.get("layout", "cramped_room"), ", ".join(overcooked_layouts)
        check(config, "ENV_KWARGS", layout in [*overcooked_layouts], f"with a layout of {layouts}")
        kwargs["layout"] = overcooked_layouts[layout]
    try:
        with warnings.catch_warnings(action="ignore"):  # Overcooked's: that there is a second version
            env = jaxmarl.make(config.ENV_NAME, **kwargs)
        classes = [*type(env).__mro__, *type(getattr(env, "_env", env)).__mro__]  # SMAX is inside HeuristicEnemySMAX
        known = {name for c in classes for name in inspect.signature(c.__init__).parameters}
        known = known - {"self", "args", "kwargs"} | set(MPE_OPTIONS if config.ENV_NAME.startswith("MPE") else ())
        if unknown := set(kwargs) - known:  # MPE takes any without a word
            raise TypeError(f"unknown {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
        return TeamEnv(env, ENVIRONMENTS[config.ENV_NAME], flatten=config.NETWORK != "cnn")
    except Exception as error:
        raise UserError(
            f"alg.ENV_NAME={config.ENV_NAME} alg.ENV_KWARGS={config.ENV_KWARGS} cannot be made: {error}"
        ) from None


class SameConv(nn.Module):
    """A convolution padded with zeros, [C, H, W, B] -> [features, H, W, B], with nn.Conv's parameters.

    Written as one matrix product over shifted slices: nn.Conv's gradient is slow inside a loop on CPU (JAX issue
    12868), and under a vmap over seeds it becomes a grouped convolution, slow on GPU (JAX issue 13800).
    """

    features: int
    size: int

    @nn.compact
    def __call__(self, x):
        def lecun_normal(key, shape):  # a matrix: on CPU random numbers in four dimensions compile for a second
            return nn.initializers.lecun_normal()(key, (math.prod(shape[:-1]), shape[-1])).reshape(shape)

        kernel = self.param("kernel", lecun_normal, (self.size, self.size, len(x), self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        (_, height, width, batch), pad = x.shape, (self.size // 2, self.size // 2)
        x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
        patches = jnp.concatenate([x[:, :, j : j + width] for j in range(self.size)])
        patches = jnp.concatenate([patches[:, i : i + height] for i in range(self.size)])
        x = kernel.reshape(-1, self.features).T @ patches.reshape(len(patches), -1) + bias[:, None]
        return x.reshape(self.features, height, width, batch)


class GRU(nn.Module):
    """nn.GRUCell over time: inputs [F, T * B] and a hidden state [B, H] -> outputs [H, T * B] and the hidden state after.

    done [T, B]: the hidden state is 0 after the step, not in it. One product makes the inputs to all gates of all steps.
    """

    features: int

    @nn.compact
    def __call__(self, x, hidden, done):
        def orthogonal(key, shape):
            blocks = [nn.initializers.orthogonal()(k, (shape[0], shape[0])) for k in jax.random.split(key, 3)]
            return jnp.concatenate(blocks, 1)

        size = self.features
        input_kernel = self.param("input_kernel", nn.initializers.lecun_normal(), (len(x), 3 * size))
        hidden_kernel = self.param("hidden_kernel", orthogonal, (size, 3 * size))
        input_bias = self.param("input_bias", nn.initializers.zeros, (3 * size,))
        hidden_bias = self.param("hidden_bias", nn.initializers.zeros, (size,))  # of the candidate, as in nn.GRUCell

        def step(hidden, inputs):
            x, done = inputs
            h = hidden @ hidden_kernel
            reset, update = jnp.split(nn.sigmoid(x[:, : 2 * size] + h[:, : 2 * size]), 2, 1)
            candidate = nn.tanh(x[:, 2 * size :] + reset * (h[:, 2 * size :] + hidden_bias))
            hidden = (1 - update) * candidate + update * hidden
            return jnp.where(done[:, None], 0, hidden), hidden

        inputs = (x.T @ input_kernel + input_bias).reshape(*done.shape, -1)
        hidden, outputs = jax.lax.scan(step, hidden, (inputs, done))
        return outputs.reshape(-1, size).T, hidden


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
    """Q(o, .) of each agent, all with the same parameters: [T, N, A, *obs] -> ([T, N, A, num_actions], hidden state).

    Only an rnn reads the hidden state [N, A, H] and done [T, N], after which it starts again from 0. A normalisation
    layer stands between each hidden layer and its ReLU. Inside, features lead and the batch is last.
    """

    num_actions: int
    network: str = "mlp"
    hidden_size: int = 256
    num_layers: int = 2
    dueling: bool = False
    norm_type: str = "layer_norm"
    norm_input: bool = False

    @nn.compact
    def __call__(self, obs, hidden=(), done=None, train=False):
        batch_norm = partial(nn.BatchNorm, use_running_average=not train, axis=0)
        norm = {"layer_norm": LayerNorm, "batch_norm": batch_norm, "none": lambda: lambda x: x}[self.norm_type]
        batch = obs.shape[:3]
        x = jnp.moveaxis(obs.reshape(-1, *obs.shape[3:]), (0, -1), (-1, 0)).astype(jnp.float32)
        x = batch_norm()(x) if self.norm_input else x
        for size in (5, 3, 3) if self.network == "cnn" else ():
            x = nn.relu(norm()(SameConv(32, size)(x)))
        x = x.reshape(-1, x.shape[-1])
        for _ in range(self.num_layers):
            x = nn.relu(norm()(Dense(self.hidden_size)(x)))
        if self.network == "rnn":
            done = jnp.zeros(batch[:2], bool) if done is None else done
            done = jnp.broadcast_to(done[..., None], batch).reshape(batch[0], -1)
            x, last = GRU(self.hidden_size)(x, hidden.reshape(-1, self.hidden_size), done)
            hidden = last.reshape(hidden.shape)
        q_values = Dense(self.num_actions)(x)
        q_values = Dense(1)(x) + q_values - q_values.mean(0) if self.dueling else q_values
        return q_values.T.reshape(*batch, -1), hidden


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]."""

    obs: jax.Array  # [T, N, A, ...]
    action: jax.Array  # [T, N, A]
    available: jax.Array  # [T, N, A, num_actions]
    reward: jax.Array  # the team's, scaled and shaped
    done: jax.Array  # the episode ended; JaxMARL does not tell time limits apart
    value: jax.Array  # the team's value of s_t, by the parameters that acted


class TrainState(struct.PyTreeNode):
    """All that one seed needs to go on; what a checkpoint holds."""

    key: jax.Array
    update_steps: jax.Array
    params: Any
    batch_stats: Any  # running statistics of BatchNorm; empty without it
    opt_state: Any
    env_state: Any
    obs: jax.Array  # [N, A, ...]
    hidden: Any  # [N, A, H], of the GRU; empty without it
    window: Any  # rnn: the last MEMORY_WINDOW transitions, [W, N, ...], and the hidden state before them
    episode_return: jax.Array  # [N], of the episodes under way
    episode_length: jax.Array


def explore(key, q_values, available, epsilon):
    """A random available action with probability epsilon, else the greedy one. Both [..., A] -> actions [...]."""
    explore, choice = jax.random.uniform(key, (2, *q_values.shape[:-1]))
    count = jnp.cumsum(available, -1)
    random_action = jnp.argmax(count > choice[..., None] * count[..., -1:], -1)
    return jnp.where(explore < epsilon, random_action, jnp.where(available, q_values, -jnp.inf).argmax(-1))


def team_value(q_values, available):
    """The sum over agents of the maximum over available actions: [..., A, num_actions] -> [...]."""
    return jnp.where(available, q_values, -jnp.inf).max(-1).sum(-1)


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
    sizes = (make_env(config).num_actions, config.NETWORK, config.HIDDEN_SIZE, config.NUM_LAYERS, config.DUELING)
    return QNetwork(*sizes, config.NORM_TYPE, config.NORM_INPUT)


def make_train(config):
    """Build `train(keys)`: a whole run for each key, compiled as one program, seeds vmapped (see its docstring)."""
    env, network = make_env(config), make_network(config)
    env_reset, env_step, env_available = jax.vmap(env.reset), jax.vmap(env.step), jax.vmap(env.available)
    recurrent, num_window = config.NETWORK == "rnn", config.MEMORY_WINDOW
    decay_updates = (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) // (config.NUM_ENVS * config.NUM_STEPS)
    eps_updates = max(1, config.EPS_DECAY * decay_updates)
    grad_steps = config.NUM_EPOCHS * config.NUM_MINIBATCHES  # of one update
    epsilon_schedule = optax.linear_schedule(config.EPS_START, config.EPS_FINISH, eps_updates)
    lr_schedule = optax.linear_schedule(
        config.LR, 0.0 if config.LR_LINEAR_DECAY else config.LR, decay_updates * grad_steps
    )
    shaping_updates = (config.REW_SHAPING_HORIZON or 0) / (config.NUM_ENVS * config.NUM_STEPS)
    shaping_schedule = optax.linear_schedule(float(shaping_updates > 0), 0.0, shaping_updates or 1)
    optimizer = optax.chain(optax.clip_by_global_norm(config.MAX_GRAD_NORM), optax.radam(lr_schedule))

    def q_function(state, obs, hidden):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        q_values, hidden = network.apply(variables, obs[None], hidden)
        return q_values[0], hidden

    def initial_hidden(num_envs):
        return jnp.zeros((num_envs, len(env.agents), config.HIDDEN_SIZE)) if recurrent else ()

    def unless(done, hidden):
        return jax.tree.map(lambda h: jnp.where(done[:, None, None], 0, h), hidden)

    def init(key):
        key, key_network, key_reset = jax.random.split(key, 3)
        obs, env_state = env_reset(jax.random.split(key_reset, config.NUM_ENVS))
        hidden, zeros = initial_hidden(config.NUM_ENVS), jnp.zeros(config.NUM_ENVS)
        variables = network.init(key_network, obs[None], hidden)
        params = variables["params"]
        state = TrainState(
            key=key, update_steps=jnp.int32(0), params=params, batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params), env_state=env_state, obs=obs, hidden=hidden, window=(),
            episode_return=zeros, episode_length=zeros,
        )  # fmt: skip
        if num_window:
            _, trajectory, *_ = jax.eval_shape(rollout, state)
            window = jax.tree.map(
                lambda x: jnp.ones((num_window, *x.shape[1:]), x.dtype), trajectory
            )  # masked, but for
            window = window._replace(obs=jnp.broadcast_to(obs, window.obs.shape))  # batch statistics, which see these
            state = state.replace(window=(window, hidden))
        return state

    # ROLLOUT
    def rollout(state):
        epsilon, shaping = epsilon_schedule(state.update_steps), shaping_schedule(state.update_steps)

        def step(carry, inputs):
            (state, kept), (t, key_act, keys_step) = carry, inputs
            kept = jax.tree.map(partial(jnp.where, t == config.NUM_STEPS - num_window), state.hidden, kept)
            q_values, hidden = q_function(state, state.obs, state.hidden)
            available = env_available(state.env_state)
            action = explore(key_act, q_values, available, epsilon)
            obs, env_state, reward, shaped_reward, done = env_step(keys_step, state.env_state, action)
            learned_from = config.REW_SCALE * (reward + shaping * shaped_reward)
            value = team_value(q_values, available)
            transition = Transition(state.obs, action, available, learned_from, done, value)
            returns, lengths = state.episode_return + reward, state.episode_length + 1
            state = state.replace(env_state=env_state, obs=obs, hidden=unless(done, hidden))
            state = state.replace(episode_return=returns * ~done, episode_length=lengths * ~done)
            return (state, kept), (transition, (done, returns, lengths, reward))

        key, key_act, key_step = jax.random.split(state.key, 3)
        keys_act = jax.random.split(key_act, config.NUM_STEPS)
        keys_step = jax.random.split(key_step, (config.NUM_STEPS, config.NUM_ENVS))
        carry, inputs = (state.replace(key=key), state.hidden), (jnp.arange(config.NUM_STEPS), keys_act, keys_step)
        (state, kept), (trajectory, episodes) = jax.lax.scan(step, carry, inputs)
        if num_window:
            state = state.replace(window=(jax.tree.map(lambda x: x[-num_window:], trajectory), kept))
        return state, trajectory, episodes

    # TARGETS: of transitions [T, N], from the team's values [T + 1, N]
    def targets(trajectory, value):
        going_on = 1.0 - trajectory.done
        return q_lambda_targets(trajectory.reward, config.GAMMA * going_on, value[1:], config.LAMBDA * going_on)

    def last_step(state):
        """The state after a rollout as a transition that is not trained on, only its value is needed: [1, N, ...]."""
        available, zeros = env_available(state.env_state), jnp.zeros(config.NUM_ENVS)
        value = zeros if recurrent else team_value(q_function(state, state.obs, state.hidden)[0], available)
        step = Transition(state.obs, jnp.zeros(available.shape[:2], jnp.int32), available, zeros, zeros > 0, value)
        return jax.tree.map(lambda x: x[None], step)

    # WHAT IS TRAINED ON, [rows, columns, ...], of which minibatches are drawn: transitions with their targets
    def transitions(state, trajectory):
        value = jnp.concatenate([trajectory.value, last_step(state).value])
        return (), trajectory, targets(trajectory, value)

    # or, of one row, whole sequences: the window, the rollout and the state after it, and the hidden state before them
    def sequences(before, state, trajectory):
        window, hidden = before.window if num_window else ((), before.hidden)
        parts = (window, trajectory, last_step(state)) if num_window else (trajectory, last_step(state))
        sequence = jax.tree.map(lambda *x: jnp.concatenate(x).swapaxes(0, 1)[None], *parts)
        return hidden[None], sequence, ()

    # LEARNING
    def learn(state, minibatch):
        hidden, steps, target = minibatch
        if recurrent:  # [B, T, ...] -> [T, B, ...]; there is nothing before the first rollout
            steps = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)
            real = (jnp.arange(len(steps.done) - 1) >= num_window) | (state.update_steps > 0)
        else:
            steps, target, real = *jax.tree.map(lambda x: x[None], (steps, target)), jnp.array([True])

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            (q_values, _), updated = network.apply(
                variables, steps.obs, hidden, steps.done, train=True, mutable=["batch_stats"]
            )
            q_team = jnp.sum(q_values * jax.nn.one_hot(steps.action, q_values.shape[-1]), (-2, -1))
            q_target = target
            if recurrent:  # from the same pass, with the parameters of now
                q_team, before_last = q_team[:-1], jax.tree.map(lambda x: x[:-1], steps)
                q_target = targets(before_last, jax.lax.stop_gradient(team_value(q_values, steps.available)))
            mean = partial(jnp.mean, where=real[:, None])
            return 0.5 * mean(jnp.square(q_team - q_target)), (mean(q_team), updated.get("batch_stats", {}))

        (td_loss, (qvals, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(
            params=optax.apply_updates(state.params, changes), batch_stats=batch_stats, opt_state=opt_state
        )
        return state, {"td_loss": td_loss, "qvals": qvals, "grad_norm": optax.tree.norm(grads)}

    # EPISODES: means over those that ended, NaN where none did
    def episode_metrics(done, returns, lengths, last_reward):
        values = {"returned_episode_returns": returns, "returned_episode_lengths": lengths}
        values |= {"returned_won_episode": last_reward >= env.win} if env.win else {}
        return {name: jnp.sum(x * done) / jnp.sum(done) for name, x in values.items()}

    # ONE UPDATE
    def update(state):
        metrics = {
            "epsilon": epsilon_schedule(state.update_steps),
            "learning_rate": lr_schedule(state.update_steps * grad_steps),
        }
        before = state
        state, trajectory, episodes = rollout(state)
        batch = sequences(before, state, trajectory) if recurrent else transitions(state, trajectory)
        key, key_shuffle = jax.random.split(state.key)

        def epoch(state, key):
            return jax.lax.scan(learn, state, shuffle_minibatches(key, batch, config.NUM_MINIBATCHES))

        state, losses = jax.lax.scan(epoch, state.replace(key=key), jax.random.split(key_shuffle, config.NUM_EPOCHS))
        state = state.replace(update_steps=state.update_steps + 1)
        metrics |= jax.tree.map(jnp.mean, losses) | episode_metrics(*episodes)
        return state, metrics | {"update_steps": state.update_steps}

    # EVALUATION
    def evaluate(state, key):
        key, key_reset = jax.random.split(key)
        obs, env_state = env_reset(jax.random.split(key_reset, config.TEST_NUM_ENVS))
        hidden, zeros = initial_hidden(config.TEST_NUM_ENVS), jnp.zeros(config.TEST_NUM_ENVS)

        def step(carry):
            t, key, obs, hidden, env_state, (ended, returns, lengths, last_reward) = carry
            key, key_act, key_step = jax.random.split(key, 3)
            q_values, hidden = q_function(state, obs, hidden)
            action = explore(key_act, q_values, env_available(env_state), config.EPS_TEST)
            keys_step = jax.random.split(key_step, config.TEST_NUM_ENVS)
            obs, env_state, reward, _, done = env_step(keys_step, env_state, action)
            last_reward = jnp.where(ended, last_reward, reward)
            episodes = (ended | done, returns + reward * ~ended, lengths + ~ended, last_reward)
            return t + 1, key, obs, unless(done, hidden), env_state, episodes

        def playing(carry):
            return (carry[0] < (config.TEST_NUM_STEPS or env.time_limit)) & ~carry[-1][0].all()

        carry = (0, key, obs, hidden, env_state, (zeros > 0, zeros, zeros, zeros))
        episodes = jax.lax.while_loop(playing, step, carry)[-1]
        metrics = {f"test/{name}": value for name, value in episode_metrics(*episodes).items()}
        return metrics | {"test/unfinished": jnp.sum(~episodes[0]).astype(jnp.float32)}

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

    vars(train).update(init=init, rollout=rollout, targets=targets, learn=learn)
    vars(train).update(transitions=transitions, sequences=sequences, update=update, evaluate=evaluate, test=test)
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
