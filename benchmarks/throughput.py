"""Steps per second of a script beside a plain PQN (baseline.py), in turns on one machine, evaluations off.

    python benchmarks/throughput.py minatar                        # 1 seed; also: cartpole
    python benchmarks/throughput.py minatar --seeds 1 4 10 --steps 2e5 --turns 7
    python benchmarks/throughput.py minatar --against terminal     # what bootstrapping at time limits costs
    python benchmarks/throughput.py cartpole --against evaluations --steps 5e5     # what the recipe's evaluations cost
    python benchmarks/throughput.py cartpole --memory --seeds 1000 --steps 5e5     # of the recipe's program, compiled but not run

Prints, for each number of seeds, compile times, steps per second (all seeds together, median over the turns), their ratio, and the
arithmetic done as a share of what this machine's matrix products reach. The GPU figures: the same commands with --steps 1e7.
"""

import argparse
import dataclasses
import importlib
import statistics
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import pqn_minatar  # noqa: E402, F401, I001 (first: a script makes each CPU core a device before JAX starts)
import baseline  # noqa: E402

# name: (script, its Config beside the defaults, the baseline's recipe, MFLOP of one forward pass)
TASKS = {
    "minatar": ("pqn_minatar", {}, baseline.MINATAR, 2e-6 * (64 * 36 * 16 + 1024 * 128 + 128 * 3)),
    "cartpole": ("pqn_gymnax", {}, baseline.CARTPOLE, 2e-6 * (4 * 256 + 256 * 256 + 256 * 2)),
}
TERMINAL = [  # time limits as terminal states: replacements in a script's text
    ("next_value = jnp.where(trajectory.truncated, final_value, next_value)", ""),
    ("(1.0 - trajectory.terminated)", "(1.0 - (trajectory.terminated | trajectory.truncated))"),
    ('jnp.where(where_truncated, info["final_observation"], final_obs[t // block])', "final_obs[t // block]"),
    ("jnp.concatenate([state.obs[None], final_obs])", "jnp.concatenate([state.obs[None], state.obs[None]])"),
]


def variant(script, replacements):
    """The script as a module, with replacements (old, new) in its text."""
    text = (ROOT / f"{script}.py").read_text()
    for old, new in replacements:
        assert old in text, f"{script}.py has no more: {old}"
        text = text.replace(old, new)
    module = types.ModuleType(script)
    sys.modules[script] = module
    exec(compile(text, script, "exec"), module.__dict__)
    return module


def matrix_rate():
    """GFLOP/s of a 2048^3 float32 matrix product, the best of five."""
    a = jnp.ones((2048, 2048))
    product, times = jax.jit(lambda a: a @ a), []
    for _ in range(6):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times) / 1e9


def timed(name, function, keys):
    """Compile and run once; then a function that runs again and returns its seconds."""
    start = time.perf_counter()
    jax.block_until_ready(function(keys))
    print(f"  {name}: first call, compilation included, {time.perf_counter() - start:.1f} s")

    def again():
        start = time.perf_counter()
        jax.block_until_ready(function(keys))
        return time.perf_counter() - start

    return again


def print_memory(module, config, keys):
    """What the compiled program of a logged interval needs on each device, in GiB."""
    train, updates = module.make_train(config), max(1, config.NUM_UPDATES // 1000)
    program = jax.jit(lambda keys: tuple(train(keys, num_updates=updates).values())).lower(keys).compile()
    found = program.memory_analysis()
    sizes = {"state and metrics": found.output_size_in_bytes, "temporary": found.temp_size_in_bytes}
    print(f"{len(keys)} seeds: " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in sizes.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=float, default=2e5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--memory", action="store_true", help="of a run in intervals of a thousandth, evaluations included"
    )
    parser.add_argument("--against", choices=["baseline", "terminal", "evaluations", "nothing"], default="baseline")
    args = parser.parse_args()
    script, changes, recipe, forward = TASKS[args.task]
    module = importlib.import_module(script)
    config = module.Config(**module.RECIPE | changes | {"TOTAL_TIMESTEPS": args.steps, "TEST_DURING_TRAINING": False})
    steps = config.NUM_UPDATES * config.NUM_ENVS * config.NUM_STEPS
    device = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(f"{script} {config.ENV_NAME}, {steps:,} steps a seed, {device}, jax {jax.__version__}")
    for seeds in args.seeds:
        keys = jax.random.split(jax.random.key(0), seeds)
        if args.memory:
            print_memory(module, dataclasses.replace(config, TEST_DURING_TRAINING=True), keys)
            continue
        train = module.make_train(config)
        runs = {"this script": timed("this script", lambda keys, train=train: train(keys)["metrics"], keys)}
        if args.against == "baseline":
            plain = jax.jit(jax.vmap(baseline.make_train(recipe | {"steps": args.steps})))
            runs["baseline"] = timed("baseline", plain, keys)
        elif args.against != "nothing":
            changes = {"TEST_DURING_TRAINING": args.against == "evaluations"}
            other = module if args.against == "evaluations" else variant(script, TERMINAL)
            train = other.make_train(other.Config(**vars(config) | changes))
            runs[args.against] = timed(args.against, lambda keys, train=train: train(keys)["metrics"], keys)
        turns = [{name: again() for name, again in runs.items()} for _ in range(args.turns)]
        rate = steps * seeds / statistics.median(turn["this script"] for turn in turns)
        share = rate * forward * (1 + 3 * config.NUM_EPOCHS) * 1e6 / (1e9 * matrix_rate())
        print(f"{seeds} seeds: this script {rate:,.0f} steps/s, {share:.0%} of the machine's matrix-product rate")
        for name in list(runs)[1:]:
            ratio = statistics.median(turn[name] / turn["this script"] for turn in turns)
            rate = steps * seeds / statistics.median(turn[name] for turn in turns)
            print(f"{seeds} seeds: {name} {rate:,.0f} steps/s; this script is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
