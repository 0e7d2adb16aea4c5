"""Make the tables of README.md and the pages from results/: what stands between <!-- scores -->, <!-- speed -->,
<!-- ablation --> or <!-- launches --> and <!-- end -->.

    python benchmarks/tables.py

results/scores.csv, curves.csv and curves.png are made anew by plot.py from the runs kept in results/; scores.csv also tells commit and machine.
Speeds: results/speed_<device>.csv, of each recipe the newest. Published figures: results/anchors.csv. A block names what it shows:
<!-- scores: pqn_gymnax --> that script's tasks, <!-- scores --> all, <!-- ablation: ablation ablation_full --> these folders of results/.
"""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BLOCK = re.compile(r"(?<=<!-- )(scores|speed|ablation|launches)(?:: ([\w ]+))?( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def draw():
    """The figure and scores.csv of the runs kept in results/, by plot.py, with script, commit and machine."""
    folders = sorted(path.parent for path in RESULTS.glob("pqn_*/config.yaml"))
    subprocess.run([sys.executable, "plot.py", *folders, "--out", RESULTS], cwd=ROOT, check=True)
    runs = [OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) for folder in folders]
    runs = [{"machine": "", **run, **run.get("about", {}), "algorithm": run["alg"]["ALG_NAME"]} for run in runs]
    join = lambda values: "; ".join(dict.fromkeys(filter(None, values)))  # noqa: E731
    facts = pd.DataFrame(runs).groupby(["task", "algorithm"])[["script", "commit", "machine"]].agg(join).reset_index()
    table = pd.read_csv(RESULTS / "scores.csv")
    table["name"] = table.algorithm.str.split(",").str[0]
    table = table.merge(facts.rename(columns={"algorithm": "name"}), on=["task", "name"]).drop(columns="name")
    table.to_csv(RESULTS / "scores.csv", index=False, float_format="%.6g")


def markdown(table):
    """A DataFrame as a table."""
    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def scored(row, name):
    """A score as `mean [low, high]`; nothing where there is none."""
    low = "" if pd.isna(row[f"{name}_low"]) else f" [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]"
    return "" if pd.isna(row[name]) else f"{row[name]:.1f}{low}"


def scores(script):
    """Scores of one script or of all, beside what others published for as many steps."""
    table, rows = pd.read_csv(RESULTS / "scores.csv"), []
    anchors = pd.read_csv(RESULTS / "anchors.csv", dtype=str, keep_default_na=False)
    for _, row in table.sort_values("task", key=lambda names: names.str.lower()).iterrows():
        near = [other for other in anchors.itertuples() if other.task == row.task]
        near = [other for other in near if not other.steps or abs(float(other.steps) / row.steps - 1) < 0.05]
        others = [f"{other.who} {other.training or other.evaluation + ' greedy'}" for other in near]
        steps, training, greedy = (
            f"{row.steps:.2g}".replace("e+0", "e"),
            scored(row, "training"),
            scored(row, "evaluation"),
        )
        named = row.task.replace("_", " ").removesuffix("-MinAtar")
        line = {
            "task": named,
            "steps": steps,
            "seeds": row.seeds,
            "in training": training,
            "greedy, at the end": greedy,
        }
        rows += [line | {"others": "; ".join(others)}] if script in (None, row.script) else []
    return markdown(pd.DataFrame(rows))


def speed(script):
    """The newest speeds of one script's recipes or of all, with machine and commit below."""
    tables = pd.concat([pd.read_csv(path, keep_default_na=False) for path in RESULTS.glob("speed_*.csv")])
    tables = tables[(tables.script == script) | (script is None)].sort_values("date", kind="stable")
    table = tables.drop_duplicates(["recipe", "NUM_SEEDS", "changes"], keep="last").sort_values(["recipe", "NUM_SEEDS"])
    table["steps/s"] = table.steps_per_s.map("{:,}".format)
    table["of matrix products"] = [f"{float(share):.0%}" if share != "" else "" for share in table.share]
    table["times a plain PQN"] = table.ratio.where(table.against == "plain", "")
    shown = table.rename(columns={"NUM_SEEDS": "seeds", "compile_s": "compiles, s"})
    shown = shown[["recipe", "seeds", "changes", "steps/s", "times a plain PQN", "of matrix products", "compiles, s"]]
    shown = shown.loc[:, (shown != "").any()]
    about = [
        f"{device}, jax {jax}, commit {commit}"
        for device, jax, commit in zip(table.device, table.jax, table.commit, strict=True)
    ]
    return f"{markdown(shown)}\n{'; '.join(dict.fromkeys(about))}; evaluations off.\n"


def ablation(folders):
    """Scores of the ablations kept in folders of results/."""
    table = pd.concat([pd.read_csv(RESULTS / folder / "scores.csv") for folder in folders.split()])
    table["steps"] = table.steps.map(lambda steps: f"{steps:.2g}".replace("e+0", "e"))
    for name, column in (("in training", "training"), ("greedy, at the end", "evaluation")):
        table[name] = [scored(row, column) for _, row in table.iterrows()]
    table["task"] = table.task.str.removesuffix("-MinAtar")
    return markdown(
        table.rename(columns={"algorithm": "variant"})[
            ["task", "steps", "variant", "seeds", "in training", "greedy, at the end"]
        ]
    )


def launches(_):
    """What benchmarks/gpu_launches.py counted."""
    table = pd.read_csv(RESULTS / "gpu_launches.csv", keep_default_na=False)
    table["launches"] = table.launches.map("{:,}".format)
    table["graph"] = table.graph.map({True: "one", False: ""})
    table["memory, GiB"] = [f"{(a + b) / 1024:.1f}" for a, b in zip(table.state_mib, table.temp_mib, strict=True)]
    names = ["recipe", "seeds", "launches", "rollout", "minibatch", "rest", "graph", "memory, GiB"]
    return markdown(table[table.changes == ""][names])


def fill(text):
    """A page with its tables made anew."""
    make = {"scores": scores, "speed": speed, "ablation": ablation, "launches": launches}
    return BLOCK.sub(lambda m: f"{m[1]}{': ' + m[2] if m[2] else ''}{m[3]}\n{make[m[1]](m[2])}\n", text)


def main():
    draw()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
