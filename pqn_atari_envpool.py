# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "envpool>=1.2.5", "hydra-core>=1.3.2",
#   "omegaconf>=2.3", "pydantic>=2.10", "orbax-checkpoint>=0.11", "safetensors>=0.5", "pandas>=2.2", "seaborn>=0.13",
#   "matplotlib>=3.8", "scipy>=1.15", "tqdm>=4.66", "wandb>=0.19",
# ]
# ///
"""PQN (Gallici et al., ICLR 2025, arXiv 2407.04811) on Atari, in one file. Documentation: docs/pqn_atari_envpool.md

python pqn_atari_envpool.py +alg=pqn_atari alg.ENV_NAME=Breakout-v5 NUM_SEEDS=3
python pqn_atari_envpool.py +alg=pqn_atari_sticky alg.ENV_NAME=Qbert-v5 alg.ENCODER=hadamax
python pqn_atari_envpool.py RESUME=latest                            # go on with a run that was stopped
out = run(Config(TOTAL_TIMESTEPS=1e6), NUM_SEEDS=3)                  # in a notebook, below a cell with this file
"""

import os
import re
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial, reduce
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
from flax import traverse_util
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from safetensors.numpy import load_file, save_file
from scipy.stats import trim_mean
from tqdm import tqdm

try:
    import envpool
except ImportError as error:  # one line on the command line
    text = f"Error: envpool is needed ({error}): `pip install 'envpool>=1.2.5'`, which has wheels for Linux"
    raise (SystemExit if __name__ == "__main__" else ImportError)(text) from None

CHECKED = {"extra": "forbid", "allow_inf_nan": False, "validate_assignment": True}
Fraction = Annotated[float, Field(ge=0, le=1)]
plain = partial(jax.tree.map, lambda x: x.item() if hasattr(x, "item") else x)  # numpy's numbers become Python's
Kwargs = Annotated[dict[str, JsonValue], BeforeValidator(plain)]
PROTOCOL = dict(episodic_life=True, reward_clip=True, repeat_action_probability=0.0, frame_skip=4, noop_max=30)
Options = Annotated[Kwargs, AfterValidator(lambda given: PROTOCOL | given)]  # over the published protocol's


@dataclass(config=CHECKED)
class Config:
    """Hyper-parameters, `alg.KEY=value` on the command line; the defaults are the published recipe."""

    ENV_NAME: str = "Pong-v5"  # any Atari game of envpool's
    ENV_KWARGS: Options = Field(default_factory=PROTOCOL.copy)  # envpool's options
    ALG_NAME: str = "pqn_atari"  # a label for logs
    TOTAL_TIMESTEPS: PositiveInt = 50_000_000  # environment steps of one seed, of frame_skip frames each
    TOTAL_TIMESTEPS_DECAY: PositiveInt | None = None  # steps over which the schedules run; null: TOTAL_TIMESTEPS
    NUM_ENVS: PositiveInt = 128  # environments in parallel, N
    NUM_STEPS: PositiveInt = 32  # steps of each environment between updates, T
    NUM_MINIBATCHES: PositiveInt = 32  # gradient steps per epoch; must divide N * T
    NUM_EPOCHS: PositiveInt = 2  # passes over a rollout
    EPS_START: Fraction = 1.0  # exploration: probability of a random action, at the start
    EPS_FINISH: Fraction = 0.001  # and at the end
    EPS_DECAY: Fraction = 0.1  # fraction of the schedule after which EPS_FINISH is reached
    LR: PositiveFloat = 2.5e-4  # RAdam's step size
    LR_LINEAR_DECAY: bool = False  # linearly to 0 over the schedule
    MAX_GRAD_NORM: PositiveFloat = 10.0  # clipping of the gradient's global norm
    GAMMA: Fraction = 0.99  # discount
    LAMBDA: Fraction = 0.65  # Q(lambda): 0 is one-step Q-learning, 1 is Monte Carlo
    REW_SCALE: float = 1.0  # scales the rewards learned from, never those reported
    ENCODER: Literal["nature", "hadamax"] = "nature"  # Mnih et al. (2015), or Kooi et al. (arXiv 2505.15345)
    DUELING: bool = False  # Q = value + advantages, less their mean (Wang et al. 2016, arXiv 1511.06581, equation 9)
    NORM_TYPE: Literal["layer_norm", "batch_norm", "none"] = "layer_norm"  # before each hidden layer's ReLU or GELU
    NORM_INPUT: bool = False  # batch-normalise observations
    TEST_DURING_TRAINING: bool = True  # TEST_ENVS emulators play beside training, not only after it
    TEST_ENVS: Annotated[int, Field(ge=0)] = 8  # emulators that never learn, E; 0: no evaluation
    EPS_TEST: Fraction = 0.0  # exploration in evaluation

    TASK = property(lambda config: re.sub(r"[^\w.-]", "-", config.ENV_NAME))  # as folders and titles name it
    NUM_UPDATES = property(lambda config: config.TOTAL_TIMESTEPS // (config.NUM_ENVS * config.NUM_STEPS))

    def __post_init__(self):
        check_counts(self)
        height, width = make_env(self).observation_space.shape[1:]
        if min(height, width) < 36 and self.ENCODER == "nature":
            raise ValueError(f"ENV_KWARGS={self.ENV_KWARGS} must have screens of at least 36 x 36 for ENCODER=nature")


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


def make_env(config, seeds=(0,)):
    """A pool of emulators, one for each of `seeds`. The step after a `done` resets: it ignores its action."""
    if sys.platform != "linux":
        raise ValueError(f"envpool's XLA interface, which this script needs, is for Linux only, not for {sys.platform}")
    name, kwargs = config.ENV_NAME, config.ENV_KWARGS
    defaults = envpool.make_spec(name).config._asdict() if name in envpool.list_all_envs() else {}
    if "noop_max" not in defaults:
        raise ValueError(f"ENV_NAME={name} must be an Atari game of envpool's such as Pong-v5")
    low = {"num_threads": 0, "thread_affinity_offset": -1, "mode": -1, "difficulty": -1, "repeat_action_probability": 0}
    ours = "num_envs batch_size seed env_seed task base_path max_num_players gym_reset_return_info".split()
    for key, value in kwargs.items():  # envpool crashes on some values, and takes others without a word
        if key in ours or key not in defaults:
            raise ValueError(f"ENV_KWARGS.{key}={value!r} is unknown; known: {sorted({*defaults} - {*ours})}")
        kind, least, most = type(defaults[key]), low.get(key, 1), 1 if key.endswith("probability") else 2**31 - 1
        fits = type(value) in (kind, int if kind is float else kind)
        if not fits or kind is not bool and not least <= value <= most:
            allowed = "true or false" if kind is bool else f"like {defaults[key]}, from {least} to {most}"
            raise ValueError(f"ENV_KWARGS.{key}={value!r} must be {allowed}")
    try:
        return envpool.make_gymnasium(name, num_envs=len(seeds), seed=list(seeds), **kwargs)
    except Exception as error:
        raise ValueError(f"ENV_KWARGS={kwargs} cannot be used for {name}: {str(error).splitlines()[:1]}") from error


def emulator_seeds(keys, count):
    """The seeds of each key's `count` emulators, one list: a key's are the same whatever other keys there are."""
    rngs = (np.random.default_rng(data) for data in np.asarray(jax.random.key_data(keys)))
    return [int(seed) for rng in rngs for seed in rng.integers(2**31 - 1, size=count)]


def start_emulators(config, keys, count):
    """A pool of `count` emulators for each key, and their Games. It ends with the last reference to it: outlive its use."""
    env, zeros = make_env(config, emulator_seeds(keys, count)), jnp.zeros((len(keys), count))
    obs = jnp.asarray(env.reset()[0]).reshape(*zeros.shape, *env.observation_space.shape)
    return env, Games(obs, zeros > 0, zeros, zeros + jnp.nan, zeros + jnp.nan)


def dense(x, features, kernel_init=nn.linear.default_kernel_init):
    """nn.Dense over the leading axis, [C, B] -> [features, B]."""
    return nn.Einsum((len(x), features), "cb,cf->fb", kernel_init=kernel_init)(x)


def conv(x, features, size=3, stride=1, scale=2.0):
    """nn.Conv without padding, [C, H, W, B] -> [features, H', W', B], as one matrix product over shifted slices: its own
    gradient is slow inside a loop on CPU (JAX issue 12868), and when seeds are vmapped on GPU (JAX issue 13800)."""
    height, width = (n - size + 1 for n in x.shape[1:3])
    x = jnp.concatenate([x[:, :, j : j + width : stride] for j in range(size)])
    x = jnp.concatenate([x[:, i : i + height : stride] for i in range(size)])
    kernel_init = nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")  # 2: he_normal
    return dense(x.reshape(len(x), -1), features, kernel_init).reshape(features, *x.shape[1:])


class LayerNorm(nn.Module):
    """nn.LayerNorm over the leading axis. Means and their spreading are matrix products: XLA's sums use one core of a CPU."""

    @nn.compact
    def __call__(self, x):
        y, mean, spread = x.reshape(len(x), -1), jnp.full((1, len(x)), 1 / len(x)), jnp.ones((len(x), 1))
        center, square = mean @ y, mean @ (y * y)
        inverse = jax.lax.rsqrt(jnp.maximum(square - center**2, 0) + 1e-6)  # of the standard deviation
        y = y * (spread @ inverse) - spread @ (center * inverse)
        scale = self.param("scale", nn.initializers.ones, (len(x),))[:, None]
        bias = self.param("bias", nn.initializers.zeros, (len(x),))[:, None]
        return (y * scale + bias).reshape(x.shape)


def pad_same(x, size, stride=1, value=0.0):
    """What the padding SAME adds to [C, H, W, B] for windows of a size and stride."""
    excess = [max(0, (-(-n // stride) - 1) * stride + size - n) for n in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in excess), (0, 0)), constant_values=value)


def max_pool(x, size, stride):
    """nn.max_pool with the padding SAME, [C, H, W, B] -> [C, H', W', B], as maxima of shifted slices, axis by axis."""
    x, (height, width) = pad_same(x, size, stride, -jnp.inf), x.shape[1:3]
    x = reduce(jnp.maximum, (x[:, i : i + height : stride] for i in range(size)))
    return reduce(jnp.maximum, (x[:, :, j : j + width : stride] for j in range(size)))


def hadamax(x, features, size, window, stride, norm):
    """A block of the Hadamax encoder (Kooi et al. 2025, arXiv 2505.15345), [C, H, W, B] -> [features, H', W', B]: two
    convolutions side by side, each normalised and through a GELU, their product, its maxima. One matrix makes both."""
    both = conv(pad_same(x, size), 2 * features, size, scale=2 * len(x) / (len(x) + features))  # xavier_normal, each
    return max_pool(reduce(jnp.multiply, (nn.gelu(norm()(x)) for x in jnp.split(both, 2))), window, stride)


class QNetwork(nn.Module):
    """Q(s, .) of bytes: [..., C, H, W] -> [..., A]. Inside, features lead and the batch is last: long rows are fast on CPU."""

    config: Config
    num_actions: int

    @nn.compact
    def __call__(self, obs, train=False):
        batch_norm = partial(nn.BatchNorm, use_running_average=not train, axis=0)
        norm = {"layer_norm": LayerNorm, "batch_norm": batch_norm, "none": lambda: lambda x: x}[self.config.NORM_TYPE]
        x = obs.reshape(-1, *obs.shape[-3:]).transpose(1, 2, 3, 0).astype(jnp.float32) / 255
        x, activation = batch_norm()(x) if self.config.NORM_INPUT else x, nn.relu
        if self.config.ENCODER == "hadamax":
            for features, size, window, stride in ((32, 8, 4, 4), (64, 4, 2, 2), (64, 3, 3, 1)):
                x, activation = hadamax(x, features, size, window, stride, norm), nn.gelu
        else:
            for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
                x = nn.relu(norm()(conv(x, features, size, stride)))
        x = activation(norm()(dense(x.reshape(-1, x.shape[-1]), 512, nn.initializers.he_normal())))
        q_values = dense(x, self.num_actions)
        q_values = dense(x, 1) + q_values - q_values.mean(0) if self.config.DUELING else q_values
        return q_values.T.reshape(*obs.shape[:-3], -1)


def make_network(config):
    """The Q-network of a Config."""
    return QNetwork(config, int(make_env(config).action_space.n))


class Transition(NamedTuple):
    """One step of a rollout, each field [T, N, ...]."""

    obs: jax.Array  # bytes
    action: jax.Array
    reward: jax.Array  # clipped, where envpool clips
    done: jax.Array  # the game ended, by itself or by the time limit, or a life: the next step only resets
    terminated: jax.Array  # by itself; or, with episodic_life, a life was lost
    mask: jax.Array  # false where the step only reset the emulator: nothing to learn from
    value: jax.Array  # max_a Q(s_t, a), by the parameters that acted
    game_over: jax.Array
    returns: jax.Array  # of the full game so far, this step included: raw rewards
    lengths: jax.Array


class TrainState(NamedTuple):
    """All that one seed needs to go on, but for its emulators, which start afresh; what a checkpoint holds."""

    key: jax.Array
    variables: Any  # the network's "params" and, where it has BatchNorm, its running "batch_stats"
    opt_state: Any


class Games(NamedTuple):
    """What emulators are at, each field [num_seeds, emulators, ...]: N that are learned from, then E for tests."""

    obs: jax.Array
    done: jax.Array  # the next step only resets
    returns: jax.Array  # raw rewards of the games under way
    last_returns: jax.Array  # of the latest full game, NaN before the first ends
    last_lengths: jax.Array


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


def shuffle_minibatches(keys, batch, num_minibatches):
    """Shuffle [T, N, ...] along both axes, all leaves alike, once a key: [E * num_minibatches, T * N / num_minibatches, ...]."""
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    bits = jax.vmap(partial(jax.random.bits, shape=len(jax.tree.leaves(batch)[0])))(keys)
    order = jnp.argsort(bits).reshape(len(keys) * num_minibatches, -1)
    return jax.tree.map(lambda x: x[order], batch)


# Scores of a random policy and of a human by game (Wang et al., 2016, arXiv 1511.06581, and DQN Zoo), 30 no-op starts.
HUMAN = """Alien 227.8 7127.7, Amidar 5.8 1719.5, Assault 222.4 742, Asterix 210 8503.3, Asteroids 719.1 47388.7,
Atlantis 12850 29028.1, BankHeist 14.2 753.1, BattleZone 2360 37187.5, BeamRider 363.9 16926.5, Berzerk 123.7 2630.4,
Bowling 23.1 160.7, Boxing 0.1 12.1, Breakout 1.7 30.5, Centipede 2090.9 12017, ChopperCommand 811 7387.8,
CrazyClimber 10780.5 35829.4, Defender 2874.5 18688.9, DemonAttack 152.1 1971, DoubleDunk -18.6 -16.4,
Enduro 0 860.5, FishingDerby -91.7 -38.7, Freeway 0 29.6, Frostbite 65.2 4334.7, Gopher 257.6 2412.5,
Gravitar 173 3351.4, Hero 1027 30826.4, IceHockey -11.2 0.9, Jamesbond 29 302.8, Kangaroo 52 3035, Krull 1598 2665.5,
KungFuMaster 258.5 22736.3, MontezumaRevenge 0 4753.3, MsPacman 307.3 6951.6, NameThisGame 2292.3 8049,
Phoenix 761.4 7242.6, Pitfall -229.4 6463.7, Pong -20.7 14.6, PrivateEye 24.9 69571.3, Qbert 163.9 13455,
Riverraid 1338.5 17118, RoadRunner 11.5 7845, Robotank 2.2 11.9, Seaquest 68.4 42054.7, Skiing -17098.1 -4336.9,
Solaris 1236.3 12326.7, SpaceInvaders 148 1668.7, StarGunner 664 10250, Surround -10 6.5, Tennis -23.8 -8.3,
TimePilot 3568 5229.2, Tutankham 11.4 167.6, UpNDown 533.4 11693.2, Venture 0 1187.5, VideoPinball 16256.9 17667.9,
WizardOfWor 563.5 4756.5, YarsRevenge 3092.9 54576.9, Zaxxon 32.5 9173.3"""
HUMAN = {f"{game}-v5": (float(low), float(human)) for game, low, human in map(str.split, HUMAN.split(","))}


def test_scores(config, returns, lengths, unfinished):
    """What is reported of test games, each argument [num_seeds, E], NaN where there is none: {name: [num_seeds]}."""
    tests = {"returned_episode_returns": returns, "returned_episode_lengths": lengths, "unfinished": unfinished}
    if config.ENV_NAME in HUMAN:
        low, human = HUMAN[config.ENV_NAME]
        tests["human_normalized_score"] = (returns - low) / (human - low)
    return {f"test/{name}": jnp.nanmean(x, -1) for name, x in tests.items()}


def make_pqn(config):
    """PQN, as functions: init(key) of one seed, and, for the emulators of all seeds are one pool that is stepped as a
    whole, update(env, state, games, i) of update number i and evaluate(state, keys), not traced, of all seeds."""
    config = override(config)  # a copy: what is traced later does not see edits of the original
    network, obs_shape = make_network(config), make_env(config).observation_space.shape
    num_tests = config.TEST_ENVS * config.TEST_DURING_TRAINING  # beside training
    decay = (config.TOTAL_TIMESTEPS_DECAY or config.TOTAL_TIMESTEPS) // (config.NUM_ENVS * config.NUM_STEPS)  # updates
    grad_steps = config.NUM_EPOCHS * config.NUM_MINIBATCHES  # of one update
    epsilon_schedule = optax.linear_schedule(config.EPS_START, config.EPS_FINISH, max(1, config.EPS_DECAY * decay))
    lr_schedule = optax.linear_schedule(config.LR, config.LR * (not config.LR_LINEAR_DECAY), decay * grad_steps)
    optimizer = optax.radam(lr_schedule)
    as_vector = ravel_pytree if jax.default_backend() != "cpu" else lambda tree: (tree, lambda tree: tree)

    def init(key):
        key, key_network = jax.random.split(key)
        variables = network.init(key_network, jnp.zeros((1, *obs_shape), jnp.uint8))
        return TrainState(key, variables, optimizer.init(variables["params"]))

    def each_seed(function, *args):
        """Seeds take turns on CPU, where one device steps all emulators and it is as fast; elsewhere they are vmapped."""
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda args: function(*args), args)
        return jax.vmap(function)(*args)

    def play(env, variables, games, keys, epsilon):
        """One step of every emulator of all seeds: the games after it, and the Transition [num_seeds, emulators, ...]."""
        q_values = each_seed(network.apply, variables, games.obs)
        action = jax.vmap(epsilon_greedy, (0, 0, None))(keys, q_values, epsilon)
        handle, _, _, step = env.xla()  # calls need no order: an action depends on the observation of the call before
        result = jax.tree.map(lambda x: x.reshape(*action.shape, *x.shape[1:]), step(handle, action.reshape(-1))[1])
        obs, reward, terminated, truncated, info = result
        terminated |= info["terminated"] > 0  # the game's end, also in the step of a time-out, or a life's
        over, lengths = truncated | (info["terminated"] > 0), info["elapsed_step"]
        done, returns = terminated | truncated, games.returns + info["reward"]
        transition = games.obs, action, reward, done, terminated, ~games.done, q_values.max(-1), over, returns, lengths
        latest = jnp.where(over, returns, games.last_returns), jnp.where(over, lengths, games.last_lengths)
        return Games(obs, done, returns * ~over, *latest), Transition(*transition)

    def evaluate(state, keys):
        """The first full game of each of TEST_ENVS emulators of every seed, on a pool of its own: {name: [num_seeds]}."""
        env, games = start_emulators(config, keys, config.TEST_ENVS)

        def step(carry):
            t, variables, games, playing, returns, lengths = carry
            keys_act = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            games, transition = play(env, variables, games, keys_act, config.EPS_TEST)
            returns, lengths = jax.tree.map(partial(jnp.where, playing), transition[-2:], (returns, lengths))
            return t + 1, variables, games, playing & ~transition.game_over, returns, lengths

        zeros, loop = jnp.zeros(games.done.shape), partial(jax.lax.while_loop, lambda carry: carry[3].any(), step)
        *_, playing, returns, lengths = jax.jit(loop)((0, state.variables, games, zeros == 0, zeros, zeros))
        return jax.block_until_ready(test_scores(config, returns, lengths, playing))

    def targets(state, last_obs, trajectory):
        """Targets, and a mask of what is learned from. The observation at a `done` is the final one, even where time ran
        out, and the reset comes one step later: V(s'_t) is the next step's value everywhere."""
        next_value = jnp.concatenate([trajectory.value[1:], network.apply(state.variables, last_obs).max(-1)[None]])
        discount, trace = config.GAMMA * (1.0 - trajectory.terminated), config.LAMBDA * (1.0 - trajectory.done)
        return q_lambda_targets(config.REW_SCALE * trajectory.reward, discount, next_value, trace), trajectory.mask

    def learn(carry, minibatch, unravel):
        """One gradient step. On a GPU, where each kernel costs its launch, what it changes is one vector."""
        (variables, opt_state), (obs, action, target, mask) = unravel(carry), minibatch

        def loss(params):
            q_values, updated = network.apply(variables | {"params": params}, obs, train=True, mutable=["batch_stats"])
            q_action = jnp.sum(q_values * jax.nn.one_hot(action, q_values.shape[-1]), -1)  # faster than to index
            squared, count = jnp.sum(jnp.square(q_action - target), where=mask), jnp.maximum(mask.sum(), 1)
            return 0.5 * squared / count, (jnp.sum(q_action, where=mask) / count, updated)  # 0 where all is masked

        (td_loss, (qvals, updated)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        norm = optax.tree.norm(as_vector(grads)[0])
        grads = optax.tree.scale(jnp.minimum(1.0, config.MAX_GRAD_NORM / norm), grads)
        changes, opt_state = optimizer.update(grads, opt_state)
        variables = variables | updated | {"params": optax.apply_updates(variables["params"], changes)}
        return as_vector((variables, opt_state))[0], jnp.stack([td_loss, qvals, norm])

    def improve(i, state, key_epochs, last_obs, trajectory):
        """One seed's part of update number i after the rollout: its targets and epochs of minibatches."""
        batch = (trajectory.obs, trajectory.action, *targets(state, last_obs, trajectory))
        batch = shuffle_minibatches(jax.random.split(key_epochs, config.NUM_EPOCHS), batch, config.NUM_MINIBATCHES)
        carry, unravel = as_vector((state.variables, state.opt_state))  # its counts are exact below 2**24
        carry, losses = jax.lax.scan(partial(learn, unravel=unravel), carry, batch)
        variables, opt_state = unravel(carry)
        metrics = {"epsilon": epsilon_schedule(i), "learning_rate": lr_schedule(i * grad_steps)}
        metrics |= dict(zip(("td_loss", "qvals", "grad_norm"), losses.mean(0), strict=True))
        metrics |= {"reset_steps": jnp.mean(~trajectory.mask)}
        for name in ("returns", "lengths"):  # of the games that ended; NaN where none did
            metrics[f"returned_episode_{name}"] = jnp.mean(getattr(trajectory, name), where=trajectory.game_over)
        frames = config.NUM_ENVS * config.NUM_STEPS * config.ENV_KWARGS["frame_skip"]  # of one update
        state = state._replace(variables=variables, opt_state=opt_state)
        return state, metrics | {"env_frame": jnp.float32(i + 1) * frames}

    def update(env, state, games, i):
        """Update number i of all seeds: a rollout of all emulators, what is learned from it, the latest test games."""
        key, key_rollout, key_epochs = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(state.key)
        keys_step = jax.vmap(partial(jax.random.split, num=config.NUM_STEPS), out_axes=1)(key_rollout)
        epsilon = jnp.append(jnp.full(config.NUM_ENVS, epsilon_schedule(i)), jnp.full(num_tests, config.EPS_TEST))
        games, trajectory = jax.lax.scan(partial(play, env, state.variables, epsilon=epsilon), games, keys_step)
        trajectory = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, : config.NUM_ENVS], 1, 0), trajectory)  # seeds first
        last_obs, state = games.obs[:, : config.NUM_ENVS], state._replace(key=key)
        state, metrics = each_seed(partial(improve, i), state, key_epochs, last_obs, trajectory)
        returns, lengths = games.last_returns[:, config.NUM_ENVS :], games.last_lengths[:, config.NUM_ENVS :]
        return state, games, metrics | test_scores(config, returns, lengths, 1.0 * jnp.isnan(returns))

    return init, update, evaluate


def make_train(config):
    """train(keys): a whole run of one seed per key, metrics [num_seeds, NUM_UPDATES]. Emulators are outside of JAX, one
    pool for all seeds: train is a loop over compiled updates, not a pure function, and not to be jitted or vmapped."""
    config = override(config)

    def train(keys):
        (state, update_seeds), metrics = start_seeds(config, keys), []
        for i in range(config.NUM_UPDATES):
            state, metrics_i = update_seeds(state, i)
            metrics.append(metrics_i)
        return {"runner_state": state, "metrics": jax.tree.map(lambda *x: np.stack(x, 1), *metrics)}

    return train


# RUNNING, LOGGING AND SAVING: nothing of the algorithm below this line
SCRIPT = re.sub(r"[^\w.-]", "-", Path(globals().get("__file__", "pqn_atari_envpool.py")).stem)  # copies have their own
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
    """The state of one seed per key, every leaf [num_seeds, ...], and update(state, i) compiled for all of them. Their
    emulators start here, one pool on one device, and end with `update`; the last update evaluates where tests are due."""
    init, update, evaluate = make_pqn(config)
    state = jax.jit(partial(jax.lax.map, init))(keys)  # never vmapped, as in the other scripts
    env, games = start_emulators(config, keys, config.NUM_ENVS + config.TEST_ENVS * config.TEST_DURING_TRAINING)
    compiled = jax.jit(partial(update, env), donate_argnums=(0, 1)).lower(state, games, 0).compile()

    def update_seeds(state, i, env=env):  # which keeps the emulators
        nonlocal games
        state, games, metrics = compiled(state, games, i)
        if i + 1 == config.NUM_UPDATES and config.TEST_ENVS and (np.asarray(metrics["test/unfinished"]) != 0).any():
            metrics |= evaluate(state, jax.vmap(partial(jax.random.fold_in, data=2**31 - 1))(keys))
        return state, metrics

    return state, update_seeds


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
