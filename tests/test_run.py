"""The harness: one-shot = chunked = resumed, the run folder, failures, the command line, notebooks."""

import csv
import dataclasses
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from conftest import FORKS, ROOT, SCRIPTS, TINY, Command, tiny_arguments

QUICK = [name for name in ("pqn_minatar", "pqn_gymnax") if name in SCRIPTS]


@pytest.fixture(params=QUICK)
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return importlib.import_module(name)


def equal_trees(a, b):
    data = lambda x: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)  # noqa: E731
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(data(x), data(y), equal_nan=True), a, b)))


def read_csv(folder):
    """metrics.csv as {column: [rows]} of text, without what a clock decides."""
    with open(next(folder.glob("**/metrics.csv")), newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("time", "sps")} for row in csv.DictReader(file)]
    return {key: [row[key] for row in rows] for key in rows[0]}


def test_one_shot_chunked_and_continued_training_are_the_same(script, tmp_path):
    config = script.Config(**TINY)
    keys = jax.random.split(jax.random.key(3), 2)
    whole = script.make_train(config)(keys)
    assert whole["metrics"]["td_loss"].shape == (2, 12)
    run = script.run(config, SEED=3, NUM_SEEDS=2, SAVE_PATH=str(tmp_path), LOG_INTERVAL=1)
    assert equal_trees(whole["runner_state"], run["runner_state"])
    for key, value in whole["metrics"].items():
        np.testing.assert_array_equal(value, run["metrics"][key], err_msg=key)
    train = script.make_train(config)
    first = train(keys, num_updates=5)
    second = train(state=first["runner_state"], num_updates=7)
    assert equal_trees(whole["runner_state"], second["runner_state"])
    joined = np.concatenate([first["metrics"]["qvals"], second["metrics"]["qvals"]], 1)
    np.testing.assert_array_equal(whole["metrics"]["qvals"], joined)
    averaged = script.run(config, SEED=3, NUM_SEEDS=2, SAVE_PATH=None, LOG_INTERVAL=5)
    assert equal_trees(whole["runner_state"], averaged["runner_state"]) and averaged["folder"] is None
    np.testing.assert_array_equal(averaged["metrics"]["update_steps"][0], [5, 10, 12])
    np.testing.assert_allclose(
        averaged["metrics"]["td_loss"][:, 0], whole["metrics"]["td_loss"][:, :5].mean(1), rtol=1e-5
    )


def test_seed_alone_equals_seed_among_others(script):
    train = script.make_train(script.Config(**TINY))
    keys = jax.random.split(jax.random.key(0), 3)
    together = train(keys, num_updates=3)["metrics"]
    alone = train(keys[1:2], num_updates=3)["metrics"]
    for key in ("td_loss", "qvals", "grad_norm", "returned_episode_returns"):
        np.testing.assert_allclose(together[key][1], alone[key][0], rtol=1e-4, atol=1e-5)


def test_evaluations_do_not_disturb_training_and_end_with_the_run(script):
    keys = jax.random.split(jax.random.key(0), 1)
    with_tests = script.make_train(script.Config(**TINY))(keys)
    without = script.make_train(script.Config(**TINY | {"TEST_DURING_TRAINING": False}))(keys)
    assert equal_trees(with_tests["runner_state"], without["runner_state"])
    evaluated = np.flatnonzero(np.isfinite(with_tests["metrics"]["test/unfinished"][0]))
    assert evaluated.tolist() == [2, 5, 8, 11]
    assert "test/unfinished" not in without["metrics"]


def test_killed_and_resumed_run_ends_as_if_it_had_never_stopped(name, command, tmp_path):
    updates = 200
    arguments = tiny_arguments(TOTAL_TIMESTEPS=4 * 8 * updates)
    arguments += ["NUM_SEEDS=2", "LOG_INTERVAL=2", "CHECKPOINT_INTERVAL=10"]
    process = command(name, *arguments, "SAVE_PATH=killed")
    while not list(tmp_path.glob("killed/*/*/checkpoints/[1-9]*0/_CHECKPOINT_METADATA")):
        assert process.running, process.err
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.code == -signal.SIGKILL
    (folder,) = tmp_path.glob("killed/*/*")
    done = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert 0 < done < updates
    assert command(name, "RESUME=latest", "SAVE_PATH=killed").code == 0
    assert command(name, *arguments, "SAVE_PATH=whole").code == 0
    assert read_csv(tmp_path / "killed") == read_csv(tmp_path / "whole")
    assert read_csv(tmp_path / "whole")["env_step"][-1] == str(4 * 8 * updates)
    a, b = (next(tmp_path.glob(f"{path}/*/*/params.safetensors")).read_bytes() for path in ("killed", "whole"))
    assert a == b


@pytest.mark.parametrize("name, number", list(zip(QUICK, (signal.SIGINT, signal.SIGTERM), strict=True)))
def test_signals_save_and_exit(name, number, command, tmp_path):
    process = command(name, *tiny_arguments(TOTAL_TIMESTEPS=4 * 8 * 100_000), "LOG_INTERVAL=10")
    while "step/s" not in process.err:
        assert process.running, process.err
        time.sleep(0.1)
    process.send_signal(number)
    assert process.code == 128 + number and "Traceback" not in process.err, process.err
    assert "Stopped after" in process.out and "RESUME=" in process.out
    (folder,) = tmp_path.glob("runs/*/*")
    saved = {"metrics.csv", "params.safetensors", "learning_curve.png", "config.yaml", "checkpoints"}
    assert saved <= set(os.listdir(folder))


def test_signals_are_heard_within_an_interval(command, tmp_path):
    """While the device computes: the first is answered at once, the second ends the run."""
    process = command("pqn_gymnax", *tiny_arguments(TOTAL_TIMESTEPS=4 * 8 * 10**6), "LOG_INTERVAL=500000")
    while "step/s" not in process.err:
        assert process.running, process.err
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    while "once more to stop at once" not in process.err:
        assert process.running, process.err
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.code == 128 + signal.SIGINT and "Traceback" not in process.err


def test_run_folder_and_loaded_agent(script, tmp_path, capsys):
    out = script.run(script.Config(**TINY), NUM_SEEDS=2, SAVE_PATH=str(tmp_path))
    folder = out["folder"]
    assert folder.parent.name == f"{script.SCRIPT}_{script.Config().ENV_NAME}_s0"
    columns = read_csv(folder)
    assert columns["seed"] == ["0", "1"] * 12 and columns["env_step"][-1] == str(TINY["TOTAL_TIMESTEPS"])
    np.testing.assert_array_equal(np.float32(columns["td_loss"][::2]), out["metrics"]["td_loss"][0])
    assert out["score"] == np.nanmean(out["metrics"]["test/returned_episode_returns"][:, -1])
    assert (folder / "learning_curve.png").stat().st_size > 10_000
    agent = script.load(folder)
    assert agent.config == script.Config(**TINY)
    state = out["runner_state"]
    assert equal_trees(agent.variables["params"], state.params)
    variables, obs = jax.tree.map(lambda x: x[1], agent.variables), state.obs[1]
    expected = script.make_network(agent.config).apply({"params": jax.tree.map(lambda x: x[1], state.params)}, obs)
    np.testing.assert_array_equal(agent.network.apply(variables, obs), expected)
    assert "test/returned_episode_returns" in capsys.readouterr().out


def test_running_statistics_are_trained_saved_and_restored(script, tmp_path):
    changes = {"NORM_INPUT": True, "NORM_TYPE": "batch_norm"}
    config = script.Config(**TINY | changes)
    out = script.run(config, SAVE_PATH=str(tmp_path))
    agent = script.load(out["folder"])
    mean = agent.variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.abs(mean).max() > 0
    train = script.make_train(config)
    state = jax.tree.map(lambda x: x[0], out["runner_state"])
    loaded = state.replace(**jax.tree.map(lambda x: x[0], agent.variables))
    evaluate = jax.jit(train.evaluate)
    assert equal_trees(evaluate(state, jax.random.key(5)), evaluate(loaded, jax.random.key(5)))
    longer = script.Config(**TINY | changes | {"TOTAL_TIMESTEPS": 2 * TINY["TOTAL_TIMESTEPS"]})
    resumed = script.run(longer, RESUME=out["folder"], SAVE_PATH=tmp_path)  # paths are as good as text
    assert resumed["metrics"]["update_steps"][0].tolist() == list(range(1, 25))
    assert script.read_settings(out["folder"])["RESUME"] == str(out["folder"])


def test_full_disk_and_failing_plot_lose_nothing(script, tmp_path, monkeypatch, capsys):
    """Saving fails until the last checkpoint, and the plot always: training ends, and the end is saved."""
    failures, replace = [0], os.replace

    def full(*args):
        failures[0] += 1
        if failures[0] < 8:
            raise OSError(28, "No space left on device")
        replace(*args)

    def broken(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(script.os, "replace", full)
    monkeypatch.setattr(script, "learning_curve", broken)
    out = script.run(script.Config(**TINY), SAVE_PATH=str(tmp_path), CHECKPOINT_INTERVAL=1)
    warnings = capsys.readouterr().err
    assert "No space left on device" in warnings and "no fonts" in warnings
    assert len(read_csv(out["folder"])["seed"]) == 12 and np.isfinite(out["score"])
    assert equal_trees(script.load(out["folder"]).variables["params"], out["runner_state"].params)


def test_corrupt_newest_checkpoint_falls_back_to_the_one_before(script, tmp_path, capsys):
    config = script.Config(**TINY | {"TEST_DURING_TRAINING": False})  # the evaluation at the end is on record
    out = script.run(config, SAVE_PATH=str(tmp_path), CHECKPOINT_INTERVAL=4)
    whole = read_csv(out["folder"])
    scores = np.array(whole["test/returned_episode_returns"], float)
    assert np.isnan(scores[:-1]).all() and scores[-1] == pytest.approx(out["score"])
    for path in (out["folder"] / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with open(out["folder"] / "metrics.csv", newline="") as file:  # another version may order its columns otherwise
        rows = [[row[0], *reversed(row[1:])] for row in csv.reader(file)]
    with open(out["folder"] / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    resumed = script.run(RESUME=str(out["folder"]))
    assert read_csv(out["folder"]) == whole and equal_trees(resumed["runner_state"], out["runner_state"])
    assert "reading checkpoint 12 failed" in capsys.readouterr().err
    columns = [i for i, name in enumerate(rows[0]) if not name.startswith("test/")]  # killed before its evaluation
    with open(out["folder"] / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([[row[i] for i in columns] for row in rows])
    again = script.run(RESUME=str(out["folder"]))  # from the end, which was saved again
    assert read_csv(out["folder"]) == whole and again["score"] == out["score"]
    assert equal_trees(again["runner_state"], out["runner_state"]) and "failed" not in capsys.readouterr().err


def test_checkpoints_follow_the_clock_too(script, tmp_path, monkeypatch):
    """However long an interval takes, what is lost is bounded: here every logged interval is late."""
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", 0)
    out = script.run(script.Config(**TINY), SAVE_PATH=str(tmp_path), CHECKPOINT_INTERVAL=100)
    assert {path.name for path in (out["folder"] / "checkpoints").iterdir() if path.name.isdigit()} == {"11", "12"}


def test_a_logged_row_has_means_and_the_last_evaluation(script):
    returns = np.float32([[1, 3, np.nan]])
    metrics = {"returned_episode_returns": returns, "td_loss": returns[:, :2], "update_steps": np.array([[1, 2, 3]])}
    tests = {
        "test/returned_episode_returns": np.float32([[5, 7, np.nan]]),
        "test/unfinished": np.float32([[0, 1, np.nan]]),
    }
    assert script.logged(metrics | tests) == {
        "returned_episode_returns": 2,
        "td_loss": 2,
        "test/returned_episode_returns": 7,
        "test/unfinished": 1,
    }
    assert np.isnan(script.logged({key: x[:, 2:] for key, x in tests.items()})["test/unfinished"])
    assert np.isnan(script.logged({"td_loss": returns})["td_loss"])  # a diverged update is not averaged away


def test_signals_are_collected_and_then_as_before(script):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    with pytest.raises(MemoryError), script.catch_signals() as received:
        os.kill(os.getpid(), signal.SIGUSR2)  # what SLURM's launcher has it send before the time is up
        raise MemoryError
    assert received == [signal.SIGUSR2]
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]


def test_nan_losses_are_reported_when_they_start(script, capsys):
    script.run(script.Config(**TINY | {"REW_SCALE": 1e30}), SAVE_PATH=None)
    err = capsys.readouterr().err
    assert err.count("Warning: the loss of seed 0") == 1


def test_unreachable_wandb_logs_offline(script, tmp_path, monkeypatch, capsys):
    import wandb

    init, modes, logged = wandb.init, [], []

    def unreachable(mode, **options):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no network")
        log = init(mode=mode, **options)
        monkeypatch.setattr(log, "log", lambda values, step: logged.append((step, values)))
        return log

    monkeypatch.setattr(wandb, "init", unreachable)
    options = {"NUM_SEEDS": 2, "WANDB_MODE": "online", "WANDB_LOG_ALL_SEEDS": True}
    out = script.run(script.Config(**TINY), SAVE_PATH=str(tmp_path), **options)
    assert modes == ["online", "offline"] and "wandb cannot be reached" in capsys.readouterr().err
    assert [step for step, _ in logged] == list(range(1, 13))
    values = logged[-1][1]
    assert values["td_loss"] == pytest.approx(out["metrics"]["td_loss"][:, -1].mean())
    assert values["rng1/td_loss"] == pytest.approx(out["metrics"]["td_loss"][1, -1])
    assert not any(np.isnan(x) for _, values in logged for x in values.values())
    assert list(out["folder"].glob("wandb/offline-run-*"))
    monkeypatch.setattr(wandb, "init", lambda id, **_: id)
    monkeypatch.chdir(out["folder"])  # RESUME=. is the same run
    assert script.start_wandb(script.Config(), Path(), script.Settings()) == "_".join(out["folder"].parts[-2:])


BAD_FOR_EACH = ("unknown game", "unknown ENV_KWARGS", "minibatches")
BAD = {
    "unknown key": (["alg.LEARNING_RATE=1"], "LEARNING_RATE"),
    "wrong type": (["alg.LR=fast"], "LR"),
    "wrong type of a root key": (["NUM_SEEDS=many"], "NUM_SEEDS"),
    "unknown recipe": (["+alg=nothing"], "nothing"),
    "unknown game": (["alg.ENV_NAME=Pacman"], "ENV_NAME='Pacman'"),
    "unknown ENV_KWARGS": (["+alg.ENV_KWARGS.speed=2"], "speed"),
    "minibatches": (["alg.NUM_MINIBATCHES=33", "alg.NUM_ENVS=128"], "NUM_MINIBATCHES=33"),
    "count": (["alg.NUM_ENVS=0"], "NUM_ENVS=0"),
    "fraction of a count": (["alg.NUM_STEPS=1.5"], "NUM_STEPS=1.5"),
    "too short": (["alg.TOTAL_TIMESTEPS=10"], "TOTAL_TIMESTEPS=10"),
    "too short schedules": (["alg.TOTAL_TIMESTEPS_DECAY=10"], "TOTAL_TIMESTEPS_DECAY=10"),
    "LAMBDA": (["alg.LAMBDA=1.1"], "LAMBDA=1.1"),
    "GAMMA": (["alg.GAMMA=-0.1"], "GAMMA=-0.1"),
    "EPS": (["alg.EPS_FINISH=2"], "EPS_FINISH=2.0"),
    "NORM_TYPE": (["alg.NORM_TYPE=group_norm"], "NORM_TYPE='group_norm'"),
    "seeds": (["NUM_SEEDS=0"], "NUM_SEEDS=0"),
    "wandb mode": (["WANDB_MODE=sometimes"], "WANDB_MODE='sometimes'"),
    "missing folder": (["RESUME=nowhere"], "nowhere"),
    "nothing to resume": (["RESUME=latest"], "RESUME=latest"),
    "unwritable": (["SAVE_PATH=/proc/runs"], "SAVE_PATH=/proc/runs"),
    "seed": ([f"SEED={2**64}"], f"SEED={2**64}"),
    "time limit": (["+alg.ENV_KWARGS.max_steps_in_episode=0"], "max_steps_in_episode=0 must be like 1000"),
    "fraction of a time limit": (
        ["+alg.ENV_KWARGS.max_steps_in_episode=7.5"],
        "max_steps_in_episode=7.5 must be like 1000",
    ),
}


def call_mains(folder, script, cases):
    """The command line with each of several arguments, in this process: <folder>/<case>/code, out and err."""
    for case, arguments in cases.items():
        (folder / case).mkdir()
        try:
            Command.call_main(folder, script, arguments, folder / case / "out", folder / case / "err")
            code = 0
        except SystemExit as error:  # a text is printed, and the exit code is 1
            code = 1 if isinstance(error.code, str) else error.code or 0
            print(error.code if isinstance(error.code, str) else "", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        (folder / case / "code").write_text(f"{code}")
        sys.stdout.flush(), sys.stderr.flush()


@pytest.fixture(scope="module", params=QUICK)
def mistakes(request, tmp_path_factory):
    """A script's name, and the folder with what its command line said to each of BAD, all in one process."""
    folder = tmp_path_factory.mktemp("mistakes")
    once = request.param != "pqn_minatar"  # the same definitions: tried on one script
    cases = {case: arguments for case, (arguments, _) in BAD.items() if not once or case in BAD_FOR_EACH}
    process = FORKS.Process(target=call_mains, args=(folder, request.param, cases))
    process.start()
    process.join(300)
    return request.param, folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(mistakes, case):
    name, folder = mistakes
    if name != "pqn_minatar" and case not in BAD_FOR_EACH:
        pytest.skip("the same definitions: tried on one script")
    code, out, err = ((folder / case / stream).read_text() for stream in ("code", "out", "err"))
    text = BAD[case][1]
    assert code == "1" and "Traceback" not in err, err
    line = next(line for line in err.splitlines() if text in line)
    if "=" in text and not line.startswith("Error merging"):
        assert line.startswith("Error: ")
    assert "Compiled" not in out
    assert not (folder / "runs").exists()


def test_corrupt_and_contradicted_run_folders_and_foreign_recipes(name, command, tmp_path):
    assert command(name, *tiny_arguments(), "SEED=3", "NUM_SEEDS=2").code == 0
    (folder,) = tmp_path.glob("runs/*/*")
    cases = [
        ([f"RESUME={folder}", "alg.LR=0.5"], "LR=0.5 contradicts"),
        (
            [f"RESUME={folder}", "+alg.ENV_KWARGS.max_steps_in_episode=7"],
            "ENV_KWARGS={'max_steps_in_episode': 7} contra",
        ),
        ([f"RESUME={folder}", "SEED=0"], "SEED=0 contradicts"),  # equal to its default, and given all the same
        (["RESUME=latest", "NUM_SEEDS=1"], "NUM_SEEDS=1 contradicts"),
        (["RESUME=nowhere"], "nowhere is not the folder of a run"),
        (["RESUME=latest", "alg.TOTAL_TIMESTEPS=64"], "TOTAL_TIMESTEPS=64 contradicts"),
    ]
    if name == "pqn_minatar":  # the gymnax script plays MinAtar, too: flattened
        cases.append((["+alg=pqn_cartpole"], "HIDDEN_SIZE"))
    for arguments, text in cases:
        process = command(name, *arguments)
        assert process.code == 1 and text in process.err and "Traceback" not in process.err
    recipe = tmp_path / "recipes/alg/tiny.yaml"  # its TOTAL_TIMESTEPS is no wish to train for longer
    recipe.parent.mkdir(parents=True)
    script = importlib.import_module(name)
    recipe.write_text(yaml.safe_dump(script.RECIPE | TINY | {"TOTAL_TIMESTEPS": 2 * TINY["TOTAL_TIMESTEPS"]}))
    again = ["RESUME=latest", "SEED=3", "CHECKPOINT_INTERVAL=2", "+alg=tiny", "--config-dir=recipes"]
    assert command(name, *again).code == 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert "RESUME" not in saved["command"] and [x.split()[1] for x in saved["resumed"]] == ["RESUME=latest"]
    assert saved["alg"]["TOTAL_TIMESTEPS"] == TINY["TOTAL_TIMESTEPS"]
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"script: {name}", "script: pqn_other"))
    process = command(name, f"RESUME={folder}")
    assert process.code == 1 and f"is a run of pqn_other, not of {name}" in process.err
    (folder / "config.yaml").write_text(text)
    rows = (folder / "metrics.csv").read_text()
    shutil.rmtree(folder / "checkpoints")  # to save space, say
    process = command(name, f"RESUME={folder}")
    assert (
        process.code == 1 and "its checkpoints are gone" in process.err and rows == (folder / "metrics.csv").read_text()
    )
    (folder / "config.yaml").write_text("alg: [")
    process = command(name, f"RESUME={folder}")
    assert process.code == 1 and "config.yaml cannot be read" in process.err


def test_sweep(command, tmp_path):
    """Of one script, since each value of LR compiles; test_tools has more."""
    process = command("pqn_gymnax", "-m", "alg.LR=1e-3,5e-4", "SEED=0,1", *tiny_arguments(TOTAL_TIMESTEPS=1e2))
    assert process.code == 0, process.err
    folders = list(tmp_path.glob("runs/*_s[01]/*"))
    assert len(folders) == 4 and not (tmp_path / "outputs").exists() and not (tmp_path / "multirun").exists()


def test_script_alone_in_an_empty_folder(name, script, tmp_path):
    """Without configs/ the schema serves, with its own defaults as the recipe; a mistake is an exit code not 0."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    sweep = ["-m", f"+alg={script.Config.ALG_NAME}", "alg.LR=1e-3,-1"]
    command = [sys.executable, f"{name}.py", *sweep, *tiny_arguments()]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert list(tmp_path.glob("runs/*/*/params.safetensors")), process.stderr
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("Error: alg.LR=-1.0 is not allowed")


def test_recipes_load_and_defaults_are_the_first(name, script):
    from omegaconf import OmegaConf

    recipes = {"pqn_minatar": ["pqn"], "pqn_gymnax": ["pqn_cartpole", "pqn_acrobot"]}[name]
    configs = [
        script.Config(**OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml")))
        for recipe in recipes
    ]
    assert configs[0] == script.Config(**script.RECIPE)


def test_a_run_without_a_recipe_has_the_published_one(command):
    """And a recipe that leaves a switch out has the neutral one."""
    for arguments, scale in (([], 0.1), (["alg.REW_SCALE=3"], 3.0), (["+alg=pqn_acrobot"], 0.1)):
        process = command("pqn_gymnax", *arguments, "--cfg", "job")
        assert process.code in (0, None) and yaml.safe_load(process.out)["alg"]["REW_SCALE"] == scale
    assert importlib.import_module("pqn_gymnax").Config().REW_SCALE == 1


def test_root_config_restates_the_settings(script):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/config.yaml"))
    config.pop("defaults")
    assert config == dataclasses.asdict(script.Settings())
