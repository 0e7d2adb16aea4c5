"""A script's speed on this machine, in turns with the plain PQN of baseline.py or with another commit's script.

    python benchmarks/speed.py                                             # every recipe below, one seed, alone
    python benchmarks/speed.py --recipes pqn pqn_cartpole --against plain --seeds 1 4
    python benchmarks/speed.py --recipes pqn_vdn_mpe --against HEAD~1      # that commit's script, of the same contract
    python benchmarks/speed.py --recipes pqn_vdn_smax alg.NUM_STEPS=16 alg.MAP_NAME=3m

Evaluations are off. A row of results/speed_<device>.csv for each recipe, number of seeds and overrides (and XLA_FLAGS), which replaces the one
before: compile_s, the program's start and compilation; steps_per_s, of all seeds together, the median over the turns; share, the arithmetic of
an update's matrix products over what a 2048^3 product reaches here; ratio, the median over the turns of ours to the other's speed; peak_gib, the
memory of the process (CPU, the compiler's included) or of the device. Several CPU devices: JAX_NUM_CPU_DEVICES=2. On a GPU: --updates 100.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {  # recipe: (script, updates in one timing on a CPU)
    "pqn_cartpole": ("pqn_gymnax", 12),
    "pqn_acrobot": ("pqn_gymnax", 12),
    "pqn_rnn_cartpole": ("pqn_rnn_gymnax", 2),
    "pqn_rnn_memory_chain": ("pqn_rnn_gymnax", 1),
    "pqn": ("pqn_minatar", 8),
    "pqn_atari": ("pqn_atari_envpool", 1),
    "pqn_craftax_classic_rnn": ("pqn_craftax_rnn", 1),
    "pqn_craftax": ("pqn_craftax_rnn", 1),
    "pqn_craftax_rnn": ("pqn_craftax_rnn", 1),
    "pqn_vdn_mpe": ("pqn_vdn_jaxmarl", 4),
    "pqn_vdn_hanabi": ("pqn_vdn_jaxmarl", 20),
    "pqn_vdn_overcooked": ("pqn_vdn_jaxmarl", 4),
    "pqn_vdn_smax": ("pqn_vdn_jaxmarl", 1),
}
FOR_A_GPU = ["pqn_craftax", "pqn_craftax_rnn"]  # left out unless asked for
KEY = ["recipe", "NUM_SEEDS", "changes"]


def product_flops(jaxpr):
    """Floating-point operations of a jaxpr's matrix products; a while loop counts as one pass, a branch as its dearest."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * terms
        values = [x for value in eqn.params.values() for x in (value if isinstance(value, (tuple, list)) else [value])]
        inner = [product_flops(getattr(x, "jaxpr", x)) for x in values if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        total += eqn.params.get("length", 1) * (max if eqn.primitive.name == "cond" else sum)(inner or [0])
    return total


def matrix_rate():
    """Floating-point operations per second of a 2048^3 float32 matrix product, the best of five."""
    import jax

    a, times = jax.numpy.ones((2048, 2048)), []
    product = jax.jit(lambda a: a @ a)
    for _ in range(6):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def hardware():
    """The devices in words; of a CPU its model, where the system tells, its cores, and what JAX makes of them."""
    import jax

    kind, info = jax.devices()[0].device_kind, Path("/proc/cpuinfo")
    models = info.read_text().split("model name\t: ")[1:] if kind == "cpu" and info.exists() else []
    if kind != "cpu":
        return f"{jax.local_device_count()} x {kind}"
    model = models[0].splitlines()[0] if models else "CPU"
    devices = f", {jax.local_device_count()} devices" if jax.local_device_count() > 1 else ""
    return f"{model}, {os.cpu_count()} cores{devices}"


def of_commit(script, revision):
    """A script as it was in a commit, as a module."""
    text = subprocess.run(
        ["git", "show", f"{revision}:{script}.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    module = types.ModuleType(f"{script}_{revision}")
    sys.modules[module.__name__] = module
    exec(compile(text.stdout, module.__name__, "exec"), module.__dict__)
    return module


def stepper(module, config, seeds, updates):
    """(seconds to start and compile, a function that makes `updates` updates of a script and returns its seconds)."""
    import jax

    start = time.perf_counter()
    state, update = module.start_seeds(config, jax.random.split(jax.random.key(0), seeds))
    compiled, carry = time.perf_counter() - start, [state, 0]

    def step():
        start = time.perf_counter()
        for _ in range(updates):
            carry[:] = update(*carry)[0], carry[1] + 1
        jax.block_until_ready(carry[0])
        return time.perf_counter() - start

    return compiled, step


def plain_stepper(recipe, seeds, updates):
    """The same of baseline.py, all updates in one program."""
    import baseline
    import jax

    settings = dict({"pqn": baseline.MINATAR, "pqn_cartpole": baseline.CARTPOLE}[recipe])
    settings["steps"] = updates * settings["envs"] * settings["horizon"]
    keys, start = jax.random.split(jax.random.key(0), seeds), time.perf_counter()
    train = jax.jit(jax.vmap(baseline.make_train(settings))).lower(keys).compile()
    compiled = time.perf_counter() - start

    def step():
        start = time.perf_counter()
        jax.block_until_ready(train(keys))
        return time.perf_counter() - start

    return compiled, step


def measure(recipe, seeds, updates, turns, against, changes):
    """One row, in this process."""
    script, _ = RECIPES[recipe]
    module = importlib.import_module(script)
    import jax
    from omegaconf import OmegaConf

    alg = OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml")
    alg = OmegaConf.to_container(OmegaConf.merge(alg, OmegaConf.from_dotlist(changes)))
    config = module.Config(**alg | {"TEST_DURING_TRAINING": False})
    compiled, ours = stepper(module, config, seeds, updates)
    other = None
    if against == "plain":
        _, other = plain_stepper(recipe, seeds, updates)
    elif against:
        past = of_commit(script, against)
        _, other = stepper(past, past.Config(**alg | {"TEST_DURING_TRAINING": False}), seeds, updates)
    ours(), other and other()
    times = [(ours(), other() if other else math.nan) for _ in range(turns)]
    seconds, steps = statistics.median(a for a, _ in times), config.NUM_ENVS * config.NUM_STEPS * updates * seeds
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flags = [f"XLA_FLAGS={os.environ['XLA_FLAGS']}"] if os.environ.get("XLA_FLAGS") else []
    row = dict(zip(KEY, (recipe, seeds, " ".join([*changes, *flags])), strict=True)) | {"task": config.TASK}
    row |= {"compile_s": round(compiled, 1), "steps_per_s": round(steps / seconds), "share": "", "against": against}
    row["ratio"] = round(statistics.median(b / a for a, b in times), 2) if other else ""
    if script != "pqn_atari_envpool":  # its emulators are stepped inside
        init, update, _ = module.make_pqn(config)
        jaxpr = jax.make_jaxpr(update)(jax.eval_shape(init, jax.random.key(0)), 0).jaxpr
        row["share"] = round(product_flops(jaxpr) * updates * seeds / seconds / matrix_rate(), 3)
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    row |= {"peak_gib": round(memory / 2**30, 2), "device": hardware(), "jax": jax.__version__, "turns": turns}
    return row | {"date": time.strftime("%Y-%m-%d"), "commit": commit, "script": script}


def write(row):
    """Merge a row into the table of its device."""
    import pandas as pd

    device = re.sub(r"[^a-z0-9]+", "_", row["device"].lower())
    path, new = ROOT / f"results/speed_{device}.csv", pd.DataFrame([row])
    before = [pd.read_csv(path, keep_default_na=False, dtype={"commit": str})] if path.exists() else []
    table = pd.concat([*before, new]).drop_duplicates(KEY, keep="last").sort_values(["script", *KEY])
    table.to_csv(path, index=False)
    print(f"Wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[r for r in RECIPES if r not in FOR_A_GPU], choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--updates", type=int, help="in one timing")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", default="", help="plain (of pqn and pqn_cartpole), or a commit")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure in this process, print JSON
    parser.add_argument("changes", nargs="*", metavar="alg.KEY=value")
    args = parser.parse_intermixed_args()
    changes = [change.removeprefix("alg.") for change in args.changes]
    if args.one:
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        row = measure(args.recipes[0], args.seeds[0], args.updates, args.turns, args.against, changes)
        return print(json.dumps(row))
    for recipe, seeds in itertools.product(args.recipes, args.seeds):
        options = ["--recipes", recipe, "--seeds", seeds, "--turns", args.turns, "--against", args.against]
        options += ["--updates", args.updates or RECIPES[recipe][1], "--one", "--", *changes]
        done = subprocess.run([sys.executable, __file__, *map(str, options)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{recipe}, {seeds} seeds: failed", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print({key: row[key] for key in (*KEY, "compile_s", "steps_per_s", "share", "ratio")}, flush=True)
        write(row)


if __name__ == "__main__":
    main()
