"""Make the tables of README.md and the pages from results/: what stands between <!-- scores -->, <!-- speed -->,
<!-- ablation -->, <!-- gpu -->, <!-- launches --> or <!-- peers --> and <!-- end -->.

    python benchmarks/tables.py

results/scores.csv, curves.csv and curves.png are made anew by plot.py from the runs kept in results/; scores.csv also tells commit and machine.
Speeds: results/speed_<device>.csv, of each recipe the newest. Published figures: results/anchors.csv. A block names what it shows:
<!-- scores: pqn_gymnax --> that script's tasks, <!-- scores --> all, <!-- ablation: ablation_1e7 --> that folder of results/,
<!-- speed: gpu --> the speeds of GPUs.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BLOCK = re.compile(
    r"(?<=<!-- )(scores|speed|ablation|gpu|launches|peers)(?:: (\w+))?( -->\n).*?(?=<!-- end -->)", re.DOTALL
)
# A task, and its name in the words of the field.
NAMES = {"(.*)-MinAtar": r"MinAtar \1", "HeuristicEnemySMAX_(.*)": r"SMAX \1, % won", "MPE_(.*)_v3": r"MPE \1"}
NAMES |= {"overcooked_(.*)": r"Overcooked \1", "hanabi": "Hanabi", "(.*)-v5": r"Atari \1"}
NAMES |= {"MemoryChain-bsuite, memory_length=(.*)": r"MemoryChain of \1 steps, at best 1"}
NAMES |= {"CartPolePositions-v1": "CartPole without velocities", "(.*)-v1": r"\1"}


def draw():
    """The figure and scores.csv of the runs kept in results/, by plot.py, with script, commit and machine. SMAX's scores are
    percent won."""
    folders = sorted(path.parent for path in RESULTS.glob("pqn_*/config.yaml"))
    won = [folder for folder in folders if "SMAX" in folder.name]
    with tempfile.TemporaryDirectory() as temporary:
        plot = [sys.executable, "plot.py", "--metric", "returned_won_episode", "--out", temporary]
        subprocess.run([*plot, *won], cwd=ROOT, check=True)
        won = pd.read_csv(f"{temporary}/scores.csv")
    subprocess.run([sys.executable, "plot.py", *folders, "--out", RESULTS], cwd=ROOT, check=True)
    table = pd.read_csv(RESULTS / "scores.csv")
    numbers = [name for name in table if name.startswith(("training", "evaluation"))]
    won[numbers] *= 100
    table = pd.concat([table[~table.task.isin(won.task)], won], ignore_index=True)
    runs = [OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) for folder in folders]
    table = table.join(table.apply(made_by, axis=1, runs=runs)).sort_values(["script", "task"], key=place)
    table.to_csv(RESULTS / "scores.csv", index=False, float_format="%.6g")


def made_by(row, runs):
    """Script, commits and machines of the runs in a row of scores.csv."""
    (task, *kwargs), name = row.task.split(", "), row.algorithm.split(", ")[0]
    runs = [run | run.get("about", {}) for run in runs if run["alg"]["ALG_NAME"] == name]
    runs = [run for run in runs if run["task"] == task]
    runs = [run for run in runs if {*kwargs} <= {f"{key}={value}" for key, value in run["alg"]["ENV_KWARGS"].items()}]
    names = ("script", "commit", "machine")
    return pd.Series({key: " and ".join(dict.fromkeys(filter(None, (run.get(key) for run in runs)))) for key in names})


def place(column):
    """What is sorted by: of scripts their place in the README, of tasks their names, with 30 before 100; others as they are."""
    readme = (ROOT / "README.md").read_text()
    if column.name == "script":
        return column.map(lambda script: readme.find(f"{script}.py"))
    if column.name == "task":
        return column.str.replace(r"\d+", lambda number: number[0].zfill(9), regex=True)
    return column


def markdown(table):
    """A DataFrame as a table."""
    if table.empty:
        return "Not measured yet.\n"
    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def short(steps):
    """1e+06 as 1e6."""
    return f"{steps:.2g}".replace("e+0", "e")


def named(task):
    """A task in the words of the field."""
    return next((re.sub(old, new, task) for old, new in NAMES.items() if re.fullmatch(old, task)), task)


def scored(row, name):
    """A score as `mean [low, high]`; nothing where there is none."""
    low = "" if pd.isna(row[f"{name}_low"]) else f" [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"
    return "" if pd.isna(row[name]) else f"{row[name]:.1f}{low}"


def scores(script):
    """Scores of one script or of all, beside what others published for as many steps."""
    table, rows = pd.read_csv(RESULTS / "scores.csv", dtype={"commit": str}), []
    anchors = pd.read_csv(RESULTS / "anchors.csv", dtype=str, keep_default_na=False)
    table = table[table.script == script] if script else table.drop_duplicates(["script", "task"])  # the best
    for _, row in table.iterrows():
        near = [other for other in anchors.itertuples() if (other.script, other.task) == (row.script, row.task)]
        near = [other for other in near if not other.steps or abs(float(other.steps) / row.steps - 1) < 0.05]
        memory = "recurrent" if row.script == "pqn_rnn_gymnax" else ""
        varied = row.algorithm.partition(", ")[2] if sum(table.task == row.task) > 1 else ""
        task = ", ".join(filter(None, [named(row.task), memory, varied]))
        rows.append({"task": task, "steps": short(row.steps), "seeds": row.seeds})
        for name, column in (("in training", "training"), ("greedy", "evaluation")):
            others = [f"{other.who} {getattr(other, column)}" for other in near if getattr(other, column)]
            rows[-1] |= {name: scored(row, column), f"others, {name}": ", ".join(others)}
        rows[-1]["commit"] = row.commit
    return markdown(pd.DataFrame(rows))


def speed(script):
    """The newest speeds of one script's recipes or of all on CPUs, or of those on GPUs, with machine and commit below."""
    table = pd.concat(
        [pd.read_csv(path, keep_default_na=False, dtype={"commit": str}) for path in RESULTS.glob("speed_*.csv")]
    )
    on_gpu = table.device.str.contains(r"^\d+ x ")  # as speed.py tells their number
    chosen = on_gpu if script == "gpu" else ~on_gpu & ((table.script == script) | (script is None))
    table = table[chosen].sort_values("date", kind="stable")
    table = table.drop_duplicates(["recipe", "NUM_SEEDS", "changes"], keep="last").sort_values(
        ["script", "recipe", "NUM_SEEDS"], key=place
    )
    if table.empty:
        return markdown(table)
    table["steps a second"] = table.steps_per_s.map("{:,}".format)
    table["share of peak"] = [f"{float(share):.0%}" if share != "" else "" for share in table.share]
    table["times the plain PQN"] = table.ratio.where(table.against == "plain", "")
    shown = table.rename(columns={"NUM_SEEDS": "seeds", "compile_s": "compile time, s"})
    names = ["recipe", "seeds", "changes", "steps a second", "times the plain PQN", "share of peak", "compile time, s"]
    shown = shown[names].loc[:, (shown[names] != "").any()]
    table["device"] = table.device.str.replace(r", \d devices", "", regex=True)  # the text above the table tells
    about = (" and ".join(dict.fromkeys(table[name])) for name in ("device", "jax", "commit"))
    return "{}\n{}; jax {}, commit {}. Evaluations are off.\n".format(markdown(shown), *about)


def ablation(folder):
    """What benchmarks/ablation.py measured: a row a variant, the best first, a column a game, and the mean over games of the
    share of the recipe's score."""
    table = pd.read_csv(RESULTS / folder / "scores.csv", dtype={"commit": str}).replace({"algorithm": {"pqn": "PQN"}})
    shares = {}
    for name, column in (("in training", "training"), ("greedy", "evaluation")):
        score = table.pivot(index="algorithm", columns="task", values=column)
        shares[f"mean share, {name}"] = (score / score.loc["PQN"]).mean(axis=1)
    table["score"] = [scored(row, "training") for _, row in table.iterrows()]
    shown = table.pivot(index="algorithm", columns="task", values="score").fillna("")
    shown = shown.rename(columns=lambda task: task.removesuffix("-MinAtar")).assign(**shares)
    shown = shown.sort_values("mean share, in training", ascending=False)
    shown = shown.assign(**{name: shown[name].map("{:.0%}".format) for name in shares})
    about = "{} seeds of {} steps; {}, commit {}.".format(
        *(" and ".join(dict.fromkeys(map(str, values))) for values in (table.seeds, table.steps.map(short))),
        *(" and ".join(dict.fromkeys(table[name])) for name in ("machine", "commit")),
    )
    return f"{markdown(shown.rename_axis('variant').reset_index())}\n{about}\n"


def gpu(_):
    """Whole runs on GPUs, evaluations included, by benchmarks/gpu.py."""
    paths = set(RESULTS.glob("gpu_*.csv")) - {RESULTS / "gpu_launches.csv"}
    table = pd.concat([pd.read_csv(path, keep_default_na=False, dtype={"commit": str}) for path in sorted(paths)])
    table["steps of a seed"] = (table.steps / table.seeds).map(short)
    table["steps a second, all seeds"] = table.steps_per_s.map("{:,}".format)
    table["frames an hour"] = [frames and short(float(frames)) for frames in table.frames_per_hour]
    table = table.rename(columns={"peak_gib": "memory, GiB"})
    names = ["run", "seeds", "steps of a seed", "seconds", "steps a second, all seeds", "frames an hour"]
    names += ["memory, GiB", "score"]
    about = (" and ".join(dict.fromkeys(table[name])) for name in ("device", "jax", "commit", "date"))
    return "{}\n{}; jax {}, commit {}, {}.\n".format(markdown(table[names]), *about)


def launches(_):
    """What benchmarks/gpu_launches.py counted."""
    table = pd.read_csv(RESULTS / "gpu_launches.csv", keep_default_na=False)
    table["launches"] = table.launches.map("{:,}".format)
    table["one graph"] = table.graph.map({True: "yes", False: "no"})
    table["memory, MiB"] = table.state_mib + table.temp_mib
    names = ["recipe", "seeds", "launches", "rollout", "minibatch", "rest", "one graph", "memory, MiB"]
    return markdown(table[table.changes == ""][names])


def peers(_):
    """What benchmarks/peers.py measured."""
    table = pd.read_csv(RESULTS / "peers.csv", dtype={"commit": str})
    table = table.astype(object).fillna("")  # no return: no episode ended
    speeds = table[["steps_per_s", "their_steps_per_s"]].map("{:,}".format)
    table[["ours, steps a second", "theirs"]] = speeds
    table["times"], table["steps of a seed"] = table.ratio, table.steps.map(short)
    table = table.rename(columns={"return": "our return", "their_return": "their return"})
    names = ["task", "steps of a seed", "seeds", "ours, steps a second", "theirs", "times"]
    names += ["our return", "their return", "turns", "peer"]
    about = (" and ".join(dict.fromkeys(table[name])) for name in ("machine", "commit", "date"))
    return "{}\n{}; commit {}, {}.\n".format(markdown(table[names]), *about)


def fill(text):
    """A page with its tables made anew."""
    make = {function.__name__: function for function in (scores, speed, ablation, gpu, launches, peers)}
    return BLOCK.sub(lambda m: f"{m[1]}{': ' + m[2] if m[2] else ''}{m[3]}\n{make[m[1]](m[2])}\n", text)


def main():
    draw()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
