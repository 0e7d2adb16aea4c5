"""The harness of the scripts: run = train, resumed = never stopped, the run folder, failures, the command line."""

import importlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import gymnax
import jax
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import FORKS, ROOT, TINY, Command, tiny_arguments
from omegaconf import OmegaConf
from pydantic import ValidationError

QUICK = ["pqn_gymnax", "pqn_minatar"]


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
    """metrics.csv as text, without what a clock decides."""
    return pd.read_csv(next(Path(folder).glob("**/metrics.csv")), dtype=str).drop(columns=["time", "sps"])


def wait_for(condition, process):
    while not condition():
        assert process.running, process.err
        time.sleep(0.02)


def test_run_is_train_and_logs_means_over_intervals(script, tmp_path):
    """One seed alone, of a run of two, logged every update; the same logged every five."""
    config = script.Config(**TINY)
    keys = jax.random.split(jax.random.key(3), 2)
    whole = jax.jit(script.make_train(config))(keys[1])
    out = script.run(config, SEED=3, NUM_SEEDS=2, SAVE_PATH=tmp_path, LOG_INTERVAL=1)
    table = out["metrics"].query("seed == 1")
    for key, values in whole["metrics"].items():
        np.testing.assert_allclose(table[key], values, rtol=1e-3, atol=1e-4, err_msg=key)
    for a, b in zip(*(jax.tree.leaves(x.variables) for x in (whole["runner_state"], out["runner_state"])), strict=True):
        np.testing.assert_allclose(a, b[1], rtol=1e-2, atol=1e-4)
    averaged = script.run(config, SEED=3, NUM_SEEDS=2, SAVE_PATH=tmp_path, LOG_INTERVAL=5)
    assert equal_trees(out["runner_state"], averaged["runner_state"])
    means = averaged["metrics"].query("seed == 1")
    assert means.update_steps.tolist() == [5, 10, 12] and means.env_step.tolist() == [160, 320, 384]
    np.testing.assert_allclose(means.td_loss.iloc[0], table.td_loss.iloc[:5].mean(), rtol=1e-5)
    tests = table["test/returned_episode_returns"].iloc[[2, 8, 11]]  # of each interval the last one
    np.testing.assert_allclose(means["test/returned_episode_returns"], tests)


@pytest.mark.parametrize(
    "name, updates, arguments", [("pqn_minatar", 100, ["SAVE_PATH=killed"]), ("pqn_gymnax", 200, [])]
)
def test_killed_and_resumed_run_ends_as_if_it_had_never_stopped(name, updates, arguments, command, tmp_path):
    run = [*tiny_arguments(TOTAL_TIMESTEPS=4 * 8 * updates), "NUM_SEEDS=2", "LOG_INTERVAL=2", "CHECKPOINT_INTERVAL=10"]
    process = command(name, *run, *arguments)
    killed = tmp_path / (arguments or ["SAVE_PATH=runs"])[0].split("=")[1]
    wait_for(lambda: list(killed.glob("*/*/checkpoints/[1-9]*0/_CHECKPOINT_METADATA")), process)
    process.send_signal(signal.SIGKILL)
    assert process.code == -signal.SIGKILL and "Compiling" in process.out
    (folder,) = killed.glob("*/*")
    assert 0 < max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()) < updates
    resumed = command(name, "RESUME=latest", *arguments)
    assert resumed.code == 0, resumed.err
    assert command(name, *run, "SAVE_PATH=whole").code == 0
    pd.testing.assert_frame_equal(read_csv(killed), read_csv(tmp_path / "whole"))
    assert read_csv(killed).env_step.iloc[-1] == str(4 * 8 * updates)
    a, b = (next(path.glob("*/*/params.safetensors")).read_bytes() for path in (killed, tmp_path / "whole"))
    assert a == b
    commands = yaml.safe_load((folder / "config.yaml").read_text())["about"]["commands"]
    assert len(commands) == 2 and "NUM_SEEDS=2" in commands[0] and "RESUME=latest" in commands[1]


@pytest.mark.parametrize("name, number", list(zip(QUICK, (signal.SIGINT, signal.SIGTERM), strict=True)))
def test_signals_save_and_end_the_program(name, number, command, tmp_path):
    """However long the interval; and the line that is printed can be pasted, whatever is in the path."""
    save_path = "lr=1e-3 (a) é*?"
    arguments = [*tiny_arguments(TOTAL_TIMESTEPS=4 * 8 * 10**6, TEST_DURING_TRAINING=False), f'SAVE_PATH="{save_path}"']
    process = command(name, *arguments, "LOG_INTERVAL=500000")
    wait_for(lambda: "step/s" in process.err, process)
    process.send_signal(number)
    assert process.code == 128 + number and "Traceback" not in process.err, process.err
    assert "once more to stop at once" in process.err and "Stopped after" in process.out
    (folder,) = (tmp_path / save_path).glob("*/*")
    assert {"metrics.csv", "params.safetensors", "config.yaml", "checkpoints", f"{name}.py"} <= set(os.listdir(folder))
    done = int(read_csv(folder).update_steps.iloc[-1])
    (again,) = shlex.split(process.out.split("go on with ")[1].splitlines()[0])
    resumed = command(name, again, "LOG_INTERVAL=1")
    wait_for(lambda: "step/s" in resumed.err, resumed)
    resumed.send_signal(number)
    assert resumed.code == 128 + number, resumed.err
    assert int(read_csv(folder).update_steps.iloc[-1]) > done


def test_ctrl_c_while_compiling_leaves_no_folder(command, tmp_path):
    for units in range(17, 20):  # compiled nowhere else
        process = command("pqn_gymnax", *tiny_arguments(HIDDEN_SIZE=units), f"SAVE_PATH=runs/{units}")
        wait_for(lambda process=process: "Compiling" in process.out, process)
        process.send_signal(signal.SIGINT)
        if process.code or "Exception ignored" not in process.err:  # Python drops what is raised in a destructor
            break
    assert process.code == 128 + signal.SIGINT and "Traceback" not in process.err, process.out + process.err
    assert not list(tmp_path.glob(f"runs/{units}/*"))


LOOP = """
import os, signal, threading, time
import pqn_gymnax as pqn
training, average = threading.Event(), pqn.average
pqn.average = lambda *args: (training.set(), average(*args))[1]
interrupt = lambda: (training.wait(), time.sleep(0.5), os.kill(os.getpid(), signal.{number}))
threading.Thread(target=interrupt, daemon=True).start()
for seed in range(2):
    pqn.run(pqn.Config(**{tiny}), SEED=seed, SAVE_PATH="loop_runs", LOG_INTERVAL=1)
    print("run", seed, "ended", flush=True)
"""


@pytest.mark.parametrize("number, end", [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Stopping after this update")])
def test_a_loop_around_run_stops(number, end, command, tmp_path):
    tiny = TINY | {"TOTAL_TIMESTEPS": 4 * 8 * 10**6, "TEST_DURING_TRAINING": False}
    (tmp_path / "loop.py").write_text(LOOP.format(number=number, tiny=tiny))
    process = command("loop.py")
    assert process.code == (1 if number == "SIGINT" else 128 + signal.SIGTERM) and end in process.err
    assert "Stopped after" in process.out and "ended" not in process.out
    assert len(list(tmp_path.glob("loop_runs/*/*/params.safetensors"))) == 1


def test_run_folder_and_loaded_agent(script, tmp_path, capsys):
    out = script.run(script.Config(**TINY), NUM_SEEDS=2, SAVE_PATH=str(tmp_path))
    folder = out["folder"]
    assert folder.parent.name == f"{script.SCRIPT}_{script.Config().ENV_NAME}_s0"
    table = read_csv(folder)
    assert table.seed.tolist() == ["0", "1"] * 12 and table.env_step.iloc[-1] == str(TINY["TOTAL_TIMESTEPS"])
    assert table.grad_steps.iloc[-1] == str(12 * 4)
    np.testing.assert_array_equal(np.float32(table.td_loss), out["metrics"].td_loss)
    assert out["score"] == pytest.approx(out["metrics"]["test/returned_episode_returns"].iloc[-2:].mean())
    assert (folder / "learning_curve.png").stat().st_size > 10_000
    config, network, variables = script.load(folder)
    state = out["runner_state"]
    assert config == script.Config(**TINY) and equal_trees(variables, state.variables)
    variables, obs = jax.tree.map(lambda x: x[1], variables), state.obs[1]
    expected = script.make_network(config).apply(jax.tree.map(lambda x: x[1], state.variables), obs)
    np.testing.assert_array_equal(network.apply(variables, obs), expected)
    assert "test/returned_episode_returns" in capsys.readouterr().out


def test_the_summary_has_of_each_seed_the_last_value_that_is_known(tmp_path, capsys):
    """No episode ends in the last update, which is logged alone."""
    import pqn_gymnax as script

    config = script.Config(**TINY | {"NUM_STEPS": 2, "TOTAL_TIMESTEPS": 4 * 2 * 29})
    table = script.run(config, NUM_SEEDS=2, SAVE_PATH=tmp_path, LOG_INTERVAL=1)["metrics"]
    assert table.returned_episode_returns.iloc[-2:].isna().all()
    out, err = capsys.readouterr()
    assert "return" in err and "nan" not in err  # the bar keeps what was known
    lines = [line.split() for line in out.splitlines()]
    for key in ("returned_episode_returns", "test/returned_episode_returns"):
        last = table.dropna(subset=key).groupby("seed")[key].tail(1)
        assert [key, *(f"{x:.2f}" for x in (last.mean(), last.min(), last.max()))] in lines


def test_running_statistics_are_trained_saved_and_restored(tmp_path):
    """And a finished run is trained for longer, with a Config that Python gives."""
    import pqn_minatar as script

    changes = {"NORM_INPUT": True, "NORM_TYPE": "batch_norm"}
    out = script.run(script.Config(**TINY | changes), NUM_SEEDS=2, SAVE_PATH=tmp_path)
    _, _, variables = script.load(out["folder"])
    assert np.abs(variables["batch_stats"]["BatchNorm_0"]["mean"]).max() > 0
    assert equal_trees(variables, out["runner_state"].variables)
    longer = script.Config(**TINY | changes | {"TOTAL_TIMESTEPS": 2 * TINY["TOTAL_TIMESTEPS"]})
    resumed = script.run(longer, RESUME=out["folder"])
    assert (
        resumed["metrics"].update_steps.unique().tolist() == list(range(1, 25)) and resumed["folder"] == out["folder"]
    )
    assert int(resumed["runner_state"].obs.shape[0]) == 2  # NUM_SEEDS is the run's
    again = script.run(RESUME=out["folder"])  # nothing is left to do
    assert equal_trees(again["runner_state"], resumed["runner_state"]) and again["score"] == resumed["score"]


def test_full_disk_and_failing_plot_lose_nothing(tmp_path, monkeypatch, capsys):
    """Saving fails until the last checkpoint, and the plot always: training ends, and the end is saved."""
    import pqn_gymnax as script

    failures, replace = [0], os.replace

    def full(*args):
        failures[0] += 1
        if failures[0] < 8:
            raise OSError(28, "No space left on device")
        replace(*args)

    def broken(*args, **kwargs):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(script.os, "replace", full)
    monkeypatch.setattr(script.sns, "lineplot", broken)
    out = script.run(script.Config(**TINY), SAVE_PATH=str(tmp_path), CHECKPOINT_INTERVAL=1)
    warnings = capsys.readouterr().err
    assert "No space left on device" in warnings and "no fonts" in warnings
    assert len(read_csv(out["folder"])) == 12 and np.isfinite(out["score"])
    assert equal_trees(script.load(out["folder"])[2], out["runner_state"].variables)


def test_checkpoints_follow_their_interval_not_the_logs(tmp_path):
    import pqn_gymnax as script

    out = script.run(script.Config(**TINY), SAVE_PATH=tmp_path, LOG_INTERVAL=3, CHECKPOINT_INTERVAL=5)
    assert {path.name for path in (out["folder"] / "checkpoints").iterdir() if path.name.isdigit()} == {"6", "12"}


@pytest.mark.parametrize("seconds, made", [(2, {"12"}), (7, {"5", "10", "12"}), (40, set(map(str, range(1, 13))))])
def test_checkpoints_are_half_a_minute_apart_without_an_interval(seconds, made, tmp_path, monkeypatch):
    """A run of 12 updates, a 20th of which is one at least, by a clock on which each takes some seconds."""
    import pqn_gymnax as script

    clock, saved = itertools.count(), set()

    class Time:
        """The script's time: update i ends at i * seconds."""

        strftime, time_ns, now = time.strftime, time.time_ns, 0.0
        time = classmethod(lambda cls: cls.now)

    def save(folder, checkpoints, state, rows, done, save=script.save):
        saved.add(str(done))
        save(folder, checkpoints, state, rows, done)

    def average(*args, average=script.average):
        Time.now = seconds * (next(clock) + 1)
        return average(*args)

    for name, value in {"time": Time, "save": save, "average": average}.items():
        monkeypatch.setattr(script, name, value)
    script.run(script.Config(**TINY), SAVE_PATH=tmp_path)
    assert saved == made


def test_a_logged_row_has_means_and_the_last_evaluation(script):
    nan = np.nan
    updates = [
        {"returned_episode_returns": r, "td_loss": loss, "test/returned_episode_returns": test, "Achievements/eat": r}
        for r, loss, test in zip(([1, nan], [nan, nan]), ([1, nan], [3, 2]), ([5, 5], [nan, nan]), strict=True)
    ]
    row = script.average(updates[0], [np.float32([*update.values()]) for update in updates])
    for name in ("returned_episode_returns", "Achievements/eat"):  # where an episode ended
        np.testing.assert_array_equal(row[name], [1, nan])
    np.testing.assert_array_equal(row["td_loss"], [2, nan])  # a diverged update is not averaged away
    np.testing.assert_array_equal(row["test/returned_episode_returns"], [5, 5])


def test_signals_are_collected_and_then_as_before(script):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    with pytest.raises(MemoryError), script.catch_signals() as received:
        os.kill(os.getpid(), signal.SIGUSR2)  # what SLURM's launcher has it send before the time is up
        raise MemoryError
    assert received == [signal.SIGUSR2]
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(list(map(type, [script.catch_signals().__enter__()]))))
    thread.start(), thread.join()
    assert seen == [[list]]  # in another thread there is nothing to catch


def test_nan_losses_are_reported_when_they_start(tmp_path, capsys):
    import pqn_gymnax as script

    script.run(script.Config(**TINY | {"REW_SCALE": 1e30}), NUM_SEEDS=2, SAVE_PATH=tmp_path)
    err = capsys.readouterr().err
    assert 1 <= err.count("is not finite") <= 2 and "the loss of seed [0" in err


def test_wandb_has_means_and_each_seed_and_a_failing_log_is_a_warning(tmp_path, monkeypatch, capsys):
    import wandb

    import pqn_gymnax as script

    init, logged = wandb.init, []

    def spied(**options):
        log = init(**options)
        monkeypatch.setattr(log, "log", lambda values, step: logged.append((step, values)))
        return log

    monkeypatch.setattr(wandb, "init", spied)
    options = {"NUM_SEEDS": 2, "WANDB_MODE": "offline", "WANDB_LOG_ALL_SEEDS": True, "SAVE_PATH": tmp_path}
    out = script.run(script.Config(**TINY), **options)
    assert [step for step, _ in logged] == list(range(1, 13))
    values, table = logged[-1][1], out["metrics"].query("update_steps == 12")
    assert values["td_loss"] == pytest.approx(table.td_loss.mean())
    assert values["rng1/td_loss"] == pytest.approx(table.td_loss.iloc[1]) and "seed" not in values
    assert not any(np.isnan(x) for _, values in logged for x in values.values())
    assert list(out["folder"].glob("wandb/offline-run-*"))
    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    out = script.run(script.Config(**TINY), **options)
    assert "start_wandb failed, training goes on: ZeroDivisionError" in capsys.readouterr().err
    assert len(read_csv(out["folder"])) == 24
    wandb.finish()


BAD_FOR_EACH = ("unknown game", "unknown ENV_KWARGS", "minibatches")
BAD = {
    "unknown key": (["alg.LEARNING_RATE=1"], "LEARNING_RATE"),
    "wrong type": (["alg.LR=fast"], "LR='fast'"),
    "wrong type of a root key": (["NUM_SEEDS=many"], "NUM_SEEDS='many'"),
    "unknown recipe": (["+alg=nothing"], "nothing"),
    "unknown key of a recipe": (["+alg.LEARNING_RATE=1"], "LEARNING_RATE=1"),
    "unknown game": (["alg.ENV_NAME=Pacman-MinAtar"], "ENV_NAME=Pacman-MinAtar is not registered"),
    "unknown ENV_KWARGS": (["+alg.ENV_KWARGS.speed=2"], "speed"),
    "a value of no use": (["+alg.ENV_KWARGS.max_steps_in_episode=[1]"], "max_steps_in_episode"),
    "minibatches": (["alg.NUM_MINIBATCHES=33", "alg.NUM_ENVS=128"], "NUM_MINIBATCHES=33"),
    "count": (["alg.NUM_ENVS=0"], "NUM_ENVS=0"),
    "fraction of a count": (["alg.NUM_STEPS=1.5"], "NUM_STEPS=1.5"),
    "too short": (["alg.TOTAL_TIMESTEPS=10"], "TOTAL_TIMESTEPS[_DECAY]=10"),
    "too short schedules": (["alg.TOTAL_TIMESTEPS_DECAY=10"], "TOTAL_TIMESTEPS[_DECAY]=10"),
    "LAMBDA": (["alg.LAMBDA=1.1"], "LAMBDA=1.1"),
    "GAMMA": (["alg.GAMMA=-0.1"], "GAMMA=-0.1"),
    "EPS": (["alg.EPS_FINISH=2"], "EPS_FINISH=2"),
    "NaN": (["alg.REW_SCALE=nan"], "REW_SCALE=nan"),
    "TEST_INTERVAL": (["alg.TEST_INTERVAL=0"], "TEST_INTERVAL=0"),
    "NORM_TYPE": (["alg.NORM_TYPE=group_norm"], "NORM_TYPE='group_norm'"),
    "OBS_DIVISOR": (["alg.OBS_DIVISOR=0"], "OBS_DIVISOR=0"),
    "another script's environment": (["alg.ENV_NAME=CartPole-v1"], "ENV_NAME='CartPole-v1'"),
    "seeds": (["NUM_SEEDS=0"], "NUM_SEEDS=0"),
    "wandb mode": (["WANDB_MODE=sometimes"], "WANDB_MODE='sometimes'"),
    "missing folder": (["RESUME=nowhere"], "nowhere"),
    "nothing to resume": (["RESUME=latest"], "RESUME=latest"),
    "unwritable": (["SAVE_PATH=/proc/none/runs"], "/proc/none"),
    "a folder that orbax cannot read": (['SAVE_PATH="sweep [1]"'], "sweep [1]"),
    "no folder": (["SAVE_PATH=null"], "SAVE_PATH=None"),
    "seed": ([f"SEED={2**32}"], f"SEED={2**32}"),
    "time limit": (["+alg.ENV_KWARGS.max_steps_in_episode=0"], "max_steps_in_episode=0 must be"),
    "fraction of a time limit": (["+alg.ENV_KWARGS.max_steps_in_episode=7.5"], "max_steps_in_episode=7.5 must be"),
}


def call_mains(folder, script, cases):
    """The command line with each of several arguments, in this process: <folder>/<case>/code, out and err."""
    for case, arguments in cases.items():
        (folder / case).mkdir()
        try:
            Command.call_main(folder, script, arguments, folder / case / "out", folder / case / "err")
            code = 0
        except SystemExit as error:
            code = error.code or 0
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
    assert code == "1" and "Traceback" not in err, err
    assert BAD[case][1] in err and "Compiling" not in out
    assert not list((folder / "runs").glob("*"))
    assert case == "unknown recipe" or len(err.splitlines()) <= 9, err  # Hydra adds lines of help


def test_what_contradicts_a_run_is_refused_and_what_does_not_is_merged(command, tmp_path):
    name = "pqn_gymnax"
    assert command(name, *tiny_arguments(), "SEED=3", "NUM_SEEDS=2").code == 0
    (folder,) = tmp_path.glob("runs/*/*")
    cases = [
        ([f"RESUME={folder}", "SEED=0"], "SEED=0 contradicts"),  # equal to its default, and given all the same
        (["RESUME=latest", "NUM_SEEDS=1"], "NUM_SEEDS=1 contradicts"),
        (["RESUME=latest", "alg.NUM_STEPS=4"], "alg.NUM_STEPS=4 contradicts"),
        (["RESUME=latest", "alg.NUM_EPOCHS=3"], "alg.NUM_EPOCHS=3 contradicts"),
        (["RESUME=latest", "alg.TOTAL_TIMESTEPS=64"], "alg.TOTAL_TIMESTEPS=64 contradicts"),
        (["RESUME=latest", "alg.LR=-1"], "LR=-1"),
    ]
    for arguments, text in cases:
        process = command(name, *arguments)
        assert process.code == 1 and text in process.err and "Traceback" not in process.err, process.err
    recipe = tmp_path / "recipes/alg/tiny.yaml"  # ignored beside RESUME
    recipe.parent.mkdir(parents=True)
    recipe.write_text(yaml.safe_dump(TINY | {"TOTAL_TIMESTEPS": 10 * TINY["TOTAL_TIMESTEPS"], "LR": 1e-5}))
    changes = ["alg.TOTAL_TIMESTEPS=768", "alg.LR=2e-4", "+alg.ENV_KWARGS.max_steps_in_episode=50"]
    again = command(name, "RESUME=latest", *changes, "+alg=tiny", "--config-dir=recipes")
    assert again.code == 0 and "'alg.LR': 0.0002" in again.out, again.err
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert [saved["alg"][key] for key in ("TOTAL_TIMESTEPS", "LR")] == [768, 2e-4] and saved["NUM_SEEDS"] == 2
    assert saved["alg"]["ENV_KWARGS"] == {"max_steps_in_episode": 50} and saved["alg"]["NUM_ENVS"] == 4
    assert read_csv(folder).update_steps.iloc[-1] == "24"
    text, rows = (folder / "config.yaml").read_text(), (folder / "metrics.csv").read_text()
    process = command(name, "RESUME=latest", "alg.NORM_INPUT=true")  # orbax's words; the folder is as it was
    assert process.code != 0
    assert text == (folder / "config.yaml").read_text() and rows == (folder / "metrics.csv").read_text()


def test_a_refused_combination_does_not_end_a_sweep(command, tmp_path):
    process = command("pqn_gymnax", "-m", "alg.NUM_MINIBATCHES=2,7,4", *tiny_arguments()[:2], *tiny_arguments()[3:])
    assert process.code == 1 and "NUM_MINIBATCHES=7 must divide" in process.err and "Traceback" not in process.err
    assert len(list(tmp_path.glob("runs/*/*/params.safetensors"))) == 2
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "multirun").exists()


def test_copies_of_other_names_and_alone(name, command, tmp_path):
    """In an empty folder, with dots in the name or through a symbolic link: runs, resumes, has folders of its own. The
    copy's first run is a Python of its own, without this project on its path."""
    shutil.copy(ROOT / f"{name}.py", tmp_path / "my.pqn [v2].py")
    (tmp_path / "link.py").symlink_to(ROOT / f"{name}.py")
    environment = os.environ | {"PYTHONPATH": ""}
    files = {"my.pqn [v2].py": "my.pqn--v2-", "link.py": "link"}
    for file, folder in list(files.items())[: 1 if name == "pqn_minatar" else 2]:
        for arguments in (tiny_arguments(), ["RESUME=latest", "alg.TOTAL_TIMESTEPS=416"]):
            if file == "link.py" or arguments[0] == "RESUME=latest" or name == "pqn_gymnax":
                assert command(file, *arguments).code == 0
            else:
                process = subprocess.run([sys.executable, file, *arguments], cwd=tmp_path, env=environment)
                assert process.returncode == 0
        (run,) = tmp_path.glob(f"runs/{folder}_*/*")
        assert (run / f"{folder}.py").read_text() == (ROOT / f"{name}.py").read_text()
        assert len(read_csv(run)) == 13
    assert {path.name for path in tmp_path.iterdir() if path.suffix not in (".out", ".err")} == {*files, "runs"}


@pytest.mark.parametrize("name", [*QUICK, "pqn_rnn_gymnax"])
def test_bare_command_first_recipe_and_config_are_the_same(name, script, command):
    """Key by key, and each recipe restates all keys."""
    recipes = {"pqn_minatar": ["pqn"], "pqn_gymnax": ["pqn_cartpole", "pqn_acrobot"]}
    recipes |= {"pqn_rnn_gymnax": ["pqn_rnn_cartpole", "pqn_rnn_memory_chain", "pqn_rnn_cartpole_positions"]}
    recipes = recipes[name]
    for recipe in recipes:
        values = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml"))
        config = script.Config(**values)
        assert values.keys() == vars(config).keys()
        assert (vars(config) == vars(script.Config())) == (recipe == recipes[0])
    for arguments in ([], [f"+alg={recipes[0]}"]):
        process = command(name, *arguments, "--cfg", "job")
        assert process.code in (0, None)
        assert vars(script.Config(**OmegaConf.create(process.out).alg)) == vars(script.Config())


def test_root_config_restates_the_settings(script):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/config.yaml"))
    config.pop("defaults")
    assert script.Settings(**config) == script.Settings() and config.keys() == vars(script.Settings()).keys()
    assert config | {"SAVE_PATH": os.path.abspath("runs")} == vars(script.Settings())


def test_values_of_numpy_are_taken_and_saved_as_plain_numbers(script, tmp_path):
    values = {"LR": np.float64(1e-3), "GAMMA": np.float32(0.5), "NUM_ENVS": np.int64(4), "NORM_INPUT": np.bool_(True)}
    values |= {"LAMBDA": np.array(0.25), "NORM_TYPE": np.random.default_rng(0).choice(["none"]), "TOTAL_TIMESTEPS": 1e2}
    kwargs = {"max_steps_in_episode": np.int64(50)}
    out = script.run(script.Config(**TINY | values, ENV_KWARGS=kwargs), SAVE_PATH=tmp_path, SEED=np.int64(1))
    config, *_ = script.load(out["folder"])
    assert config == script.Config(**TINY | values, ENV_KWARGS=kwargs)
    assert all(type(x) in (str, bool, int, float, dict, type(None)) for x in vars(config).values())
    assert type(config.ENV_KWARGS["max_steps_in_episode"]) is int and type(config.TOTAL_TIMESTEPS) is int
    for bad in ({"LR": np.ones(2)}, {"NUM_ENVS": np.float64(1.5)}, {"ENV_KWARGS": {"x": np.ones(2)}}, {"LR": 1j}):
        with pytest.raises(ValidationError):
            script.Config(**bad)


class Broken(gymnax.environments.classic_control.cartpole.CartPole):
    """An environment that lacks something, by name."""

    def __init__(self, lacks=""):
        super().__init__()
        self.lacks = lacks

    def step(self, *args):
        return super().step(*args)[1:] if self.lacks == "a sixth value" else super().step(*args)

    def reset(self, *args):
        obs, state = super().reset(*args)
        return ({"obs": obs} if self.lacks == "one array" else obs), state

    def action_space(self, params=None):
        if self.lacks == "actions":
            raise NotImplementedError
        return super().action_space(params)


@pytest.mark.parametrize("lacks", ["a sixth value", "one array", "actions", ""])
def test_an_environment_without_the_interface_is_refused_by_name(lacks):
    import pqn_gymnax as pqn

    if "Broken" not in gymnax.registered_envs:
        gymnax.registration.register("Broken", Broken)
    kwargs = {"lacks": lacks}
    if not lacks:
        pqn.Config(ENV_NAME="Broken", ENV_KWARGS=kwargs)
        return
    with pytest.raises(ValidationError, match="ENV_NAME=Broken .* must have gymnax 1.0's interface, discrete actions"):
        pqn.Config(ENV_NAME="Broken", ENV_KWARGS=kwargs)
