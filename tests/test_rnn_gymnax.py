"""The recurrent gymnax agent: recurrence, targets with time limits, the window, what needs memory and what has none."""

import shutil
from functools import partial

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY
from flax import struct
from gymnax.environments import environment, spaces
from omegaconf import OmegaConf
from pydantic import ValidationError
from test_algorithm import oracle

import pqn_gymnax
import pqn_rnn_gymnax as pqn

SMALL = TINY | {"HIDDEN_SIZE": 16, "NUM_LAYERS": 1}
WHOLE = {"NUM_MINIBATCHES": 1, "NUM_EPOCHS": 1}  # one gradient step an update, of everything


@struct.dataclass
class State(environment.EnvState):
    cue: jax.Array


@struct.dataclass
class Params:
    steps: int = 4  # for which the cue is to be remembered
    max_steps_in_episode: int = 100


class Recall(environment.Environment):
    """One of four cues is shown at first, and nothing at all until a signal `steps` steps later. Then the action must be
    the cue: reward 1, or 0, and the episode terminates. What is shown then is the same for all cues: whoever sees only
    that gets 1 / 4 on average."""

    num_actions = 4

    @property
    def default_params(self):
        return Params()

    def get_obs(self, state, params, key=None):
        cue = jax.nn.one_hot(state.cue, 4) * (state.time == 0)
        return jnp.append(cue, state.time == params.steps).astype(jnp.float32)

    def reset_env(self, key, params):
        state = State(jnp.int32(0), jax.random.randint(key, (), 0, 4))
        return self.get_obs(state, params), state

    def step_env(self, key, state, action, params):
        asked = state.time == params.steps
        reward = jnp.int32(asked & (action == state.cue))  # a whole number: cast where it is stored
        state = state.replace(time=state.time + 1)
        return self.get_obs(state, params), state, reward, asked, {}

    def action_space(self, params=None):
        return spaces.Discrete(4)

    def observation_space(self, params):
        return spaces.Box(0, 1, (5,))


if "Recall" not in gymnax.registered_envs:
    gymnax.registration.register("Recall", Recall)


def noisy(variables):
    """Other parameters, so that none is trivial."""
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)


def start(**changes):
    """A small Config, and the state of a seed whose parameters are noise."""
    config = pqn.Config(**SMALL | {"ENV_NAME": "Recall"} | changes)
    state = jax.jit(pqn.make_pqn(config)[0])(jax.random.key(1))
    return config, state._replace(variables=noisy(state.variables))


def see(monkeypatch, config, state, i=0, made=None):
    """What update i trains on, the order of environments undone: the state after, its metrics, the hidden state before,
    the sequence [W + T + 1, N, ...], and its targets. `made`: a sequence to train on in place of the one played."""
    seen, take, targets = {}, pqn.take_sequences, pqn.q_lambda_targets

    def keep(name):
        return lambda x: seen.setdefault(name, jax.tree.map(np.asarray, x))

    def spy(hidden, parts, envs):
        hidden, steps = take(hidden, parts, envs)
        steps = steps if made is None else jax.tree.map(lambda x: jnp.asarray(x)[:, envs], made)
        jax.debug.callback(keep("batch"), (envs, hidden, steps))
        return hidden, steps

    def spy_targets(*arguments):
        jax.debug.callback(keep("targets"), targets(*arguments))
        return targets(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pqn, "take_sequences", spy)
        patch.setattr(pqn, "q_lambda_targets", spy_targets)
        after, metrics = jax.block_until_ready(jax.jit(pqn.make_pqn(config)[1])(state, i))
        jax.effects_barrier()
    envs, hidden, steps = seen["batch"]
    order = np.argsort(envs)
    hidden, steps = jax.tree.map(lambda x: x[order], hidden), jax.tree.map(lambda x: x[:, order], steps)
    return after, metrics, hidden, steps, seen["targets"][:, order]


@pytest.mark.parametrize(
    "changes",
    [{}, {"NUM_RNN_LAYERS": 2, "NORM_TYPE": "none", "ADD_LAST_ACTION": False}, {"NORM_INPUT": True, "NUM_LAYERS": 2}],
)
def test_network_step_by_step_is_the_network_over_the_sequence(changes):
    """With resets inside: from an episode's first observation on, what was before makes no difference."""
    config, state = start(**changes)
    network, rng = pqn.make_network(config), np.random.default_rng(0)
    obs = rng.normal(size=(12, 4, 5))
    reset, last_action = rng.random((12, 4)) < 0.2, rng.integers(-1, 4, (12, 4))
    reset[[0, 5]] = [[False] * 4, [True, False, False, True]]
    hidden = jax.tree.map(lambda x: x + 0.5, network.initial_hidden(4))
    apply = jax.jit(partial(network.apply, state.variables))
    q_values, after = apply(obs, reset, last_action, hidden)
    assert q_values.shape == (12, 4, 4)
    stepped, rows = hidden, []
    for t in range(12):
        row, stepped = apply(obs[t : t + 1], reset[t : t + 1], last_action[t : t + 1], stepped)
        rows.append(row[0])
    np.testing.assert_allclose(jnp.stack(rows), q_values, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stepped, after)
    zero = network.initial_hidden(4)
    fresh, _ = apply(obs[5:], reset[5:], last_action[5:], zero)
    for n, ended in enumerate(reset[5]):
        assert np.allclose(fresh[:1, n], q_values[5:6, n], atol=1e-5) == ended


def test_gru_is_flax_gru_cell():
    x, size = jax.random.normal(jax.random.key(0), (7, 4, 5)), 6
    cell, state = nn.GRUCell(size), jnp.full((4, size), 0.3)
    params = noisy(cell.init(jax.random.key(1), state, x[0])["params"])
    kernel, bias = (jnp.concatenate([params[f"i{gate}"][leaf] for gate in "rzn"], -1) for leaf in ("kernel", "bias"))
    recurrent = jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in "rzn"], -1)
    after, h = pqn.gru(state, x @ kernel + bias, jnp.zeros((7, 4), bool), recurrent, params["hn"]["bias"])
    for t in range(7):
        state, expected = cell.apply({"params": params}, state, x[t])
        np.testing.assert_allclose(h[t], expected, atol=1e-6)
    np.testing.assert_array_equal(after, h[-1])


def test_parameters_of_the_gru_are_drawn_as_flax_draws_them():
    """A dense layer of the input for all gates, LeCun-normal as any; an orthogonal recurrent kernel for each gate."""
    network, no = pqn.make_network(pqn.Config(**SMALL | {"NUM_RNN_LAYERS": 2})), jnp.zeros((7, 4), bool)
    variables = network.init(jax.random.key(0), jnp.zeros((7, 4, 4)), no, no - 1, network.initial_hidden(4))
    params = variables["params"]
    for i, inputs in enumerate((16 + 2, 16), 1):
        assert params[f"Dense_{i}"]["kernel"].shape == (inputs, 48) and params[f"Dense_{i}"]["bias"].shape == (48,)
        assert (params[f"recurrent_bias_{i - 1}"] == np.zeros(16)).all()
        for gate in jnp.split(params[f"recurrent_kernel_{i - 1}"], 3, 1):
            np.testing.assert_allclose(gate @ gate.T, np.eye(16), atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_targets_equal_the_definition_on_made_up_trajectories(lam, monkeypatch):
    """Terminations, time limits, several of them in a row, a window that was not played and the row after the rollout."""
    config, state = start(LAMBDA=lam, GAMMA=0.8, REW_SCALE=2.0, NUM_ENVS=16, NUM_STEPS=20, MEMORY_WINDOW=3,
                          TOTAL_TIMESTEPS=1e4, **WHOLE)  # fmt: skip
    rng, shape = np.random.default_rng(0), (3 + 20 + 1, 16)
    done = rng.random(shape) < 0.3
    cut = done & (rng.random(shape) < 0.5)
    played = np.ones(shape, bool)
    played[:3, :8] = played[-1] = False  # of half of the environments
    done, cut = done & played, cut & played
    integers = rng.integers(0, 4, (2, *shape))
    made = pqn.Transition(
        obs=rng.normal(size=(*shape, 5)).astype(np.float32), reset=rng.random(shape) < 0.2, last_action=integers[0],
        action=integers[1], reward=rng.normal(size=shape).astype(np.float32), done=done, mask=played & ~cut,
        returns=np.zeros(shape), lengths=np.zeros(shape),
    )  # fmt: skip
    _, metrics, hidden, steps, given = see(monkeypatch, config, state, made=made)
    jax.tree.map(np.testing.assert_array_equal, steps, made)
    q_values = np.asarray(jax.jit(pqn.make_network(config).apply)(state.variables, *made[:3], hidden)[0])
    value, mask = q_values.max(-1), made.mask
    ends = np.roll(~mask, -1, 0)  # the next row has no return of its own, but a value
    expected = oracle(2 * made.reward, done & ~cut, ends, np.roll(value, -1, 0), 0.8, lam)
    np.testing.assert_allclose(given[mask], expected[mask], atol=1e-4)
    np.testing.assert_allclose(given[~mask], value[~mask], atol=1e-5)
    q_action = np.take_along_axis(q_values, made.action[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics["td_loss"], 0.5 * np.square(q_action - expected)[mask].mean(), rtol=1e-4)


@pytest.mark.parametrize("window", [0, 3, 8])
def test_training_starts_with_the_last_steps_of_the_rollout_before_and_the_hidden_state_before_them(
    window, monkeypatch
):
    config, state = start(MEMORY_WINDOW=window, **WHOLE)
    apply = jax.jit(pqn.make_network(config).apply)
    middle, _, hidden, first, _ = see(monkeypatch, config, state)
    assert len(first.obs) == window + 8 + 1 and not first.mask[:window].any() and not first.mask[-1].any()
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(hidden))
    played = jax.tree.map(lambda x: x[window:-1], first)
    assert played.mask.all() and played.done.any()  # all episodes terminate
    expected = hidden
    if window < 8:
        _, expected = apply(state.variables, *(x[: 8 - window] for x in played[:3]), hidden)
        assert np.abs(expected[0]).max() > 0
    second_state = middle._replace(variables=noisy(middle.variables))
    after, _, hidden, second, _ = see(monkeypatch, config, second_state, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), hidden, expected)
    equal = lambda a, b: np.testing.assert_array_equal(a, b)  # noqa: E731
    jax.tree.map(lambda a, b: equal(a[:window], b[8 - window :]), second, played)
    jax.tree.map(lambda a, b: equal(a[window], b[-1]), second[:3], first[:3])  # what was to be played next
    assert second.mask[:-1].all()
    jax.tree.map(lambda a, b: equal(a[-1], b), second[:3], tuple(after.now[:3]))
    _, hidden = apply(second_state.variables, *(x[window:-1] for x in second[:3]), middle.hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), hidden, after.hidden)


@pytest.mark.parametrize("limit, cut", [(3, True), (5, False), (100, False)])
def test_what_a_time_limit_cuts_is_masked_and_episodes_start_anew(limit, cut, monkeypatch):
    """Episodes terminate at the fifth step: a limit of five is none. The last action is none at an episode's start."""
    kwargs = {"max_steps_in_episode": limit}
    config, state = start(ENV_KWARGS=kwargs, MEMORY_WINDOW=0, NUM_STEPS=16, TOTAL_TIMESTEPS=1e4, **WHOLE)
    _, metrics, _, steps, _ = see(monkeypatch, config, state)
    steps = jax.tree.map(lambda x: x[:-1], steps)
    length = min(limit, 5)
    ends = np.arange(1, 17) % length == 0
    assert (steps.done == ends[:, None]).all() and (steps.mask == ~(ends & cut)[:, None]).all()
    np.testing.assert_array_equal(steps.reset[1:], steps.done[:-1])
    np.testing.assert_array_equal(steps.last_action[1:], np.where(steps.done[:-1], -1, steps.action[:-1]))
    assert steps.reset[0].all() and (steps.last_action[0] == -1).all()
    assert (steps.obs[steps.reset][:, :4].sum(-1) == 1).all() and (steps.obs[~steps.reset][:, :4] == 0).all()
    assert metrics["returned_episode_lengths"] == length
    assert metrics["returned_episode_returns"] == steps.returns[ends].mean()


def test_memory_is_needed_and_learned():
    """The recurrent agent recalls every cue; pqn_gymnax, with the same budget, stays at chance: 1 / 4."""
    changes = {
        "ENV_NAME": "Recall", "NUM_ENVS": 32, "NUM_STEPS": 20, "NUM_EPOCHS": 4, "NUM_MINIBATCHES": 4, "TOTAL_TIMESTEPS": 32 * 20 * 80,
        "EPS_DECAY": 0.5, "EPS_FINISH": 0.05, "LR": 3e-3, "LAMBDA": 0.9, "REW_SCALE": 1.0, "HIDDEN_SIZE": 32, "NUM_LAYERS": 1,
        "TEST_DURING_TRAINING": False, "TEST_NUM_ENVS": 1024,
    }  # fmt: skip
    scores = []
    for script in (pqn, pqn_gymnax):
        out = jax.jit(script.make_train(script.Config(**changes)))(jax.random.key(0))
        scores.append(float(out["metrics"]["test/returned_episode_returns"][-1]))
    assert scores[0] == 1.0 and abs(scores[1] - 0.25) < 0.06, scores  # four standard deviations


@pytest.mark.parametrize("name", ["FrozenLake-misc", "UmbrellaChain-bsuite"])
def test_discrete_action_environments_train(name):
    """Matrices are flattened, integers cast, discrete observations one-hot."""
    config = pqn.Config(**SMALL | {"ENV_NAME": name, "TOTAL_TIMESTEPS": 96, "TEST_DURING_TRAINING": False})
    out = jax.jit(pqn.make_train(config))(jax.random.key(0))
    assert np.isfinite(out["metrics"]["td_loss"]).all()
    env, params = gymnax.make(name)
    space = env.observation_space(params)
    inputs = space.n if name == "FrozenLake-misc" else np.prod(space.shape)
    assert len(out["runner_state"].variables["params"]["Dense_0"]["kernel"]) == inputs


def test_cartpole_positions_is_cartpole_without_velocities():
    key = jax.random.key(3)
    env, params = pqn.make_env(pqn.Config(ENV_NAME="CartPolePositions-v1"))
    whole, _ = gymnax.make("CartPole-v1")
    assert env.observation_space(params).shape == (2,) and params.max_steps_in_episode == 500
    np.testing.assert_array_equal(env.observation_space(params).high, whole.observation_space(params).high[::2])
    (obs, state), (all_obs, _) = env.reset(key, params), whole.reset(key, params)
    for action in (0, 1, 1):
        np.testing.assert_array_equal(obs, all_obs[::2])
        all_obs, *_ = whole.step(key, state, action, params)
        obs, state, *_ = env.step(key, state, action, params)
    np.testing.assert_array_equal(obs, jnp.stack([state.x, state.theta]))


def test_a_resumed_run_is_one_that_never_stopped(tmp_path):
    """The window, the hidden state and BatchNorm's statistics are in the checkpoint; a loaded agent acts."""
    config = pqn.Config(**SMALL | {"ENV_NAME": "Recall", "NORM_TYPE": "batch_norm", "MEMORY_WINDOW": 3})
    whole = pqn.run(config, NUM_SEEDS=2, SAVE_PATH=tmp_path, LOG_INTERVAL=6, CHECKPOINT_INTERVAL=6)
    shutil.rmtree(whole["folder"] / "checkpoints" / "12")  # as if it had been killed before the end
    resumed = pqn.run(RESUME=whole["folder"])
    data = lambda out: out["runner_state"]._replace(key=0)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, data(whole), data(resumed))
    np.testing.assert_array_equal(*(jax.random.key_data(out["runner_state"].key) for out in (whole, resumed)))
    config, network, variables = pqn.load(resumed["folder"])
    seed, obs = jax.tree.map(lambda x: x[1], variables), jnp.zeros((1, 3, 5))
    reset, hidden = jnp.ones((1, 3), bool), network.initial_hidden(3)
    assert network.apply(seed, obs, reset, jnp.full((1, 3), -1), hidden)[0].shape == (1, 3, 4)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"NUM_MINIBATCHES": 8}, "NUM_MINIBATCHES=8 must divide NUM_ENVS=4"),
        ({"MEMORY_WINDOW": 9}, "MEMORY_WINDOW=9 must be at most NUM_STEPS=8"),
    ],
)
def test_counts_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        pqn.Config(**TINY | changes)


def test_published_recipes_load_and_ours_have_their_values():
    """purejaxql's keys and values, as far as they differ between its two recipes or from our defaults."""
    cartpole = {"TOTAL_TIMESTEPS": 5e5, "NUM_STEPS": 64, "EPS_FINISH": 0.2, "EPS_DECAY": 0.2, "LR": 0.0001,
                "LR_LINEAR_DECAY": True, "REW_SCALE": 0.1, "ENV_NAME": "CartPole-v1", "ENV_KWARGS": {}}  # fmt: skip
    chain = {"TOTAL_TIMESTEPS": 1e5, "NUM_STEPS": 128, "EPS_FINISH": 0.01, "EPS_DECAY": 0.1, "LR": 0.001,
             "LR_LINEAR_DECAY": False, "REW_SCALE": 1.0, "ENV_NAME": "MemoryChain-bsuite",
             "ENV_KWARGS": {"memory_length": 100}}  # fmt: skip
    both = {"NUM_ENVS": 32, "MEMORY_WINDOW": 4, "EPS_START": 1.0, "NUM_MINIBATCHES": 16, "NUM_EPOCHS": 4, "GAMMA": 0.99,
            "NORM_INPUT": False, "HIDDEN_SIZE": 256, "NUM_LAYERS": 2, "NORM_TYPE": "layer_norm", "MAX_GRAD_NORM": 10,
            "LAMBDA": 0.95, "TEST_DURING_TRAINING": True, "TEST_INTERVAL": 0.05, "TEST_NUM_ENVS": 128, "EPS_TEST": 0.0}  # fmt: skip
    for name, values in (("cartpole", cartpole), ("memory_chain", chain)):
        ours = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/pqn_rnn_{name}.yaml"))
        theirs = pqn.Config(**both | values, ALG_NAME=ours["ALG_NAME"])
        assert pqn.Config(**ours) == theirs
    assert pqn.make_env(theirs)[1].memory_length == 100
