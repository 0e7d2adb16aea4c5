"""What the choices of PQN are worth on MinAtar: the published recipe, and the same with one thing changed.

    python benchmarks/ablation.py Breakout Freeway --steps 1e6 --seeds 4
    python plot.py runs/ablation --out results/ablation --metric test/returned_episode_returns

Schedules run over --steps. Where no option changes the thing, the script's text is changed: a rewording of the script ends in an error here.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import throughput  # noqa: E402

NEXT_VALUE = "next_value = jnp.concatenate([trajectory.value[1:], value[:1]])"
VARIANTS = {  # name: (changes of Config, replacements in the script)
    "PQN": ({}, []),
    "no LayerNorm": ({"NORM_TYPE": "none"}, []),
    "LAMBDA=0": ({"LAMBDA": 0.0}, []),
    "LAMBDA=0.95": ({"LAMBDA": 0.95}, []),
    "time limits terminal": ({}, throughput.TERMINAL),
    # The existing implementations' targets: the backward scan starts one step off, with V(s_T) for V(s_{T-1}).
    "targets off by one": ({}, [(NEXT_VALUE, f"{NEXT_VALUE}.at[-2].set(value[0])")]),
    "inputs / 255": ({"OBS_DIVISOR": 255.0}, []),
}


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
            changes, replacements = VARIANTS[name]
            module = throughput.variant("pqn_minatar", replacements)
            config = {"ENV_NAME": f"{game}-MinAtar", "ALG_NAME": name, "TOTAL_TIMESTEPS": args.steps} | changes
            print(f"{game}, {name}")
            out = module.run(module.Config(**config), SEED=args.seed, NUM_SEEDS=args.seeds, SAVE_PATH="runs/ablation")
            if out["interrupted"]:
                sys.exit(f"Stopped: remove {out['folder']}, or go on with --variants")


if __name__ == "__main__":
    main()
