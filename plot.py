# /// script
# requires-python = ">=3.11"
# dependencies = ["matplotlib>=3.8", "numpy>=2.0", "omegaconf>=2.3", "pandas>=2.2", "scipy>=1.15", "seaborn>=0.13"]
# ///
"""Learning curves and a table of scores, from the run folders of any script. Documentation: docs/tools.md

python plot.py runs/*                               # curves.png, curves.csv, and the table, printed and in scores.csv
python plot.py runs/lr --out runs/lr --x time       # a sweep (SAVE_PATH=runs/lr): its best setting comes first
"""

import argparse
import re
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from omegaconf import OmegaConf
from scipy import stats

AXES = {"env_step": "environment steps", "env_frame": "frames", "time": "training time [s]"}
CAPTION = "interquartile mean over seeds; band: its 95% bootstrap interval; dashed: published"
LINE, SEED = ["task", "algorithm"], ["task", "algorithm", "run", "seed"]  # columns that tell lines and seeds apart


def leave_out(what, reason):
    """Say that something is not drawn, and why."""
    print(f"Left out {what}: {reason}", file=sys.stderr)


def read_run(folder):
    """A run's task, settings and metrics; None, and why, if it cannot be used."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        alg = pd.json_normalize(saved["alg"]).iloc[0].map(str).to_dict()
        name = saved.get("about", saved).get("task", alg["ENV_NAME"])  # the environment, with map or layout
        table = pd.read_csv(folder / "metrics.csv")
        run = {"folder": folder, "environment": name, "alg": alg, "SEED": saved["SEED"], "table": table}
        return run | {"steps": int(table.env_step.max()), "seeds": table.seed.nunique()}
    except FileNotFoundError as error:
        leave_out(folder, f"no {Path(error.filename).name} yet")
    except Exception as error:
        leave_out(folder, f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})")


def varied(runs):
    """The hyper-parameters in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run["alg"])
    return [key for key in keys if len({run["alg"][key] for run in runs if key in run["alg"]}) > 1]


def read_runs(paths):
    """The runs at or below each path, below it in the order of the alphabet; each with the name of its line."""
    folders = dict.fromkeys(file.parent for path in paths for file in sorted(Path(path).rglob("config.yaml")))
    runs = [run for folder in folders if "wandb" not in folder.parts and (run := read_run(folder))]
    for run in runs:  # an environment with other arguments is another task
        keys = varied([other for other in runs if other["environment"] == run["environment"]])
        kwargs = [key for key in keys if key.startswith("ENV_KWARGS.") and key in run["alg"]]
        run["task"] = ", ".join([run["environment"], *(f"{key[11:]}={run['alg'][key]}" for key in kwargs)])
    for run in runs:
        same = [other for other in runs if other["task"] == run["task"]]
        keys = varied([other for other in same if other["alg"]["ALG_NAME"] == run["alg"]["ALG_NAME"]])
        keys = [key for key in keys if key in run["alg"]]
        run["algorithm"] = ", ".join([run["alg"]["ALG_NAME"], *(f"{key}={run['alg'][key]}" for key in keys)])
    return runs


def pool(runs):
    """One table of the metrics of all runs. Of a line's only those that got as far as its longest, one of each SEED: that
    of most seeds, the newest of equals."""
    longest, kept = {}, {}
    newest = sorted(runs, key=lambda run: run["folder"].name, reverse=True)
    for run in sorted(newest, key=lambda run: (-run["steps"], -run["seeds"])):
        line = run["task"], run["algorithm"]
        if run["steps"] < (most := longest.setdefault(line, run["steps"])):
            leave_out(run["folder"], f"it got to step {run['steps']:,}, others of {' '.join(line)} to {most:,}")
        elif kept.setdefault((*line, run["SEED"]), run) is not run:
            leave_out(run["folder"], "another run has the same SEED and settings, and as many seeds or more")
    folders = {run["folder"] for run in kept.values()}
    tables = [run["table"].assign(**{name: run[name] for name in LINE}, run=str(run["folder"])) for run in runs]
    return pd.concat([table for table, run in zip(tables, runs, strict=True) if run["folder"] in folders])


def iqm(values, axis=-1):
    """The interquartile mean: of the middle half of the values."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values, statistic=iqm):
    """The 95% bootstrap interval of a statistic over seeds; NaN for a single one."""
    if len(values) < 2:
        return np.nan, np.nan
    with warnings.catch_warnings(action="ignore"):  # that all seeds have the same score
        return stats.bootstrap((values,), statistic, n_resamples=2000, method="percentile", rng=0).confidence_interval


def curve_points(data, x, metric):
    """Each seed's means over at most 100 stretches of its line, only of those where all the line's seeds have one."""
    lines = data.groupby(LINE, sort=False)
    data = data.assign(
        bin=lines.env_step.transform(lambda steps: pd.cut(steps, 100, labels=False)),
        population=(data.run + data.seed.astype(str)).groupby([data[name] for name in LINE]).transform("nunique"),
    ).dropna(subset=[x, metric])
    data[x] = data.groupby([*LINE, "bin"])[x].transform("mean")  # seeds' clocks differ
    points = data.groupby([*SEED, "population", x], sort=False)[metric].mean().reset_index()
    points = points[points.groupby([*LINE, x]).seed.transform("size") == points.population]
    for line in lines.groups.keys() - set(points[LINE].itertuples(index=False, name=None)):
        leave_out(" ".join(line), f"its seeds do not have {metric} over {x}")
    return points


def score_table(data, metric):
    """A row a line, in each task the highest evaluation first: the metric's mean over the last tenth of the run, and that
    of the last evaluation; means over seeds with 95% bootstrap intervals."""
    late = data.env_step > 0.9 * data.groupby(LINE).env_step.transform("max")
    data = data.assign(training=data[metric].where(late), evaluation=data[f"test/{metric}"])
    columns = {"steps": ("env_step", "max"), "training": ("training", "mean"), "evaluation": ("evaluation", "last")}
    rows = []
    for line, seeds in data.groupby(SEED, sort=False).agg(**columns).groupby(LINE, sort=False):
        rows.append(dict(zip(LINE, line, strict=True)) | {"seeds": len(seeds), "steps": seeds.steps.max()})
        for name in ("training", "evaluation"):
            low, high = interval(seeds[name].to_numpy(), np.mean)
            rows[-1] |= {name: seeds[name].mean(skipna=False), f"{name}_low": low, f"{name}_high": high}
    rows = pd.DataFrame(rows).assign(place=lambda rows: pd.factorize(rows.task)[0])
    return rows.sort_values(["place", "evaluation", "training"], ascending=[True, False, False]).drop(columns="place")


def print_table(rows):
    """The table for the terminal: each score as `mean [low, high]`."""
    shown = rows[[*LINE, "seeds", "steps"]].copy()
    for name in ("training", "evaluation"):
        triples = rows[[name, f"{name}_low", f"{name}_high"]].to_numpy()
        texts = ["{:.2f} [{:.2f}, {:.2f}]".format(*triple) for triple in triples]
        shown[name] = [text.removesuffix(" [nan, nan]").replace("nan", "") for text in texts]
    print(shown.to_string(index=False))


def draw_published(panel, task, metric, steps):
    """The scores of others in results/anchors.csv as dashed lines, of a range its middle; not of runs over twice as long."""
    path, column = (
        Path(__file__).with_name("results") / "anchors.csv",
        "evaluation" if "test/" in metric else "training",
    )
    anchors = pd.read_csv(path, dtype=str).dropna(subset=[column]) if path.exists() else pd.DataFrame()
    anchors = [
        row
        for _, row in anchors.iterrows()
        if (row.task, row.metric) == (task.split(", ")[0], metric.removeprefix("test/"))
        and not float(row.steps) > 2 * steps  # kept where its steps are not known
    ]
    for i, row in enumerate(anchors):
        value = np.mean([float(number) for number in re.findall(r"-?[\d.]+", row[column])])
        label = row.who + (f", {row.steps} steps" if row.steps == row.steps else "")
        panel.axhline(value, linestyle="--", color=str(0.2 + 0.5 * i / len(anchors)), label=label)


def draw(points, rows, x, metric):
    """The figure: a panel a task, a line an algorithm, in the table's order."""
    tasks, labels = rows.task.unique(), rows.algorithm.unique()
    columns = min(3 if len(tasks) < 10 else 5, len(tasks))
    height = -(-len(tasks) // columns)
    colours = sns.color_palette("colorblind")
    colours.pop(7)  # grey, as published scores are; the other nine again and again
    palette = {label: colours[i % 9] for i, label in enumerate(labels)}
    options = {"palette": palette, "estimator": iqm, "errorbar": interval}
    figure = Figure(figsize=(1 + 5 * columns, 0.6 + 4 * height), layout="constrained")
    for i, task in enumerate(tasks, 1):
        with sns.axes_style("whitegrid"):
            panel = figure.add_subplot(height, columns, i, title=task)
        order = rows.algorithm[rows.task == task].tolist()
        sns.lineplot(points[points.task == task], x=x, y=metric, hue="algorithm", hue_order=order, ax=panel, **options)
        draw_published(panel, task, metric, rows.steps[rows.task == task].max())
        panel.set(xlabel=AXES[x], ylabel=metric.replace("test/", "evaluation: ").replace("_", " "))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        for text in panel.legend(fontsize="small").get_texts():
            text.set_text(textwrap.fill(text.get_text(), 40))
    figure.suptitle(CAPTION, fontsize="medium")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("--x", default="env_step", choices=AXES)
    parser.add_argument("--metric", default="returned_episode_returns", help="any column of metrics.csv")
    parser.add_argument("--out", default=".", type=Path, help="folder for curves.png, curves.csv and scores.csv")
    args = parser.parse_args()
    runs, metric = read_runs(args.paths), args.metric.removeprefix("test/")
    if not runs:
        sys.exit(f"Error: no run with metrics in {', '.join(args.paths)}")
    data = pool(runs)
    data = data.reindex(columns=[*SEED, *dict.fromkeys(["env_step", args.x]), metric, f"test/{metric}"])
    points = curve_points(data, args.x, args.metric)
    if points.empty:
        sys.exit(f"Error: no run has {args.metric} over {args.x}")
    rows = score_table(data.merge(points[LINE].drop_duplicates()), metric)
    print_table(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.out / "scores.csv", index=False, float_format="%.6g")
    curves = points.groupby([*LINE, args.x], sort=False)[args.metric].agg(iqm=iqm, interval=interval).reset_index()
    curves[["low", "high"]] = curves.pop("interval").to_list()
    curves.to_csv(args.out / "curves.csv", index=False, float_format="%.6g")
    draw(points, rows, args.x, args.metric).savefig(args.out / "curves.png", dpi=120)
    print(f"Wrote {args.out / 'curves.png'}, {args.out / 'curves.csv'} and {args.out / 'scores.csv'}")


if __name__ == "__main__":
    main()
