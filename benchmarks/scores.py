"""Train the recipes, and keep their runs in results/.

    python benchmarks/scores.py --seeds 5 Breakout-MinAtar Asterix-MinAtar      # the recipes in full
    python benchmarks/scores.py --fraction 0.1                                  # all tasks below, a tenth of each recipe's steps
    python benchmarks/scores.py --keep runs/<run>/<time>                        # a run that is there already

Tasks are trained one after the other, into runs/evidence/<fraction>_<seeds>_seeds; one that was stopped goes on where it was. What is kept: config.yaml,
with command, commit and machine, the curve, and the main columns of metrics.csv. Recipes in full are kept by themselves. Then: benchmarks/tables.py
"""

import argparse
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf
from speed import hardware

ROOT = Path(__file__).resolve().parent.parent
GAMES = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]
TASKS = {  # task, and what tells it from others: (script, recipe, overrides)
    "CartPole-v1": ("pqn_gymnax", "pqn_cartpole", []),
    "Acrobot-v1": ("pqn_gymnax", "pqn_acrobot", []),
    "CartPole-v1, recurrent": ("pqn_rnn_gymnax", "pqn_rnn_cartpole", []),
    "CartPolePositions-v1": ("pqn_rnn_gymnax", "pqn_rnn_cartpole_positions", []),
    **{
        f"MemoryChain-bsuite, {n}": ("pqn_rnn_gymnax", "pqn_rnn_memory_chain", [f"alg.ENV_KWARGS.memory_length={n}"])
        for n in (10, 30, 100)
    },
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
        for name in ("3m", "2s3z", "3s5z", "5m_vs_6m")
    },
    "hanabi": ("pqn_vdn_jaxmarl", "pqn_vdn_hanabi", []),
}

KEPT = ["seed", "env_step", "update_steps", "time", "td_loss", "reset_steps"]  # columns of metrics.csv
KEPT += ["test/percent_of_maximum", "test/human_normalized_score", "test/unfinished"]


def git_commit():
    """The working tree's commit; with -dirty where more than results/ was changed."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", ":!results"]).stdout
    return git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + ("-dirty" if changed else "")


def finished(folder, steps):
    """Whether a run has come to its last update."""
    if not (folder / "metrics.csv").exists():
        return False
    last = pd.read_csv(folder / "metrics.csv").iloc[-1]
    return last["env_step"] + last["env_step"] / last["update_steps"] > steps


def train(task, fraction, seeds, root):
    """One task, trained or gone on with, below root; kept if it is the recipe in full."""
    script, recipe, overrides = TASKS[task]
    steps = fraction * float(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml").TOTAL_TIMESTEPS)
    root = root / task.replace(", ", "_")  # of its own
    runs, commits = root / f"{script}_{task.split(',')[0]}_s0", root / "commits"
    folders = sorted(runs.glob("*/"))
    if folders and finished(folders[-1], steps):
        return print(f"{task}: has been trained, {folders[-1]}")
    root.mkdir(parents=True, exist_ok=True)
    with open(commits, "a") as file:
        print(git_commit(), file=file)
    command = [f"{script}.py", f"+alg={recipe}", *overrides, f"NUM_SEEDS={seeds}", f"SAVE_PATH={root}"]
    command += [f"alg.TOTAL_TIMESTEPS={steps:g}"] if fraction != 1 else []
    command = [f"{script}.py", f"RESUME={folders[-1]}"] if folders else command
    if code := subprocess.call([sys.executable, *command], cwd=ROOT):  # it has said why
        sys.exit(code)
    if fraction == 1:
        keep(max(runs.glob("*/")), ", resumed at ".join(dict.fromkeys(commits.read_text().split())))


def keep(folder, commit):
    """A run as evidence, in results/<script>_<task>_s<SEED>/."""
    saved = OmegaConf.load(folder / "config.yaml")
    about = saved.about
    length = saved.alg.ENV_KWARGS.get("memory_length")  # of MemoryChain: a task each
    task = f"{about.task}_{length}" if length else about.task
    kept = ROOT / "results" / f"{about.script}_{task}_s{saved.SEED}"
    kept.mkdir(parents=True, exist_ok=True)
    command = about.commands[0][about.commands[0].index(about.script) :].split()
    about.commands = " ".join(["python", *(word for word in command if not word.startswith("SAVE_PATH="))])
    about.commit, about.machine = commit, hardware()
    saved.SAVE_PATH, saved.RESUME = "runs", None  # no paths of a machine
    OmegaConf.save(saved, kept / "config.yaml")
    table = pd.read_csv(folder / "metrics.csv")
    columns = [name for name in table if name in KEPT or "returned_" in name or "test/Achievements" in name]
    table[columns].to_csv(kept / "metrics.csv", index=False, float_format="%.6g")
    shutil.copy(folder / "learning_curve.png", kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=", ".join(TASKS))
    parser.add_argument("--fraction", type=float, default=1.0, help="of each recipe's steps, schedules included")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", nargs="+", type=Path, metavar="FOLDER", help="of runs, made at this commit")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        sys.exit(f"Error: no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the training's: it saves, and ends with a code
    for folder in args.keep or ():
        keep(folder, git_commit())
    for task in () if args.keep else args.tasks or TASKS:
        train(task, args.fraction, args.seeds, ROOT / f"runs/evidence/{args.fraction:g}_{args.seeds}_seeds")


if __name__ == "__main__":
    main()
