"""The scripts are siblings: same-named definitions are the same. Declared dependencies agree."""

import ast
import itertools
import re
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

# What may differ from script to script, by name; everything else at top level is the same, letter for letter.
MAY_DIFFER = {"SCRIPT", "Config", "QNetwork", "Transition", "TrainState", "make_env", "make_network", "make_pqn"}
MAY_DIFFER_IN_ATARI = {"make_train", "start_seeds"}  # one pool of emulators for all seeds
MAY_DIFFER_IN_TEAMS = {"epsilon_greedy"}  # some actions are unavailable
GYMNAX = {"SCRIPT", "Config", "QNetwork", "make_network"}  # between the two feed-forward scripts of gymnax
RECURRENT = {"SCRIPT", "Config", "QNetwork", "Transition", "TrainState", "make_pqn"}  # pqn_gymnax and pqn_rnn_gymnax


def definitions(script):
    """Name -> syntax tree of every top-level function, class, decorated or assigned name."""
    found = {}
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.dump(node)
        elif isinstance(node, (ast.If, ast.Expr)) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            found[ast.unparse(node)[:40]] = ast.dump(node)
    return found


@pytest.mark.parametrize("a, b", list(itertools.combinations(SCRIPTS, 2)))
def test_same_named_definitions_are_the_same(a, b):
    allowed = MAY_DIFFER | (MAY_DIFFER_IN_ATARI if "pqn_atari_envpool" in (a, b) else set())
    allowed |= MAY_DIFFER_IN_TEAMS if "pqn_vdn_jaxmarl" in (a, b) else set()
    allowed = GYMNAX if {a, b} == {"pqn_gymnax", "pqn_minatar"} else allowed
    allowed = RECURRENT if {a, b} == {"pqn_gymnax", "pqn_rnn_gymnax"} else allowed
    a, b = definitions(a), definitions(b)
    assert {name for name in a.keys() & b.keys() if a[name] != b[name]} <= allowed


def test_gradient_steps_are_the_same():
    """Inside make_pqn, so that one script's tests of it stand for all."""
    texts = [(ROOT / f"{script}.py").read_text() for script in SCRIPTS]
    for start, end in (
        ("        norm = optax", "norm])\n"),
        ("    as_vector = ", "\n"),
        ("        carry, unravel = ", "\n"),
    ):
        assert len({text[(begin := text.index(start)) : text.index(end, begin)] for text in texts}) == 1, start


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short_enough_to_read(script):
    """At most 600 lines (640 with memory, 700 where the environment needs more), 260 of them below make_train."""
    text = (ROOT / f"{script}.py").read_text()
    (end,) = (node.end_lineno for node in ast.parse(text).body if getattr(node, "name", "") == "make_train")
    lines, budgets = len(text.splitlines()), {"pqn_gymnax": 600, "pqn_minatar": 600, "pqn_rnn_gymnax": 640}
    assert lines <= budgets.get(script, 700) and lines - end <= 260


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_function_nests_deeper_than_three(script):
    def depth(node):
        inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, ast.FunctionDef)

    assert depth(ast.parse((ROOT / f"{script}.py").read_text())) <= 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_dependencies_are_those_of_the_extra(script):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / f"{script}.py").read_text()
    inline = tomllib.loads("".join(re.findall(r"^# (.*\n)", text.split("# ///\n")[0].split("# /// script\n")[1], re.M)))
    extra = next(names for key, names in project["optional-dependencies"].items() if key in script.split("_"))
    assert sorted(inline["dependencies"]) == sorted(project["dependencies"] + extra)
    assert inline["requires-python"] == project["requires-python"]


@pytest.mark.parametrize("tool", ["plot", "watch"])
def test_inline_dependencies_of_tools_are_in_the_extras(tool):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / f"{tool}.py").read_text()
    inline = tomllib.loads("".join(re.findall(r"^# (.*\n)", text.split("# ///\n")[0].split("# /// script\n")[1], re.M)))
    assert set(inline["dependencies"]) <= set(
        itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    )
    assert inline["requires-python"] == project["requires-python"]


def test_constraints_name_exact_versions_of_all_direct_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = itertools.chain(*(v for k, v in project["optional-dependencies"].items() if k != "cuda"))
    direct = {re.split(r"[\[<>=]", name)[0].lower() for name in [*project["dependencies"], *extras]} - {project["name"]}
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines)
    assert direct <= {line.split("==")[0].lower() for line in lines}
