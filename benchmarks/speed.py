"""One command for every script's speed on this machine: results/speed_<device>.csv, and the table of it in Markdown beside it.

    python benchmarks/speed.py                                           # every recipe below, one seed
    python benchmarks/speed.py --recipes pqn pqn_cartpole --seeds 1 10 --envs 1 4      # growth with NUM_SEEDS and NUM_ENVS
    python benchmarks/speed.py --recipes pqn_vdn_smax --turns 5 NUM_STEPS=16 alg.MAP_NAME=3m

Each row is measured in a process of its own, evaluations off, and replaces the row of the same recipe, sizes and number of seeds. Columns:
compile_s, the first call less a later one; steps_per_s, of all seeds together, the median over the turns; environment_steps_per_s, of the
environments of one seed stepped with random actions; share, the arithmetic of the update's matrix products over what a 2048^3 product reaches
here; peak_gib, the process's memory on a CPU (the compiler's included) or the device's. On a GPU: --updates 100.
"""

import argparse
import importlib
import itertools
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {  # recipe: (script, updates in one timing on a CPU)
    "pqn_cartpole": ("pqn_gymnax", 40),
    "pqn_acrobot": ("pqn_gymnax", 40),
    "pqn": ("pqn_minatar", 12),
    "pqn_atari": ("pqn_atari_envpool", 1),
    "pqn_craftax_classic_rnn": ("pqn_craftax_rnn", 2),
    "pqn_craftax_rnn": ("pqn_craftax_rnn", 1),  # in full it is for a GPU: left out unless asked for
    "pqn_vdn_mpe": ("pqn_vdn_jaxmarl", 4),
    "pqn_vdn_hanabi": ("pqn_vdn_jaxmarl", 20),
    "pqn_vdn_overcooked": ("pqn_vdn_jaxmarl", 4),
    "pqn_vdn_smax": ("pqn_vdn_jaxmarl", 1),
}
KEY = ["recipe", "NUM_SEEDS", "NUM_ENVS", "NUM_STEPS", "changes"]


def product_flops(jaxpr):
    """Floating-point operations of a jaxpr's matrix products; a while loop counts as one pass, a branch as its dearest."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
        values = [x for value in eqn.params.values() for x in (value if isinstance(value, (tuple, list)) else [value])]
        inner = [product_flops(getattr(x, "jaxpr", x)) for x in values if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        total += eqn.params.get("length", 1) * (max if eqn.primitive.name == "cond" else sum)(inner or [0])
    return total


def random_play(script, module, config, train, key):
    """(function, state): each call steps the environments of one seed NUM_STEPS times with random actions."""
    import jax

    state = jax.jit(train.init)(key)
    if script == "pqn_craftax_rnn":
        from craftax_rnn import random_play

        return random_play(config, train), state
    if script == "pqn_vdn_jaxmarl":
        from throughput_vdn import random_play

        return random_play(config), (key, (state.env_state, state.obs))
    if script == "pqn_atari_envpool":
        from atari_envpool import random_play

        env = module.make_env(config, module.emulator_seeds(key[None], config.NUM_ENVS))
        env.reset()
        return random_play(env, config.NUM_ENVS, config.NUM_STEPS), key
    env, params = module.make_env(config)
    step = jax.vmap(env.step, (0, 0, 0, None))

    def random_step(carry, key):
        key_action, key_step = jax.random.split(key)
        action = jax.random.randint(key_action, (config.NUM_ENVS,), 0, env.num_actions)
        obs, state, *_ = step(jax.random.split(key_step, config.NUM_ENVS), carry[0], action, params)
        return (state, obs), None  # observations are carried so that they are computed

    @jax.jit
    def play(carry):
        key, key_play = jax.random.split(carry[0])
        return key, jax.lax.scan(random_step, carry[1], jax.random.split(key_play, config.NUM_STEPS))[0]

    return play, (key, (state.env_state, state.obs))


def update_flops(script, module, config, train, key):
    """Floating-point operations of one update's matrix products."""
    import jax

    state = jax.eval_shape(train.init, key)
    if script != "pqn_atari_envpool":
        return product_flops(jax.make_jaxpr(train.update)(state).jaxpr)

    obs = jax.numpy.zeros((config.NUM_ENVS, *state.obs.shape[1:]), state.obs.dtype)

    def value(params):
        return module.make_network(config).apply({"params": params}, obs).sum()

    acting, learning = (product_flops(jax.make_jaxpr(f)(state.params).jaxpr) for f in (value, jax.grad(value)))
    return config.NUM_STEPS * (acting + config.NUM_EPOCHS * learning)


def hardware():
    """The devices in words; of a CPU its model, where the system tells."""
    import jax

    kind, info = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    models = info.read_text().split("model name\t: ")[1:] if kind == "cpu" and info.exists() else []
    return f"{jax.local_device_count()} x {models[0].splitlines()[0] if models else kind}"


def measure(recipe, seeds, envs, updates, turns, changes):
    """One row, in this process."""
    script, _ = RECIPES[recipe]
    module = importlib.import_module(script)
    import jax
    from omegaconf import OmegaConf
    from throughput import matrix_rate

    alg = OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml")
    alg = OmegaConf.to_container(OmegaConf.merge(alg, OmegaConf.from_dotlist(changes)))
    alg["NUM_ENVS"] = int(alg["NUM_ENVS"] * envs)
    config = module.Config(**alg | {"TEST_DURING_TRAINING": False})
    train, keys = module.make_train(config), jax.random.split(jax.random.key(0), seeds)

    def seconds(function, *args, **kwargs):
        start = time.perf_counter()
        out = jax.block_until_ready(function(*args, **kwargs))
        return time.perf_counter() - start, out

    first, out = seconds(train, keys, num_updates=updates, length=updates)
    times = []
    for _ in range(turns):
        spent, out = seconds(train, state=out["runner_state"], num_updates=updates, length=updates)
        times.append(spent)
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flops = update_flops(script, module, config, train, keys[0]) * updates * seeds
    play, carry = random_play(script, module, config, train, keys[0])
    playing = []
    for _ in range(turns + 2):  # what it returns may be of other types than what it was given: two compilations
        spent, carry = seconds(play, carry)
        playing.append(spent)
    steps, spent = config.NUM_ENVS * config.NUM_STEPS, statistics.median(times)
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    row = dict(zip(KEY, (recipe, seeds, config.NUM_ENVS, config.NUM_STEPS, " ".join(changes)), strict=True))
    row |= {"task": config.TASK, "compile_s": round(first - spent, 1)}
    row["steps_per_s"] = round(steps * updates * seeds / spent)
    row["environment_steps_per_s"] = round(steps / statistics.median(playing[2:]))
    row |= {"gflop_per_s": round(flops / spent / 1e9, 1), "share": round(flops / spent / 1e9 / matrix_rate(), 3)}
    row |= {
        "peak_gib": round(memory / 2**30, 2),
        "device": hardware(),
    }
    return row | {
        "jax": jax.__version__,
        "script": script,
        "turns": turns,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
    }


def write(row):
    """Merge a row into the results of its device: a CSV and its table."""
    import pandas as pd

    device = re.sub(r"[^a-z0-9]+", "_", row["device"].lower())
    path, new = ROOT / f"results/speed_{device}.csv", pd.DataFrame([row])
    table = pd.concat([pd.read_csv(path, keep_default_na=False), new]) if path.exists() else new
    table = table.drop_duplicates(KEY, keep="last").sort_values(
        ["script", *KEY], key=lambda x: x.astype(str).str.zfill(9)
    )
    table.to_csv(path, index=False)
    shown = table[[*KEY, "compile_s", "steps_per_s", "environment_steps_per_s", "share", "peak_gib", "commit"]]
    lines = [shown.columns, ["---"] * shown.shape[1], *shown.itertuples(index=False)]
    versions = f"{row['device']}, jax {version('jax')}; {row['date']}; columns: see benchmarks/speed.py\n\n"
    path.with_suffix(".md").write_text(versions + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))
    print(f"Wrote {path} and {path.with_suffix('.md')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[r for r in RECIPES if r != "pqn_craftax_rnn"], choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--envs", type=float, nargs="+", default=[1], help="times the recipe's NUM_ENVS")
    parser.add_argument("--updates", type=int, help="in one timing")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure in this process, print JSON
    parser.add_argument("changes", nargs="*", metavar="alg.KEY=value")
    args = parser.parse_intermixed_args()
    changes = [change.removeprefix("alg.") for change in args.changes]
    if args.one:
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        row = measure(args.recipes[0], args.seeds[0], args.envs[0], args.updates, args.turns, changes)
        return print(json.dumps(row))
    for recipe, seeds, envs in itertools.product(args.recipes, args.seeds, args.envs):
        options = ["--recipes", recipe, "--seeds", seeds, "--envs", envs, "--turns", args.turns]
        options += ["--updates", args.updates or RECIPES[recipe][1], "--one", "--", *changes]
        done = subprocess.run([sys.executable, __file__, *map(str, options)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{recipe}, {seeds} seeds, {envs} times NUM_ENVS: failed", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print({key: row[key] for key in (*KEY, "compile_s", "steps_per_s", "share")}, flush=True)
        write(row)


if __name__ == "__main__":
    main()
