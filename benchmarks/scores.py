"""Train the recipes, and set their scores beside what others published, a table scores.md.

    python benchmarks/scores.py --seeds 3 Breakout-MinAtar Asterix-MinAtar      # the recipes in full
    python benchmarks/scores.py --fraction 0.1                                  # all tasks below, a tenth of each recipe's steps
    python benchmarks/scores.py --table                                         # nothing is trained: the table of what results/ has

Tasks are trained one after the other, into runs/evidence/<fraction>_<seeds>_seeds; one that was stopped goes on where it was. Recipes in full are kept
in results/, with their table; a fraction's table is beside its runs. Published figures: results/anchors.csv.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
GAMES = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]
TASKS = {  # task: (script, recipe, overrides)
    "CartPole-v1": ("pqn_gymnax", "pqn_cartpole", []),
    "Acrobot-v1": ("pqn_gymnax", "pqn_acrobot", []),
    **{f"{game}-MinAtar": ("pqn_minatar", "pqn", [f"alg.ENV_NAME={game}-MinAtar"]) for game in GAMES},
    "Pong-v5": ("pqn_atari_envpool", "pqn_atari", []),
    "Breakout-v5": ("pqn_atari_envpool", "pqn_atari", ["alg.ENV_NAME=Breakout-v5"]),
    "Craftax-Classic-Symbolic-v1": ("pqn_craftax_rnn", "pqn_craftax_classic_rnn", []),
    "Craftax-Symbolic-v1": ("pqn_craftax_rnn", "pqn_craftax_rnn", []),
    "MPE_simple_spread_v3": ("pqn_vdn_jaxmarl", "pqn_vdn_mpe", []),
    **{
        f"overcooked_{layout}": ("pqn_vdn_jaxmarl", "pqn_vdn_overcooked", [f"alg.ENV_KWARGS.layout={layout}"])
        for layout in ("cramped_room", "asymm_advantages", "coord_ring", "forced_coord", "counter_circuit")
    },
    **{
        f"HeuristicEnemySMAX_{name}": ("pqn_vdn_jaxmarl", "pqn_vdn_smax", [f"alg.MAP_NAME={name}"])
        for name in ("2s3z", "3s5z", "5m_vs_6m")
    },
    "hanabi": ("pqn_vdn_jaxmarl", "pqn_vdn_hanabi", []),
}

HEADING = """Mean training return over the last tenth of a run, and its last evaluation: means over seeds with 95% bootstrap intervals.
Made by `python benchmarks/scores.py --table`; commands, commits and rows are in the folders beside this file.

"""


def finished(folder, steps):
    """Whether a run has come to its last update."""
    if not (folder / "metrics.csv").exists():
        return False
    last = pd.read_csv(folder / "metrics.csv").iloc[-1]
    return last["env_step"] + last["env_step"] / last["update_steps"] > steps


def train(task, fraction, seeds, root):
    """One task, trained or gone on with, below root; kept in results/ if it is the recipe in full."""
    script, recipe, overrides = TASKS[task]
    steps = fraction * float(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml").TOTAL_TIMESTEPS)
    command = [f"{script}.py", f"+alg={recipe}", *overrides, f"NUM_SEEDS={seeds}"]
    command += [f"alg.TOTAL_TIMESTEPS={steps:g}"] if fraction != 1 else []
    runs, commits = root / f"{script}_{task}_s0", root / f"{task}.commits"
    folders = sorted(runs.glob("*/"))
    if folders and finished(folders[-1], steps):
        return print(f"{task}: has been trained, {folders[-1]}")
    root.mkdir(parents=True, exist_ok=True)
    with open(commits, "a") as file:
        subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=file, check=True)
    command = [f"{script}.py", f"RESUME={folders[-1]}"] if folders else [*command, f"SAVE_PATH={root}"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if fraction == 1:
        commit = ", resumed at ".join(dict.fromkeys(commits.read_text().split()))
        keep = [sys.executable, "benchmarks/keep.py", max(runs.glob("*/")), commit]
        subprocess.run(keep, cwd=ROOT, check=True)


def write_table(root):
    """root/scores.md: each task's scores as plot.py finds them, published ones below."""
    subprocess.run([sys.executable, "plot.py", root, "--out", root], cwd=ROOT, check=True)
    ours = pd.read_csv(root / "scores.csv")
    anchors = pd.read_csv(ROOT / "results/anchors.csv", keep_default_na=False, dtype=str)

    def shown(row, name):
        low = "" if pd.isna(row[f"{name}_low"]) else f" [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"
        return "" if pd.isna(row[name]) else f"{row[name]:.1f}{low}"

    lines = [("task", "steps", "seeds", "who", "training", "evaluation"), ("---",) * 6]
    for _, row in ours.sort_values("task", key=lambda names: names.str.lower()).iterrows():
        scores = [shown(row, name) for name in ("training", "evaluation")]
        lines.append((row["task"], f"{row['steps']:.3g}", row["seeds"], f"**ours**, {row['algorithm']}", *scores))
        for _, other in anchors[anchors["task"] == row["task"]].iterrows():
            lines.append(("", other["steps"], "", other["who"], other["training"], other["evaluation"]))
    table = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    (root / "scores.md").write_text(HEADING + table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=", ".join(TASKS))
    parser.add_argument("--fraction", type=float, default=1.0, help="of each recipe's steps, schedules included")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        sys.exit(f"Error: no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    root = ROOT / f"runs/evidence/{args.fraction:g}_{args.seeds}_seeds"
    for task in [] if args.table else args.tasks or TASKS:
        train(task, args.fraction, args.seeds, root)
    write_table(root if args.fraction != 1 else ROOT / "results")


if __name__ == "__main__":
    main()
