"""Speed and memory of the Craftax script: where an update's time goes, beside the environment alone and the arithmetic.

    python benchmarks/craftax_rnn.py speed                                     # Craftax-Classic, configs/alg/pqn_craftax_classic_rnn.yaml
    python benchmarks/craftax_rnn.py speed --recipe pqn_craftax_rnn NUM_ENVS=64 NUM_STEPS=32    # Craftax-Symbolic, on a CPU
    python benchmarks/craftax_rnn.py resets --turns 3 NUM_ENVS=128             # optimistic resets and plain ones, random actions
    python benchmarks/craftax_rnn.py memory --recipe pqn_craftax_rnn NUM_ENVS=64    # bytes per environment step, nothing is run

`speed` prints environment steps a second with random actions, of rollouts and of updates, the split of an update's time, and the
share of the machine's matrix-product rate; `memory` compiles an update for NUM_STEPS and for twice as many and compares.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import jax
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from craftax.craftax_env import make_craftax_env_from_name  # noqa: E402
from throughput import matrix_rate  # noqa: E402

import pqn_craftax_rnn as pqn  # noqa: E402


def seconds(function, state, turns):
    """The median time of a call, compilation apart."""
    times = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(state))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def random_play(config, train, auto_reset=False):
    """NUM_STEPS steps of every environment with random actions and resets: state -> state. auto_reset: Craftax's own."""
    env, params = pqn.make_env(config)
    step_env = jax.vmap(env.step_env, (0, 0, 0, None))
    own = jax.vmap(make_craftax_env_from_name(config.ENV_NAME, auto_reset=True).step, (0, 0, 0, None))

    def step(carry, key):
        key_action, key_step, key_reset = jax.random.split(key, 3)
        action = jax.random.randint(key_action, (config.NUM_ENVS,), 0, env.num_actions)
        args = jax.random.split(key_step, config.NUM_ENVS), carry[1], action, params
        if auto_reset:
            return own(*args)[:2], None
        obs, env_state, _, done, _ = step_env(*args)
        return train.restart(key_reset, done, obs, env_state), None

    def play(state):
        key, key_play = jax.random.split(state.key)
        keys = jax.random.split(key_play, config.NUM_STEPS)
        obs, env_state = jax.lax.scan(step, (state.obs, state.env_state), keys)[0]
        return state.replace(key=key, obs=obs, env_state=env_state)

    return jax.jit(play)


def start(config, train):
    """A state in the midst of episodes: after 512 random steps, so that they end at any time."""
    state, play = jax.jit(train.init)(jax.random.key(0)), random_play(config, train)
    for _ in range(-(-512 // config.NUM_STEPS)):
        state = play(state)
    return jax.block_until_ready(state)


def megaflop(config, obs_size, num_actions):
    """Of one forward pass for one observation, products only."""
    size, total, inputs = config.HIDDEN_SIZE, 0, obs_size
    for _ in range(config.NUM_LAYERS):
        total, inputs = total + inputs * size, size
    inputs += num_actions * config.ADD_LAST_ACTION
    for _ in range(config.NUM_RNN_LAYERS):
        total, inputs = total + (inputs + size) * 4 * size, size
    return 2e-6 * (total + inputs * num_actions)


def speed(config, turns):
    train = pqn.make_train(config)
    state = start(config, train)
    steps = config.NUM_ENVS * config.NUM_STEPS
    functions = {"random actions": random_play(config, train), "rollout": jax.jit(train.rollout)}
    functions["update"] = jax.jit(train.update)
    spent = {name: seconds(function, state, turns) for name, function in functions.items()}
    for name, value in spent.items():
        print(f"{name}: {steps / value:,.0f} steps/s")
    parts = {
        "environment": spent["random actions"],
        "inference": spent["rollout"] - spent["random actions"],
        "learning": spent["update"] - spent["rollout"],
    }
    print("of an update:", ", ".join(f"{name} {value / spent['update']:.0%}" for name, value in parts.items()))
    forward = megaflop(config, state.obs.shape[-1], pqn.make_env(config)[0].num_actions)
    per_step = forward * (1 + 3 * config.NUM_EPOCHS * (1 + (config.MEMORY_WINDOW + 1) / config.NUM_STEPS))
    rate = matrix_rate()
    floor = rate * 1e3 / per_step
    print(f"{per_step:.0f} MFLOP a step, at {rate:.0f} GFLOP/s at most {floor:,.0f} steps/s", end="; ")
    print(
        f"an update reaches {steps / spent['update'] / floor:.0%} of that, its learning {learning(parts, forward, config, rate):.0%}"
    )


def learning(parts, forward, config, rate):
    """The share of the matrix-product rate that the learning phase reaches."""
    flop = forward * 1e6 * 3 * config.NUM_EPOCHS * config.NUM_ENVS * (config.NUM_STEPS + config.MEMORY_WINDOW + 1)
    return flop / parts["learning"] / (rate * 1e9)


def resets(config, turns):
    config.USE_OPTIMISTIC_RESETS, plays = True, {}
    optimistic = pqn.make_train(config)
    state = start(config, optimistic)
    plays["optimistic resets"] = random_play(config, optimistic)
    config.USE_OPTIMISTIC_RESETS = False
    plain = pqn.make_train(config)
    plays["plain resets"], plays["Craftax's own"] = random_play(config, plain), random_play(config, plain, True)
    times = {name: [] for name in plays}
    for turn, (name, play) in itertools.product(range(turns + 1), plays.items()):  # in turns; the first compiles
        begin = time.perf_counter()
        jax.block_until_ready(play(state))
        times[name] += [time.perf_counter() - begin] * (turn > 0)
    for name, values in times.items():
        print(f"{name}: {config.NUM_ENVS * config.NUM_STEPS / statistics.median(values):,.0f} steps/s")


def memory(config, turns):
    sizes = {}
    for steps in (config.NUM_STEPS, 2 * config.NUM_STEPS):
        train = pqn.make_train(pqn.Config(**vars(config) | {"NUM_STEPS": steps}))
        state = jax.eval_shape(train.init, jax.random.key(0))
        analysis = jax.jit(train.update, donate_argnums=0).lower(state).compile().memory_analysis()
        sizes[steps] = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
        print(f"NUM_STEPS={steps}: {sizes[steps] / 2**20:,.0f} MiB with the state, of which observations "
              f"{4 * state.obs.size * steps / 2**20:,.0f}")  # fmt: skip
    per_step = (sizes[2 * config.NUM_STEPS] - sizes[config.NUM_STEPS]) / (config.NUM_ENVS * config.NUM_STEPS)
    stored = 4 * state.obs.shape[-1]
    print(f"{per_step:,.0f} bytes per environment step, {per_step / stored:.2f} times an observation's {stored:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "resets", "memory"])
    parser.add_argument("overrides", nargs="*", help="KEY=value, of Config")
    parser.add_argument("--recipe", default="pqn_craftax_classic_rnn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_intermixed_args()
    recipe = yaml.safe_load((ROOT / f"configs/alg/{args.recipe}.yaml").read_text())
    recipe |= {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in args.overrides)}
    recipe = {key: float(x) if isinstance(x, str) and x[0].isdigit() else x for key, x in recipe.items()}  # 1e9
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {recipe['ENV_NAME']}")
    {"speed": speed, "resets": resets, "memory": memory}[args.what](pqn.Config(**recipe), args.turns)
