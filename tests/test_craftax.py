"""The recurrent agent: recurrence, targets, memory, world by world resets, batch renormalisation, bytes, real Craftax."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHORT_CRAFTAX, TINY
from flax import struct
from test_algorithm import oracle

import pqn_craftax_rnn as pqn

SMALL = TINY | pqn.RECIPE | {"HIDDEN_SIZE": 16, "TEST_NUM_ENVS": 8}


@struct.dataclass
class State:
    time: Any
    length: Any
    world: Any  # a number of this world's own
    seen: Any  # the world at the step before, to catch an episode that goes on in another one


@struct.dataclass
class Params:
    shortest: int = 2
    longest: int = 9


class Counter:
    """Reward 1 a step; an episode ends after `length` steps, drawn between the two limits. Like Craftax, no auto reset.

    Observation: time, length, world, in `size` numbers.
    """

    num_actions = 6

    def __init__(self, size=5):
        self.size = size

    def observe(self, state):
        return jnp.zeros(self.size).at[:3].set(jnp.stack([state.time / 10, state.length / 10, state.world]))

    def reset_env(self, key, params):
        length = jax.random.randint(key, (), params.shortest, params.longest + 1)
        state = State(jnp.float32(0), jnp.float32(length), jax.random.uniform(key), jnp.float32(0))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1, seen=state.world)
        done = state.time >= state.length
        info = {"Achievements/live_long": 100.0 * done * (state.length > 5), "discount": 1.0 - done}
        return self.observe(state), state, 1.0 + 0 * state.time, done, info


@pytest.fixture
def probe(monkeypatch):
    """Make the script play a probe environment, by the name Probe: probe(env, params, **changes) -> config, train, state."""

    def use(env=None, params=None, **changes):
        env, params = env or Counter(), params or Params()
        monkeypatch.setattr(pqn, "make_env", lambda config: (env, params))
        monkeypatch.setitem(pqn.MAX_RETURN, "Probe", 10)
        config = pqn.Config(**SMALL | {"ENV_NAME": "Probe"} | changes)
        train = pqn.make_train(config)
        return config, train, jax.jit(train.init)(jax.random.key(1))

    return use


def shaken(state):
    """The same with other parameters and running statistics, so that none of them is trivial and actions vary."""
    noise = lambda x: x + (0.8 if x.ndim == 2 else 0.1) * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    stats = {layer: x | {"mean": noise(x["mean"]), "var": 0.1 * x["var"]} for layer, x in state.batch_stats.items()}
    return state.replace(params=jax.tree.map(noise, state.params), batch_stats=stats)


def played(config, sequence):
    """The rollout's own steps of what is trained on, without the window and the observation after it."""
    return jax.tree.map(lambda x: x[config.MEMORY_WINDOW : -1], sequence)


def q_values_of(config, state, hidden, sequence):
    """The training pass with frozen statistics: hidden after, Q-values [S, N, A]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.jit(pqn.make_network(config).apply)(variables, hidden, *sequence[:3])


VARIANTS = [
    {"NORM_TYPE": "batch_norm", "NUM_LAYERS": 2},
    {"NORM_TYPE": "layer_norm", "NUM_RNN_LAYERS": 2, "MEMORY_WINDOW": 3},
    {"NORM_TYPE": "none", "NORM_INPUT": False, "MEMORY_WINDOW": 8, "ADD_LAST_ACTION": False},
    {"NUM_RNN_LAYERS": 0},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_training_pass_reproduces_the_rollout_across_episode_ends(probe, changes):
    """The Q-values of a rollout, step by step, and the hidden state after it are those of one pass over what was stored."""
    config, train, state = probe(EPS_START=0.0, EPS_FINISH=0.0, **changes)
    state = shaken(state)
    rollout = jax.jit(train.rollout)
    before, earlier, _ = rollout(state)
    after, sequence, _ = rollout(before)
    trajectory, window = played(config, sequence), config.MEMORY_WINDOW
    assert trajectory.done.any(0).all()
    seen = jax.tree.map(lambda x: x[:-1], sequence)
    hidden, q_values = q_values_of(config, state, before.window_hidden, seen)
    np.testing.assert_array_equal(q_values.argmax(-1)[window:], trajectory.action)
    assert len(np.unique(trajectory.action)) > 1
    act = partial(jax.jit(pqn.make_network(config).apply), {"params": state.params, "batch_stats": state.batch_stats})
    stepped = before.hidden
    for t in range(config.NUM_STEPS):  # as the rollout acts
        stepped, one = act(stepped, *(x[window + t][None] for x in sequence[:3]))
        np.testing.assert_allclose(one[0], q_values[window + t], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), hidden, after.hidden)
    equal = lambda a, b: np.testing.assert_array_equal(a, b)  # noqa: E731
    if window:  # the window is the end of the rollout before
        jax.tree.map(lambda x, y: equal(x[:window], y[-1 - window : -1]), sequence, earlier)
    jax.tree.map(equal, tuple(x[-1] for x in sequence[:3]), (after.obs, after.reset, after.last_action))


def test_last_action_is_the_one_before_and_none_at_the_start_of_an_episode(probe):
    config, train, state = probe()
    after, sequence, _ = jax.jit(train.rollout)(state)
    trajectory = played(config, sequence)
    assert (trajectory.last_action[0] == -1).all() and trajectory.reset[0].all()
    expected = np.where(trajectory.done[:-1], -1, trajectory.action[:-1])
    np.testing.assert_array_equal(trajectory.last_action[1:], expected)
    np.testing.assert_array_equal(trajectory.reset[1:], trajectory.done[:-1])
    np.testing.assert_array_equal(after.last_action, np.where(trajectory.done[-1], -1, trajectory.action[-1]))


def test_nothing_leaks_over_an_episode_end(probe):
    """Q-values from an episode's start on are those of a network that saw nothing else; within an episode they are not."""
    config, train, state = probe(NUM_STEPS=16, TOTAL_TIMESTEPS=1e4)
    state = shaken(state)
    sequence = played(config, jax.jit(train.rollout)(state)[1])
    _, q_values = q_values_of(config, state, state.hidden, sequence)
    zero = pqn.make_network(config).initial_hidden(config.NUM_ENVS)
    other = jax.tree.map(lambda x: 1.0 + x, zero)
    starts = 0
    for t in range(1, 16):
        rest = jax.tree.map(lambda x, t=t: x[t:], sequence)
        fresh, filled = (np.asarray(q_values_of(config, state, hidden, rest)[1]) for hidden in (zero, other))
        for n in range(config.NUM_ENVS):
            if sequence.reset[t, n]:
                np.testing.assert_allclose(fresh[:, n], q_values[t:, n], atol=1e-5)
                np.testing.assert_array_equal(fresh[:, n], filled[:, n])
                starts += 1
            else:
                assert np.abs(fresh[0, n] - q_values[t, n]).max() > 1e-4
    assert starts > 3


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_targets_equal_the_definition_and_bootstrap_from_the_observation_after_the_rollout(probe, lam):
    config, train, state = probe(LAMBDA=lam, GAMMA=0.9, REW_SCALE=2.0, MEMORY_WINDOW=2)
    state = shaken(state)
    state, _, _ = jax.jit(train.rollout)(state)
    _, sequence, _ = jax.jit(train.rollout)(state)
    _, q_values = q_values_of(config, state, state.window_hidden, sequence)
    targets = jax.jit(train.targets)(sequence, q_values)
    assert targets.shape == (2 + config.NUM_STEPS, config.NUM_ENVS)
    done, value = np.asarray(sequence.done[:-1]), np.asarray(q_values.max(-1))
    expected = oracle(2 * np.asarray(sequence.reward[:-1]), done, done & False, value[1:], 0.9, lam)
    np.testing.assert_allclose(targets, expected, atol=1e-5)
    assert (np.asarray(sequence.done[-2]) == 0).any()  # somewhere the last value counts


@pytest.mark.parametrize("window", [0, 3])
def test_every_transition_is_trained_on_with_gradients_through_the_training_pass(probe, window):
    """The loss is the mean over all transitions of the window and the rollout; a window that was never played is none."""
    config, train, state = probe(NUM_MINIBATCHES=1, MEMORY_WINDOW=window, NORM_TYPE="layer_norm", NORM_INPUT=False)
    for update in range(2):
        after, sequence, _ = jax.jit(train.rollout)(state)
        _, q_values = q_values_of(config, state, state.window_hidden, sequence)
        targets = train.targets(sequence, q_values)
        real = slice(window if update == 0 else 0, None)
        q_action = np.take_along_axis(np.asarray(q_values), np.asarray(sequence.action)[..., None], -1)[:-1, :, 0]
        _, losses = jax.jit(train.learn)(state, (state.window_hidden, sequence))
        np.testing.assert_allclose(losses["td_loss"], 0.5 * np.square(q_action - targets)[real].mean(), rtol=1e-5)
        np.testing.assert_allclose(losses["qvals"], q_action[real].mean(), rtol=1e-4, atol=1e-6)
        state = after.replace(update_steps=after.update_steps + 1)


def test_an_update_trains_on_every_environment_once_an_epoch(probe, monkeypatch):
    """With frozen parameters (LR tiny) the mean loss of an epoch's minibatches is that of the whole batch."""
    config, train, state = probe(
        NUM_ENVS=8, NUM_MINIBATCHES=4, NUM_EPOCHS=1, LR=1e-30, NORM_TYPE="none", NORM_INPUT=False
    )
    _, sequence, _ = jax.jit(train.rollout)(state)
    _, whole = jax.jit(train.learn)(state, (state.window_hidden, sequence))
    _, metrics = jax.jit(train.update)(state)
    np.testing.assert_allclose(metrics["td_loss"], whole["td_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["qvals"], whole["qvals"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "optimistic, ratio, limits", [(False, 16, (2, 9)), (True, 4, (3, 3)), (True, 16, (2, 9)), (True, 5, (2, 9))]
)
def test_every_episode_gets_its_own_world_at_once_however_many_end_together(probe, optimistic, ratio, limits):
    """Times count up from 0 in one world to its length, the next step starts another; no two episodes share a world."""
    config, train, state = probe(
        params=Params(*limits), NUM_ENVS=16, NUM_STEPS=40, TOTAL_TIMESTEPS=1e4,
        USE_OPTIMISTIC_RESETS=optimistic, OPTIMISTIC_RESET_RATIO=ratio,
    )  # fmt: skip
    _, sequence, episodes = jax.jit(train.rollout)(state)
    trajectory = played(config, sequence)
    time, length, world = (np.asarray(trajectory.obs[..., i]) for i in range(3))
    starts = np.isclose(time, 0)
    np.testing.assert_array_equal(starts, trajectory.reset)
    assert np.isclose(
        np.where(starts[1:], time[:-1] + 0.1 - length[:-1], time[1:] - time[:-1] - 0.1), 0, atol=1e-6
    ).all()
    assert ((world[1:] == world[:-1]) == ~starts[1:]).all()
    assert len(np.unique(world)) == starts.sum()
    done = np.asarray(trajectory.done)
    for name in ("returned_episode_returns", "returned_episode_lengths"):
        np.testing.assert_allclose(episodes[name], 10 * length[done].mean(), rtol=1e-5)


def test_evaluation_plays_first_episodes_with_fresh_keys_and_counts_achievements(probe):
    config, train, state = probe(TEST_NUM_ENVS=4096, TEST_NUM_STEPS=100, LOG_ACHIEVEMENTS=True)
    metrics = jax.jit(train.evaluate)(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - 5.5) < 0.15 and metrics["test/unfinished"] == 0
    assert metrics["test/returned_episode_returns"] == metrics["test/returned_episode_lengths"]
    np.testing.assert_allclose(
        metrics["test/percent_of_maximum"], 10 * metrics["test/returned_episode_returns"], rtol=1e-6
    )
    assert abs(metrics["test/Achievements/live_long"] - 50) < 3
    _, train, state = probe(TEST_NUM_ENVS=4096, TEST_NUM_STEPS=5)
    metrics = jax.jit(train.evaluate)(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - 3.5) < 0.1 and abs(metrics["test/unfinished"] - 2048) < 200
    assert (
        "test/Achievements/live_long" in metrics
        and "Achievements/live_long" not in jax.eval_shape(train.update, state)[1]
    )


class Dice(Counter):
    """Reward: a die thrown with the step's key. With one key for all steps, all rewards of an episode are equal."""

    def step_env(self, key, state, action, params):
        obs, state, _, done, info = super().step_env(key, state, action, params)
        return obs, state, 1.0 + jax.random.randint(key, (), 0, 6), done, info


def test_every_step_of_training_and_evaluation_has_its_own_key(probe):
    config, train, state = probe(
        Dice(), Params(16, 16), TEST_NUM_ENVS=2048, NUM_ENVS=128, NUM_STEPS=32, TOTAL_TIMESTEPS=1e5
    )
    reward = np.asarray(played(config, jax.jit(train.rollout)(state)[1]).reward)
    assert (reward == reward[0]).all(1).sum() == 1 and abs(np.std(reward[:16].sum(0)) - np.sqrt(16 * 35 / 12)) < 1.5
    returns = [jax.jit(train.evaluate)(state, jax.random.key(i))["test/returned_episode_returns"] for i in range(8)]
    # the mean of 2,048 sums of 16 dice: one standard deviation is 0.15
    assert max(abs(x - 56) for x in returns) < 0.6 and len(set(map(float, returns))) == 8


def test_achievements_of_training_episodes(probe):
    config, train, state = probe(
        LOG_ACHIEVEMENTS=True, NUM_ENVS=256, NUM_STEPS=32, TOTAL_TIMESTEPS=1e5, NUM_MINIBATCHES=1, NUM_EPOCHS=1
    )
    state, metrics = jax.jit(train.update)(state)
    assert 35 < metrics["Achievements/live_long"] < 65 and 4 < metrics["returned_episode_returns"] < 6


@pytest.mark.parametrize("num_rnn_layers", [1, 0])
def test_memory_is_needed_and_learned(monkeypatch, num_rnn_layers):
    """MemoryChain: a bit shown at the start is asked for five steps later, reward 1 or -1. Without memory a guess: 0.

    Without the last action, either: the feed-forward agent would keep the bit by repeating itself.
    """
    env, params = gymnax.make("MemoryChain-bsuite")
    monkeypatch.setattr(pqn, "make_env", lambda config: (env, params))
    monkeypatch.setitem(pqn.MAX_RETURN, "Probe", 1)
    config = pqn.Config(
        ENV_NAME="Probe", NUM_RNN_LAYERS=num_rnn_layers, NUM_ENVS=32, NUM_STEPS=16, NUM_EPOCHS=4, NUM_MINIBATCHES=4,
        TOTAL_TIMESTEPS=32 * 16 * 80, EPS_DECAY=0.5, EPS_FINISH=0.05, LR=3e-3, MAX_GRAD_NORM=10, LAMBDA=0.9,
        HIDDEN_SIZE=32, NORM_TYPE="layer_norm", NORM_INPUT=False, ADD_LAST_ACTION=False, TEST_INTERVAL=1.0, TEST_NUM_ENVS=256,
        TEST_NUM_STEPS=20,
    )  # fmt: skip
    out = pqn.make_train(config)(jax.random.split(jax.random.key(0), 2))
    score = np.asarray(out["metrics"]["test/returned_episode_returns"][:, -1])
    assert (score > 0.95).all() if num_rnn_layers else (np.abs(score) < 0.25).all()


def test_lstm_is_flax_lstm():
    x, size = jax.random.normal(jax.random.key(0), (7, 4, 5)), 6
    cell, ours = nn.OptimizedLSTMCell(size), pqn.LSTM(size)
    state = jax.tree.map(lambda s: s + 0.3, cell.initialize_carry(jax.random.key(0), x[0].shape))
    params = cell.init(jax.random.key(1), state, x[0])["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    kernel, recurrent, bias = (
        jnp.concatenate([params[f"{side}{gate}"][leaf] for gate in "ifgo"], -1)
        for side, leaf in (("i", "kernel"), ("h", "kernel"), ("h", "bias"))
    )
    mine = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
    assert jax.tree.map(
        jnp.shape, ours.init(jax.random.key(0), state, x, jnp.zeros((7, 4), bool))["params"]
    ) == jax.tree.map(jnp.shape, mine)
    after, h = ours.apply({"params": mine}, state, x, jnp.zeros((7, 4), bool))
    for t in range(7):
        state, expected = cell.apply({"params": params}, state, x[t])
        np.testing.assert_allclose(h[t], expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, state)
    fresh = ours.init(jax.random.key(0), state, x, jnp.zeros((7, 4), bool))["params"]["recurrent_kernel"]
    for gate in jnp.split(fresh, 4, 1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(size), atol=1e-5)


def test_batch_renormalisation():
    """Running statistics when acting; plain batch normalisation for 1,000 batches; then corrected within bounds."""
    layer, x = pqn.BatchRenorm(), 3 + 2 * jax.random.normal(jax.random.key(0), (50, 4, 3))
    variables = layer.init(jax.random.key(0), x, False)
    normal = lambda stats, x, train: (  # noqa: E731
        lambda y, updated: (x * y[0] + y[1], updated["batch_stats"])
    )(*layer.apply({"params": variables["params"], "batch_stats": stats}, x, train, mutable=["batch_stats"]))
    fresh = variables["batch_stats"]
    acting, same = normal(fresh, x, False)
    np.testing.assert_allclose(acting, x / np.sqrt(1.001), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, fresh)
    y, stats = normal(fresh, x, True)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1)), 1, atol=1e-3)
    np.testing.assert_allclose(stats["mean"], 0.001 * x.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.999 + 0.001 * x.var((0, 1)), rtol=1e-4)
    assert stats["batches"] == 1
    near = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 3.0), "batches": jnp.int32(1000)}
    y, _ = normal(near, x, True)  # within the bounds: what acting sees
    np.testing.assert_allclose(y, normal(near, x, False)[0], atol=1e-5)
    far = {"mean": jnp.full(3, -90.0), "var": jnp.full(3, 0.04), "batches": jnp.int32(1000)}
    y, _ = normal(far, x, True)  # r = 3, d = 5
    np.testing.assert_allclose(y, 3 * (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-3) + 5, atol=1e-3)


def test_normalised_input_is_folded_into_the_first_layer():
    layer, x = pqn.AffineDense(4), jax.random.normal(jax.random.key(0), (6, 5, 3))
    scale, shift = jnp.array([2.0, -1.0, 0.5]), jnp.array([0.3, 0.0, 1.0])
    variables = layer.init(jax.random.key(1), x, scale, shift)
    variables["params"]["bias"] += 1.0
    loss = lambda apply, v, *args: jnp.sum(jnp.sin(apply(v, *args)))  # noqa: E731
    plain = lambda v, scale, shift: nn.Dense(4).apply(v, x * scale + shift)  # noqa: E731
    folded = lambda v, scale, shift: layer.apply(v, x, scale, shift)  # noqa: E731
    grads = (
        jax.value_and_grad(lambda *a, f=f: loss(f, *a), (0, 1, 2))(variables, scale, shift) for f in (plain, folded)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *grads)


def test_continued_and_resumed_training_is_the_same_and_a_restored_agent_scores_the_same(probe, tmp_path):
    """Running statistics, the window and the hidden state are in the checkpoint; statistics are beside the parameters."""
    config, train, _ = probe(MEMORY_WINDOW=2)
    keys = jax.random.split(jax.random.key(0), 2)
    whole = train(keys)["runner_state"]
    halves = [train(keys, num_updates=6)]
    halves.append(train(state=halves[0]["runner_state"], num_updates=6))
    state = jax.tree.map(lambda x: x[1], halves[1]["runner_state"])
    run = pqn.run(config, NUM_SEEDS=2, SAVE_PATH=str(tmp_path), LOG_INTERVAL=6, CHECKPOINT_INTERVAL=6)
    for path in (run["folder"] / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")  # as if it had been killed before the end
    resumed = pqn.run(RESUME=str(run["folder"]), SAVE_PATH=str(tmp_path))
    key_data = lambda state: state.replace(key=jax.random.key_data(state.key))  # noqa: E731
    for out in (halves[1], run, resumed):
        jax.tree.map(np.testing.assert_array_equal, key_data(whole), key_data(out["runner_state"]))
    agent = pqn.load(run["folder"])
    assert agent.variables["batch_stats"]["BatchRenorm_0"]["batches"].tolist() == [12 * 4] * 2
    assert np.abs(agent.variables["batch_stats"]["BatchRenorm_0"]["mean"]).max() > 0
    loaded = state.replace(**jax.tree.map(lambda x: x[1], agent.variables))
    evaluate = jax.jit(train.evaluate)
    assert evaluate(state, jax.random.key(5)) == evaluate(loaded, jax.random.key(5))


def test_bytes_per_environment_step(probe):
    """A rollout is stored once: doubling it adds its observations, plus a minibatch's, and no permuted or shifted copy."""
    size, temp = 4000, {}
    for steps in (16, 32):
        _, train, state = probe(
            Counter(size), NUM_ENVS=16, NUM_STEPS=steps, NUM_MINIBATCHES=4, TOTAL_TIMESTEPS=1e5, HIDDEN_SIZE=8
        )
        analysis = jax.jit(train.update).lower(state).compile().memory_analysis()
        temp[steps] = analysis.temp_size_in_bytes
    slope = (temp[32] - temp[16]) / (16 * 16)  # bytes a step
    assert 1 <= slope / (4 * size) < 1.6


BAD = {
    "ENV_NAME": "Craftax-Pixels-v1",
    "ENV_KWARGS": {"gravity": 1},
    "NUM_MINIBATCHES": 3,
    "MEMORY_WINDOW": 9,
    "NUM_RNN_LAYERS": -1,
    "OPTIMISTIC_RESET_RATIO": 0.5,
    "NORM_TYPE": "group_norm",
}


@pytest.mark.parametrize("key", BAD)
def test_bad_input_names_the_key(key):
    with pytest.raises(pqn.UserError, match=key):
        pqn.Config(**SMALL | {"ENV_NAME": "Craftax-Classic-Symbolic-v1", key: BAD[key]})


WRONG = [
    ("max_timesteps", "long"), ("max_timesteps", float("inf")), ("max_timesteps", -1), ("max_timesteps", True),
    ("max_zombies", 2.5), ("map_size", 32), ("map_size", [64]), ("map_size", ["a", "b"]), ("fractal_noise_angles", [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize("sizes", [{"map_size": [60, 60]}, {"max_zombies": 0}])
def test_sizes_of_which_craftax_makes_no_world_are_refused(sizes):
    with pytest.raises(pqn.UserError, match="no world of these sizes"):
        pqn.Config(**SMALL | {"ENV_NAME": "Craftax-Classic-Symbolic-v1", "ENV_KWARGS": sizes})


def test_craftax_symbolic_is_traced():
    """The published environment compiles for a minute; that an update of it keeps all shapes and types is seen without."""
    train = pqn.make_train(pqn.Config(**SMALL))
    state = jax.eval_shape(train.init, jax.random.key(0))
    after, metrics = jax.eval_shape(train.update, state)
    assert jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert state.obs.shape == (4, 8268) and "td_loss" in metrics


def test_command_line_of_this_script(command):
    process = command("pqn_craftax_rnn", "alg.ENV_NAME=Craftax-Pixels-v1")
    assert process.code == 1 and "Traceback" not in process.err and "Craftax-Classic-Symbolic-v1" in process.err


@pytest.mark.parametrize("key, value", WRONG)
def test_values_of_env_kwargs_are_like_the_environments_own(key, value):
    with pytest.raises(pqn.UserError, match=re.escape(f"ENV_KWARGS.{key}={value!r}")):
        pqn.Config(**SMALL | {"ENV_NAME": "Craftax-Classic-Symbolic-v1", "ENV_KWARGS": {key: value}})
    env, params = pqn.make_env(pqn.Config(**SMALL | {"ENV_KWARGS": {"max_timesteps": 1e3, "map_size": [32, 32]}}))
    assert params.max_timesteps == 1000 and env.static_env_params.map_size == (32, 32)


def test_craftax_classic_trains_and_evaluates():
    """The real environment, through `run`: finite losses, achievements, a score within its bounds, ENV_KWARGS in force."""
    config = pqn.Config(**TINY | SHORT_CRAFTAX)
    out = pqn.run(config, SAVE_PATH=None)
    metrics = {key: value[0] for key, value in out["metrics"].items()}
    assert np.isfinite(metrics["td_loss"]).all()
    assert 0 < metrics["test/returned_episode_lengths"][-1] <= 20 and metrics["test/unfinished"][-1] == 0
    assert sum(key.startswith("Achievements/") for key in metrics) == 22
    assert -1 <= out["score"] <= 22
    np.testing.assert_allclose(metrics["test/percent_of_maximum"][-1], out["score"] / 22 * 100, rtol=1e-5)


def test_recipes_load_and_the_published_one_is_the_default():
    from conftest import ROOT
    from omegaconf import OmegaConf

    published, classic = (
        pqn.Config(**OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{name}.yaml")))
        for name in ("pqn_craftax_rnn", "pqn_craftax_classic_rnn")
    )
    assert published == pqn.Config(**pqn.RECIPE) and classic.ENV_NAME == "Craftax-Classic-Symbolic-v1"
