"""README and pages: their links lead somewhere, their commands are understood, their tables are those of results/."""

import importlib
import re
import shlex
import sys

import hydra
import pandas as pd
import pytest
from conftest import ROOT, SCRIPTS
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def first_value(override):
    """What an override gives the first job of a sweep."""
    if override.is_interval_sweep():
        return override.value().start
    return (
        next(override.sweep_string_iterator()) if override.is_sweep_override() else override.get_value_element_as_str()
    )


def commands(script):
    """The overrides of all command lines of a script in the pages and in its own docstring."""
    texts = [page.read_text().replace("\\\n", " ") for page in [*PAGES, ROOT / f"{script}.py"]]
    lines = [line for text in texts for line in re.findall(rf"\b{script}\.py ([^`\n|]*)", text)]
    for line in lines:
        words = shlex.split(line.replace("...", ""), comments=True)
        if "RESUME" not in line and "<" not in line and all("=" in word or word == "-m" for word in words):
            parsed = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
            parsed = [override for override in parsed if not override.key_or_group.startswith("hydra")]
            yield [f"{override.get_key_element()}={first_value(override)}" for override in parsed]


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_the_pages_are_understood(script):
    """Hydra composes them, Config and Settings take what comes of it."""
    module, found = importlib.import_module(script), list(commands(script))
    assert len(found) > 1
    ConfigStore.instance().store(name="schema", node=module.SCHEMA)
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for overrides in found:
            values = OmegaConf.to_container(hydra.compose("config", overrides))
            module.Config(**values.pop("alg"))
            module.Settings(**values)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    assert tables.fill(page.read_text()) == page.read_text(), "run: python benchmarks/tables.py"


def test_every_score_tells_how_it_was_made():
    """Seeds, steps, script, commit and machine; the commit is that of the runs of this script and task."""
    about = [OmegaConf.load(path).about for path in (ROOT / "results").glob("pqn_*/config.yaml")]
    for path in (ROOT / "results").glob("**/scores.csv"):
        table = pd.read_csv(path, dtype=str)
        assert not table[["seeds", "steps", "script", "commit", "machine"]].isna().any(axis=None), path
    for row in pd.read_csv(ROOT / "results/scores.csv", dtype=str).itertuples():
        own = {run.commit for run in about if (run.script, run.task) == (row.script, row.task.split(", ")[0])}
        assert {*row.commit.split(" and ")} <= own, row.task


def test_results_are_small():
    files = [path for path in (ROOT / "results").glob("**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25 * 2**20


def test_the_readme_is_short():
    """Under 130 lines of at most 120 columns; a table's rows may be wider."""
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) < 130 and all(len(line) <= 120 for line in lines if not line.startswith("|"))


def test_the_sweep_as_one_program_runs(capsys):
    """The program in tools.md, shorter: a line for each of its six combinations."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/tools.md").read_text(), re.M | re.S)
    exec(program.replace("TOTAL_TIMESTEPS=1e5", "TOTAL_TIMESTEPS=4096, NUM_ENVS=4, HIDDEN_SIZE=8"), {})
    assert capsys.readouterr().out.count("LR=") == 6
