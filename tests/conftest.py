"""Shared by the tests: the scripts, a tiny configuration of each, and the command line as a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CACHE = ROOT / ".pytest_cache" / "jax"  # compiled programs, for all tests and the processes they start
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["COLUMNS"] = "200"
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


@pytest.fixture
def command(tmp_path):
    """Run a script as a user does, in an empty folder: command("pqn_minatar", "alg.LR=1e-3")."""

    def run(script, *arguments, check=True, wait=True, **options):
        path = script if str(script).endswith(".py") else ROOT / f"{script}.py"
        options = {"cwd": tmp_path, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        process = subprocess.Popen([sys.executable, str(path), *arguments], **options)
        if not wait:
            return process
        process.stdout_text, process.stderr_text = process.communicate(timeout=600)
        if check:
            assert process.returncode == 0, process.stderr_text
        return process

    return run


def tiny_arguments(**changes):
    """TINY as overrides of a command line."""
    return [f"alg.{key}={value}" for key, value in (TINY | changes).items()]
