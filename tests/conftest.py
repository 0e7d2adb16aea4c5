"""Shared by the tests: the scripts, a tiny configuration of each, and their command lines as processes."""

import importlib
import itertools
import multiprocessing
import os
import runpy
import signal
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CACHE = ROOT / ".pytest_cache" / "jax"  # compiled programs, for all tests and the processes they start
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation. XLA stops at flags that it does not know, so the second is for known versions.
FLAGS = "--xla_backend_optimization_level=0"  # processes that learn for long have level 1
FLAGS += " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ["COLUMNS"] = "200"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it: so would the commands
SCRIPTS = sorted(path.stem for path in ROOT.glob("pqn_*.py"))
TINY = {
    "NUM_ENVS": 4,
    "NUM_STEPS": 8,
    "NUM_MINIBATCHES": 2,
    "NUM_EPOCHS": 2,
    "TOTAL_TIMESTEPS": 4 * 8 * 12,
    "TEST_INTERVAL": 0.25,
    "TEST_NUM_ENVS": 4,
    "TEST_NUM_STEPS": 200,
}
# Craftax takes long to compile: one program, cached, for all tests of the real environment.
SHORT_CRAFTAX = {
    "ENV_NAME": "Craftax-Classic-Symbolic-v1",
    "ENV_KWARGS": {"max_timesteps": 20},
    "HIDDEN_SIZE": 16,
    "NUM_STEPS": 16,
    "TOTAL_TIMESTEPS": 4 * 16 * 3,
    "LOG_ACHIEVEMENTS": True,
    "TEST_INTERVAL": 1.0,
    "TEST_NUM_STEPS": 60,
}


# Commands are forked from a process that has imported what takes seconds to import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["flax.linen", "optax", "seaborn", "hydra", "orbax.checkpoint"])
os.environ["PYTHONPATH"] = str(ROOT)


class Command:
    """A command line in a process of its own: exit code, output and errors. Of a script of ours, by name, or a file."""

    count = itertools.count()

    def __init__(self, folder, script, *arguments, level=0):
        self.files = [folder / f"{next(self.count)}.{stream}" for stream in ("out", "err")]
        for file in self.files:
            file.touch()
        process = partial(FORKS.Process, daemon=True)  # it ends with the tests, whatever became of its own
        self.process = process(target=self.call_main, args=(folder, script, arguments, *self.files, level))
        self.process.start()

    @staticmethod
    def call_main(folder, script, arguments, out, err, level=0):
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("level=0", f"level={level}")
        os.chdir(folder)
        for stream, file in enumerate((out, err), 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [str(script), *map(str, arguments)]
        if str(script).endswith(".py"):
            sys.path.insert(0, str(Path(folder, script).parent))
            runpy.run_path(str(script), run_name="__main__")
        else:
            importlib.import_module(script).main()

    @property
    def out(self):
        return self.files[0].read_text()

    @property
    def err(self):
        return self.files[1].read_text()

    @property
    def running(self):
        return self.process.is_alive()

    @property
    def code(self):
        self.process.join(600)
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)


@pytest.fixture
def command(tmp_path):
    """Run a script's command line in an empty folder: command("pqn_minatar", "alg.LR=1e-3").code."""
    return partial(Command, tmp_path)


def tiny_arguments(**changes):
    """TINY as overrides of a command line."""
    return [f"alg.{key}={value}" for key, value in (TINY | changes).items()]
