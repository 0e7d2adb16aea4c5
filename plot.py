# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "matplotlib>=3.8", "numpy>=2.0", "omegaconf>=2.3", "pandas>=2.2", "scipy>=1.15", "seaborn>=0.13",
# ]
# ///
"""Learning curves and a table of scores, from the run folders of any script. Documentation: docs/tools.md

python plot.py runs/*                               # curves.png, curves.csv, and the table, printed and in scores.csv
python plot.py runs/lr --out runs/lr --x time       # a sweep (SAVE_PATH=runs/lr): its best setting comes first
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from omegaconf import OmegaConf
from scipy import stats

AXES = {"env_step": "environment steps", "env_frame": "frames", "time": "training time [s]"}
NAMES = {"returned_episode_returns": "training return", "test/returned_episode_returns": "evaluation return"}
CAPTION = "interquartile mean over seeds; band: its 95% bootstrap interval; dashed: published"
LINE, SEED = ["task", "algorithm"], ["task", "algorithm", "run", "seed"]  # columns that tell lines and seeds apart


def leave_out(what, reason):
    print(f"Left out {what}: {reason}", file=sys.stderr)


def read_run(folder):
    """A run's task, settings and metrics; None, and why, if it cannot be used."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        alg = pd.json_normalize(saved["alg"]).iloc[0].map(str).to_dict()
        table = pd.read_csv(folder / "metrics.csv")
        if table.empty or not {"seed", "env_step"} <= set(table):
            raise ValueError("metrics.csv has no metrics")
        task = saved.get("about", saved).get("task", alg["ENV_NAME"])  # the environment, with map or layout
        run = {"folder": folder, "task": task, "alg": alg, "SEED": saved["SEED"], "table": table}
        return run | {"steps": table.env_step.max(), "seeds": table.seed.nunique()}
    except FileNotFoundError as error:
        leave_out(folder, f"no {Path(error.filename).name} yet")
    except Exception as error:
        leave_out(folder, f"cannot be read ({str(error).splitlines()[0]})")


def read_runs(paths):
    """All runs at or below the paths, in their order, below a path in the alphabet's; each with its line's label."""
    folders = [config.parent for path in paths for config in sorted(Path(path).rglob("config.yaml"))]
    folders = [
        folder for folder in dict.fromkeys(folders) if "wandb" not in folder.parts
    ]  # wandb has a config.yaml, too
    runs = [run for run in map(read_run, folders) if run]
    for run in runs:
        algs = [other["alg"] for other in runs if other["task"] == run["task"]]
        algs = [alg for alg in algs if alg["ALG_NAME"] == run["alg"]["ALG_NAME"]]
        varied = [key for key in run["alg"] if len({alg[key] for alg in algs if key in alg}) > 1]
        run["algorithm"] = ", ".join([run["alg"]["ALG_NAME"], *(f"{key}={run['alg'][key]}" for key in varied)])
    return runs


def pool(runs):
    """One table of all metrics. Of a line's runs only those that got as far as its longest, one of each SEED: that of most
    seeds, the newest of equals."""
    longest, kept = {}, {}
    newest = sorted(runs, key=lambda run: run["folder"].name, reverse=True)
    for run in sorted(newest, key=lambda run: (-run["steps"], -run["seeds"])):
        line = run["task"], run["algorithm"]
        if run["steps"] < longest.setdefault(line, run["steps"]):
            others = f"others of {' '.join(line)} to {longest[line]:,}"
            leave_out(run["folder"], f"it got to step {run['steps']:,}, {others}")
        elif kept.setdefault((*line, run["SEED"]), run) is not run:
            leave_out(run["folder"], "another run has the same SEED and settings, and as many seeds or more")
    kept = [run for run in runs if any(run is other for other in kept.values())]
    tables = [run["table"].assign(task=run["task"], algorithm=run["algorithm"], run=i) for i, run in enumerate(kept)]
    return pd.concat(tables, ignore_index=True)


def iqm(values, axis=-1):
    """The interquartile mean: of the middle half of the values."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values, statistic=iqm):
    """The 95% bootstrap interval of a statistic over seeds; NaN for a single one."""
    if len(values) < 2:
        return np.nan, np.nan
    return stats.bootstrap((values,), statistic, n_resamples=2000, method="percentile", rng=0).confidence_interval


def curve_points(data, x, metric, points=100):
    """A row a seed and point, at most `points` a line, each of the rows nearby; only those that all seeds of a line have."""
    seeds = data[SEED].drop_duplicates().value_counts(LINE)
    data = data.dropna(subset=[x, metric])
    bins = data.groupby(LINE).env_step.transform(lambda steps: pd.cut(steps, points, labels=False))
    data = data.assign(**{x: data.groupby([*LINE, bins])[x].transform("mean")})  # seeds' clocks differ
    values = data.groupby([*SEED, x], sort=False)[metric].mean().reset_index()
    found = values.groupby([*LINE, x]).seed.transform("size")
    values = values[found.to_numpy() == seeds.loc[list(zip(values.task, values.algorithm))].to_numpy()]
    for line in seeds.index.difference(pd.MultiIndex.from_frame(values[LINE])):
        leave_out(" ".join(line), f"not all of its seeds have {metric} over {x}")
    return values


def score_table(data, metric):
    """A row a line, the best evaluation of each task first: means and 95% bootstrap intervals over seeds of the training
    metric's mean over the last tenth of the run, and of its last evaluation."""
    metric = metric.removeprefix("test/")
    data = data.reindex(columns=[*SEED, "env_step", metric, f"test/{metric}"])
    late = data[data.env_step > 0.9 * data.groupby(LINE).env_step.transform("max")]
    scores = {"training": late.groupby(SEED, sort=False)[metric].mean()}
    scores["evaluation"] = data.groupby(SEED, sort=False)[f"test/{metric}"].last()
    rows = []
    for line, seeds in pd.DataFrame(scores).groupby(LINE, sort=False):
        steps = data.set_index(LINE).env_step.loc[line].max()
        row = dict(zip(LINE, line)) | {"seeds": len(seeds), "steps": int(steps)}
        for name, values in seeds.items():
            low, high = interval(values.to_numpy(), np.mean)
            row |= {name: values.mean(skipna=False), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    rows, order = pd.DataFrame(rows), list(dict.fromkeys(data.task))
    ranked = rows.sort_values(["evaluation", "training"], ascending=False)
    return ranked.sort_values("task", key=lambda tasks: tasks.map(order.index), kind="stable")


def print_table(rows):
    """The table for the terminal: each score as `mean [low, high]`."""
    shown = rows[["task", "algorithm", "seeds", "steps"]].copy()
    for name in ("training", "evaluation"):
        triples = rows[[name, f"{name}_low", f"{name}_high"]].to_numpy()
        shown[name] = [f"{m:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else "") for m, low, high in triples]
    print(shown.to_string(index=False))


def published(metric):
    """{task: [(label, value)]} of results/anchors.csv; of a range its middle."""
    path, column = (
        Path(__file__).with_name("results") / "anchors.csv",
        "evaluation" if "test/" in metric else "training",
    )
    found = {}
    for row in pd.read_csv(path, dtype=str).dropna(subset=[column]).itertuples() if path.exists() else ():
        if row.metric == metric.removeprefix("test/"):
            label = re.split(r" \(|, ", row.who)[0] + (f", {row.steps} steps" if isinstance(row.steps, str) else "")
            value = np.mean([float(number) for number in re.findall(r"-?[\d.]+", getattr(row, column))])
            found.setdefault(row.task, []).append((label, value))
    return found


def draw(values, rows, x, metric):
    """The figure: a panel a task, a line an algorithm, in the table's order; published scores dashed."""
    tasks, labels, anchors = list(dict.fromkeys(rows.task)), list(dict.fromkeys(rows.algorithm)), published(metric)
    columns = min(3, len(tasks))
    height = -(-len(tasks) // columns)
    palette = sns.color_palette("colorblind" if len(labels) <= 10 else "husl", len(labels))
    figure = Figure(figsize=(1 + 5 * columns, 0.6 + 4 * height), layout="constrained")
    with sns.axes_style("whitegrid"):
        panels = figure.subplots(height, columns, squeeze=False).flat
    for task, panel in zip(tasks, panels):
        order = [label for label in rows.algorithm[rows.task == task]]
        options = {
            "hue": "algorithm",
            "hue_order": order,
            "palette": {label: palette[labels.index(label)] for label in order},
        }
        sns.lineplot(values[values.task == task], x=x, y=metric, estimator=iqm, errorbar=interval, ax=panel, **options)
        for (label, value), grey in zip(anchors.get(task, ()), ("0.2", "0.5", "0.7")):
            panel.axhline(value, linestyle="--", color=grey, label=label)
        panel.set(title=task, xlabel=AXES.get(x, x), ylabel=NAMES.get(metric, metric))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.legend(fontsize="small")
    for panel in list(panels)[len(tasks) :]:
        panel.axis("off")
    figure.suptitle(CAPTION, fontsize="medium")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--x", default="env_step", choices=AXES)
    parser.add_argument("--metric", default="returned_episode_returns", help="any column of metrics.csv")
    parser.add_argument("--out", default=".", type=Path, help="folder for curves.png, curves.csv and scores.csv")
    args = parser.parse_args()
    runs = read_runs(args.paths)
    if not runs:
        sys.exit(f"Error: no run with metrics in {', '.join(args.paths)}")
    data = pool(runs)
    if not {args.x, args.metric} <= set(data):
        sys.exit(f"Error: no run has {args.metric} over {args.x}")
    values = curve_points(data, args.x, args.metric)
    if values.empty:
        sys.exit(f"Error: no run has {args.metric} over {args.x}")
    rows = score_table(data.merge(values[LINE].drop_duplicates()), args.metric)
    print_table(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.out / "scores.csv", index=False, float_format="%.6g")
    points = values.groupby([*LINE, args.x], sort=False)[args.metric].agg(iqm=iqm, interval=interval).reset_index()
    points[["low", "high"]] = points.pop("interval").to_list()
    points.to_csv(args.out / "curves.csv", index=False, float_format="%.6g")
    draw(values, rows, args.x, args.metric).savefig(args.out / "curves.png", dpi=120)
    print(f"Wrote {args.out / 'curves.png'}, {args.out / 'curves.csv'} and {args.out / 'scores.csv'}")


if __name__ == "__main__":
    main()
