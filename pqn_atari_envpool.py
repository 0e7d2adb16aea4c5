# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "envpool>=1.2.5",
#   "hydra-core>=1.3.2", "omegaconf>=2.3", "orbax-checkpoint>=0.11", "safetensors>=0.5",
#   "matplotlib>=3.8", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN (Gallici et al., ICLR 2025, arXiv 2407.04811) on Atari, in one file. Documentation: docs/pqn_atari_envpool.md

    python pqn_atari_envpool.py                                          # Pong with the defaults of Config
    python pqn_atari_envpool.py +alg=pqn_atari alg.ENV_NAME=Breakout-v5 NUM_SEEDS=3
    python pqn_atari_envpool.py +alg=pqn_atari_sticky alg.ENV_NAME=Qbert-v5
    python pqn_atari_envpool.py RESUME=latest                            # go on with a run that was stopped

From Python, or after pasting this file into a notebook cell: `out = run(Config(TOTAL_TIMESTEPS=1e6), NUM_SEEDS=3)`.
"""

import csv
import dataclasses
import difflib
import importlib.metadata
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from tqdm import tqdm

SCRIPT = "pqn_atari_envpool"
# What the published recipe sets beside Config's neutral defaults. A run for which no recipe is named has it, too.
RECIPE = {}

# Game: scores of a random policy and of a human (Wang et al., 2016, arXiv 1511.06581, and DQN Zoo), 30 no-op starts.
HUMAN = {
    "Alien-v5": (227.8, 7127.7), "Amidar-v5": (5.8, 1719.5), "Assault-v5": (222.4, 742.0),
    "Asterix-v5": (210.0, 8503.3), "Asteroids-v5": (719.1, 47388.7), "Atlantis-v5": (12850.0, 29028.1),
    "BankHeist-v5": (14.2, 753.1), "BattleZone-v5": (2360.0, 37187.5), "BeamRider-v5": (363.9, 16926.5),
    "Berzerk-v5": (123.7, 2630.4), "Bowling-v5": (23.1, 160.7), "Boxing-v5": (0.1, 12.1), "Breakout-v5": (1.7, 30.5),
    "Centipede-v5": (2090.9, 12017.0), "ChopperCommand-v5": (811.0, 7387.8), "CrazyClimber-v5": (10780.5, 35829.4),
    "Defender-v5": (2874.5, 18688.9), "DemonAttack-v5": (152.1, 1971.0), "DoubleDunk-v5": (-18.6, -16.4),
    "Enduro-v5": (0.0, 860.5), "FishingDerby-v5": (-91.7, -38.7), "Freeway-v5": (0.0, 29.6),
    "Frostbite-v5": (65.2, 4334.7), "Gopher-v5": (257.6, 2412.5), "Gravitar-v5": (173.0, 3351.4),
    "Hero-v5": (1027.0, 30826.4), "IceHockey-v5": (-11.2, 0.9), "Jamesbond-v5": (29.0, 302.8),
    "Kangaroo-v5": (52.0, 3035.0), "Krull-v5": (1598.0, 2665.5), "KungFuMaster-v5": (258.5, 22736.3),
    "MontezumaRevenge-v5": (0.0, 4753.3), "MsPacman-v5": (307.3, 6951.6), "NameThisGame-v5": (2292.3, 8049.0),
    "Phoenix-v5": (761.4, 7242.6), "Pitfall-v5": (-229.4, 6463.7), "Pong-v5": (-20.7, 14.6),
    "PrivateEye-v5": (24.9, 69571.3), "Qbert-v5": (163.9, 13455.0), "Riverraid-v5": (1338.5, 17118.0),
    "RoadRunner-v5": (11.5, 7845.0), "Robotank-v5": (2.2, 11.9), "Seaquest-v5": (68.4, 42054.7),
    "Skiing-v5": (-17098.1, -4336.9), "Solaris-v5": (1236.3, 12326.7), "SpaceInvaders-v5": (148.0, 1668.7),
    "StarGunner-v5": (664.0, 10250.0), "Surround-v5": (-10.0, 6.5), "Tennis-v5": (-23.8, -8.3),
    "TimePilot-v5": (3568.0, 5229.2), "Tutankham-v5": (11.4, 167.6), "UpNDown-v5": (533.4, 11693.2),
    "Venture-v5": (0.0, 1187.5), "VideoPinball-v5": (16256.9, 17667.9), "WizardOfWor-v5": (563.5, 4756.5),
    "YarsRevenge-v5": (3092.9, 54576.9), "Zaxxon-v5": (32.5, 9173.3),
}  # fmt: skip


class UserError(ValueError):
    """A mistake of the user's: its message is one line with the key, the value and what is allowed."""


def published_protocol():
    """What envpool is told by default: a lost life ends an episode, rewards are clipped to -1, 0, 1."""
    return {
        "episodic_life": True,
        "reward_clip": True,
        "repeat_action_probability": 0.0,
        "frame_skip": 4,
        "noop_max": 30,
    }


@dataclass
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; counts may be written 1e7. Raises UserError if wrong."""

    ENV_NAME: str = "Pong-v5"  # any Atari game of envpool's
    ENV_KWARGS: dict = field(default_factory=published_protocol)  # envpool's options, over the published protocol's
    ALG_NAME: str = "pqn_atari"  # a label for logs
    TOTAL_TIMESTEPS: float = 5e7  # environment steps of one seed, of frame_skip frames each
    TOTAL_TIMESTEPS_DECAY: float | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: float = 128  # emulators in parallel, N
    NUM_STEPS: float = 32  # steps of each emulator between updates, T
    NUM_MINIBATCHES: float = 32  # gradient steps per epoch; must divide N * T
    NUM_EPOCHS: float = 2  # passes over a rollout
    EPS_START: float = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: float = 0.001  # and at the end
    EPS_DECAY: float = 0.1  # fraction of the schedule after which EPS_FINISH is reached
    LR: float = 2.5e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = False  # linearly to 0 over the schedule
    MAX_GRAD_NORM: float = 10.0  # clipping of the gradient's global norm
    GAMMA: float = 0.99  # discount
    LAMBDA: float = 0.65  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 1.0  # scales the rewards learned from, never those reported
    DUELING: bool = False  # Q = value + advantages, less their mean (Wang et al. 2016, arXiv 1511.06581, equation 9)
    NORM_TYPE: str = "layer_norm"  # after each hidden layer: layer_norm, batch_norm or none
    NORM_INPUT: bool = False  # batch-normalise observations
    TEST_DURING_TRAINING: bool = True  # TEST_ENVS emulators play beside training; without, only after it
    TEST_ENVS: float = 8  # emulators that never learn, E
    EPS_TEST: float = 0.0  # exploration in evaluation

    def __post_init__(self):
        check_numbers(self)
        self.ENV_KWARGS = published_protocol() | self.ENV_KWARGS
        make_env(self)
        sizes = [self.ENV_KWARGS.get(key, 84) for key in ("img_height", "img_width")]
        check(self, "ENV_KWARGS", min(sizes) >= 36, "with screens of at least 36 x 36 for the network's convolutions")
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


def make_env(config, seeds=(0,)):
    """A pool of emulators, one for each of `seeds`. The step after a `done` resets: it ignores its action."""
    if sys.platform != "linux":
        raise UserError(f"envpool's XLA interface, which this script needs, is for Linux only, not for {sys.platform}")
    try:
        import envpool
        from envpool.atari.registration import atari_game_list
    except ImportError as error:
        wheels = "`pip install 'envpool>=1.2.5'`, which has wheels for Linux"
        raise UserError(f"envpool is needed and cannot be imported ({error}): {wheels}") from None
    games = {"".join(map(str.capitalize, game.split("_"))) + "-v5": game for game in atari_game_list}
    near = difflib.get_close_matches(config.ENV_NAME.split("-")[0] + "-v5", games, cutoff=0.5)
    check(config, "ENV_NAME", config.ENV_NAME in games, f"an Atari game, such as {' or '.join(near or ['Pong-v5'])}")
    defaults = envpool.make_spec(config.ENV_NAME).config._asdict()
    ours = "num_envs batch_size seed env_seed task base_path max_num_players gym_reset_return_info".split()
    ours.append("zero_discount_on_life_loss")  # of a discount that is not used here: `episodic_life` ends the episode
    least = {
        "num_threads": 0,
        "thread_affinity_offset": -1,
        "mode": -1,
        "difficulty": -1,
        "repeat_action_probability": 0,
    }
    for key, value in config.ENV_KWARGS.items():  # envpool crashes on some values, and takes others without a word
        default, name = defaults.get(key), f"alg.ENV_KWARGS.{key}={value!r}"
        if key in ours or default is None:
            raise UserError(f"{name} is unknown; it takes {', '.join(sorted(set(defaults) - set(ours)))}")
        low, high = least.get(key, 1), 1 if key == "repeat_action_probability" else 2**31 - 1
        kind = (int, float) if isinstance(default, float) else type(default)
        fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits or kind is not bool and not low <= value <= high:
            allowed = "true or false" if kind is bool else f"like {default}, from {low} to {high}"
            raise UserError(f"{name} is not allowed: must be {allowed}")
    try:
        return envpool.make_gymnasium(config.ENV_NAME, num_envs=len(seeds), seed=list(seeds), **config.ENV_KWARGS)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"alg.ENV_KWARGS={config.ENV_KWARGS} cannot be used for {config.ENV_NAME}: {reason}") from None


def emulator_seeds(keys, count):
    """The seeds of each key's `count` emulators, one list: a key's are the same whatever other keys there are."""
    rngs = (np.random.default_rng(data) for data in np.asarray(jax.random.key_data(keys)))
    return [int(seed) for rng in rngs for seed in rng.integers(2**31 - 1, size=count)]


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
    """Q(s, .) of bytes: [..., C, H, W] -> [..., A], after Mnih et al. (2015), with a normalisation layer before each ReLU.

    Inside, features lead and the batch is last: products and normalisation then run along long rows, fast on CPU.
    """

    num_actions: int
    dueling: bool = False
    norm_type: str = "layer_norm"
    norm_input: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        batch_norm = partial(nn.BatchNorm, use_running_average=not train, axis=0)
        norm = {"layer_norm": LayerNorm, "batch_norm": batch_norm, "none": lambda: lambda x: x}[self.norm_type]
        batch = x.shape[:-3]
        x = jnp.moveaxis(x.reshape(-1, *x.shape[-3:]), 0, -1).astype(jnp.float32) / 255
        x = batch_norm()(x) if self.norm_input else x
        for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(norm()(Conv(features, size, stride)(x)))
        x = x.reshape(-1, x.shape[-1])
        x = nn.relu(norm()(Dense(512, nn.initializers.he_normal())(x)))
        q_values = Dense(self.num_actions)(x)
        q_values = Dense(1)(x) + q_values - q_values.mean(0) if self.dueling else q_values
        return q_values.T.reshape(*batch, -1)


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]."""

    obs: jax.Array  # bytes
    action: jax.Array
    reward: jax.Array  # clipped, where envpool clips
    terminated: jax.Array  # the game ended or, with episodic_life, a life was lost
    truncated: jax.Array  # the time limit ended the game
    value: jax.Array  # max_a Q(s_t, a), by the parameters that acted
    real: jax.Array  # false where the step only reset the emulator: nothing to learn from


class TrainState(struct.PyTreeNode):
    """All that one seed needs to go on, but for its emulators; what a checkpoint holds."""

    key: jax.Array
    update_steps: jax.Array
    params: Any
    batch_stats: Any  # running statistics of BatchNorm; empty without it
    opt_state: Any
    pool: jax.Array  # names the emulators that the fields below belong to; 0: none yet
    obs: jax.Array  # [N + E, C, H, W]: training emulators, then test emulators
    done: jax.Array  # [N + E], the next step only resets
    game_return: jax.Array  # [N + E], raw rewards of the games under way
    last_return: jax.Array  # [N + E], of the latest full game, NaN before the first ends
    last_length: jax.Array


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
    return QNetwork(int(make_env(config).action_space.n), config.DUELING, config.NORM_TYPE, config.NORM_INPUT)


def make_train(config):
    """Build `train(keys)`: a whole run for each key, compiled as one program with all emulators (see its docstring)."""
    network, obs_shape = make_network(config), make_env(config).observation_space.shape
    num_envs, num_tests = config.NUM_ENVS, config.TEST_ENVS if config.TEST_DURING_TRAINING else 0
    decay_updates = (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) // (config.NUM_ENVS * config.NUM_STEPS)
    eps_updates = max(1, config.EPS_DECAY * decay_updates)
    grad_steps = config.NUM_EPOCHS * config.NUM_MINIBATCHES  # of one update
    epsilon_schedule = optax.linear_schedule(config.EPS_START, config.EPS_FINISH, eps_updates)
    lr_schedule = optax.linear_schedule(
        config.LR, 0.0 if config.LR_LINEAR_DECAY else config.LR, decay_updates * grad_steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.MAX_GRAD_NORM), optax.radam(lr_schedule))

    def each_seed(function, *args):
        # Seeds take turns on CPU, where one device steps all emulators and it is as fast; elsewhere they are vmapped.
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda args: function(*args), args)
        return jax.vmap(function)(*args)

    def q_function(state, obs):
        return network.apply({"params": state.params, "batch_stats": state.batch_stats}, obs)

    def init(key):
        key, key_network = jax.random.split(key)
        obs, zeros = jnp.zeros((num_envs + num_tests, *obs_shape), jnp.uint8), jnp.zeros(num_envs + num_tests)
        variables = network.lazy_init(key_network, jax.ShapeDtypeStruct(obs.shape, obs.dtype))
        params = variables["params"]
        return TrainState(
            key=key, update_steps=jnp.int32(0), params=params, batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params), pool=jnp.int32(0), obs=obs, done=zeros > 0, game_return=zeros,
            last_return=zeros + jnp.nan, last_length=zeros + jnp.nan,
        )  # fmt: skip

    def emulate(env, action):
        """Step all emulators of a pool: actions [S, E] -> obs, raw and learned rewards, terminated, truncated, ...

        Calls need no order of their own: an action depends on the observation of the call before.
        """
        handle, _, _, step = env.xla()
        _, (obs, reward, terminated, truncated, info) = step(handle, action.reshape(-1))
        terminated = terminated | (info["terminated"] > 0)  # a game that ends in the step of its time-out has ended
        game_over = truncated | (info["terminated"] > 0)  # `terminated` may be a lost life
        result = obs, reward, info["reward"], terminated, truncated, game_over, info["elapsed_step"]
        return jax.tree.map(lambda x: x.reshape(*action.shape, *x.shape[1:]), result)

    # ROLLOUT: of all seeds [S, ...] together, for their emulators are one pool, stepped flat
    def rollout(env, state):
        def act(state, key):
            key_act, key_test = jax.random.split(key)
            q_values = q_function(state, state.obs)
            action = epsilon_greedy(key_act, q_values[:num_envs], epsilon_schedule(state.update_steps))
            action_test = epsilon_greedy(key_test, q_values[num_envs:], config.EPS_TEST)
            return jnp.concatenate([action, action_test]), q_values.max(-1)

        def step(state, keys):
            action, value = each_seed(act, state, keys)
            obs, reward, score, terminated, truncated, game_over, length = emulate(env, action)
            transition = Transition(state.obs, action, reward, terminated, truncated, value, ~state.done)
            returns = state.game_return + score
            state = state.replace(
                obs=obs, done=terminated | truncated, game_return=returns * ~game_over,
                last_return=jnp.where(game_over, returns, state.last_return),
                last_length=jnp.where(game_over, length, state.last_length),
            )  # fmt: skip
            return state, jax.tree.map(lambda x: x[:, :num_envs], (transition, (game_over, returns, length)))

        key, key_act = jnp.moveaxis(jax.vmap(jax.random.split)(state.key), 1, 0)
        keys_act = jax.vmap(jax.random.split, (0, None), 1)(key_act, config.NUM_STEPS)
        state, steps = jax.lax.scan(step, state.replace(key=key), keys_act)
        return state, *jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps)

    # TARGETS, of one seed from here on. The observation at a `done` is the final one, even where time ran out, and the
    # reset comes one step later: V(s'_t) is the next step's value everywhere.
    def targets(state, trajectory):
        last_value = q_function(state, state.obs[:num_envs]).max(-1)
        next_value = jnp.concatenate([trajectory.value[1:], last_value[None]])
        discount = config.GAMMA * (1.0 - trajectory.terminated)
        trace = config.LAMBDA * (1.0 - (trajectory.terminated | trajectory.truncated))
        return q_lambda_targets(config.REW_SCALE * trajectory.reward, discount, next_value, trace)

    # LEARNING
    def learn(state, minibatch):
        obs, action, target, real = minibatch
        weight = real / jnp.maximum(real.sum(), 1)  # a mean over the real transitions

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            q_values, updated = network.apply(variables, obs, train=True, mutable=["batch_stats"])
            q_action = jnp.sum(q_values * jax.nn.one_hot(action, q_values.shape[-1]), -1)
            td_loss = 0.5 * jnp.sum(weight * jnp.square(q_action - target))
            return td_loss, (jnp.sum(weight * q_action), updated.get("batch_stats", {}))

        (td_loss, (qvals, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(
            params=optax.apply_updates(state.params, changes), batch_stats=batch_stats, opt_state=opt_state
        )
        return state, {"td_loss": td_loss, "qvals": qvals, "grad_norm": optax.tree.norm(grads)}

    # ONE UPDATE
    def update(state, trajectory, games):
        game_over, returns, lengths = games
        metrics = {
            "epsilon": epsilon_schedule(state.update_steps),
            "learning_rate": lr_schedule(state.update_steps * grad_steps),
        }
        batch = (trajectory.obs, trajectory.action, targets(state, trajectory), trajectory.real)
        key, key_shuffle = jax.random.split(state.key)

        def epoch(state, key):
            return jax.lax.scan(learn, state, shuffle_minibatches(key, batch, config.NUM_MINIBATCHES))

        state, losses = jax.lax.scan(epoch, state.replace(key=key), jax.random.split(key_shuffle, config.NUM_EPOCHS))
        state = state.replace(update_steps=state.update_steps + 1)
        metrics |= jax.tree.map(jnp.mean, losses)
        metrics["reset_steps"] = jnp.mean(~trajectory.real)
        metrics["returned_episode_returns"] = jnp.sum(returns * game_over) / jnp.sum(game_over)  # NaN where none ended
        metrics["returned_episode_lengths"] = jnp.sum(lengths * game_over) / jnp.sum(game_over)
        if config.TEST_DURING_TRAINING:
            metrics |= test_scores(state.last_return[num_envs:], state.last_length[num_envs:])
        return state, metrics | {"update_steps": state.update_steps}

    # EVALUATION
    def test_scores(returns, lengths):
        ended = ~jnp.isnan(returns)
        scores = {
            "test/returned_episode_returns": jnp.nanmean(returns),
            "test/returned_episode_lengths": jnp.nanmean(lengths),
            "test/unfinished": jnp.sum(~ended).astype(jnp.float32),
        }
        if config.ENV_NAME in HUMAN:
            low, human = HUMAN[config.ENV_NAME]
            scores["test/human_normalized_score"] = (scores["test/returned_episode_returns"] - low) / (human - low)
        return scores

    def test(state):
        """TEST_ENVS full games of every seed after training, on emulators of their own: [num_seeds] each."""
        keys = jax.vmap(partial(jax.random.fold_in, data=2**31 - 1))(state.key)  # a child that no split makes
        env = make_env(config, emulator_seeds(keys, config.TEST_ENVS))
        zeros = jnp.zeros((len(keys), config.TEST_ENVS))

        def act(state, key, obs):
            return epsilon_greedy(key, q_function(state, obs), config.EPS_TEST)

        def step(state, carry):
            keys, obs, game_return, returns, lengths = carry
            keys, keys_act = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            obs, _, score, _, _, game_over, length = emulate(env, each_seed(act, state, keys_act, obs))
            first, game_return = game_over & jnp.isnan(returns), game_return + score
            return keys, obs, game_return, jnp.where(first, game_return, returns), jnp.where(first, length, lengths)

        def play(state, obs):
            carry = keys, obs.reshape(*zeros.shape, *obs_shape), zeros, zeros + jnp.nan, zeros + jnp.nan
            carry = jax.lax.while_loop(lambda carry: jnp.isnan(carry[3]).any(), partial(step, state), carry)
            return jax.vmap(test_scores)(*carry[3:])

        return jax.block_until_ready(jax.jit(play)(state, env.reset()[0]))  # the emulators must outlive the play

    # THE WHOLE RUN: a scan over updates of all seeds
    def update_seeds(env, state):
        return each_seed(update, *rollout(env, state))

    def updates(env, state, active):
        step, idle = partial(update_seeds, env), lambda state: (state, nan_like(shapes))
        _, shapes = jax.eval_shape(step, state)
        return jax.lax.scan(lambda state, active: jax.lax.cond(active, step, idle, state), state, active)

    pool = {}  # the emulators in use, and the program compiled for them

    def connect(state):
        """The state, every leaf [S, ...], with emulators that start afresh."""
        num_seeds = len(state.update_steps)
        if not pool or pool["stepped"] or pool["num_seeds"] != num_seeds:
            env = make_env(config, emulator_seeds(state.key, num_envs + num_tests))
            updates_env = jax.jit(partial(updates, env), donate_argnums=0)
            obs = env.reset()[0].reshape(num_seeds, -1, *obs_shape)
            pool.update(name=time.time_ns() % 2**30, num_seeds=num_seeds, obs=obs, updates=updates_env, stepped=False)
        state = state.replace(obs=jnp.asarray(pool["obs"]), done=jnp.zeros_like(state.done))
        state = state.replace(game_return=jnp.zeros_like(state.game_return))
        return state.replace(pool=jnp.full(num_seeds, pool["name"]))

    def train(keys=None, state=None, num_updates=config.NUM_UPDATES, length=None):
        """Train one agent per key (`keys` [num_seeds]), or go on from `state`, which is consumed, for `num_updates`.

        Returns {"runner_state": every leaf [num_seeds, ...], "metrics": each [num_seeds, num_updates]}. Keys get
        emulators of their own, and so does a state whose emulators are gone or have moved on (from a checkpoint, or from
        before the latest call). The program is compiled for its emulators; calls of equal `length` >= num_updates share it.
        """
        if keys is not None:
            pool.clear()
            state = jax.jit(jax.vmap(init))(keys)
        if not pool or int(state.pool[0]) != pool["name"]:
            state = connect(state)
        active = jnp.arange(length or num_updates) < num_updates
        state, metrics = jax.block_until_ready(pool["updates"](state, active))  # the emulators must outlive their use
        pool["stepped"] |= num_updates > 0
        pool["name"] += num_updates  # a copy of the state before is no longer theirs
        state = state.replace(pool=jnp.full_like(state.pool, pool["name"]))
        return {"runner_state": state, "metrics": jax.tree.map(lambda x: x[:num_updates].T, metrics)}

    vars(train).update(init=init, connect=connect, rollout=rollout)
    vars(train).update(targets=targets, learn=learn, update=update, test=test)
    return train


def counters(config, update_steps):
    """Steps after so many updates, counted in Python: exact at any length."""
    env_step = update_steps * config.NUM_ENVS * config.NUM_STEPS
    grad_steps = update_steps * config.NUM_EPOCHS * config.NUM_MINIBATCHES
    return {
        "env_step": env_step,
        "env_frame": env_step * config.ENV_KWARGS.get("frame_skip", 4),
        "grad_steps": grad_steps,
    }


def nan_like(shapes):
    """A tree of NaN, 0 where integer, of the given shapes."""
    value = {True: jnp.nan, False: 0}
    return jax.tree.map(lambda x: jnp.full(x.shape, value[jnp.issubdtype(x.dtype, jnp.floating)], x.dtype), shapes)


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
