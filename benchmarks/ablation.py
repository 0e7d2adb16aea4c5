"""What the choices of PQN are worth on MinAtar: the published recipe, and the same with one thing changed.

    python benchmarks/ablation.py Breakout Freeway --steps 1e6 --seeds 4
    python plot.py runs/ablation --out results/ablation --metric test/returned_episode_returns

Schedules run over --steps. Where no option changes the thing, the script's text is changed: a rewording of the script ends in an error here.
"""

import argparse
import sys
import types
from pathlib import Path

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("games", nargs="+", metavar="game", help="Breakout, Freeway, ...")
    parser.add_argument("--steps", type=float, default=1e6)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="SEED")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()
    for game in args.games:
        for name in args.variants:
            changes, replacement = VARIANTS[name]
            module = variant(replacement)
            config = {"ENV_NAME": f"{game}-MinAtar", "ALG_NAME": name, "TOTAL_TIMESTEPS": args.steps} | changes
            print(f"{game}, {name}")
            module.run(module.Config(**config), SEED=args.seed, NUM_SEEDS=args.seeds, SAVE_PATH="runs/ablation")


if __name__ == "__main__":
    main()
