"""Atari's alone: emulators against an oracle without JAX, masking, scores of full games, seeds, resuming, encoders, errors."""

import csv
import re
import shutil
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from pydantic import ValidationError
from test_algorithm import Layer, compare_layers, oracle

envpool = pytest.importorskip("envpool")
import pqn_atari_envpool as pqn  # noqa: E402

# Small screens: less to compute
LIMIT = {**pqn.PROTOCOL, "max_episode_steps": 150, "num_threads": 2, "img_height": 44, "img_width": 44}
TINY = {
    "ENV_NAME": "Breakout-v5", "ENV_KWARGS": LIMIT, "NUM_ENVS": 3, "NUM_STEPS": 8, "NUM_MINIBATCHES": 2, "NUM_EPOCHS": 1,
    "TOTAL_TIMESTEPS": 3 * 8 * 4, "TEST_ENVS": 2,
}  # fmt: skip


def data(x):
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def equal_trees(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(data(x), data(y), equal_nan=True), a, b)))


def keys(count, seed=3):
    return jax.random.split(jax.random.key(seed), count)


def play_updates(config, seed_keys, updates, learning=True):
    """Updates with every Transition [S, N + E, ...] and batch [T, N, ...] that goes to the learner, as they come."""
    transitions, batches, transition, shuffle = [], [], pqn.Transition, pqn.shuffle_minibatches

    def spy_transition(*fields):
        keep = lambda *fields: transitions.append(transition(*(np.array(x) for x in fields)))  # noqa: E731
        jax.debug.callback(keep, *fields, ordered=True)
        return transition(*fields)

    def spy_shuffle(keys, batch, num_minibatches):
        jax.debug.callback(lambda *batch: batches.append([np.array(x) for x in batch]), *batch, ordered=True)
        return shuffle(keys, batch, num_minibatches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqn, "Transition", spy_transition)
        patch.setattr(pqn, "shuffle_minibatches", spy_shuffle)
        state, update = pqn.start_seeds(config if learning else pqn.override(config, LR=0.0), seed_keys)
        metrics = []
        for i in range(updates):
            state, metrics_i = update(state, i)
            metrics.append(jax.device_get(metrics_i))
        jax.effects_barrier()
    steps = jax.tree.map(lambda *x: np.stack(x, 1), *transitions)  # [S, T, N + E, ...]
    batch = [
        np.stack(x).reshape(updates, len(seed_keys), *x[0].shape).swapaxes(0, 1) for x in zip(*batches, strict=True)
    ]
    batch = [x.reshape(len(seed_keys), -1, *x.shape[3:]) for x in batch]
    return state, steps, batch, jax.tree.map(lambda *x: np.stack(x, 1), *metrics)


@pytest.fixture(scope="module")
def recorded():
    """48 updates of two seeds without learning, by a random policy; the test emulators play greedily."""
    config = pqn.Config(**TINY | {"NUM_STEPS": 10, "TOTAL_TIMESTEPS": 1e6, "GAMMA": 0.9, "REW_SCALE": 2.0})
    state, steps, batch, metrics = play_updates(config, keys(2), 48, learning=False)
    learned = jax.tree.map(lambda x: x[:, :, :3], steps)
    return config, state, steps, learned, batch, metrics


@pytest.fixture(scope="module")
def replayed(recorded):
    """The same emulators without JAX, given the recorded actions: what came of each step, [S, T, N]."""
    learned = recorded[3]
    env = envpool.make_gymnasium("Breakout-v5", num_envs=10, seed=pqn.emulator_seeds(keys(2), 5), **LIMIT)
    (obs, _), steps = env.reset(), []
    for t in range(learned.action.shape[1]):
        action = np.zeros((2, 5), np.int32)
        action[:, :3] = learned.action[:, t]
        after, reward, terminated, truncated, info = env.step(action.ravel())
        steps.append((obs, after, reward, terminated, truncated, info["lives"], info["reward"], info["elapsed_step"]))
        obs = after
    names = ("obs", "next_obs", "reward", "terminated", "truncated", "lives", "score", "elapsed")
    arrays = (np.stack(x).reshape(len(steps), 2, 5, *x[0].shape[1:])[:, :, :3] for x in zip(*steps, strict=True))
    return {name: x.swapaxes(0, 1) for name, x in zip(names, arrays, strict=True)}


def test_rollouts_are_what_the_emulators_do(recorded, replayed):
    learned, batch = recorded[3:5]
    for name in ("obs", "reward", "terminated"):
        np.testing.assert_array_equal(getattr(learned, name), replayed[name], err_msg=name)
    np.testing.assert_array_equal(learned.done, replayed["terminated"] | replayed["truncated"])
    for ours, name in zip(batch[:2], ("obs", "action"), strict=True):
        np.testing.assert_array_equal(ours, getattr(learned, name))
    lost_life = replayed["terminated"] & (replayed["lives"] > 0)
    game_over = replayed["terminated"] & (replayed["lives"] == 0)
    assert lost_life.sum() > 10 and game_over.sum() > 0 and replayed["truncated"].sum() > 0


def test_rewards_learned_from_are_clipped_and_scores_are_raw():
    """A random policy's invaders are worth 5 to 30 points each; no game ends within 140 steps."""
    changes = {"ENV_NAME": "SpaceInvaders-v5", "NUM_ENVS": 8, "NUM_STEPS": 140, "TOTAL_TIMESTEPS": 1e6}
    _, steps, _, _ = play_updates(pqn.Config(**TINY | changes), keys(1), 1)
    seeds = pqn.emulator_seeds(keys(1), 10)[:8]
    env = envpool.make_gymnasium("SpaceInvaders-v5", num_envs=8, seed=seeds, **LIMIT)
    env.reset()
    expected = [env.step(np.asarray(action)) for action in steps.action[0, :, :8]]
    score = np.stack([step[-1]["reward"] for step in expected])
    np.testing.assert_array_equal(steps.reward[0, :, :8], np.sign(score))
    np.testing.assert_array_equal(steps.returns[0, -1, :8], score.sum(0))
    assert score.max() >= 5 and not any(step[-1]["terminated"].any() for step in expected)


def test_exactly_the_reset_steps_are_masked(recorded, replayed):
    """A step that follows a `done` is a reset, also over the border of two rollouts; no other is."""
    real, done = recorded[4][3], replayed["terminated"] | replayed["truncated"]
    np.testing.assert_array_equal(~real[:, 1:], done[:, :-1])
    assert real[:, 0].all() and (~real[:, 10::10]).any()
    waits = np.diff(replayed["elapsed"], axis=1) <= 0  # the emulator's own count stands still, or starts again
    np.testing.assert_array_equal(~real[:, 1:], waits)
    assert (replayed["reward"][~real] == 0).all() and not done[~real].any()
    np.testing.assert_allclose(recorded[5]["reset_steps"], (~real).reshape(2, 48, 30).mean(2), atol=1e-6)


def test_targets_of_real_steps_are_those_of_the_oracle(recorded, replayed):
    """Time-outs bootstrap from the observation at `done`, which is the final one; lives and games end the return."""
    config, state, _, _, (_, _, targets, real), _ = recorded
    network = pqn.make_network(config)
    for seed in range(2):
        variables = jax.tree.map(lambda x, seed=seed: x[seed], state.variables)
        value = jax.jit(lambda obs, variables=variables: network.apply(variables, obs).max(-1))
        for start in range(0, 480, 10):
            part = {name: x[seed, start : start + 10] for name, x in replayed.items()}
            next_value = np.asarray(value(part["next_obs"]))
            expected = oracle(2 * part["reward"], part["terminated"], part["truncated"], next_value, 0.9, config.LAMBDA)
            mask = real[seed, start : start + 10]
            np.testing.assert_allclose(targets[seed, start : start + 10][mask], expected[mask], atol=1e-4)


def test_scores_are_those_of_full_games_with_raw_rewards(recorded, replayed):
    learned, metrics = recorded[3], recorded[5]
    over, returns, lengths = learned.game_over, learned.returns, learned.lengths
    np.testing.assert_array_equal(over, replayed["truncated"] | (replayed["terminated"] & (replayed["lives"] == 0)))
    for seed, n in np.ndindex(2, 3):
        total, steps = 0.0, 0
        for t in range(480):
            total, steps = total + replayed["score"][seed, t, n], steps + learned.mask[seed, t, n]
            if over[seed, t, n]:
                assert (returns[seed, t, n], lengths[seed, t, n]) == (total, steps)
                total, steps = 0.0, 0
    for seed, i in np.ndindex(2, 48):
        ended = over[seed, 10 * i : 10 * i + 10]
        for name, x in (("returns", returns), ("lengths", lengths)):
            found = metrics[f"returned_episode_{name}"][seed, i]
            assert (
                np.isnan(found)
                if not ended.any()
                else found == pytest.approx(x[seed, 10 * i : 10 * i + 10][ended].mean())
            )


def test_test_emulators_play_greedily_and_report_their_latest_score(recorded):
    config, state, steps, _, _, metrics = recorded
    seeds = pqn.emulator_seeds(keys(2), 5)[3:5]
    env = envpool.make_gymnasium("Breakout-v5", num_envs=2, seed=seeds, **LIMIT)  # those of the first seed
    variables = jax.tree.map(lambda x: x[0], state.variables)
    act = jax.jit(lambda obs: pqn.make_network(config).apply(variables, obs).argmax(-1))
    obs, total, latest, length = env.reset()[0], np.zeros(2), np.full(2, np.nan), np.full(2, np.nan)
    for t in range(480):
        np.testing.assert_array_equal(steps.obs[0, t, 3:], obs)
        obs, _, terminated, truncated, info = env.step(np.asarray(act(obs)))
        total += info["reward"]
        over = truncated | (terminated & (info["lives"] == 0))
        latest, length = np.where(over, total, latest), np.where(over, info["elapsed_step"], length)
        total *= ~over
        if t % 10 == 9:
            found = [metrics[f"test/{name}"][0, t // 10] for name in ("returned_episode_returns", "unfinished")]
            expected = latest[~np.isnan(latest)]
            assert found[1] == np.isnan(latest).mean() and (np.isnan(found[0]) if not len(expected) else True)
            assert not len(expected) or found[0] == pytest.approx(expected.mean())
    assert metrics["test/returned_episode_lengths"][0, -1] == length.mean() and np.isfinite(latest).all()
    assert metrics["test/unfinished"][0, 0] == 1


def test_masked_transitions_are_not_learned_from(monkeypatch):
    """The loss is the mean over the others, whatever stands in those; where all are masked, nothing is learned."""
    given, shapes = [], (((12, 4, 44, 44), np.uint8), ((12,), np.int32), ((12,), np.float32), ((12,), bool))
    shapes = [jax.ShapeDtypeStruct((2, *shape), dtype) for shape, dtype in shapes]
    fixed = lambda *_: tuple(jax.pure_callback(lambda: tuple(np.stack([x, x]) for x in given[0]), shapes))  # noqa: E731
    monkeypatch.setattr(pqn, "shuffle_minibatches", fixed)
    config = pqn.Config(**TINY | {"TEST_ENVS": 0})
    state, update = pqn.start_seeds(config, keys(1))
    obs = np.random.default_rng(0).integers(0, 256, (12, 4, 44, 44)).astype(np.uint8)
    mask, action, target = np.arange(12) % 3 > 0, np.arange(12, dtype=np.int32) % 4, np.arange(12, dtype=np.float32)
    ends = []
    for batch in (
        (obs, action, np.where(mask, target, 1e6).astype(np.float32), mask),
        (np.where(mask[:, None, None, None], obs, 255 - obs), action, target, mask),
        (obs, action, target, np.zeros(12, bool)),
    ):
        given[:] = [batch]
        ends.append(jax.block_until_ready(update(jax.tree.map(jnp.copy, state), 0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), ends[0][1], ends[1][1])
    assert ends[0][1]["td_loss"][0] > 1
    assert ends[2][1]["td_loss"] == ends[2][1]["grad_norm"] == 0 and equal_trees(ends[2][0].variables, state.variables)
    given[:] = [(obs[mask], action[mask], target[mask])]
    q_values = pqn.make_network(config).apply(jax.tree.map(lambda x: x[0], state.variables), obs[mask])
    first = 0.5 * np.square(np.take_along_axis(np.array(q_values), action[mask, None], 1)[:, 0] - target[mask]).mean()
    assert ends[0][1]["td_loss"][0] == pytest.approx(first, rel=0.3)  # the mean of two steps, the first one's is this


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return pqn.run(pqn.Config(**TINY), SEED=3, NUM_SEEDS=2, SAVE_PATH=folder, LOG_INTERVAL=2, CHECKPOINT_INTERVAL=1)


def test_run_is_live(whole_run):
    """Losses, masks, counts, files: everything there and finite; no test game has ended, so that the end evaluates."""
    metrics = whole_run["metrics"]
    assert metrics.seed.tolist() == [0, 1, 0, 1]
    for key in ("td_loss", "qvals", "grad_norm", "reset_steps"):
        assert np.isfinite(metrics[key]).all(), key
    assert 0 <= metrics["reset_steps"].min() and metrics["reset_steps"].max() < 0.3
    with open(whole_run["folder"] / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["env_frame"] for row in rows] == [f"{4 * 3 * 8 * n}.0" for n in (2, 2, 4, 4)]
    assert np.isnan(metrics["test/returned_episode_returns"]).tolist() == [True, True, False, False]
    assert metrics["test/unfinished"].tolist() == [1, 1, 0, 0] and np.isfinite(whole_run["score"])
    config, network, variables = pqn.load(whole_run["folder"])
    assert config == pqn.Config(**TINY) and equal_trees(variables, whole_run["runner_state"].variables)
    first = jax.tree.map(lambda x: x[0], variables)
    assert network.apply(first, np.zeros((2, 4, 44, 44), np.uint8)).shape == (2, 4)


def test_seed_alone_in_train_equals_seed_among_others_in_run(whole_run):
    out = pqn.make_train(pqn.Config(**TINY))(keys(2)[1:])
    among = whole_run["metrics"].query("seed == 1")
    for key in ("td_loss", "qvals", "reset_steps", "grad_norm"):
        assert out["metrics"][key].shape == (1, 4)
        np.testing.assert_allclose(out["metrics"][key][0].reshape(2, 2).mean(1), among[key], rtol=1e-3, err_msg=key)
    frames = out["metrics"]["env_frame"]  # an int32 would wrap at 2^31
    assert frames.tolist() == [[96, 192, 288, 384]] and frames.dtype == np.float32
    for key in ("returned_episode_returns", "returned_episode_lengths"):
        assert out["metrics"][f"test/{key}"][0, -1] == among[f"test/{key}"].iloc[-1]
    assert pqn.emulator_seeds(keys(3), 4)[4:8] == pqn.emulator_seeds(keys(3)[1:2], 6)[:4]


def test_resumed_run_has_its_learner_and_fresh_emulators(whole_run):
    """A checkpoint has no emulators: it is restored into a state that was just started, and theirs start afresh."""
    before, folder = whole_run["runner_state"], whole_run["folder"]
    assert before._fields == ("key", "variables", "opt_state")
    longer = pqn.Config(**TINY | {"TOTAL_TIMESTEPS": 3 * 8 * 6})
    new = jax.jit(partial(jax.lax.map, pqn.make_pqn(longer)[0]))(keys(2, seed=4))
    saved = ocp.CheckpointManager(folder / "checkpoints")
    assert not equal_trees(new, before)
    assert equal_trees(saved.restore(4, args=ocp.args.StandardRestore(new)), before)
    again = pqn.run(RESUME=folder)  # nothing is left to do
    assert equal_trees(again["runner_state"], before) and again["score"] == whole_run["score"]
    resumed = pqn.run(longer, RESUME=folder)
    assert resumed["metrics"].query("seed == 0").update_steps.tolist() == [2, 4, 6]
    assert np.isfinite(resumed["metrics"].td_loss).all() and np.isfinite(resumed["score"])
    env, games = pqn.start_emulators(longer, keys(2), 5)
    fresh = pqn.make_env(longer, pqn.emulator_seeds(keys(2), 5)).reset()[0]
    np.testing.assert_array_equal(games.obs.reshape(10, 4, 44, 44), fresh)
    assert not games.done.any() and (games.returns == 0).all() and np.isnan(games.last_returns).all()


def test_final_evaluation_plays_one_full_game_each():
    config = pqn.Config(**TINY | {"TEST_DURING_TRAINING": False, "EPS_TEST": 0.5, "TOTAL_TIMESTEPS": 48})
    metrics = pqn.make_train(config)(keys(2))["metrics"]
    scores = {name: x for name, x in metrics.items() if name.startswith("test/")}
    assert scores.keys() == {f"test/{name}" for name in (
        "returned_episode_returns", "returned_episode_lengths", "unfinished", "human_normalized_score")}  # fmt: skip
    assert all(np.isnan(x[:, 0]).all() and np.isfinite(x[:, 1]).all() for x in scores.values())
    lengths = scores["test/returned_episode_lengths"][:, 1]
    assert (scores["test/unfinished"][:, 1] == 0).all() and ((lengths > 20) & (lengths <= 150)).all()
    returns, human = (scores[f"test/{name}"][:, 1] for name in ("returned_episode_returns", "human_normalized_score"))
    np.testing.assert_allclose(human, (returns - 1.7) / (30.5 - 1.7), rtol=1e-4)


def test_layers_are_those_of_flax():
    for channels, size, stride, side in ((2, 4, 2, 9), (3, 3, 1, 5)):
        x = jax.random.normal(jax.random.key(2), (2, side, side, channels))
        ours = Layer(lambda x, size=size, stride=stride: pqn.conv(x, 6, size, stride))
        compare_layers(ours, nn.Conv(6, (size, size), (stride, stride), padding="VALID"), x)


class FlaxHadamax(nn.Module):
    """The Hadamax network with flax's layers, batch first and channels last, [B, C, H, W] -> [B, A]."""

    num_actions: int

    @nn.compact
    def __call__(self, obs):
        x = obs.transpose(0, 2, 3, 1) / 255.0
        for features, size, window, stride in ((32, 8, 4, 4), (64, 4, 2, 2), (64, 3, 3, 1)):
            both = [nn.Conv(features, (size, size), padding="SAME")(x) for _ in range(2)]
            x, y = (nn.gelu(nn.LayerNorm()(x)) for x in both)
            x = nn.max_pool(x * y, (window, window), (stride, stride), padding="SAME")
        x = nn.gelu(nn.LayerNorm()(nn.Dense(512)(x.reshape(len(x), -1))))
        return nn.Dense(self.num_actions)(x)


def as_flax(params, sides):
    """Parameters of our Hadamax network, as FlaxHadamax has them; sides: of what is flattened."""
    found = {name: x for name, x in params.items() if name.startswith("LayerNorm")}
    for i, (features, size) in enumerate(((32, 8), (64, 4), (64, 3))):
        kernel = params[f"Einsum_{i}"]["kernel"].reshape(size, size, -1, 2, features)
        bias = params[f"Einsum_{i}"]["bias"].reshape(2, features)
        found |= {f"Conv_{2 * i + j}": {"kernel": kernel[..., j, :], "bias": bias[j]} for j in range(2)}
    kernel = params["Einsum_3"]["kernel"].reshape(64, *sides, 512).transpose(1, 2, 0, 3).reshape(-1, 512)
    return found | {"Dense_0": {"kernel": kernel, "bias": params["Einsum_3"]["bias"]}, "Dense_1": params["Einsum_4"]}


@pytest.mark.parametrize("shape, sides", [((84, 84), (11, 11)), ((37, 50), (5, 7))])
def test_hadamax_is_that_of_flax(shape, sides):
    """Values and gradients, also where much of the screen is flat and maxima are ties."""
    obs = jax.random.randint(jax.random.key(0), (3, 4, *shape), 0, 256).at[1, :, 20:].set(0).at[2].set(87)
    obs = obs.astype(jnp.uint8)
    ours, theirs = pqn.QNetwork(pqn.Config(ENCODER="hadamax"), 4), FlaxHadamax(4)
    params = jax.jit(ours.init)(jax.random.key(1), obs)["params"]
    noise = lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape) * (p.ndim == 1)  # noqa: E731
    params = jax.tree.map(noise, params)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), obs)["params"]
    assert jax.tree.map(jnp.shape, as_flax(params, sides)) == jax.tree.map(jnp.shape, shapes)
    applies = (lambda p: ours.apply({"params": p}, obs), lambda p: theirs.apply({"params": as_flax(p, sides)}, obs))
    values = [jax.jit(apply)(params) for apply in applies]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4)
    grads = [jax.jit(jax.grad(lambda p, apply=apply: jnp.sum(jnp.sin(apply(p)))))(params) for apply in applies]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):  # rounding decides what of two near-ties is the maximum
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


def test_hadamax_is_as_large_and_drawn_as_the_authors():
    """Xavier-normal kernels in convolutions, He-normal in the dense layer, LeCun-normal in the last one."""
    network, obs = pqn.QNetwork(pqn.Config(ENCODER="hadamax"), 4), jnp.zeros((1, 4, 84, 84), jnp.uint8)
    params = jax.jit(network.init)(jax.random.key(0), obs)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 4_125_124
    fans = ((64 * 4, 64 * 32), (16 * 32, 16 * 64), (9 * 64, 9 * 64))
    for i, variance in enumerate([*(2 / sum(fan) for fan in fans), 2 / 7744, 1 / 512]):
        assert abs(params[f"Einsum_{i}"]["kernel"].std() / np.sqrt(variance) - 1) < 0.1


@pytest.mark.parametrize("size, stride, side", [(4, 4, 84), (2, 2, 21), (3, 1, 11), (4, 4, 9)])
def test_max_pool_is_that_of_flax(size, stride, side):
    x = jax.random.normal(jax.random.key(0), (3, side, side + 1, 2))
    pool = partial(nn.max_pool, window_shape=(size, size), strides=(stride, stride), padding="SAME")
    ours = lambda x: pqn.max_pool(x.transpose(3, 1, 2, 0), size, stride).transpose(3, 1, 2, 0)  # noqa: E731
    np.testing.assert_array_equal(ours(x), pool(x))
    grads = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(3 * f(x))))(x) for f in (ours, pool))
    np.testing.assert_allclose(*grads, atol=1e-6)


def test_dueling_heads():
    """Q = V + A - mean A: the head of advantages may be shifted, and Q's mean over actions is the head of the value."""
    network, obs = (
        pqn.QNetwork(pqn.Config(DUELING=True), 4),
        jax.random.randint(jax.random.key(0), (3, 4, 84, 84), 0, 256),
    )
    params = jax.jit(network.init)(jax.random.key(1), obs)["params"]
    bias = lambda layer, x: params | {layer: params[layer] | {"bias": params[layer]["bias"] + x}}  # noqa: E731
    apply = jax.jit(network.apply)
    plain, advantages, value = (
        apply({"params": p}, obs) for p in (params, bias("Einsum_4", 2.0), bias("Einsum_5", 2.0))
    )
    np.testing.assert_allclose(advantages, plain, atol=1e-5)
    np.testing.assert_allclose(value, plain + 2, atol=1e-5)
    assert np.std(plain, 1).min() > 0


@pytest.mark.parametrize("encoder", ["nature", "hadamax"])
@pytest.mark.parametrize("norm, norm_input", [("batch_norm", False), ("none", True)])
def test_network_takes_any_leading_axes_and_tracks_statistics(encoder, norm, norm_input):
    network = pqn.QNetwork(pqn.Config(ENCODER=encoder, NORM_TYPE=norm, NORM_INPUT=norm_input), 3)
    obs = jax.random.randint(jax.random.key(0), (2, 2, 4, 40, 40), 0, 256).astype(jnp.uint8)
    variables = jax.jit(network.init)(jax.random.key(1), obs)
    q_values, updated = network.apply(variables, obs, train=True, mutable=["batch_stats"])
    assert q_values.shape == (2, 2, 3) and "batch_stats" in updated
    np.testing.assert_allclose(network.apply(variables, obs)[1], network.apply(variables, obs[1]), atol=1e-4)


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
    assert pqn.Config(**recipe("pqn_atari")) == pqn.Config()
    assert recipe("pqn_atari").keys() == recipe("pqn_atari_sticky").keys() == vars(pqn.Config()).keys()
    sticky = pqn.make_env(pqn.Config(**recipe("pqn_atari_sticky"))).config
    assert sticky["repeat_action_probability"] == 0.25 and not sticky["episodic_life"] and sticky["noop_max"] == 1
    keys = {
        "TOTAL_TIMESTEPS": 1e7, "TOTAL_TIMESTEPS_DECAY": 1e7, "NUM_ENVS": 128, "NUM_STEPS": 32, "EPS_START": 1.0,
        "EPS_FINISH": 0.001, "EPS_DECAY": 0.1, "NUM_EPOCHS": 2, "NUM_MINIBATCHES": 32, "NORM_TYPE": "layer_norm",
        "LR": 0.00025, "MAX_GRAD_NORM": 10, "LR_LINEAR_DECAY": False, "GAMMA": 0.99, "LAMBDA": 0.65,
        "ENV_NAME": "Pong-v5", "ENV_KWARGS": pqn.PROTOCOL, "TEST_DURING_TRAINING": True, "TEST_ENVS": 8,
        "EPS_TEST": 0.0, "ALG_NAME": "pqn",
    }  # fmt: skip
    assert pqn.Config(**keys) == pqn.Config(TOTAL_TIMESTEPS=1e7, TOTAL_TIMESTEPS_DECAY=1e7, ALG_NAME="pqn")


BAD = {
    "misspelt": ({"ENV_NAME": "Breakot-v5"}, "ENV_NAME=Breakot-v5 must be an Atari game .* such as Pong-v5"),
    "another naming": ({"ENV_NAME": "PongNoFrameskip-v4"}, "such as Pong-v5"),
    "another script's": ({"ENV_NAME": "Breakout-MinAtar"}, "such as Pong-v5"),
    "another kind of envpool's": ({"ENV_NAME": "CartPole-v1"}, "ENV_NAME=CartPole-v1 must be an Atari game"),
    "unknown option": ({"ENV_KWARGS": {"speed": 2}}, "ENV_KWARGS.speed=2 is unknown; known: .*frame_skip"),
    "reserved option": ({"ENV_KWARGS": {"num_envs": 2}}, "num_envs=2 is unknown"),
    "wrong type": ({"ENV_KWARGS": {"frame_skip": "often"}}, "ENV_KWARGS.frame_skip='often' must be like 4"),
    "null": ({"ENV_KWARGS": {"frame_skip": None}}, "ENV_KWARGS.frame_skip=None must be like 4"),
    "fraction of a frame": ({"ENV_KWARGS": {"frame_skip": 1.5}}, "ENV_KWARGS.frame_skip=1.5 "),
    "what crashes envpool": ({"ENV_KWARGS": {"noop_max": 0}}, "ENV_KWARGS.noop_max=0 .* from 1 to"),
    "what hangs envpool": ({"ENV_KWARGS": {"num_threads": -1}}, "ENV_KWARGS.num_threads=-1 .* from 0 to"),
    "no probability": ({"ENV_KWARGS": {"repeat_action_probability": 7}}, "repeat_action_probability=7 .* from 0 to 1"),
    "a number for a switch": ({"ENV_KWARGS": {"episodic_life": 1}}, "episodic_life=1 .* true or false"),
    "another game": ({"ENV_KWARGS": {"task": "breakout"}}, "ENV_KWARGS.task='breakout' is unknown"),
    "small screens": ({"ENV_KWARGS": {"img_height": 20}}, "ENV_KWARGS=.* 36 x 36"),
    "minibatches": ({"NUM_MINIBATCHES": 33}, "NUM_MINIBATCHES=33"),
    "test emulators": ({"TEST_ENVS": -1}, "TEST_ENVS=-1"),
    "norm": ({"NORM_TYPE": "group_norm"}, "NORM_TYPE='group_norm'"),
    "encoder": ({"ENCODER": "impala"}, "ENCODER='impala'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case):
    changes, text = BAD[case]
    with pytest.raises(ValidationError) as error:
        pqn.Config(**changes)
    (first,) = error.value.errors()
    line = "".join(f"{key}={first['input']!r}: " for key in first["loc"][:1]) + first["msg"]  # as `main` prints it
    assert re.search(text, line) and "\n" not in line


def test_small_screens_are_no_mistake_for_hadamax():
    pqn.Config(ENV_KWARGS={"img_height": 20}, ENCODER="hadamax")


def test_an_option_of_envpools_is_over_the_published_protocol():
    config = pqn.Config(ENV_KWARGS={"frame_skip": 2})
    assert config.ENV_KWARGS == pqn.PROTOCOL | {"frame_skip": 2} and pqn.PROTOCOL["frame_skip"] == 4
    config.ENV_KWARGS = {"noop_max": 5}
    assert config.ENV_KWARGS == pqn.PROTOCOL | {"noop_max": 5}


def test_missing_envpool_is_one_clear_line(command, tmp_path):
    (tmp_path / "envpool.py").write_text("raise ImportError('no wheel')")
    shutil.copy(ROOT / "pqn_atari_envpool.py", tmp_path)
    (tmp_path / "mine.py").write_text("import pqn_atari_envpool")
    for arguments in (["pqn_atari_envpool.py", "+alg=pqn_atari"], ["mine.py"]):
        process = command(*arguments)
        assert process.code == 1, process.err
        last = process.err.splitlines()[-1]
        assert "Error: envpool is needed (no wheel): `pip install 'envpool>=1.2.5'`" in last
        assert arguments[0] == "mine.py" or len(process.err.splitlines()) == 1


def test_platforms_without_envpools_xla_interface_are_one_clear_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="Linux only, not for darwin"):
        pqn.Config()


def test_command_line(command):
    """Recipe, options of envpool's and a misspelt game, in one line of error."""
    arguments = ("+alg=pqn_atari_sticky", "alg.ENV_KWARGS.frame_skip=2", "+alg.ENV_KWARGS.num_threads=1")
    process = command("pqn_atari_envpool", *arguments, "alg.ENV_NAME=Pog-v5")
    assert process.code == 1 and "Traceback" not in process.err
    assert "Error: ENV_NAME=Pog-v5 must be an Atari game" in process.err and "Pong-v5" in process.err
