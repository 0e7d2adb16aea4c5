"""Final scores of runs, from their metrics.csv: for each seed the mean training return over the last tenth and the last evaluation.

python benchmarks/scores.py results/pqn_minatar_breakout_1e7.csv runs/*/*/metrics.csv
"""

import argparse
from pathlib import Path

import numpy as np


def scores(path):
    """Training return over the last tenth of the steps and last evaluation, each [num_seeds]."""
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="")
    late = table[table["env_step"] > 0.9 * table["env_step"].max()]
    seeds = [late[late["seed"] == seed] for seed in np.unique(late["seed"])]
    tests = [rows["test/returned_episode_returns"] for rows in seeds]
    train = [np.nanmean(rows["returned_episode_returns"]) for rows in seeds]
    return np.array(train), np.array([x[np.isfinite(x)][-1] if np.isfinite(x).any() else np.nan for x in tests])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        for name, values in zip(("training", "evaluation"), scores(path), strict=True):
            print(f"{path}: {name} {', '.join(f'{x:.1f}' for x in values)}: {values.mean():.1f}")


if __name__ == "__main__":
    main()
