"""How fast pqn_atari_envpool.py is beside its emulators alone, and where the time goes.

    python benchmarks/atari_envpool.py                                  # published recipe, Pong, 1 seed
    python benchmarks/atari_envpool.py --game Breakout-v5 --seeds 1 2 4 --threads 8 16 --affinity
    python benchmarks/atari_envpool.py --network                        # the convolutions beside flax's, no emulators

Each turn steps all emulators without learning (random actions), plays rollouts (emulators and inference), and trains (all three), with one
pool and one number of threads. Medians over the turns; steps are those of the training emulators of all seeds together. With --network: a
forward pass and a gradient step of one minibatch, inside a scan, for seeds vmapped and seeds in turn.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pqn_atari_envpool as pqn  # noqa: E402


class FlaxNetwork(nn.Module):
    """The Q-network with flax's own layers, [B, C, H, W] -> [B, A]."""

    num_actions: int

    @nn.compact
    def __call__(self, x):
        x = x.transpose(0, 2, 3, 1).astype(jnp.float32) / 255
        for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(nn.LayerNorm()(nn.Conv(features, (size, size), (stride, stride), padding="VALID")(x)))
        x = nn.relu(nn.LayerNorm()(nn.Dense(512)(x.reshape(len(x), -1))))
        return nn.Dense(self.num_actions)(x)


def seconds(function, *args):
    """Seconds that a call takes, its result awaited; and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def in_turn(function):
    """As jax.vmap(function), one after the other."""
    return lambda *args: jax.lax.map(lambda x: function(*x), args)


def compare_networks(batch, seeds, turns):
    """Milliseconds of a forward pass and of a gradient step of each seed, for both networks."""
    obs = jax.random.randint(jax.random.key(0), (seeds, 4, batch, 4, 84, 84), 0, 256).astype(jnp.uint8)
    for name, network in (("ours", pqn.QNetwork(6)), ("nn.Conv", FlaxNetwork(6))):
        params = jax.vmap(network.init)(jax.random.split(jax.random.key(1), seeds), obs[:, 0, :1])

        def forward(params, obs, network=network):
            return jax.lax.scan(lambda p, x: (p, network.apply(p, x).sum()), params, obs)

        def train(params, obs, network=network):
            def step(params, obs):
                grads = jax.grad(lambda p: jnp.square(network.apply(p, obs)).mean())(params)
                return jax.tree.map(lambda p, g: p - 1e-5 * g, params, grads), 0.0

            return jax.lax.scan(step, params, obs)

        for how, wrap in (("vmapped", jax.vmap), ("in turn", in_turn)) if seeds > 1 else (("", in_turn),):
            for part, function in (("forward", forward), ("gradient step", train)):
                program = jax.jit(wrap(function))
                compiling = seconds(program, params, obs)[0]
                each = [1e3 * seconds(program, params, obs)[0] / (4 * seeds) for _ in range(turns)]
                title = f"{name} {part}, {seeds} seeds {how}".rstrip()
                print(f"{title}: {min(each):.1f} ms a minibatch of {batch} (first call {compiling:.1f} s)", flush=True)


def random_play(env, emulators, steps):
    """Step all emulators so many times with random actions, no network: key -> key."""
    handle, _, _, step = env.xla()
    actions = int(env.action_space.n)

    def random_step(key, _):
        key, key_act = jax.random.split(key)
        _, (_, reward, *_) = step(handle, jax.random.randint(key_act, (emulators,), 0, actions))
        return jax.random.fold_in(key, (reward.sum() > 1e9).astype(jnp.uint32)), None  # in order

    return jax.jit(lambda key: jax.lax.scan(random_step, key, None, steps)[0])


def measure(config, seeds, updates, turns):
    """Print the three rates and the split of time for a number of seeds."""
    train = pqn.make_train(config)
    keys = jax.random.split(jax.random.key(0), seeds)
    emulators = config.NUM_ENVS + (config.TEST_ENVS if config.TEST_DURING_TRAINING else 0)
    env = pqn.make_env(config, pqn.emulator_seeds(keys, emulators))
    obs, emulate = env.reset()[0], random_play(env, seeds * emulators, updates * config.NUM_STEPS)

    @jax.jit
    def play(state):
        return jax.lax.scan(lambda state, _: (train.rollout(env, state)[0], None), state, None, updates)[0]

    state = jax.vmap(train.init)(keys)
    state = state.replace(obs=jnp.asarray(obs).reshape(seeds, emulators, *obs.shape[1:]))
    learning = train(keys, num_updates=0, length=updates)["runner_state"]
    seconds(emulate, keys[0]), seconds(play, state)
    learning = train(state=learning, num_updates=updates, length=updates)["runner_state"]
    times = []
    for turn in range(turns):
        alone = seconds(emulate, jax.random.key(turn))[0]
        playing, state = seconds(play, state)
        whole, out = seconds(partial(train, state=learning, num_updates=updates, length=updates))
        learning = out["runner_state"]
        times.append((alone, playing, whole))
    alone, playing, whole = (statistics.median(x) for x in zip(*times, strict=True))
    steps = seeds * updates * config.NUM_ENVS * config.NUM_STEPS
    split = {"emulators": alone, "inference": playing - alone, "learning": whole - playing}
    print(
        f"{seeds} seeds, num_threads {config.ENV_KWARGS.get('num_threads', 0) or 'all'}: emulators alone {steps / alone:,.0f} steps/s, "
        f"training {steps / whole:,.0f} steps/s, {alone / whole:.0%} of that; "
        + ", ".join(f"{name} {part / whole:.0%}" for name, part in split.items())
        + f"; {4 * 3600 * steps / whole:,.0f} frames an hour, 2e8 in {2e8 * whole / (4 * 3600 * steps):.1f} h",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--game", default="Pong-v5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, nargs="+", default=[0], help="envpool's num_threads; 0: one per core")
    parser.add_argument("--affinity", action="store_true", help="bind envpool's threads to cores")
    parser.add_argument("--envs", type=int, default=128)
    parser.add_argument("--updates", type=int, default=2, help="updates of each measurement")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--network", action="store_true")
    args = parser.parse_args()
    print(f"{args.game}, {args.envs} emulators a seed, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for seeds in args.seeds:
        if args.network:
            compare_networks(128, seeds, args.turns)
            continue
        for threads in args.threads:
            kwargs = {"num_threads": threads, "thread_affinity_offset": 0 if args.affinity else -1}
            kwargs = pqn.published_protocol() | kwargs
            config = pqn.Config(ENV_NAME=args.game, ENV_KWARGS=kwargs, NUM_ENVS=args.envs, TOTAL_TIMESTEPS=1e8)
            measure(config, seeds, args.updates, args.turns)


if __name__ == "__main__":
    main()
