# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "numpy>=2.0", "omegaconf>=2.3", "pandas>=2.2", "scipy>=1.15"]
# ///
"""Learning curves and a table of scores, from the run folders of any script. Documentation: docs/tools.md

    python plot.py runs/*                                  # curves.png, curves.csv, and the table here and in scores.csv
    python plot.py runs/lr_sweep --out lr --x time         # a sweep (SAVE_PATH=runs/lr_sweep), against wall clock
    python plot.py runs/* --metric test/returned_episode_returns

Runs are grouped by environment (a panel each) and algorithm (a line each: ALG_NAME and the hyper-parameters in which
the runs differ). Seeds are pooled. Lines are interquartile means, bands 95% bootstrap confidence intervals over seeds
(Agarwal et al., 2021, arXiv 2108.13264). What is left out is said.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from omegaconf import OmegaConf
from scipy import stats

COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
]  # colour-blind safe (Okabe, Ito)
AXES = {"env_step": "environment steps", "env_frame": "frames", "time": "training time [s]"}
METRICS = {"returned_episode_returns": "training return", "test/returned_episode_returns": "evaluation return"}


def leave_out(folder, reason):
    """Say that a run is not used, and why."""
    print(f"Left out {folder}: {reason}", file=sys.stderr)


def read_run(folder):
    """A run as a dictionary: its task, its flat hyper-parameters, its table of metrics; None if it cannot be used."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        alg = pd.json_normalize(saved["alg"]).iloc[0].to_dict()
        table = pd.read_csv(folder / "metrics.csv")
        if table.empty or not {"seed", "env_step", "update_steps"} <= set(table):
            raise ValueError("metrics.csv has no metrics")
        task = saved.get("about", saved).get("task", alg["ENV_NAME"])  # the environment, with map or layout
        return {"folder": folder, "task": task, "alg": alg, "seed": saved["SEED"], "table": table}
    except FileNotFoundError as error:
        return leave_out(folder, f"no {Path(error.filename).name} yet")
    except Exception as error:
        return leave_out(folder, f"cannot be read ({str(error).splitlines()[0]})")


def read_runs(paths):
    """All runs at or below the paths, in the order of their making."""
    folders = {config.parent for path in paths for config in Path(path).rglob("config.yaml")}
    folders = {
        folder for folder in folders if "wandb" not in folder.parts
    }  # wandb keeps one of its own in a run's folder
    return list(filter(None, map(read_run, sorted(folders, key=lambda folder: folder.name))))


def label(run, runs):
    """An algorithm's name, and the hyper-parameters in which its runs on this task differ."""
    name, others = run["alg"]["ALG_NAME"], [other["alg"] for other in runs if other["task"] == run["task"]]
    others = [alg for alg in others if alg["ALG_NAME"] == name]
    varied = [key for key in run["alg"] if len({str(alg[key]) for alg in others if key in alg}) > 1]
    return ", ".join([name, *(f"{key}={run['alg'][key]}" for key in varied)])


def grouped(runs):
    """(task, label) -> runs to pool, one of each SEED: those that got as far as the longest, of these the one of most seeds, the newest of equals."""
    groups = {}
    for run in runs:
        groups.setdefault((run["task"], label(run, runs)), []).append(run)
    for key, group in groups.items():
        longest, pooled = max(run["table"]["env_step"].max() for run in group), {}
        for run in sorted(reversed(group), key=lambda run: -run["table"]["seed"].nunique()):
            if (steps := run["table"]["env_step"].max()) < longest:
                leave_out(run["folder"], f"it got to step {steps:,}, others of {' '.join(key)} to {longest:,}")
            elif pooled.setdefault(run["seed"], run) is not run:
                leave_out(run["folder"], "another run has the same SEED and settings, and as many seeds or more")
        groups[key] = list(pooled.values())[::-1]
    return groups


def by_seed(runs, column):
    """A column of the pooled runs: rows are logged updates, columns seeds."""
    tables = [run["table"].reindex(columns=["update_steps", "seed", column]) for run in runs]
    tables = [table.pivot(index="update_steps", columns="seed", values=column) for table in tables]
    return pd.concat(tables, axis=1, keys=range(len(tables)))


def interval(values, statistic):
    """The 95% bootstrap confidence interval of a statistic over the last axis; NaN for a single seed."""
    if values.shape[-1] < 2:
        return np.full((2, *values.shape[:-1]), np.nan)
    options = {"axis": -1, "n_resamples": 2000, "method": "percentile", "rng": np.random.default_rng(0)}
    with warnings.catch_warnings(action="ignore"):  # that all seeds have the same score
        return np.array(stats.bootstrap((values,), statistic, **options).confidence_interval)


def iqm(values, axis=-1):
    """The interquartile mean: of the middle half of the values."""
    return stats.trim_mean(values, 0.25, axis=axis)


def curve(runs, x, metric, points=100):
    """The line of a group: a table of x, IQM and interval, at most `points` rows, each of adjacent logged rows."""
    if missing := [run["folder"] for run in runs if not {x, metric} <= set(run["table"])]:
        return leave_out(missing[0], f"it has no {metric} over {x}")
    values = by_seed(runs, metric).dropna(how="all")
    if values.empty:
        return leave_out(runs[0]["folder"], f"no {metric} in it")
    bins = np.arange(len(values)) * min(points, len(values)) // len(values)
    steps = by_seed(runs, x).loc[values.index].mean(axis=1).groupby(bins).mean()
    values = values.groupby(bins).mean()
    known = values.notna().all(axis=1).to_numpy()  # every seed has one: the population is the same along the line
    low, high = interval(values.to_numpy(), iqm)
    line = pd.DataFrame({x: steps, "iqm": iqm(values.to_numpy()), "low": low, "high": high})
    return line[known]


def scores(runs, metric):
    """A group's scores by seed: the mean in training over the last tenth of the run, and the last evaluation's."""
    metric, steps = metric.removeprefix("test/"), by_seed(runs, "env_step")
    found = {"training": by_seed(runs, metric)[steps.max(axis=1) > 0.9 * steps.max().max()].mean()}
    if any(f"test/{metric}" in run["table"] for run in runs):
        found["evaluation"] = by_seed(runs, f"test/{metric}").ffill().iloc[-1]
    return {name: values.to_numpy() for name, values in found.items()}


def score_table(groups, metric):
    """A row a group: seeds, steps, mean and 95% interval of each score."""
    rows = []
    for (task, label), runs in groups.items():
        row = {"task": task, "algorithm": label, "seeds": by_seed(runs, "env_step").shape[1]}
        row["steps"] = int(runs[0]["table"]["env_step"].max())
        for name, values in scores(runs, metric).items():
            low, high = interval(values, np.mean)
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def print_table(rows):
    """The table for the terminal: each score as `mean [low, high]`."""
    shown = rows[["task", "algorithm", "seeds", "steps"]].copy()
    for name in [name for name in ("training", "evaluation") if name in rows]:
        triples = rows[[name, f"{name}_low", f"{name}_high"]].to_numpy()
        shown[name] = [f"{m:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else "") for m, low, high in triples]
    print(shown.to_string(index=False))


def draw(lines, x, metric):
    """The figure: a panel a task, a line a group."""
    tasks = list(dict.fromkeys(task for task, _ in lines))
    columns = min(3, len(tasks))
    size = (1 + 5 * columns, 0.6 + 4 * -(-len(tasks) // columns))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(-(-len(tasks) // columns), columns, squeeze=False).flat
    for panel in list(axes)[len(tasks) :]:
        panel.axis("off")
    labels = list(dict.fromkeys(label for _, label in lines))
    for (task, label), line in lines.items():
        panel, colour = axes[tasks.index(task)], COLOURS[labels.index(label) % len(COLOURS)]
        style = ["-", "--", ":", "-."][labels.index(label) // len(COLOURS) % 4]
        panel.plot(line[x], line["iqm"], style, color=colour, linewidth=2, label=label)
        panel.fill_between(line[x], line["low"], line["high"], color=colour, alpha=0.2, linewidth=0)
        panel.set_title(task, fontsize=14)
        panel.set_xlabel(AXES.get(x, x), fontsize=12)
        panel.set_ylabel(METRICS.get(metric, metric), fontsize=12)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.tick_params(labelsize=11)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=10)
    figure.suptitle("interquartile mean over seeds, band: 95% bootstrap confidence interval", fontsize=11)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--x", default="env_step", choices=AXES)
    parser.add_argument("--metric", default="returned_episode_returns", help="any column of metrics.csv")
    parser.add_argument("--out", default=".", help="folder for curves.png, curves.csv and scores.csv")
    args = parser.parse_args()
    groups = grouped(read_runs(args.paths))
    if not groups:
        sys.exit(f"Error: no run with metrics in {', '.join(args.paths)}")
    lines = {key: curve(runs, args.x, args.metric) for key, runs in groups.items()}
    lines = {key: line for key, line in lines.items() if line is not None}
    if not lines:
        sys.exit(f"Error: no run has {args.metric} over {args.x}")
    rows, out = score_table({key: groups[key] for key in lines}, args.metric), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "scores.csv", index=False, float_format="%.6g")
    print_table(rows)
    named = [line.assign(task=task, algorithm=label) for (task, label), line in lines.items()]
    pd.concat(named).to_csv(out / "curves.csv", index=False, float_format="%.6g")
    draw(lines, args.x, args.metric).savefig(out / "curves.png", dpi=120)
    print(f"Wrote {out / 'curves.png'}, {out / 'curves.csv'} and {out / 'scores.csv'}")


if __name__ == "__main__":
    main()
