"""Around the scripts: notebooks, plot.py, watch.py, and Hydra's sweepers and launchers."""

import csv
import json
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SCRIPTS, SHORT_CRAFTAX, TINY, tiny_arguments

sys.path.insert(0, str(ROOT / "notebooks"))
import generate  # noqa: E402

import plot  # noqa: E402

MPE = {
    "ENV_NAME": "MPE_simple_spread_v3",
    "MAP_NAME": None,
    "ALG_NAME": "pqn_vdn_mpe",
    "NETWORK": "mlp",
    "MEMORY_WINDOW": 0,
}
# Beside TINY: what each script's notebook trains here, on its own defaults else.
CHANGES = {
    "pqn_minatar": {"NUM_SEEDS": 2},
    "pqn_gymnax": {},
    "pqn_rnn_gymnax": {"HIDDEN_SIZE": 16},
    "pqn_atari_envpool": {"TOTAL_TIMESTEPS": 96, "TEST_ENVS": 1, "ENV_KWARGS": {"max_episode_steps": 60}},
    "pqn_craftax_rnn": SHORT_CRAFTAX,
    "pqn_vdn_jaxmarl": MPE | {"HIDDEN_SIZE": 16},
}
PICTURES = {  # with a bar of 32 pixels
    "pqn_minatar": (480, 512), "pqn_gymnax": (600, 532), "pqn_atari_envpool": (480, 662), "pqn_craftax_rnn": (576, 608),
    "pqn_vdn_jaxmarl": (500, 532), "pqn_rnn_gymnax": (600, 532),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_notebooks_are_those_of_the_scripts(script):
    stale = "run: python notebooks/generate.py"
    assert (ROOT / f"notebooks/{script}.ipynb").read_text() == generate.notebook(script), stale


@pytest.mark.parametrize("script", SCRIPTS)
def test_notebook_trains_and_its_agent_can_be_watched(script, tmp_path, monkeypatch, capsys):
    """The script's cell defines without running; `run` in the next trains and shows its curve; watch.py plays."""
    import nbformat
    from nbclient import NotebookClient
    from PIL import Image

    import watch

    notebook = nbformat.read(ROOT / f"notebooks/{script}.ipynb", 4)
    title, install, cell, train = notebook.cells
    changes = CHANGES[script].copy()
    seeds = changes.pop("NUM_SEEDS", 1)
    config = TINY | changes
    if script == "pqn_atari_envpool":  # its test emulators play along
        config = {key: config[key] for key in config.keys() - {"TEST_INTERVAL", "TEST_NUM_ENVS", "TEST_NUM_STEPS"}}
    assert install.source.splitlines()[1].startswith("%pip install") and train.source.startswith("out = run(Config(")
    train.source = f"out = run(Config(**{config!r}), NUM_SEEDS={seeds})\nprint('score', out['score'])"
    notebook.cells = [cell, train]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    assert cell.outputs == []
    text = "".join(output.get("text", "") for output in train.outputs)
    assert "score" in text and "step/s" in text
    assert any("image/png" in output.get("data", {}) for output in train.outputs)

    (folder,) = tmp_path.glob("runs/*/*")
    if (
        script == "pqn_craftax_rnn"
    ):  # of the real environment: achievements, a score within its bounds, ENV_KWARGS in force
        table = pd.read_csv(folder / "metrics.csv")
        last = table.iloc[-1]
        assert np.isfinite(table.td_loss).all() and -1 <= last["test/returned_episode_returns"] <= 22
        assert 0 < last["test/returned_episode_lengths"] <= 20 and last["test/unfinished"] == 0
        assert sum(key.startswith("Achievements/") for key in table) == 22
        percent = last["test/returned_episode_returns"] / 22 * 100
        np.testing.assert_allclose(last["test/percent_of_maximum"], percent, rtol=1e-5)
    assert (folder / "params.safetensors").exists() and "Warning" not in text, text
    assert any(path.name.isdigit() for path in (folder / "checkpoints").iterdir())
    picture, last = tmp_path / "episode.gif", str(seeds - 1)
    monkeypatch.setattr(
        sys, "argv", ["watch.py", str(folder), "--episodes=2", f"--seed-index={last}", f"--out={picture}"]
    )
    watch.main()
    said = capsys.readouterr().out
    scores = [float(line.split("return ")[1].split()[0]) for line in said.splitlines() if line.startswith("episode")]
    differ = len(set(scores)) > 1
    assert len(scores) == 2 and (f"best {max(scores):g}" if differ else "all alike") in said
    assert f"the {'best' if differ else 'first'} episode" in said
    assert Image.open(picture).size == PICTURES[script]
    monkeypatch.setattr(sys, "argv", ["watch.py", str(folder), f"--seed-index={seeds}"])
    with pytest.raises(SystemExit, match=f"--seed-index={seeds} must be from 0 to"):
        watch.main()
    if script == "pqn_gymnax":  # what its visualiser does not know
        monkeypatch.setattr("gymnax.visualize.Visualizer.init", lambda self: None)
        monkeypatch.setattr(sys, "argv", ["watch.py", str(folder), "--episodes=1", f"--out={tmp_path / 'none.gif'}"])
        watch.main()
        assert "No picture: nothing here can draw CartPole-v1" in capsys.readouterr().out
        assert not (tmp_path / "none.gif").exists()


def test_watch_refuses_in_one_line(tmp_path, monkeypatch):
    import watch

    for argument, said in (
        ("--episodes=0", "--episodes=0 must be at least 1"),
        ("--epsilon=2", "--epsilon=2.0 must be from 0 to 1"),
        ("--out=watch.png", "--out=watch.png must be a .gif or .mp4"),
        (f"--out={tmp_path}/none/watch.gif", "in a folder that exists"),
        ("--seed=0", "is not the folder of a run"),
    ):
        monkeypatch.setattr(sys, "argv", ["watch.py", str(tmp_path), argument])
        with pytest.raises(SystemExit) as error:
            watch.main()
        assert said in str(error.value) and "\n" not in str(error.value)


MINE = """
import gymnax
from gymnax.environments.classic_control.cartpole import CartPole
class Mine(CartPole):
    pass
gymnax.registration.register("Mine-v0", Mine)
"""


def test_an_environment_of_ones_own_is_trained_resumed_and_watched(command, tmp_path):
    """Its module registers it: imported before `run`, and named to watch.py; without it a line says what is missing. By a
    copy of the script under another name."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "my_pqn.py").write_text((ROOT / "pqn_gymnax.py").read_text())
    config = TINY | {"ENV_NAME": "Mine-v0"}
    run = "import mine, my_pqn as pqn\nprint(pqn.run({}, SAVE_PATH='runs')['score'])"
    (tmp_path / "train.py").write_text(run.format(f"pqn.Config(**{config!r})"))
    (tmp_path / "resume.py").write_text(run.format("RESUME='latest'"))
    watch = [ROOT / "watch.py", "--episodes=2", "--out=watch.mp4"]
    for arguments, code, said in (
        (["train.py"], 0, "Run folder"),
        (["resume.py"], 0, "Run folder"),
        (["my_pqn.py", "RESUME=latest"], 1, "ENV_NAME=Mine-v0 is not registered with gymnax"),
        ([*watch, None], 1, "--import <the module that registers it>"),
        ([*watch, None, "--import=mine"], 0, "Wrote watch.mp4"),
    ):
        arguments = [next(tmp_path.glob("runs/*/*")) if word is None else word for word in arguments]
        process = command(*arguments)
        assert process.code == code and said in process.out + process.err, process.err
        assert "Traceback" not in process.err
    assert process.out.count("return ") == 2


def fake_run(folder, seed, returns, lr=1e-3, **more):
    """A run's folder with two seeds that score `returns` at every step, and one more each at the end."""
    folder.mkdir(parents=True)
    alg = {"ALG_NAME": "pqn", "ENV_NAME": "CartPole-v1", "LR": lr} | more
    (folder / "config.yaml").write_text(json.dumps({"SEED": seed, "task": "CartPole-v1", "alg": alg}))
    with open(folder / "metrics.csv", "w", newline="") as file:
        names = ["seed", "env_step", "time", "update_steps"]
        names += ["returned_episode_returns", "test/returned_episode_returns"]
        lines = [
            [i, 10 * t, t, t, score + (t == 20), score if t % 5 == 0 else "nan"]
            for t in range(1, 21)
            for i, score in enumerate(returns)
        ]
        csv.writer(file).writerows([names, *lines])


def test_plot_pools_seeds_and_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    fake_run(tmp_path / "runs/a/1", 0, (1, 2))
    fake_run(tmp_path / "runs/a/2", 1, (3, 100), GAMMA=0.99)  # of a newer version: pooled all the same
    for seed in (0, 1):
        fake_run(tmp_path / f"runs/d/{seed}", seed, (5,), lr=1e-5)
    file = tmp_path / "runs/d/1/metrics.csv"  # its evaluation is not there yet
    file.write_text(file.read_text().replace("test/", "no/"))
    fake_run(tmp_path / "runs/b/1", 0, (7, 7), lr=1e-4)
    fake_run(tmp_path / "runs/b/0", 0, (8, 8), lr=1e-4)  # the same again, older
    fake_run(tmp_path / "runs/b/2", 0, (9,), lr=1e-4)  # newer, but a quick look of one seed
    for name in ("killed", "started", "half"):
        fake_run(tmp_path / f"runs/{name}/1", 2, (1, 2))
    for name, keep in (("killed", 11), ("half", 0)):
        file = tmp_path / f"runs/{name}/1/metrics.csv"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:keep]))
    (tmp_path / "runs/started/1/metrics.csv").unlink()
    fake_run(tmp_path / "runs/a/1/wandb/files", 5, (0, 0))  # not ours
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "runs"), f"--out={tmp_path}"])
    plot.main()
    out, err = capsys.readouterr()
    left_out = {
        "b/0": "another run has the same SEED",
        "b/2": "another run has the same SEED",
        "killed/1": "it got to step 50",
        "half/1": "cannot be read",
        "started/1": "no metrics",
    }
    assert len(err.splitlines()) == 5 and all(f"{key}: " in err and why in err for key, why in left_out.items()), err
    assert "pqn, LR=0.001" in out and "pqn, LR=0.0001" in out
    with open(tmp_path / "scores.csv") as file:
        scores = {row["algorithm"]: row for row in csv.DictReader(file)}
    row = scores["pqn, LR=0.001"]
    assert row["seeds"] == "4" and float(row["evaluation"]) == 106 / 4 and float(row["training"]) == 106 / 4 + 0.5
    assert scores["pqn, LR=1e-05"]["training"] == "5.5" and scores["pqn, LR=1e-05"]["evaluation"] == ""
    assert 1 <= float(row["evaluation_low"]) < 106 / 4 < float(row["evaluation_high"]) <= 100
    with open(tmp_path / "curves.csv") as file:
        line = [row for row in csv.DictReader(file) if row["algorithm"] == "pqn, LR=0.001"]
    assert len(line) == 20 and [float(line[i]["env_step"]) for i in (0, -1)] == [10, 200]
    assert float(line[0]["iqm"]) == 2.5 and float(line[-1]["iqm"]) == 3.5  # the middle two of 1, 2, 3, 100
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    written = (tmp_path / "scores.csv").read_text()
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "runs"), f"--out={tmp_path}", "--metric=returns"])
    with pytest.raises(SystemExit, match="no run has returns"):
        plot.main()
    assert (tmp_path / "scores.csv").read_text() == written
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no run with metrics"):
        plot.main()


def test_plot_takes_an_environment_with_other_arguments_for_another_task(tmp_path, monkeypatch):
    for size, lr in ((5, 1e-3), (5, 1e-4), (9, 1e-3)):
        fake_run(tmp_path / f"runs/{size}_{lr}/1", 0, (size,), lr=lr, ENV_KWARGS={"size": size, "walls": 1})
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "runs"), f"--out={tmp_path}"])
    plot.main()
    with open(tmp_path / "scores.csv") as file:
        lines = {(row["task"], row["algorithm"]) for row in csv.DictReader(file)}
    small = {("CartPole-v1, size=5", "pqn, LR=0.001"), ("CartPole-v1, size=5", "pqn, LR=0.0001")}
    assert lines == small | {("CartPole-v1, size=9", "pqn")}


@pytest.mark.parametrize(
    "override",
    [
        "hydra/launcher=joblib hydra.launcher.n_jobs=2 SEED=0,1",
        "hydra/launcher=submitit_local hydra.launcher.timeout_min=5 SEED=0,1",
        "hydra/sweeper=optuna hydra.sweeper.n_trials=2 hydra.sweeper.n_jobs=1 hydra.sweeper.direction=maximize SEED=range(0,9)",
    ],
)
def test_launchers_and_sweepers(override, command, tmp_path, monkeypatch, capsys):
    """And plot.py on the two runs that come of it."""
    recipe = ["+alg=pqn_rnn_cartpole_positions", "alg.MEMORY_WINDOW=0"]  # the script registers its environment
    job = command("pqn_rnn_gymnax", "-m", *override.split(), *recipe, *tiny_arguments(), "SAVE_PATH=sweep")
    assert job.code == 0, job.err
    assert len(list(tmp_path.glob("sweep/*/*/params.safetensors"))) == 2
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "sweep"), f"--out={tmp_path}"])
    plot.main()
    assert "CartPolePositions-v1" in capsys.readouterr().out and (tmp_path / "curves.png").stat().st_size > 10_000


def test_slurm_launcher_is_configured(command):
    job = command(
        "pqn_minatar", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "--cfg", "hydra", "-p", "hydra.launcher"
    )
    assert job.code == 0 and "SlurmLauncher" in job.out and "partition: gpu" in job.out, job.err
