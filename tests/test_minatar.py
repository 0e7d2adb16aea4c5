"""What is MinAtar's alone: games, the published recipe as written elsewhere, and a short learning run."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from probes import Clock
from pydantic import ValidationError

import pqn_minatar as pqn

GAMES = ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"]


@pytest.mark.parametrize("game", GAMES)
def test_all_games_train(game):
    config = pqn.Config(**TINY | {"ENV_NAME": f"{game}-MinAtar", "TOTAL_TIMESTEPS": 64, "TEST_DURING_TRAINING": False})
    out = jax.jit(pqn.make_train(config))(jax.random.key(0))
    assert np.isfinite(out["metrics"]["td_loss"]).all()


def test_env_kwargs_go_where_they_belong():
    kwargs = {"use_minimal_action_set": False, "max_steps_in_episode": 7}
    env, params = pqn.make_env(pqn.Config(ENV_KWARGS=kwargs))
    assert env.action_space(params).n == 6 and params.max_steps_in_episode == 7


def test_arguments_are_those_of_what_was_registered():
    """A function that makes an environment, and cannot without its argument."""
    gymnax.registration.register("Sized-MinAtar", lambda size: Clock(shape=(size, size, 2)))
    env, params = pqn.make_env(pqn.Config(ENV_NAME="Sized-MinAtar", ENV_KWARGS={"size": 9, "longest": 7}))
    assert env.shape == (9, 9, 2) and params.longest == 7
    with pytest.raises(ValidationError, match="unexpected keyword argument 'shape'"):
        pqn.Config(ENV_NAME="Sized-MinAtar", ENV_KWARGS={"size": 9, "shape": 9})
    with pytest.raises(ValidationError, match="missing 1 required positional argument: 'size'"):
        pqn.Config(ENV_NAME="Sized-MinAtar")


def test_recipe_written_for_purejaxql_loads():
    """The keys of purejaxql's MinAtar recipe."""
    keys = {
        "TOTAL_TIMESTEPS": 1e7, "TOTAL_TIMESTEPS_DECAY": 1e7, "NUM_ENVS": 128, "NUM_STEPS": 32, "EPS_START": 1.0,
        "EPS_FINISH": 0.05, "EPS_DECAY": 0.1, "NUM_MINIBATCHES": 32, "NUM_EPOCHS": 2, "NORM_TYPE": "layer_norm",
        "LR": 0.0005, "MAX_GRAD_NORM": 10, "LR_LINEAR_DECAY": True, "GAMMA": 0.99, "LAMBDA": 0.65,
        "ENV_NAME": "Breakout-MinAtar", "ENV_KWARGS": {}, "TEST_DURING_TRAINING": True, "TEST_INTERVAL": 0.05,
        "TEST_NUM_ENVS": 128, "EPS_TEST": 0.0, "ALG_NAME": "pqn", "NORM_INPUT": False, "REW_SCALE": 1.0,
    }  # fmt: skip
    config = pqn.Config(**keys)
    assert config == pqn.Config(TOTAL_TIMESTEPS_DECAY=1e7) and config.NUM_UPDATES == 2441


def test_schedules():
    few = TINY | {"ENV_NAME": "Clock-MinAtar", "TEST_DURING_TRAINING": False, "NUM_MINIBATCHES": 1}
    config = pqn.Config(**few | {"TOTAL_TIMESTEPS": 4 * 8 * 20, "EPS_DECAY": 0.5})
    metrics = jax.jit(pqn.make_train(config))(jax.random.key(0))["metrics"]
    np.testing.assert_allclose(metrics["epsilon"][jnp.array([0, 5, 10, 19])], [1, 0.525, 0.05, 0.05], rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"][jnp.array([0, 10, 19])], [5e-4, 2.5e-4, 2.5e-5], rtol=1e-5)
    at_once = pqn.Config(**TINY | {"EPS_DECAY": 0.0, "TEST_DURING_TRAINING": False, "TOTAL_TIMESTEPS": 96})
    metrics = jax.jit(pqn.make_train(at_once))(jax.random.key(0))["metrics"]
    np.testing.assert_allclose(metrics["epsilon"], [1, 0.05, 0.05], rtol=1e-5)


def test_learns_breakout(command, tmp_path):
    """A random policy's return is 0.5; 3e5 steps with the published recipe bring it above 3 (see docs)."""
    process = command("pqn_minatar", "alg.TOTAL_TIMESTEPS=3e5", "alg.TEST_INTERVAL=1", level=3)
    assert process.code == 0, process.err
    (table,) = map(pd.read_csv, tmp_path.glob("runs/*/*/metrics.csv"))
    assert table.returned_episode_returns[-7:].mean() > 3 and table["test/returned_episode_returns"].iloc[-1] > 3
