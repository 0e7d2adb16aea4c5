"""All GPU figures of the pages, in sittings: what one did not finish, the next goes on with.

    python benchmarks/gpu.py                                      # at most 9 minutes; again until it says that all is done
    python benchmarks/gpu.py --runs minatar cartpole_2000 --limit 3600
    python benchmarks/gpu.py --fraction 1e-3 --out /tmp           # a trial of each, a thousandth of its steps, on any machine

A row of results/gpu_<device>.csv for each run that has ended: seconds and steps_per_s, of training and evaluations without compilation, all
seeds together; frames_per_hour, of Atari, four a step; peak_gib, of the device's memory; score, the mean of the last evaluation. Runs are kept in
runs/gpu.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RUNS = {  # name: (script, recipe, seeds, changes)
    "minatar": ("pqn_minatar", "pqn", 1, {}),
    "minatar_10": ("pqn_minatar", "pqn", 10, {}),
    "cartpole": ("pqn_gymnax", "pqn_cartpole", 1, {}),
    "cartpole_2000": ("pqn_gymnax", "pqn_cartpole", 2000, {}),
    "atari": ("pqn_atari_envpool", "pqn_atari", 1, {"TOTAL_TIMESTEPS": 1e6}),
    "atari_2": ("pqn_atari_envpool", "pqn_atari", 2, {"TOTAL_TIMESTEPS": 1e6}),
    "atari_4": ("pqn_atari_envpool", "pqn_atari", 4, {"TOTAL_TIMESTEPS": 1e6}),
    "smax": ("pqn_vdn_jaxmarl", "pqn_vdn_smax", 1, {"TOTAL_TIMESTEPS": 2e6}),
    "overcooked": ("pqn_vdn_jaxmarl", "pqn_vdn_overcooked", 1, {}),
}


def measure(name, fraction):
    """Train a run, or go on with it, to its end: its row."""
    import jax
    from omegaconf import OmegaConf

    sys.path.insert(0, str(ROOT))
    script, recipe, num_seeds, changes = RUNS[name]
    pqn, path = __import__(script), ROOT / f"runs/gpu/{name}_{fraction}"
    if list(path.glob("*/*/checkpoints/*")):
        out = pqn.run(RESUME="latest", SAVE_PATH=path)
    else:
        config = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml")) | changes
        steps = max(fraction * config["TOTAL_TIMESTEPS"], 2 * config["NUM_ENVS"] * config["NUM_STEPS"])
        out = pqn.run(pqn.Config(**config | {"TOTAL_TIMESTEPS": int(steps)}), SAVE_PATH=path, NUM_SEEDS=num_seeds)
    table, memory = out["metrics"], jax.local_devices()[0].memory_stats() or {}
    steps, seconds = int(table.env_step.max()) * num_seeds, float(table.time.max())
    row = {
        "run": name,
        "seeds": num_seeds,
        "steps": steps,
        "seconds": round(seconds, 1),
        "steps_per_s": round(steps / seconds),
    }
    row |= {"frames_per_hour": round(steps / seconds * 4 * 3600) if script == "pqn_atari_envpool" else ""}
    row |= {"peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2), "score": round(out["score"], 2)}
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()  # none outside a checkout
    row |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return row | {"date": time.strftime("%Y-%m-%d"), "commit": commit}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--limit", type=float, default=540, help="seconds, of this sitting")
    parser.add_argument("--fraction", type=float, default=1.0, help="of each run's steps")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # measure in this process, print JSON
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(measure(args.runs[0], args.fraction)))
    end, left = time.time() + args.limit, []
    for name in args.runs:
        done = ROOT / f"runs/gpu/{name}_{args.fraction}.json"
        command = [sys.executable, __file__, "--one", "--runs", name, "--fraction", str(args.fraction)]
        if not done.exists() and time.time() < end:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            try:
                output, _ = process.communicate(timeout=end - time.time())
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves, and the next sitting goes on
                output, _ = process.communicate()
            if process.returncode == 0:
                done.write_text(output.splitlines()[-1])
        if not done.exists():
            left.append(name)
            continue
        row = json.loads(done.read_text())
        path = args.out / f"gpu_{re.sub(r'[^a-z0-9]+', '_', row['device'].lower())}.csv"
        before = [pd.read_csv(path, keep_default_na=False, dtype={"commit": str})] if path.exists() else []
        table = pd.concat([*before, pd.DataFrame([row])])
        table.drop_duplicates("run", keep="last").to_csv(path, index=False)
        print(row, flush=True)
    print(f"Left for the next sitting: {' '.join(left)}" if left else "All is done")


if __name__ == "__main__":
    main()
