"""What is the gymnax script's alone: any environment with discrete actions, several devices, a short learning run."""

import json
import os
import subprocess
import sys

import gymnax
import jax
import numpy as np
import pytest
from conftest import ROOT, TINY

import pqn_gymnax as pqn

ENVIRONMENTS = [
    "MountainCar-v0",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "FourRooms-misc",
    "FrozenLake-misc",
    "BernoulliBandit-misc",
]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_discrete_action_environments_train(name):
    """Matrices are flattened, integers cast, discrete observations one-hot."""
    config = pqn.Config(**TINY | {"ENV_NAME": name, "TOTAL_TIMESTEPS": 64, "TEST_DURING_TRAINING": False})
    out = pqn.make_train(config)(jax.random.split(jax.random.key(0), 1))
    assert np.isfinite(out["metrics"]["td_loss"]).all()
    inputs = jax.tree.leaves(out["runner_state"].params["Dense_0"]["kernel"])[0].shape[1]
    env, params = gymnax.make(name)
    space = env.observation_space(params)
    assert inputs == (space.n if name == "FrozenLake-misc" else np.prod(space.shape))


def test_continuous_actions_are_refused():
    with pytest.raises(pqn.UserError, match="ENV_NAME='Pendulum-v1' .* discrete actions"):
        pqn.Config(ENV_NAME="Pendulum-v1")


def test_reward_scale_scales_what_is_learned_and_not_what_is_reported():
    """The same seed with rewards scaled or not: the same first rollout is reported, another loss is learned from."""
    keys = jax.random.split(jax.random.key(0), 1)
    a, b = (
        pqn.make_train(pqn.Config(**TINY | {"REW_SCALE": x, "NUM_STEPS": 32, "TEST_DURING_TRAINING": False}))(
            keys, num_updates=1
        )["metrics"]
        for x in (0.1, 1)
    )
    assert a["returned_episode_returns"] == b["returned_episode_returns"] > 5
    assert b["td_loss"] > 10 * a["td_loss"]


SHARDED = """
import jax, json, numpy as np, sys
sys.path.insert(0, sys.argv[1])
import pqn_gymnax as pqn
out = {"devices": jax.local_device_count(), "for 5": pqn.seed_mesh(5).size}
train = pqn.make_train(pqn.Config(**json.loads(sys.argv[2])))
for num_seeds in json.loads(sys.argv[3]):
    run = train(jax.random.split(jax.random.key(0), num_seeds))
    out[f"{num_seeds}"] = {key: np.nan_to_num(value).tolist() for key, value in run["metrics"].items()}
    out[f"for {num_seeds}"] = len(run["runner_state"].obs.sharding.device_set)
print(json.dumps(out))
"""


def test_seeds_are_spread_over_devices_and_the_numbers_are_those_of_one():
    results = []
    for devices, seeds in (1, [6]), (4, [4, 6]):  # 4 seeds are the first of 6
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", SHARDED, str(ROOT), json.dumps(TINY), json.dumps(seeds)]
        results.append(json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout))
    one, four = results
    assert four["devices"] == 4 and [four[f"for {n}"] for n in (4, 6, 5)] == [4, 3, 1]
    for n in (4, 6):
        for key, value in one["6"].items():
            message = f"{n} seeds, {key}"
            np.testing.assert_allclose(value[:n], four[f"{n}"][key], rtol=1e-4, atol=1e-5, err_msg=message)


def test_solves_cartpole():
    """The published recipe reaches 500 well before its 5e5 steps; a broken learner stays below 200."""
    out = pqn.run(pqn.Config(**pqn.RECIPE, TOTAL_TIMESTEPS=2.5e5, TEST_INTERVAL=1.0), NUM_SEEDS=2, SAVE_PATH=None)
    assert out["score"] > 450
