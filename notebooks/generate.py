"""Write a Colab notebook for each script: an install cell, the script as it is, and a small run with its curve.

python notebooks/generate.py     # after a change to a script; the tests fail if a notebook is stale
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RUNS = {  # what is trained, and how long that takes on two CPU cores, as Colab has them
    "pqn_minatar": ('run(Config(ENV_NAME="Breakout-MinAtar", TOTAL_TIMESTEPS=1e7), NUM_SEEDS=3)', "20 minutes"),
    "pqn_gymnax": ('run(Config(ENV_NAME="CartPole-v1"), NUM_SEEDS=10)', "3 minutes"),
    "pqn_rnn_gymnax": ('run(Config(ENV_NAME="CartPolePositions-v1"), NUM_SEEDS=5)', "an hour"),
    "pqn_atari_envpool": ('run(Config(ENV_NAME="Pong-v5", TOTAL_TIMESTEPS=5e6))', "3 hours"),
    "pqn_craftax_rnn": (
        'run(Config(ENV_NAME="Craftax-Classic-Symbolic-v1", NUM_ENVS=256, TOTAL_TIMESTEPS=1e7))',
        "3 hours",
    ),
    "pqn_vdn_jaxmarl": ('run(Config(MAP_NAME="3m", TOTAL_TIMESTEPS=2e6), NUM_SEEDS=3)', "3 hours"),
}
TITLE = """# {script}.py

The cells below install packages, define the script and train: `{run}`.
On two CPU cores that takes about {time}. A GPU, which has not been timed: *Runtime, Change runtime type*."""


def cell(name, kind, text):
    """A notebook's cell."""
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": {}, "source": text.strip().splitlines(keepends=True), **code}


def notebook(script):
    """The notebook of a script, as text."""
    text = (FOLDER.parent / f"{script}.py").read_text()
    metadata, body = re.match(r"# /// script\n(.*?)# ///\n(.*)", text, re.DOTALL).groups()
    packages = [package for package in re.findall(r'"([^"]+)"', metadata) if re.match(r"[a-z]", package)]
    packages = [f'"{package}"' for package in packages if not package.startswith("jax>")]
    run, time = RUNS[script]
    cells = [
        cell("title", "markdown", TITLE.format(script=script, run=run, time=time)),
        cell("install", "code", f"# JAX 0.10 or newer is taken to be there\n%pip install -q {' '.join(packages)}"),
        cell("script", "code", body),
        cell("run", "code", f"out = {run}"),
    ]
    about = {"accelerator": "GPU", "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    for script in RUNS:
        (FOLDER / f"{script}.ipynb").write_text(notebook(script))
