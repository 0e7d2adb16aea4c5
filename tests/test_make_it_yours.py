"""docs/make_it_yours.md: every diff applies, trains and does what is said; its environment trains and can be watched."""

import importlib.util
import inspect
import re
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TINY, Command

PAGE = (ROOT / "docs/make_it_yours.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w)\.(.*?^```\n)", PAGE, re.M | re.S))
DIFFS = {name: re.search(r"^```diff\n(.*?)^```$", text, re.M | re.S)[1] for name, text in SECTIONS.items()}
NEEDS = {name: re.findall(r"^On top of (\w):$", text, re.M) for name, text in SECTIONS.items()}
CHANGES = {"NUM_EPOCHS": 1, "TOTAL_TIMESTEPS": 4 * 8 * 4, "TEST_DURING_TRAINING": False, "TEST_NUM_STEPS": 20}


def patched(folder, names):
    """The module of my_pqn.py in a folder: a copy of pqn_minatar.py with these changes, in turn."""
    (folder / "pqn_minatar.py").write_bytes((ROOT / "pqn_minatar.py").read_bytes())
    for name in names:
        subprocess.run(["git", "apply", "-"], input=DIFFS[name], text=True, cwd=folder, check=True)
    (folder / "pqn_minatar.py").rename(folder / "my_pqn.py")
    spec = importlib.util.spec_from_file_location("my_pqn", folder / "my_pqn.py")
    sys.modules["my_pqn"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(pqn, count=3, **changes):
    """States before and after each of some updates, the updates' metrics, and the network."""
    init, update, _ = pqn.make_pqn(config := pqn.Config(**TINY | CHANGES | changes))
    states, metrics, step = [jax.jit(init)(jax.random.key(0))], [], jax.jit(update)
    for i in range(count):
        state, values = step(states[-1], i)
        states, metrics = [*states, state], [*metrics, values]
    assert all(np.isfinite(values["td_loss"]) for values in metrics)
    return states, metrics, pqn.make_network(config)


def check_rms_norm(pqn):
    """In the parameters; and what leaves it has a mean square of 1, but a mean."""
    states, _, network = train(pqn, NORM_TYPE="rms_norm")
    obs = np.random.default_rng(0).random((4, 10, 10, 4))
    _, seen = network.apply(states[0].variables, obs, capture_intermediates=True)
    params = states[-1].variables["params"]
    for name, features in (("RMSNorm_0", 16), ("RMSNorm_1", 128)):
        assert params[name].keys() == {"scale"} and params[name]["scale"].shape == (features,)
        y = np.asarray(seen["intermediates"][name]["__call__"][0])
        np.testing.assert_allclose((y**2).mean(0), 1, rtol=0.01)
        assert abs(y.mean(0)).max() > 0.01  # LayerNorm's are below 1e-6


def check_next_values(pqn, states, network, value):
    """V(s') in the targets against value(Q of the network that acted, Q of the target network), in NumPy."""
    state = states[-1]._replace(target=jax.tree.map(lambda x: x[::-1], states[-1].variables))
    rng, shape = np.random.default_rng(0), (TINY["NUM_STEPS"], TINY["NUM_ENVS"])
    obs, done, terminated = rng.integers(0, 2, (*shape, *state.obs.shape[1:])), *(rng.random((2, *shape)) < 0.5)
    trajectory = pqn.Transition(obs, 0, np.zeros(shape), done, done & terminated, np.full(shape, 100.0), 0, 0)
    obs = np.concatenate([obs, state.obs[None]])
    v = value(*(np.asarray(network.apply(x, obs)) for x in (state.variables, state.target)))
    pqn.q_lambda_targets = lambda reward, discount, next_value, trace: next_value  # tested elsewhere
    found = inspect.getclosurevars(pqn.make_pqn(pqn.Config(**TINY))[1]).nonlocals["targets"](state, trajectory)[0]
    np.testing.assert_allclose(found, np.where(done & ~terminated, v[:-1], v[1:]), rtol=1e-4, atol=1e-4)


def check_target_network(pqn):
    states, _, network = train(pqn, TARGET_INTERVAL=2)
    refreshed = [0, 0, 2, 2]  # the state whose parameters each state's target has
    for i, state in enumerate(states):
        same = [jax.tree.all(jax.tree.map(np.array_equal, state.target, other.variables)) for other in states]
        assert same == [j == refreshed[i] for j in range(4)]
    check_next_values(pqn, states, network, lambda acted, target: target.max(-1))


def check_double_q(pqn):
    states, _, network = train(pqn)
    index = partial(np.take_along_axis, axis=-1)
    check_next_values(pqn, states, network, lambda acted, target: index(target, acted.argmax(-1)[..., None])[..., 0])


def check_ladder(pqn):
    """The epsilons of every step of rollouts, [N], and of evaluations, one number."""
    seen, act = [], pqn.epsilon_greedy
    pqn.epsilon_greedy = lambda *args: jax.debug.callback(seen.append, args[2]) or act(*args)
    train(pqn, 4, EPS_START=0.4, EPS_FINISH=0.4, EPS_TEST=0.25)
    jax.effects_barrier()
    rollouts, tests = ([x for x in seen if np.ndim(x) == n] for n in (1, 0))
    assert len(rollouts) == 4 * TINY["NUM_STEPS"] and set(map(float, tests)) == {0.25}
    np.testing.assert_allclose(rollouts, [[0.4 ** (1 + 7 * i / 3) for i in range(4)]] * len(rollouts), rtol=1e-5)


def check_metric(pqn):
    """With greedy actions at a learning rate of (almost) 0, max Q is the Q(s, a) that is learned."""
    _, metrics, _ = train(pqn, EPS_START=0.0, EPS_FINISH=0.0, LR=1e-12)
    np.testing.assert_allclose([x["max_q"] for x in metrics], [x["qvals"] for x in metrics], rtol=1e-3)


def check_optimizer(pqn):
    """A gradient step with decay differs from one without by the decay, of matrices alone."""
    (start, decayed), (_, plain) = (train(pqn, 1, WEIGHT_DECAY=x, NUM_MINIBATCHES=1)[0] for x in (0.5, 0.0))
    assert type(decayed.opt_state[0]).__name__ == "ScaleByAdamState" and decayed.opt_state[0].count == 1
    for x, a, b in zip(*(jax.tree.leaves(s.variables["params"]) for s in (start, decayed, plain)), strict=True):
        np.testing.assert_allclose(b - a, 5e-4 * 0.5 * x * (x.ndim > 1), rtol=0, atol=1e-6)


CHECKS = {"a": check_rms_norm, "b": check_target_network, "c": check_double_q, "d": check_ladder, "e": check_metric}
CHECKS |= {"f": check_optimizer}


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_does_what_is_said(name, tmp_path):
    CHECKS[name](patched(tmp_path, [*NEEDS[name], name]))


def test_all_diffs_together(tmp_path):
    """Through `run`: the metric is in the table, the state in a checkpoint."""
    pqn = patched(tmp_path, DIFFS)
    folder = pqn.run(pqn.Config(**TINY | CHANGES, NORM_TYPE="rms_norm"), SAVE_PATH=tmp_path)["folder"]
    table = pd.read_csv(folder / "metrics.csv")
    assert folder.parent.name == "my_pqn_Breakout-MinAtar_s0" and (folder / "checkpoints/4").exists()
    assert list(table.update_steps) == [1, 2, 3, 4] and np.isfinite(table[["td_loss", "max_q"]].to_numpy()).all()


def test_the_environment(tmp_path, monkeypatch):
    """A walk to the goal ends with reward 1; it trains, and watch.py plays it."""
    (tmp_path / "maze.py").write_text(re.search(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)[1])
    monkeypatch.syspath_prepend(tmp_path)
    import maze

    import pqn_minatar as pqn

    kwargs = {"size": 7, "max_steps_in_episode": 50}
    config = pqn.Config(**TINY | CHANGES | {"ENV_NAME": "Maze-MinAtar", "ENV_KWARGS": kwargs})
    env, params = pqn.make_env(config)
    state = maze.State(0, np.array([0, 1]), np.array([2, 2]))
    for action, expected in ((1, 0), (0, 0), (1, 0), (1, 1)):  # a pillar, right, down, down
        obs, state, reward, terminated, _ = env.step_env(jax.random.key(0), state, action, params)
        assert reward == terminated == expected and obs.shape == (7, 7, 3)
    folder = pqn.run(config, SAVE_PATH=tmp_path)["folder"]
    watch = Command(tmp_path, ROOT / "watch.py", folder, "--episodes", 1, "--import", "maze")
    assert watch.code == 0, watch.err
    assert (tmp_path / "watch.gif").exists()
