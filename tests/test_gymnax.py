"""What is the gymnax script's alone: any environment with discrete actions, several devices, a short learning run."""

import json

import gymnax
import jax
import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from gymnax.environments import environment, spaces
from pydantic import ValidationError

import pqn_gymnax as pqn

ENVIRONMENTS = ["MountainCar-v0", "Catch-bsuite", "DeepSea-bsuite", "FourRooms-misc", "FrozenLake-misc"]
ENVIRONMENTS += ["BernoulliBandit-misc"]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_discrete_action_environments_train(name):
    """Matrices are flattened, integers cast, discrete observations one-hot."""
    config = pqn.Config(**TINY | {"ENV_NAME": name, "TOTAL_TIMESTEPS": 64, "TEST_DURING_TRAINING": False})
    out = jax.jit(pqn.make_train(config))(jax.random.key(0))
    assert np.isfinite(out["metrics"]["td_loss"]).all()
    inputs = len(out["runner_state"].variables["params"]["Einsum_0"]["kernel"])
    env, params = gymnax.make(name)
    space = env.observation_space(params)
    assert inputs == (space.n if name == "FrozenLake-misc" else np.prod(space.shape))


def test_continuous_actions_are_refused():
    with pytest.raises(ValidationError, match="ENV_NAME=Pendulum-v1 .* discrete actions"):
        pqn.Config(ENV_NAME="Pendulum-v1")


class Ten(environment.Environment):
    """Reward 1 for action 1; terminates after ten steps by itself, its parameters have no time limit."""

    num_actions = 2

    class default_params:  # noqa: N801
        replace = classmethod(lambda cls, **kwargs: cls)

    def reset_env(self, key, params):
        return jax.numpy.zeros(1), environment.EnvState(0)

    def step_env(self, key, state, action, params):
        state = environment.EnvState(state.time + 1)
        return jax.numpy.full(1, state.time / 10.0), state, jax.numpy.float32(action), state.time >= 10, {}

    def is_truncated(self, state, params):
        return jax.numpy.array(False)

    def action_space(self, params=None):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0, 1, (1,))


def test_without_a_time_limit_the_length_of_evaluations_must_be_given(tmp_path):
    from flax import struct

    @struct.dataclass
    class Params:
        bonus: float = 1.0

    Ten.default_params = Params()
    if "Ten" not in gymnax.registered_envs:
        gymnax.registration.register("Ten", Ten)
    with pytest.raises(ValidationError, match="max_steps_in_episode=None must be .* or TEST_NUM_STEPS"):
        pqn.Config(ENV_NAME="Ten", TEST_NUM_STEPS=None)
    config = pqn.Config(**TINY | {"ENV_NAME": "Ten", "TEST_NUM_STEPS": 50})
    metrics = jax.jit(pqn.make_train(config))(jax.random.key(0))["metrics"]
    assert metrics["test/returned_episode_lengths"][-1] == 10 and metrics["test/unfinished"][-1] == 0


def test_reward_scale_scales_what_is_learned_and_not_what_is_reported():
    """The same seed with rewards scaled or not: the same first rollout is reported, another loss is learned from."""
    a, b = (
        jax.jit(pqn.make_train(pqn.Config(**TINY | {"REW_SCALE": x, "NUM_STEPS": 32, "TOTAL_TIMESTEPS": 128})))(
            jax.random.key(0)
        )["metrics"]
        for x in (0.1, 1)
    )
    assert a["returned_episode_returns"] == b["returned_episode_returns"] > 5
    assert b["td_loss"] > 10 * a["td_loss"]


SHARDED = """
import jax, json, numpy as np, sys
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))  # as JAX_NUM_CPU_DEVICES
import pqn_gymnax as pqn
out, config = {"devices": jax.local_device_count()}, pqn.Config(**json.loads(sys.argv[2]))
for num_seeds in json.loads(sys.argv[3]):
    state, update = pqn.start_seeds(config, jax.random.split(jax.random.key(0), num_seeds))
    for i in range(3):
        state, metrics = update(state, i)
        out[f"{num_seeds} {i}"] = {key: np.nan_to_num(value).tolist() for key, value in metrics.items()}
    out[f"for {num_seeds}"] = len(state.obs.sharding.device_set)
print(json.dumps(out))
"""


def test_seeds_are_spread_over_devices_and_the_numbers_are_those_of_one(command, tmp_path):
    """And importing the script changes no setting of JAX: its devices are those of the environment."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    sizes = (1, [6, 1]), (4, [4, 6, 5])  # 4 seeds are the first of 6
    processes = [command("sharded.py", devices, json.dumps(TINY), json.dumps(seeds)) for devices, seeds in sizes]
    one, four = (json.loads(process.out) for process in processes if process.code == 0)
    assert one["devices"] == 1 and four["devices"] == 4 and [four[f"for {n}"] for n in (4, 6, 5)] == [4, 3, 1]
    for result, n in ((four, 4), (four, 6), (one, 1)):
        for i in range(3):
            for key, value in one[f"6 {i}"].items():
                other = result[f"{n} {i}"][key]
                np.testing.assert_allclose(value[:n], other, rtol=1e-3, atol=1e-4, err_msg=f"{n} seeds, {key}")


def test_solves_cartpole(command, tmp_path):
    """The published recipe reaches 500 well before its 5e5 steps; a broken learner stays below 200."""
    process = command("pqn_gymnax", "alg.TOTAL_TIMESTEPS=2.5e5", "alg.TEST_INTERVAL=1", level=3)
    assert process.code == 0, process.err
    (table,) = map(pd.read_csv, tmp_path.glob("runs/*/*/metrics.csv"))
    assert table["test/returned_episode_returns"].iloc[-1] > 450
