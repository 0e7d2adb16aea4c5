"""What the choices of PQN are worth on MinAtar: the published recipe, and the same with one thing changed.

    python benchmarks/ablation.py                                                                   # five games, 1e6 steps, 3 seeds
    python benchmarks/ablation.py Breakout --steps 1e7 --seeds 5 --variants "inputs / 255" --out results/ablation_1e7 \\
        --beside results/pqn_minatar_Breakout-MinAtar_s0                             # the recipe's run is there already

Schedules run over --steps. Where no option changes the thing, the script's text is changed: a rewording of the script ends in an error here.
Runs are kept in runs/<name of --out>: what was stopped goes on. At the end plot.py draws them all into --out; its scores.csv has commit and machine.
"""

import argparse
import re
import subprocess
import sys
import types
from itertools import product
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf
from scores import GAMES, finished, git_commit
from speed import hardware
from tables import made_by

ROOT = Path(__file__).resolve().parent.parent
TERMINAL = ("reward, done, terminated, q_values.max(-1)", "reward, done, done, q_values.max(-1)")
NEXT_VALUE = "next_value = jnp.where(cut, trajectory.value, next_value)"
VARIANTS = {  # name: (changes of Config, a replacement in the script)
    "PQN": ({}, None),
    "no LayerNorm": ({"NORM_TYPE": "none"}, None),
    "LAMBDA=0": ({"LAMBDA": 0.0}, None),
    "LAMBDA=0.95": ({"LAMBDA": 0.95}, None),
    "time limits terminal": ({}, TERMINAL),
    # The existing implementations' targets: the backward scan starts one step off, with V(s_T) for V(s_{T-1}).
    "targets off by one": ({}, (NEXT_VALUE, f"{NEXT_VALUE}.at[-2].set(next_value[-1])")),
    "inputs / 255": ({"OBS_DIVISOR": 255.0}, None),
}


def variant(replacement):
    """pqn_minatar as a module, with a replacement (old, new) in its text."""
    text = (ROOT / "pqn_minatar.py").read_text()
    if replacement:
        assert text.count(replacement[0]) == 1, f"pqn_minatar.py has no more: {replacement[0]}"
        text = text.replace(*replacement)
    module = types.ModuleType("pqn_minatar")
    sys.modules["pqn_minatar"] = module
    exec(compile(text, "pqn_minatar", "exec"), module.__dict__)
    return module


def train(game, name, args):
    """One variant on one game, trained or gone on with; its config.yaml is given commit and machine."""
    changes, replacement = VARIANTS[name]
    root = ROOT / "runs" / args.out.name / game / re.sub(r"\W+", "_", name)
    folders = sorted(root.glob("*/*/"))
    if folders and finished(folders[-1], args.steps):
        return print(f"{game}, {name}: has been trained, {folders[-1]}")
    print(f"{game}, {name}")
    module = variant(replacement)
    config = {"ENV_NAME": f"{game}-MinAtar", "ALG_NAME": name, "TOTAL_TIMESTEPS": args.steps}
    config |= {"TEST_DURING_TRAINING": False} | changes
    settings = {"RESUME": folders[-1]} if folders else {"NUM_SEEDS": args.seeds, "SAVE_PATH": root}
    folder = module.run(None if folders else module.Config(**config), **settings)["folder"]
    saved = OmegaConf.load(folder / "config.yaml")
    saved.about.commit, saved.about.machine = git_commit(), hardware()
    OmegaConf.save(saved, folder / "config.yaml")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("games", nargs="*", metavar="game", default=GAMES, help=", ".join(GAMES))
    parser.add_argument("--steps", type=float, default=1e6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=Path, default=Path("results/ablation"))
    parser.add_argument("--beside", nargs="+", type=Path, default=[], metavar="FOLDER", help="runs to draw, too")
    args = parser.parse_args()
    for game, name in product(args.games, args.variants):
        train(game, name, args)
    folders = [ROOT / "runs" / args.out.name, *(folder.resolve() for folder in args.beside)]
    subprocess.run([sys.executable, "plot.py", *folders, "--out", args.out], cwd=ROOT, check=True)
    configs = [path for folder in folders for path in folder.rglob("config.yaml")]
    runs = [OmegaConf.to_container(OmegaConf.load(path)) for path in configs]
    table = pd.read_csv(ROOT / args.out / "scores.csv")
    table.join(table.apply(made_by, axis=1, runs=runs)).to_csv(ROOT / args.out / "scores.csv", index=False)


if __name__ == "__main__":
    main()
