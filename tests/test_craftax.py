"""The recurrent agent: recurrence, targets, memory, world by world resets, batch renormalisation, bytes, real Craftax."""

import enum
import re
import shutil
from functools import partial
from typing import Any

import flax.linen as nn
import gymnax
import hydra
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, TINY
from flax import struct
from omegaconf import OmegaConf
from pydantic import ValidationError
from test_algorithm import oracle

import pqn_craftax_rnn as pqn

SMALL = TINY | {"HIDDEN_SIZE": 16, "TEST_NUM_ENVS": 8, "NORM_TYPE": "batch_norm"}
WHOLE = {"NUM_MINIBATCHES": 1, "NUM_EPOCHS": 1}  # one gradient step an update, of everything
PLAIN = {"NORM_TYPE": "layer_norm", "NORM_INPUT": False}  # the network is the same in training and acting


@struct.dataclass
class State:
    time: Any
    length: Any
    world: Any  # a number of this world's own
    achievements: Any  # whether the episode ended after more than 5 steps


@struct.dataclass
class Params:
    shortest: int = 2
    longest: int = 9


class Achievement(enum.Enum):
    LIVE_LONG = 0


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
        state = State(jnp.float32(0), jnp.float32(length), jax.random.uniform(key), jnp.zeros(1, bool))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        done = state.time >= state.length
        state = state.replace(achievements=jnp.stack([done & (state.length > 5)]))
        return self.observe(state), state, 1.0 + 0 * state.time, done, {"discount": 1.0 - done}


@pytest.fixture
def probe(monkeypatch):
    """Make the script play a probe: probe(env, params, **changes) -> config, (init, update, evaluate), state."""

    def use(env=None, params=None, **changes):
        env, params = env or Counter(), params or Params()
        monkeypatch.setattr(pqn, "make_env", lambda config: (env, params))
        monkeypatch.setitem(pqn.GAMES, pqn.Config.ENV_NAME, (Achievement, 10))
        config = pqn.Config(**SMALL | changes)
        init, update, evaluate = pqn.make_pqn(config)
        return config, (init, jax.jit(update), evaluate), jax.jit(init)(jax.random.key(1))

    return use


@pytest.fixture
def see(monkeypatch):
    """see(config, state, i): what update i trains on in its first minibatch, the order of environments undone: the state
    after the update, its metrics, the hidden state before the sequence, and the sequence [W + T + 1, N, ...]."""

    seen, take, programs = [], pqn.take_sequences, {}

    def spy(hidden, parts, envs):
        minibatch = take(hidden, parts, envs)
        jax.debug.callback(lambda *x: seen.append(jax.tree.map(np.asarray, x)), envs, *minibatch)
        return minibatch

    def look(config, state, i=0):
        seen.clear()
        if id(config) not in programs:
            programs[id(config)] = jax.jit(pqn.make_pqn(config)[1])
        with monkeypatch.context() as patch:
            patch.setattr(pqn, "take_sequences", spy)
            after, metrics = jax.block_until_ready(programs[id(config)](state, i))
            jax.effects_barrier()
        envs, hidden, sequence = seen[0]
        order = np.argsort(envs)
        ordered = jax.tree.map(lambda x: x[order], hidden), jax.tree.map(lambda x: x[:, order], sequence)
        return after, metrics, *ordered

    return look


def shaken(state):
    """The same with other parameters and running statistics, so that none of them is trivial and actions vary."""
    noise = lambda x: x + (2.0 if x.ndim == 2 else 0.1) * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    params, stats = state.variables["params"], state.variables.get("batch_stats", {})
    stats = {layer: x | {"mean": noise(x["mean"]), "var": 0.1 * x["var"]} for layer, x in stats.items()}
    variables = {"params": jax.tree.map(noise, params), "batch_stats": stats}
    return state._replace(variables={key: variables[key] for key in state.variables})


def played(config, sequence):
    """The rollout's own steps of what is trained on, without the window and the observation after it."""
    return jax.tree.map(lambda x: x[config.MEMORY_WINDOW : -1], sequence)


def q_values_of(config, state, hidden, sequence):
    """The training pass with frozen statistics: Q-values [S, N, A], hidden after."""
    return jax.jit(pqn.make_network(config).apply)(state.variables, *sequence[:3], hidden)


VARIANTS = [
    {"NORM_TYPE": "batch_norm", "NUM_LAYERS": 2},
    {"NORM_TYPE": "layer_norm", "NUM_RNN_LAYERS": 2, "MEMORY_WINDOW": 3},
    {"NORM_TYPE": "none", "NORM_INPUT": False, "MEMORY_WINDOW": 8, "ADD_LAST_ACTION": False},
    {"NUM_RNN_LAYERS": 0},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_training_pass_reproduces_the_rollout_across_episode_ends(probe, see, changes):
    """The Q-values of a rollout, step by step, and the hidden state after it are those of one pass over what was stored."""
    config, _, state = probe(EPS_START=0.0, EPS_FINISH=0.0, **WHOLE, **changes)
    state = shaken(state)
    before, _, _, earlier = see(config, state)
    before = before._replace(variables=state.variables)
    after, _, hidden_before, sequence = see(config, before, 1)
    trajectory, window = played(config, sequence), config.MEMORY_WINDOW
    assert trajectory.done.any(0).all()
    equal = lambda a, b: np.testing.assert_array_equal(a, b)  # noqa: E731
    jax.tree.map(equal, hidden_before, before.window_hidden)
    q_values, hidden = q_values_of(config, state, hidden_before, jax.tree.map(lambda x: x[:-1], sequence))
    equal(q_values.argmax(-1)[window:], trajectory.action)
    assert len(np.unique(trajectory.action)) > 1
    act = partial(jax.jit(pqn.make_network(config).apply), state.variables)
    stepped = before.hidden
    for t in range(config.NUM_STEPS):  # as the rollout acts
        one, stepped = act(*(x[window + t][None] for x in sequence[:3]), stepped)
        np.testing.assert_allclose(one[0], q_values[window + t], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), hidden, after.hidden)
    if window:  # the window is the end of the rollout before
        jax.tree.map(lambda x, y: equal(x[:window], y[-1 - window : -1]), sequence, earlier)
    jax.tree.map(equal, tuple(x[-1] for x in sequence[:3]), after.now[:3])
    assert sequence.mask[:-1].all() and not sequence.mask[-1].any()
    assert earlier.mask[window:-1].all() and not earlier.mask[:window].any()


def test_last_action_is_the_one_before_and_none_at_the_start_of_an_episode(probe, see):
    config, _, state = probe(**WHOLE)
    after, _, _, sequence = see(config, state)
    trajectory = played(config, sequence)
    assert (trajectory.last_action[0] == -1).all() and trajectory.reset[0].all()
    expected = np.where(trajectory.done[:-1], -1, trajectory.action[:-1])
    np.testing.assert_array_equal(trajectory.last_action[1:], expected)
    np.testing.assert_array_equal(trajectory.reset[1:], trajectory.done[:-1])
    np.testing.assert_array_equal(after.now.last_action, np.where(trajectory.done[-1], -1, trajectory.action[-1]))


def test_nothing_leaks_over_an_episode_end(probe, see):
    """Q-values from an episode's start on are those of a network that saw nothing else; within an episode they are not."""
    config, _, state = probe(NUM_STEPS=16, TOTAL_TIMESTEPS=1e4, **WHOLE)
    state = shaken(state)
    sequence = played(config, see(config, state)[3])
    q_values, _ = q_values_of(config, state, state.hidden, sequence)
    zero = pqn.make_network(config).initial_hidden(config.NUM_ENVS)
    other = jax.tree.map(lambda x: 1.0 + x, zero)
    starts, apply = 0, jax.jit(partial(pqn.make_network(config).apply, state.variables))
    for t in range(1, 16):
        rolled = jax.tree.map(lambda x, t=t: np.roll(x, -t, 0), sequence)
        fresh, filled = (np.asarray(apply(*rolled[:3], hidden)[0])[: 16 - t] for hidden in (zero, other))
        for n in range(config.NUM_ENVS):
            if sequence.reset[t, n]:
                np.testing.assert_allclose(fresh[:, n], q_values[t:, n], atol=1e-5)
                np.testing.assert_array_equal(fresh[:, n], filled[:, n])
                starts += 1
            else:
                assert np.abs(fresh[0, n] - q_values[t, n]).max() > 1e-4
    assert starts > 3


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_targets_equal_the_definition_and_bootstrap_from_the_observation_after_the_rollout(probe, see, lam):
    """The loss is that of targets by their definition from the training pass's values; so every target is right: each
    error would change it."""
    config, _, state = probe(LAMBDA=lam, GAMMA=0.9, REW_SCALE=2.0, MEMORY_WINDOW=2, **WHOLE, **PLAIN)
    state = shaken(state)
    state = see(config, state)[0]
    given, targets = [], pqn.q_lambda_targets

    def spy(*arguments):
        jax.debug.callback(lambda x: given.append(np.asarray(x)), targets(*arguments))
        return targets(*arguments)

    pqn.q_lambda_targets = spy
    try:
        _, _, hidden, sequence = see(pqn.override(config), state, 1)  # another program
    finally:
        pqn.q_lambda_targets = targets
    q_values, _ = q_values_of(config, state, hidden, sequence)
    done, value = sequence.done[:-1], np.asarray(q_values.max(-1))
    expected = oracle(2 * sequence.reward[:-1], done, done & False, value[1:], 0.9, lam)
    columns = np.lexsort(expected)  # environments are in another order there
    np.testing.assert_allclose(given[0][:-1][:, np.lexsort(given[0][:-1])], expected[:, columns], atol=1e-5)
    assert expected.shape == (2 + config.NUM_STEPS, config.NUM_ENVS)
    assert (sequence.done[-2] == 0).any()  # somewhere the last value counts


@pytest.mark.parametrize("window", [0, 3])
def test_every_transition_is_trained_on_with_gradients_through_the_training_pass(probe, see, window):
    """The loss is the mean over all transitions of the window and the rollout; a window that was never played is none."""
    config, _, state = probe(MEMORY_WINDOW=window, **WHOLE, **PLAIN)
    network = pqn.make_network(config)
    for update in range(2):
        after, metrics, hidden, sequence = see(config, state, update)
        real = slice(window if update == 0 else 0, None)
        done = sequence.done[:-1]

        def loss(params, hidden, sequence, real=real, done=done):
            q_values, _ = network.apply({"params": params}, *sequence[:3], hidden)
            value = jax.lax.stop_gradient(q_values.max(-1))
            discount, trace = config.GAMMA * (1.0 - done), config.LAMBDA * (1.0 - done)
            target = pqn.q_lambda_targets(sequence.reward[:-1], discount, value[1:], trace)
            q_action = jnp.take_along_axis(q_values, sequence.action[..., None], -1)[:-1, :, 0]
            return 0.5 * jnp.square(q_action - target)[real].mean(), q_action[real].mean()

        both = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (td_loss, qvals), grads = both(state.variables["params"], hidden, sequence)
        norm = np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(grads)))
        np.testing.assert_allclose(metrics["td_loss"], td_loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["qvals"], qvals, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        state = after


def test_an_update_trains_on_every_environment_once_an_epoch(probe):
    """With frozen parameters (LR tiny) the mean loss of an epoch's minibatches is that of the whole batch."""
    changes = {"NUM_ENVS": 8, "NUM_EPOCHS": 1, "LR": 1e-30, "NORM_TYPE": "none", "NORM_INPUT": False}
    parts, whole = (probe(NUM_MINIBATCHES=count, **changes)[1][1](probe(**changes)[2], 0)[1] for count in (4, 1))
    np.testing.assert_allclose(parts["td_loss"], whole["td_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts["qvals"], whole["qvals"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimistic, ratio, limits", [(False, 16, (2, 9)), (True, 4, (3, 3)), (True, 5, (2, 9))])
def test_every_episode_gets_its_own_world_at_once_however_many_end_together(probe, see, optimistic, ratio, limits):
    """Times count up from 0 in one world to its length, the next step starts another; no two episodes share a world."""
    config, _, state = probe(
        params=Params(*limits), NUM_ENVS=16, NUM_STEPS=40, TOTAL_TIMESTEPS=1e4,
        USE_OPTIMISTIC_RESETS=optimistic, OPTIMISTIC_RESET_RATIO=ratio, **WHOLE,
    )  # fmt: skip
    _, metrics, _, sequence = see(config, state)
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
        np.testing.assert_allclose(metrics[name], 10 * length[done].mean(), rtol=1e-5)


def conditions(jaxpr):
    """Shapes of the conditions of all loops in a jaxpr that have no fixed length."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation.params["cond_jaxpr"].out_avals[0].shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from conditions(inner)


def test_worlds_of_vmapped_seeds_are_not_copied_where_another_seed_needs_new_ones(probe):
    """Where a condition is of each seed, XLA selects for each between what the loop carries before and after a step. And
    each seed has the numbers of a run of its own."""
    config, (init, update, _), _ = probe(NUM_ENVS=16, NUM_STEPS=20, TOTAL_TIMESTEPS=1e4, **WHOLE, **PLAIN)
    states = jax.lax.map(init, jax.random.split(jax.random.key(0), 2))
    shapes = set(conditions(jax.make_jaxpr(jax.vmap(update, (0, None)))(states, 0).jaxpr))
    assert shapes == {()}
    after, metrics = jax.jit(jax.vmap(update, (0, None)))(states, 0)
    for seed in range(2):
        alone, own = update(jax.tree.map(lambda x, seed=seed: x[seed], states), 0)
        np.testing.assert_array_equal(after.now.obs[seed], alone.now.obs)
        np.testing.assert_allclose(metrics["td_loss"][seed], own["td_loss"], rtol=1e-4)


def test_evaluation_plays_first_episodes_with_fresh_keys_and_counts_achievements(probe):
    """The mean is over all of them, those that had not ended included."""
    _, (_, _, evaluate), state = probe(TEST_NUM_ENVS=4096, TEST_NUM_STEPS=100, LOG_ACHIEVEMENTS=True)
    metrics = evaluate(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - 5.5) < 0.15 and metrics["test/unfinished"] == 0
    assert metrics["test/returned_episode_returns"] == metrics["test/returned_episode_lengths"]
    np.testing.assert_allclose(
        metrics["test/percent_of_maximum"], 10 * metrics["test/returned_episode_returns"], rtol=1e-6
    )
    assert abs(metrics["test/Achievements/live_long"] - 50) < 3
    _, (_, update, evaluate), state = probe(TEST_NUM_ENVS=4096, TEST_NUM_STEPS=5)
    metrics = evaluate(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - (2 + 3 + 4 + 5 * 5) / 8) < 0.1
    assert abs(metrics["test/unfinished"] - 0.5) < 0.05 and metrics["test/Achievements/live_long"] == 0
    logged = jax.eval_shape(update, state, 0)[1]
    assert "test/Achievements/live_long" in logged and "Achievements/live_long" not in logged


class Dice(Counter):
    """Reward: a die thrown with the step's key. With one key for all steps, all rewards of an episode are equal."""

    def step_env(self, key, state, action, params):
        obs, state, _, done, info = super().step_env(key, state, action, params)
        return obs, state, 1.0 + jax.random.randint(key, (), 0, 6), done, info


def test_every_step_of_training_and_evaluation_has_its_own_key(probe, see):
    config, (_, _, evaluate), state = probe(
        Dice(), Params(16, 16), TEST_NUM_ENVS=2048, NUM_ENVS=128, NUM_STEPS=32, TOTAL_TIMESTEPS=1e5, **WHOLE
    )
    reward = np.asarray(played(config, see(config, state)[3]).reward)
    assert (reward == reward[0]).all(1).sum() == 1 and abs(np.std(reward[:16].sum(0)) - np.sqrt(16 * 35 / 12)) < 1.5
    returns = [evaluate(state, jax.random.key(i))["test/returned_episode_returns"] for i in range(8)]
    # the mean of 2,048 sums of 16 dice: one standard deviation is 0.15
    assert max(abs(x - 56) for x in returns) < 0.6 and len(set(map(float, returns))) == 8


def test_achievements_of_training_episodes(probe):
    _, (_, update, _), state = probe(LOG_ACHIEVEMENTS=True, NUM_ENVS=256, NUM_STEPS=32, TOTAL_TIMESTEPS=1e5, **WHOLE)
    state, metrics = update(state, 0)
    assert 35 < metrics["Achievements/live_long"] < 65 and 4 < metrics["returned_episode_returns"] < 6


@pytest.mark.parametrize("num_rnn_layers", [1, 0])
def test_memory_is_needed_and_learned(monkeypatch, num_rnn_layers):
    """MemoryChain: a bit shown at the start is asked for five steps later, reward 1 or -1. Without memory a guess: 0.

    Without the last action, either: the feed-forward agent would keep the bit by repeating itself.
    """
    env, params = gymnax.make("MemoryChain-bsuite")
    monkeypatch.setattr(pqn, "make_env", lambda config: (env, params))
    monkeypatch.setitem(pqn.GAMES, pqn.Config.ENV_NAME, ((), 1))
    config = pqn.Config(
        NUM_RNN_LAYERS=num_rnn_layers, NUM_ENVS=32, NUM_STEPS=16, NUM_EPOCHS=4, NUM_MINIBATCHES=4,
        TOTAL_TIMESTEPS=32 * 16 * 80, EPS_DECAY=0.5, EPS_FINISH=0.05, LR=3e-3, MAX_GRAD_NORM=10, LAMBDA=0.9,
        HIDDEN_SIZE=32, NORM_TYPE="layer_norm", NORM_INPUT=False, ADD_LAST_ACTION=False, TEST_INTERVAL=1.0, TEST_NUM_ENVS=256,
        TEST_NUM_STEPS=20,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 2)
    out = jax.jit(partial(jax.lax.map, pqn.make_train(config)))(keys)
    score = np.asarray(out["metrics"]["test/returned_episode_returns"][:, -1])
    assert (score > 0.95).all() if num_rnn_layers else (np.abs(score) < 0.25).all()


def test_lstm_is_flax_lstm():
    x, size = jax.random.normal(jax.random.key(0), (7, 4, 5)), 6
    cell = nn.OptimizedLSTMCell(size)
    state = jax.tree.map(lambda s: s + 0.3, cell.initialize_carry(jax.random.key(0), x[0].shape))
    params = cell.init(jax.random.key(1), state, x[0])["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    kernel, recurrent, bias = (
        jnp.concatenate([params[f"{side}{gate}"][leaf] for gate in "ifgo"], -1)
        for side, leaf in (("i", "kernel"), ("h", "kernel"), ("h", "bias"))
    )
    after, h = pqn.lstm(state, x @ kernel + bias, jnp.zeros((7, 4), bool), recurrent)
    for t in range(7):
        state, expected = cell.apply({"params": params}, state, x[t])
        np.testing.assert_allclose(h[t], expected, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, state)


def test_parameters_of_the_lstm_are_drawn_as_flax_draws_them():
    """A dense layer of the input for all gates, LeCun-normal as any; an orthogonal recurrent kernel for each gate."""
    config = pqn.Config(HIDDEN_SIZE=6, NUM_RNN_LAYERS=2)
    network, no = pqn.QNetwork(config, 3), jnp.zeros((7, 4), bool)
    variables = network.init(jax.random.key(0), jnp.zeros((7, 4, 5)), no, no - 1, network.initial_hidden(4))
    params = variables["params"]
    for i, inputs in enumerate((6 + 3, 6)):
        assert params[f"Dense_{i}"]["kernel"].shape == (inputs, 24) and params[f"Dense_{i}"]["bias"].shape == (24,)
        for gate in jnp.split(params[f"recurrent_kernel_{i}"], 4, 1):
            np.testing.assert_allclose(gate @ gate.T, np.eye(6), atol=1e-5)


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


def test_normalised_input_is_folded_into_the_first_layer(monkeypatch):
    """Q-values and gradients are those of the network without NORM_INPUT on observations that were normalised before."""
    config = pqn.Config(HIDDEN_SIZE=6, NORM_TYPE="none")
    network, without = (pqn.QNetwork(pqn.override(config, NORM_INPUT=norm), 3) for norm in (True, False))
    obs, reset = 2 + jax.random.normal(jax.random.key(0), (5, 4, 7)), jnp.zeros((5, 4), bool)
    last_action, hidden = jnp.zeros((5, 4), int), network.initial_hidden(4)
    variables = network.init(jax.random.key(1), obs, reset, last_action, hidden)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    params = jax.tree.map(noise, variables["params"])

    def folded(params):
        (q_values, _), _ = network.apply(
            variables | {"params": params}, obs, reset, last_action, hidden, True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(q_values))

    def plain(params):
        rest = {name: x for name, x in params.items() if name != "BatchRenorm_0"}
        stats, own = variables["batch_stats"]["BatchRenorm_0"], params["BatchRenorm_0"]
        (scale, shift), _ = pqn.BatchRenorm().apply(
            {"params": own, "batch_stats": stats}, obs, True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(without.apply({"params": rest}, obs * scale + shift, reset, last_action, hidden)[0]))

    results = (jax.value_and_grad(f)(params) for f in (plain, folded))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), *results)


def test_continued_and_resumed_training_is_the_same_and_a_restored_agent_scores_the_same(probe, tmp_path):
    """Running statistics, the window and the hidden state are in the checkpoint; statistics are beside the parameters."""
    config, (_, _, evaluate), _ = probe(MEMORY_WINDOW=2)
    keys = jax.random.split(jax.random.key(0), 2)
    half = {"TOTAL_TIMESTEPS": config.TOTAL_TIMESTEPS // 2, "TOTAL_TIMESTEPS_DECAY": config.TOTAL_TIMESTEPS}
    trained = jax.jit(partial(jax.lax.map, pqn.make_train(pqn.override(config, **half))))(keys)["runner_state"]
    options = {"NUM_SEEDS": 2, "SAVE_PATH": str(tmp_path), "LOG_INTERVAL": 6, "CHECKPOINT_INTERVAL": 6}
    run = pqn.run(config, **options)
    shutil.rmtree(run["folder"] / "checkpoints" / "12")  # as if it had been killed before the end
    with ocp.CheckpointManager(run["folder"] / "checkpoints") as checkpoints:
        saved = checkpoints.restore(6, args=ocp.args.StandardRestore(run["runner_state"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), trained.variables, saved.variables)
    resumed = pqn.run(RESUME=str(run["folder"]), SAVE_PATH=str(tmp_path))
    data = lambda state: state._replace(key=jax.random.key_data(state.key))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, data(run["runner_state"]), data(resumed["runner_state"]))
    loaded_config, network, variables = pqn.load(run["folder"])
    assert loaded_config == config and network.initial_hidden(3)[0][0].shape == (3, config.HIDDEN_SIZE)
    assert variables["batch_stats"]["BatchRenorm_0"]["batches"].tolist() == [12 * 4] * 2
    assert np.abs(variables["batch_stats"]["BatchRenorm_0"]["mean"]).max() > 0
    state = jax.tree.map(lambda x: x[1], run["runner_state"])
    loaded = state._replace(variables=jax.tree.map(lambda x: x[1], variables))
    assert evaluate(state, jax.random.key(5)) == evaluate(loaded, jax.random.key(5))


def test_bytes_per_environment_step(probe):
    """A rollout is stored once: doubling it adds its observations, plus a minibatch's, and no permuted or shifted copy."""
    size, temp = 4000, {}
    for steps in (16, 32):
        _, (_, update, _), state = probe(
            Counter(size), NUM_ENVS=16, NUM_STEPS=steps, NUM_MINIBATCHES=4, TOTAL_TIMESTEPS=1e5, HIDDEN_SIZE=8,
            NORM_INPUT=False,
        )  # fmt: skip
        analysis = update.lower(state, 0).compile().memory_analysis()
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
    with pytest.raises(ValidationError, match=key):
        pqn.Config(**SMALL | {"ENV_NAME": "Craftax-Classic-Symbolic-v1", key: BAD[key]})


def test_minibatches_are_of_whole_environments():
    with pytest.raises(ValidationError, match="NUM_MINIBATCHES=8 must divide NUM_ENVS=4"):
        pqn.Config(**SMALL | {"NUM_MINIBATCHES": 8})


WRONG = [
    ("max_timesteps", "long"), ("max_timesteps", float("inf")), ("max_timesteps", -1), ("max_timesteps", True),
    ("max_zombies", 2.5), ("map_size", 32), ("map_size", [64]), ("map_size", ["a", "b"]), ("fractal_noise_angles", [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize("sizes", [{"map_size": [60, 60]}, {"max_zombies": 0}])
def test_sizes_of_which_craftax_makes_no_world_are_refused(sizes):
    with pytest.raises(ValidationError, match=re.escape(f"ENV_KWARGS={sizes} must be sizes of which Craftax makes")):
        pqn.Config(**SMALL | {"ENV_NAME": "Craftax-Classic-Symbolic-v1", "ENV_KWARGS": sizes})


def test_craftax_symbolic_is_traced():
    """The published environment compiles for a minute; that an update of it keeps all shapes and types is seen without."""
    init, update, _ = pqn.make_pqn(pqn.Config(**SMALL))
    state = jax.eval_shape(init, jax.random.key(0))
    after, metrics = jax.eval_shape(update, state, 0)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert all(jax.tree.leaves(same)) and state.now.obs.shape == (4, 8268) and "td_loss" in metrics
    assert sum(key.startswith("test/Achievements/") for key in metrics) == 67


def test_command_line_of_this_script(command):
    process = command("pqn_craftax_rnn", "alg.ENV_NAME=Craftax-Pixels-v1")
    assert process.code == 1 and "Traceback" not in process.err and "Craftax-Classic-Symbolic-v1" in process.err


@pytest.mark.parametrize("key, value", WRONG)
def test_values_of_env_kwargs_are_like_the_environments_own(key, value):
    named = "ENV_KWARGS.max_timesteps" if value == float("inf") else f"ENV_KWARGS.{key}={value!r} must be like"
    with pytest.raises(ValidationError, match=re.escape(named)):
        pqn.Config(**SMALL | {"ENV_NAME": "Craftax-Classic-Symbolic-v1", "ENV_KWARGS": {key: value}})


def test_env_kwargs_are_fields_of_both():
    env, params = pqn.make_env(pqn.Config(**SMALL | {"ENV_KWARGS": {"max_timesteps": 1e3, "map_size": [32, 32]}}))
    assert params.max_timesteps == 1000 and env.static_env_params.map_size == (32, 32)
    assert isinstance(params.max_timesteps, int) and isinstance(env.static_env_params.map_size[0], int)


def recipe(name):
    return OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{name}.yaml"))


def test_recipes_load_and_the_published_one_is_the_default():
    names = ["pqn_craftax_rnn", "pqn_craftax_rnn_2024", "pqn_craftax", "pqn_craftax_classic_rnn"]
    published, older, feed_forward, classic = (pqn.Config(**recipe(name)) for name in names)
    assert all(recipe(name).keys() == vars(published).keys() for name in names)
    assert published == pqn.Config() and classic.ENV_NAME == "Craftax-Classic-Symbolic-v1"
    changes = {"ALG_NAME": "pqn_craftax_rnn_2024", "NORM_TYPE": "batch_norm", "TEST_DURING_TRAINING": True}
    assert vars(older) == vars(published) | changes
    assert feed_forward.NUM_RNN_LAYERS == feed_forward.LAMBDA == 0 and not feed_forward.ADD_LAST_ACTION


RECURRENT = """
ALG_NAME: "pqn_rnn"
TOTAL_TIMESTEPS: 1e9
TOTAL_TIMESTEPS_DECAY: 1e9
NUM_ENVS: 1024
MEMORY_WINDOW: 0
NUM_STEPS: 128
EPS_START: 1.
EPS_FINISH: 0.005
EPS_DECAY: 0.1
NUM_MINIBATCHES: 4
NUM_EPOCHS: 4
NORM_INPUT: True
NORM_TYPE: "layer_norm"
HIDDEN_SIZE: 512
NUM_LAYERS: 1
NUM_RNN_LAYERS: 1
ADD_LAST_ACTION: True
LR: 0.0003
MAX_GRAD_NORM: 0.5
LR_LINEAR_DECAY: True
REW_SCALE: 1.
GAMMA: 0.99
LAMBDA: 0.5
ENV_NAME: "Craftax-Symbolic-v1"
USE_OPTIMISTIC_RESETS: True
OPTIMISTIC_RESET_RATIO: 16
LOG_ACHIEVEMENTS: False
TEST_DURING_TRAINING: False
TEST_INTERVAL: 0.01
TEST_NUM_ENVS: 512
TEST_NUM_STEPS: 10000
EPS_TEST: 0.00
"""
FEED_FORWARD = """
ALG_NAME: "pqn_craftax"
TOTAL_TIMESTEPS: 1e9
TOTAL_TIMESTEPS_DECAY: 1e9
NUM_ENVS: 1024
NUM_STEPS: 1
EPS_START: 0.1
EPS_FINISH: 0.005
EPS_DECAY: 0.2
NUM_MINIBATCHES: 1
NUM_EPOCHS: 1
NORM_INPUT: True
NORM_TYPE: "layer_norm"
HIDDEN_SIZE: 1024
NUM_LAYERS: 4
LR: 0.0001
MAX_GRAD_NORM: 1.0
LR_LINEAR_DECAY: True
REW_SCALE: 1.
GAMMA: 0.99
Q_LAMBDA: False
LAMBDA: 0
ENV_NAME: "Craftax-Symbolic-v1"
USE_OPTIMISTIC_RESETS: True
OPTIMISTIC_RESET_RATIO: 16
LOG_ACHIEVEMENTS: False
WANDB_LOG_INTERVAL: 100
TEST_DURING_TRAINING: False
TEST_INTERVAL: 0.01
TEST_NUM_ENVS: 512
TEST_NUM_STEPS: 10000
EPS_TEST: 0.00
"""


@pytest.mark.parametrize("text, ours", [(RECURRENT, "pqn_craftax_rnn"), (FEED_FORWARD, "pqn_craftax")])
def test_recipes_written_for_purejaxql_load_unchanged(text, ours, tmp_path):
    """Composed by Hydra as on the command line, with all keys that they name; they give what our own recipe does."""
    (tmp_path / "alg").mkdir()
    (tmp_path / "alg" / "theirs.yaml").write_text(text)
    hydra.core.config_store.ConfigStore.instance().store(name="schema", node=pqn.SCHEMA)  # the last imported script's
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = hydra.compose("config", ["+alg=theirs", f"hydra.searchpath=[file://{tmp_path}]"])
    config = pqn.Config(**OmegaConf.to_container(cfg.alg))
    same = {"ALG_NAME": config.ALG_NAME, "TOTAL_TIMESTEPS_DECAY": 10**9}
    assert vars(config) == vars(pqn.Config(**recipe(ours))) | same
