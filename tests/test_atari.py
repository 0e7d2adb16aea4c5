"""Atari's alone: emulators against an oracle without JAX, masking, scores of full games, seeds, resuming, errors."""

import csv
import os
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_algorithm import compare_layers, oracle

envpool = pytest.importorskip("envpool")
import pqn_atari_envpool as pqn  # noqa: E402

LIMIT = {**pqn.published_protocol(), "max_episode_steps": 150, "num_threads": 2}
TINY = {
    "ENV_NAME": "Breakout-v5", "ENV_KWARGS": LIMIT, "NUM_ENVS": 3, "NUM_STEPS": 8, "NUM_MINIBATCHES": 2, "NUM_EPOCHS": 1,
    "TOTAL_TIMESTEPS": 3 * 8 * 4, "TEST_ENVS": 2,
}  # fmt: skip
LEARNER = ("key", "update_steps", "params", "batch_stats", "opt_state")


def data(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def equal_trees(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(data(x), data(y), equal_nan=True), a, b)))


def keys(count, seed=3):
    return jax.random.split(jax.random.key(seed), count)


@pytest.fixture(scope="module")
def recorded():
    """48 rollouts of two seeds without learning, by a random policy; the test emulators play greedily."""
    config = pqn.Config(**TINY | {"NUM_STEPS": 10, "TOTAL_TIMESTEPS": 1e6, "GAMMA": 0.9, "REW_SCALE": 2.0})
    train, seeds = pqn.make_train(config), pqn.emulator_seeds(keys(2), 5)
    env = pqn.make_env(config, seeds)
    state = jax.jit(jax.vmap(train.init))(keys(2))
    state = state.replace(obs=jnp.asarray(env.reset()[0]).reshape(2, 5, 4, 84, 84))
    rollout, targets, found = jax.jit(partial(train.rollout, env)), jax.jit(jax.vmap(train.targets)), []
    params = jax.tree.map(lambda x: x[0], state.params)
    for _ in range(48):
        state, trajectory, games = rollout(state)
        found.append((trajectory, games, targets(state, trajectory)))
        jax.block_until_ready(state)
    found = jax.tree.map(lambda *x: np.concatenate(x, 1), *found)  # [S, T, N]
    return config, seeds, state, params, found


@pytest.fixture(scope="module")
def replayed(recorded):
    """The same emulators without JAX, given the recorded actions: what came of each step, [S, T, N]."""
    config, seeds, _, _, (trajectory, _, _) = recorded
    env = envpool.make_gymnasium("Breakout-v5", num_envs=10, seed=seeds, **LIMIT)
    (obs, _), steps = env.reset(), []
    for t in range(trajectory.action.shape[1]):
        action = np.zeros((2, 5), np.int32)
        action[:, :3] = trajectory.action[:, t]
        after, reward, terminated, truncated, info = env.step(action.ravel())
        steps.append((obs, after, reward, terminated, truncated, info["lives"], info["reward"], info["elapsed_step"]))
        obs = after
    names = ("obs", "next_obs", "reward", "terminated", "truncated", "lives", "score", "elapsed")
    arrays = (np.stack(x).reshape(len(steps), 2, 5, *x[0].shape[1:])[:, :, :3] for x in zip(*steps, strict=True))
    return {name: x.swapaxes(0, 1) for name, x in zip(names, arrays, strict=True)}


def test_rollouts_are_what_the_emulators_do(recorded, replayed):
    trajectory = recorded[4][0]
    for name in ("obs", "reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(trajectory, name), replayed[name], err_msg=name)
    lost_life = replayed["terminated"] & (replayed["lives"] > 0)
    game_over = replayed["terminated"] & (replayed["lives"] == 0)
    assert lost_life.sum() > 10 and game_over.sum() > 0 and replayed["truncated"].sum() > 0


def test_rewards_learned_from_are_clipped_and_scores_are_raw():
    """A random policy's invaders are worth 5 to 30 points each; no game ends within 140 steps."""
    config = pqn.Config(
        **TINY | {"ENV_NAME": "SpaceInvaders-v5", "NUM_ENVS": 8, "NUM_STEPS": 140, "TOTAL_TIMESTEPS": 1e6}
    )
    train, seeds = pqn.make_train(config), pqn.emulator_seeds(keys(1), 10)
    env = pqn.make_env(config, seeds)
    state = jax.jit(jax.vmap(train.init))(keys(1)).replace(obs=jnp.asarray(env.reset()[0])[None])
    state, trajectory, _ = jax.block_until_ready(jax.jit(partial(train.rollout, env))(state))
    env = envpool.make_gymnasium("SpaceInvaders-v5", num_envs=8, seed=seeds[:8], **LIMIT)
    env.reset()
    steps = [env.step(np.asarray(action)) for action in trajectory.action[0]]
    score = np.stack([step[-1]["reward"] for step in steps])
    np.testing.assert_array_equal(trajectory.reward[0], np.sign(score))
    np.testing.assert_array_equal(state.game_return[0, :8], score.sum(0))
    assert score.max() >= 5 and not any(step[-1]["terminated"].any() for step in steps)


def test_exactly_the_reset_steps_are_masked(recorded, replayed):
    """A step that follows a `done` is a reset, also over the border of two rollouts; no other is."""
    real, done = recorded[4][0].real, replayed["terminated"] | replayed["truncated"]
    np.testing.assert_array_equal(~real[:, 1:], done[:, :-1])
    assert real[:, 0].all() and (~real[:, 10::10]).any()
    waits = np.diff(replayed["elapsed"], axis=1) <= 0  # the emulator's own count stands still, or starts again
    np.testing.assert_array_equal(~real[:, 1:], waits)
    assert (replayed["reward"][~real] == 0).all() and not done[~real].any()


def test_targets_of_real_steps_are_those_of_the_oracle(recorded, replayed):
    """Time-outs bootstrap from the observation at `done`, which is the final one; lives and games end the return."""
    config, _, _, _, (trajectory, _, targets) = recorded
    network = pqn.make_network(config)
    for seed in range(2):
        params = jax.tree.map(lambda x, seed=seed: x[seed], recorded[2].params)
        value = jax.jit(lambda obs, params=params: network.apply({"params": params}, obs).max(-1))
        for start in range(0, 480, 10):
            part = {name: x[seed, start : start + 10] for name, x in replayed.items()}
            next_value = np.asarray(value(part["next_obs"]))
            expected = oracle(2 * part["reward"], part["terminated"], part["truncated"], next_value, 0.9, config.LAMBDA)
            real = trajectory.real[seed, start : start + 10]
            np.testing.assert_allclose(targets[seed, start : start + 10][real], expected[real], atol=1e-4)


def test_scores_are_those_of_full_games_with_raw_rewards(recorded, replayed):
    over, returns, lengths = recorded[4][1]
    np.testing.assert_array_equal(over, replayed["truncated"] | (replayed["terminated"] & (replayed["lives"] == 0)))
    for seed, n in np.ndindex(2, 3):
        total, steps = 0.0, 0
        for t in range(480):
            total, steps = total + replayed["score"][seed, t, n], steps + recorded[4][0].real[seed, t, n]
            if over[seed, t, n]:
                assert (returns[seed, t, n], lengths[seed, t, n]) == (total, steps)
                total, steps = 0.0, 0


def test_a_copy_of_an_earlier_state_gets_emulators_of_its_own():
    train = pqn.make_train(pqn.Config(**TINY))
    state = train(keys(1), num_updates=1, length=1)["runner_state"]
    copy = jax.tree.map(jnp.copy, state)
    state = train(state=state, num_updates=1, length=1)["runner_state"]
    names = [int(train(state=s, num_updates=0, length=1)["runner_state"].pool[0]) for s in (state, copy)]
    assert names[0] != names[1] and int(copy.pool[0]) not in names


def test_test_emulators_play_greedily_and_keep_their_latest_score(recorded):
    config, seeds, state, params, _ = recorded
    env = envpool.make_gymnasium("Breakout-v5", num_envs=2, seed=seeds[3:5], **LIMIT)  # those of the first seed
    act = jax.jit(lambda obs: pqn.make_network(config).apply({"params": params}, obs).argmax(-1))
    obs, total, latest, length = env.reset()[0], np.zeros(2), np.full(2, np.nan), np.full(2, np.nan)
    for _ in range(480):
        obs, _, terminated, truncated, info = env.step(np.asarray(act(obs)))
        total += info["reward"]
        over = truncated | (terminated & (info["lives"] == 0))
        latest, length = np.where(over, total, latest), np.where(over, info["elapsed_step"], length)
        total *= ~over
    np.testing.assert_array_equal(state.obs[0, 3:], obs)
    np.testing.assert_array_equal(state.last_return[0, 3:], latest)
    np.testing.assert_array_equal(state.last_length[0, 3:], length)
    assert np.isfinite(latest).all()


def test_masked_transitions_are_not_learned_from():
    train = pqn.make_train(pqn.Config(**TINY))
    state, learn = jax.jit(train.init)(keys(2)[0]), jax.jit(train.learn)
    obs = jax.random.randint(jax.random.key(0), (12, 4, 84, 84), 0, 256).astype(jnp.uint8)
    real = jnp.arange(12) % 3 > 0
    action, target = jnp.arange(12) % 4, jnp.arange(12.0)
    with_noise = learn(state, (obs, action, jnp.where(real, target, 1e6), real))
    alone = learn(state, jax.tree.map(lambda x: x[real], (obs, action, target, real)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), with_noise[1], alone[1])
    nothing = learn(state, (obs, action, target, jnp.zeros(12, bool)))
    assert nothing[1]["td_loss"] == 0 and equal_trees(nothing[0].params, state.params)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return pqn.run(
        pqn.Config(**TINY), SEED=3, NUM_SEEDS=2, SAVE_PATH=str(folder), LOG_INTERVAL=2, CHECKPOINT_INTERVAL=1
    )


def test_run_is_live(whole_run):
    """Losses, masks, counts, files: everything there and finite."""
    metrics = whole_run["metrics"]
    for key in ("td_loss", "qvals", "grad_norm", "reset_steps"):
        assert metrics[key].shape == (2, 2) and np.isfinite(metrics[key]).all(), key
    assert 0 <= metrics["reset_steps"].min() and metrics["reset_steps"].max() < 0.3
    with open(whole_run["folder"] / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["env_frame"] for row in rows] == [str(4 * 3 * 8 * n) for n in (2, 2, 4, 4)]
    assert np.isfinite(whole_run["score"])
    agent = pqn.load(whole_run["folder"])
    assert equal_trees(agent.variables["params"], whole_run["runner_state"].params)
    first = jax.tree.map(lambda x: x[0], agent.variables)
    assert agent.network.apply(first, np.zeros((2, 4, 84, 84), np.uint8)).shape == (2, 4)
    assert pqn.counters(pqn.Config(), 10**9)["env_frame"] == 4 * 128 * 32 * 10**9


def test_seed_alone_and_in_one_shot_equals_seed_among_others_in_chunks(whole_run):
    out = pqn.make_train(pqn.Config(**TINY))(keys(2)[1:])
    for key in ("td_loss", "qvals", "reset_steps", "grad_norm"):
        expected = whole_run["metrics"][key][1]
        np.testing.assert_allclose(out["metrics"][key][0].reshape(2, 2).mean(1), expected, rtol=1e-3, err_msg=key)
    np.testing.assert_array_equal(out["runner_state"].obs[0], whole_run["runner_state"].obs[1])
    assert pqn.emulator_seeds(keys(3), 4)[4:8] == pqn.emulator_seeds(keys(3)[1:2], 6)[:4]


def test_resumed_run_has_its_learner_and_fresh_emulators(whole_run):
    import orbax.checkpoint as ocp

    before = whole_run["runner_state"]
    train = pqn.make_train(pqn.Config(**TINY))
    saved = ocp.CheckpointManager((whole_run["folder"] / "checkpoints").resolve())
    new = jax.jit(jax.vmap(train.init))(keys(2))
    state = pqn.restore(whole_run["folder"], saved, new)[0]
    assert equal_trees(state, before)
    connected = train.connect(state)
    assert all(equal_trees(getattr(connected, name), getattr(before, name)) for name in LEARNER)
    assert (connected.pool != before.pool).all() and (connected.game_return == 0).all() and not connected.done.any()
    env = pqn.make_env(pqn.Config(**TINY), pqn.emulator_seeds(state.key, 5))
    np.testing.assert_array_equal(connected.obs.reshape(10, 4, 84, 84), env.reset()[0])
    longer = pqn.Config(**TINY | {"TOTAL_TIMESTEPS": 3 * 8 * 6})
    resumed = pqn.run(longer, RESUME=str(whole_run["folder"]))
    assert resumed["metrics"]["update_steps"][0].tolist() == [2, 4, 6]
    assert np.isfinite(resumed["metrics"]["td_loss"]).all()


def test_final_evaluation_plays_one_full_game_each():
    train = pqn.make_train(pqn.Config(**TINY | {"TEST_DURING_TRAINING": False, "EPS_TEST": 0.5}))
    state = jax.jit(jax.vmap(train.init))(keys(2))
    assert state.obs.shape[:2] == (2, 3)
    scores = train.test(state)
    assert (scores["test/unfinished"] == 0).all() and np.isfinite(scores["test/returned_episode_returns"]).all()
    assert ((scores["test/returned_episode_lengths"] > 20) & (scores["test/returned_episode_lengths"] <= 150)).all()


def test_layers_are_those_of_flax():
    for channels, size, stride, side in ((2, 4, 2, 9), (3, 3, 1, 5)):
        x = jax.random.normal(jax.random.key(2), (2, side, side, channels))
        compare_layers(pqn.Conv(6, size, stride), nn.Conv(6, (size, size), (stride, stride), padding="VALID"), x)


def test_dueling_heads():
    """Q = V + A - mean A: the head of advantages may be shifted, and Q's mean over actions is the head of the value."""
    network, obs = pqn.QNetwork(4, dueling=True), jax.random.randint(jax.random.key(0), (3, 4, 84, 84), 0, 256)
    params = jax.jit(network.init)(jax.random.key(1), obs)["params"]
    bias = lambda layer, x: params | {layer: params[layer] | {"bias": params[layer]["bias"] + x}}  # noqa: E731
    plain, advantages, value = (
        jax.jit(network.apply)({"params": p}, obs) for p in (params, bias("Dense_1", 2.0), bias("Dense_2", 2.0))
    )
    np.testing.assert_allclose(advantages, plain, atol=1e-5)
    np.testing.assert_allclose(value, plain + 2, atol=1e-5)
    assert np.std(plain, 1).min() > 0


def test_human_normalized_scores():
    """The published medians and numbers of games above human follow from the published scores and our table."""
    assert len(pqn.HUMAN) == 57 and set(pqn.HUMAN) <= set(envpool.list_all_envs())
    human = {name.removesuffix("-v5").lower(): scores for name, scores in pqn.HUMAN.items()}
    with open(ROOT / "results" / "atari57_published.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for column, median, above in (("pqn_400M_paper", 2.45, 40), ("rainbow_200M_paper", 2.31, 43)):
        pairs = [(float(row[column]), *human[row["game"].lower().replace(" ", "")]) for row in rows]
        scores = np.array([(score - low) / (high - low) for score, low, high in pairs])
        assert len(scores) == 57 and abs(np.median(scores) - median) < 0.006 and (scores > 1).sum() == above


def test_recipes():
    from omegaconf import OmegaConf

    recipe = lambda name: OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{name}.yaml"))  # noqa: E731
    assert pqn.Config(**recipe("pqn_atari")) == pqn.Config(**pqn.RECIPE)
    sticky = pqn.make_env(pqn.Config(**recipe("pqn_atari_sticky"))).config
    assert sticky["repeat_action_probability"] == 0.25 and not sticky["episodic_life"] and sticky["noop_max"] == 1
    keys = {
        "TOTAL_TIMESTEPS": 1e7, "TOTAL_TIMESTEPS_DECAY": 1e7, "NUM_ENVS": 128, "NUM_STEPS": 32, "EPS_START": 1.0,
        "EPS_FINISH": 0.001, "EPS_DECAY": 0.1, "NUM_EPOCHS": 2, "NUM_MINIBATCHES": 32, "NORM_TYPE": "layer_norm",
        "LR": 0.00025, "MAX_GRAD_NORM": 10, "LR_LINEAR_DECAY": False, "GAMMA": 0.99, "LAMBDA": 0.65,
        "ENV_NAME": "Pong-v5", "ENV_KWARGS": pqn.published_protocol(), "TEST_DURING_TRAINING": True, "TEST_ENVS": 8,
        "EPS_TEST": 0.0, "ALG_NAME": "pqn",
    }  # fmt: skip
    assert pqn.Config(**keys) == pqn.Config(TOTAL_TIMESTEPS=1e7, TOTAL_TIMESTEPS_DECAY=1e7, ALG_NAME="pqn")


BAD = {
    "near match": ({"ENV_NAME": "Breakot-v5"}, "ENV_NAME='Breakot-v5' .* Breakout-v5"),
    "another naming": ({"ENV_NAME": "PongNoFrameskip-v4"}, "such as .*Pong-v5"),
    "another script's": ({"ENV_NAME": "Breakout-MinAtar"}, "such as Breakout-v5"),
    "unknown option": ({"ENV_KWARGS": {"speed": 2}}, "ENV_KWARGS.speed=2 is unknown; it takes .*frame_skip"),
    "reserved option": ({"ENV_KWARGS": {"num_envs": 2}}, "num_envs=2 is unknown"),
    "wrong type": (
        {"ENV_KWARGS": {"frame_skip": "often"}},
        "ENV_KWARGS.frame_skip='often' is not allowed: must be like 4",
    ),
    "fraction of a frame": ({"ENV_KWARGS": {"frame_skip": 1.5}}, "ENV_KWARGS.frame_skip=1.5 "),
    "what crashes envpool": ({"ENV_KWARGS": {"noop_max": 0}}, "ENV_KWARGS.noop_max=0 .* from 1 to"),
    "what hangs envpool": ({"ENV_KWARGS": {"num_threads": -1}}, "ENV_KWARGS.num_threads=-1 .* from 0 to"),
    "no probability": ({"ENV_KWARGS": {"repeat_action_probability": 7}}, "repeat_action_probability=7 .* from 0 to 1"),
    "a number for a switch": ({"ENV_KWARGS": {"episodic_life": 1}}, "episodic_life=1 .* true or false"),
    "another game": ({"ENV_KWARGS": {"task": "breakout"}}, "ENV_KWARGS.task='breakout' is unknown"),
    "small screens": ({"ENV_KWARGS": {"img_height": 20}}, "ENV_KWARGS=.* 36 x 36"),
    "minibatches": ({"NUM_MINIBATCHES": 33}, "NUM_MINIBATCHES=33"),
    "test emulators": ({"TEST_ENVS": 0}, "TEST_ENVS=0"),
    "norm": ({"NORM_TYPE": "group_norm"}, "NORM_TYPE='group_norm'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    changes, text = BAD[case]
    with pytest.raises(pqn.UserError, match=text) as error:
        pqn.Config(**changes)
    assert "\n" not in str(error.value)


def test_an_option_of_envpools_is_over_the_published_protocol():
    assert pqn.Config(ENV_KWARGS={"frame_skip": 2}).ENV_KWARGS == pqn.published_protocol() | {"frame_skip": 2}


def test_missing_envpool_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(pqn.UserError, match="pip install 'envpool>=1.2.5'") as error:
        pqn.Config()
    assert "\n" not in str(error.value)


def test_missing_envpool_on_the_command_line(tmp_path):
    (tmp_path / "envpool.py").write_text("raise ImportError('no wheel')")
    for arguments in ([], ["+alg=pqn_atari"]):
        process = subprocess.run(
            [sys.executable, ROOT / "pqn_atari_envpool.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert process.returncode == 1 and process.stderr.startswith("Error: envpool is needed"), process.stderr
        assert len(process.stderr.splitlines()) == 1


def test_platforms_without_envpools_xla_interface_are_one_clear_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(pqn.UserError, match="Linux only, not for darwin"):
        pqn.Config()


def test_command_line(command):
    """Recipe, options of envpool's and a misspelt game, in one line of error."""
    arguments = ("+alg=pqn_atari_sticky", "alg.ENV_KWARGS.frame_skip=2", "+alg.ENV_KWARGS.num_threads=1")
    process = command("pqn_atari_envpool", *arguments, "alg.ENV_NAME=Pog-v5")
    assert process.code == 1 and "Traceback" not in process.err
    assert process.err.startswith("Error: alg.ENV_NAME='Pog-v5'") and "Pong-v5" in process.err
