"""The VDN script: targets and hidden states against oracles, availability, episode ends, probes that need a team."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import team_probes  # noqa: F401
from conftest import ROOT, TINY
from test_algorithm import oracle

import pqn_vdn_jaxmarl as pqn

SMALL = TINY | {"HIDDEN_SIZE": 16, "NUM_LAYERS": 1, "ENV_NAME": "clock", "GAMMA": 0.9, "LAMBDA": 0.7}
RNN = {"NETWORK": "rnn", "MEMORY_WINDOW": 3}


def parts(**changes):
    """A Config, its train function and a state after some updates of one seed."""
    config = pqn.Config(**SMALL | changes)
    train = pqn.make_train(config)
    return config, train, jax.jit(train.init)(jax.random.key(1))


def played(config, params, trajectory, after, hidden):
    """Of a rollout and the state after it, stepped one by one with the hidden state 0 at each start: Q-values and
    available actions [T + 1, N, A, num_actions], and the hidden states before each step."""
    network, q_values, hiddens = pqn.make_network(config), [], []
    step = jax.jit(lambda obs, hidden: network.apply({"params": params}, obs[None], hidden))
    for t, obs in enumerate([*trajectory.obs, after.obs]):
        hiddens.append(hidden)
        q, hidden = step(obs, hidden)
        q_values.append(np.asarray(q[0]))
        if t < len(trajectory.obs):
            hidden = jax.tree.map(lambda h, t=t: h * ~trajectory.done[t][:, None, None], hidden)
    last = jax.vmap(pqn.make_env(config).available)(after.env_state)
    return np.stack(q_values), np.concatenate([trajectory.available, last[None]]), hiddens


def best(q_values, available):
    """The team's value by a loop over agents and actions."""
    value = np.zeros(q_values.shape[:-2])
    for index in np.ndindex(value.shape):
        for q, can in zip(q_values[index], available[index], strict=True):
            value[index] += max(x for x, a in zip(q, can, strict=True) if a)
    return value


def expected_targets(config, q_values, available, trajectory):
    reward, done = np.asarray(trajectory.reward), np.asarray(trajectory.done)
    return oracle(reward, done, done & False, best(q_values, available)[1:], config.GAMMA, config.LAMBDA)


def test_feed_forward_targets_equal_the_oracle():
    """Agents with unlike actions, some unavailable, some dead; episode ends are terminal."""
    config, train, state = parts(NUM_STEPS=16, TOTAL_TIMESTEPS=16 * 4, REW_SCALE=0.5)
    after, trajectory, (done, *_) = jax.jit(train.rollout)(state)
    assert done.any() and not trajectory.available.all() and (trajectory.obs == 0).all(-1).any()
    _, steps, targets = jax.jit(train.transitions)(after, trajectory)
    q_values, available, _ = played(config, state.params, trajectory, after, ())
    np.testing.assert_allclose(targets, expected_targets(config, q_values, available, trajectory), atol=1e-4)
    minibatch = ((), *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (steps, targets)))
    _, losses = jax.jit(train.learn)(state, minibatch)  # the team's Q is the sum over agents, of the actions they took
    chosen = np.take_along_axis(q_values[:-1], np.asarray(steps.action)[..., None], -1).sum((2, 3))
    assert losses["td_loss"] == pytest.approx(0.5 * np.square(chosen - targets).mean(), rel=1e-4)
    assert losses["qvals"] == pytest.approx(chosen.mean(), rel=1e-3)


@pytest.mark.parametrize("window", [0, 3])
def test_recurrent_loss_equals_the_oracle_and_no_hidden_state_crosses_an_episode_end(window):
    """The losses of three rollouts, the parameters left as they are; before the first there is no window."""
    config, train, state = parts(NETWORK="rnn", MEMORY_WINDOW=window, NUM_MINIBATCHES=1, TOTAL_TIMESTEPS=1e3)
    rollout, learn, sequences = jax.jit(train.rollout), jax.jit(train.learn), jax.jit(train.sequences)
    history = []
    for update in range(3):
        after, trajectory, _ = rollout(state)
        history.append(trajectory)
        steps = jax.tree.map(lambda *x: np.concatenate(x), *history)
        q_values, available, hiddens = played(config, state.params, steps, after, jnp.zeros((4, 3, 16)))
        np.testing.assert_allclose(after.hidden, hiddens[-1], atol=1e-5)
        begin = max(0, 8 * update - window)
        hidden, sequence, _ = batch = jax.tree.map(lambda x: x[0], sequences(state, after, trajectory))
        assert sequence.done.shape == (4, 8 + window + 1)
        np.testing.assert_allclose(hidden, hiddens[begin], atol=1e-5)
        trained = jax.tree.map(lambda x, begin=begin: x[begin:], steps)
        targets = expected_targets(config, q_values[begin:], available[begin:], trained)
        chosen = np.take_along_axis(q_values[begin:-1], trained.action[..., None], -1).sum((2, 3))
        _, losses = learn(state, batch)
        assert losses["td_loss"] == pytest.approx(0.5 * np.square(chosen - targets).mean(), rel=1e-4)
        assert np.isfinite(losses["grad_norm"])
        state = after.replace(update_steps=state.update_steps + 1)
    assert steps.done[:-1].any() and (hiddens[-1] != 0).any()


def test_unavailable_actions_are_never_chosen():
    available = jax.random.bernoulli(jax.random.key(0), 0.4, (5, 3, 6)).at[..., 2].set(True)
    q_values = jax.random.normal(jax.random.key(1), available.shape) - 10.0 * available
    act = jax.jit(jax.vmap(pqn.explore, (0, None, None, None)))
    for epsilon in (0.0, 0.5, 1.0):
        action = np.asarray(act(jax.random.split(jax.random.key(2), 20_000), q_values, available, epsilon))
        shares = (action[..., None] == np.arange(6)).mean(0)
        greedy = np.where(available, q_values, -np.inf).argmax(-1)[..., None] == np.arange(6)
        uniform = available / available.sum(-1, keepdims=True)
        np.testing.assert_allclose(shares, epsilon * uniform + (1 - epsilon) * greedy, atol=0.015)
        assert (shares[~available] == 0).all()


@pytest.mark.parametrize("changes", [{}, RNN])
def test_training_and_evaluation(changes):
    """In Clock an unavailable action costs 100: returns of episodes and evaluations tell that none was taken."""
    config, train, _ = parts(TEST_NUM_ENVS=64, EPS_TEST=0.5, NUM_STEPS=16, TOTAL_TIMESTEPS=16 * 4 * 4, **changes)
    metrics = train(jax.random.split(jax.random.key(0), 2))["metrics"]
    for prefix in ("", "test/"):
        returns, lengths = (metrics[f"{prefix}returned_episode_{x}"][:, -1] for x in ("returns", "lengths"))
        assert (returns >= 0).all() and (returns <= 20).all() and (lengths >= 4).all() and (lengths <= 9).all()
    assert (metrics["test/unfinished"][:, -1] == 0).all() and np.isfinite(metrics["td_loss"]).all()


def test_evaluation_counts_first_episodes_and_wins():
    """Greedy on zero Q-values is action 0 for ever, and wins nothing; the last available actions earn 3, then 6: won."""
    config, train, state = parts(TEST_NUM_ENVS=1024, TEST_NUM_STEPS=6)
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    metrics = jax.jit(train.evaluate)(state, jax.random.key(0))
    assert metrics["test/returned_episode_returns"] == 0 == metrics["test/returned_won_episode"]
    assert abs(metrics["test/returned_episode_lengths"] - 5) < 0.2  # 4 to 9, of which 4, 5 and 6 end in time
    assert abs(metrics["test/unfinished"] / 1024 - 0.5) < 0.06
    config, train, state = parts(
        TEST_NUM_ENVS=64, TEST_NUM_STEPS=2, ENV_KWARGS={"shortest": 2, "longest": 2}, DUELING=True
    )
    bias = state.params["Dense_1"]["bias"].at[:].set(jnp.arange(4.0))  # the last available action
    params = jax.tree.map(jnp.zeros_like, state.params) | {"Dense_1": {"bias": bias, "kernel": jnp.zeros((16, 4))}}
    metrics = jax.jit(train.evaluate)(state.replace(params=params), jax.random.key(0))
    assert metrics["test/returned_episode_returns"] == (0 + 1 + 2) + (1 + 2 + 3)
    assert metrics["test/returned_won_episode"] == 1


def test_observations_are_the_environments_own():
    """Padded, with ids; blank only for an agent that died while the others play on, and never at a start."""
    config, train, state = parts(NUM_STEPS=32, TOTAL_TIMESTEPS=32 * 4)
    _, trajectory, _ = jax.jit(train.rollout)(state)
    time = np.zeros(4, int)
    for t in range(32):
        for n in range(4):
            for i in range(3):
                length = trajectory.obs[t, n, 2, 1] if time[n] < 4 else None
                seen = np.zeros(4 + 3)
                if time[n] < i + 2:
                    seen[:2], seen[4 + i] = ((1 + time[n]) / 10, length), 1
                np.testing.assert_allclose(trajectory.obs[t, n, i], seen, atol=1e-6)
                assert not trajectory.available[t, n, i, 2 + i :].any()  # actions that it does not have
        time = (time + 1) * ~np.asarray(trajectory.done[t])
    assert trajectory.done.any()


@pytest.mark.parametrize("name", ["MPE_simple_speaker_listener_v4", "MPE_simple_spread_v3"])
def test_first_observations_of_mpe_are_not_blank(name):
    env = pqn.make_env(pqn.Config(**SMALL | {"ENV_NAME": name, "ENV_KWARGS": {"max_steps": 2}}))
    step, (obs, state) = jax.jit(env.step), env.reset(jax.random.key(0))
    for t in range(3):
        assert obs.shape == (len(env.agents), env.size + len(env.agents))
        obs, state, reward, _, done = step(jax.random.key(t), state, jnp.zeros(len(env.agents), jnp.int32))
        assert done == (t == 2)  # MPE ends one step late
    np.testing.assert_allclose(obs, env.stack(env.env.get_obs(state)), atol=1e-6)
    assert state.step == 0 and (np.abs(obs).sum(1) > 1).all() and reward.shape == ()


def test_shaped_reward_fades_out_and_is_not_reported():
    """Three agents are given 1 a step each; over two updates it fades to 0."""
    config, train, state = parts(REW_SHAPING_HORIZON=2 * 32, REW_SCALE=2.0)
    rollout = jax.jit(train.rollout)
    for update, shaping in enumerate((1.0, 0.5, 0.0, 0.0)):
        after, trajectory, (_, returns, _, reward) = rollout(state.replace(update_steps=jnp.int32(update)))
        np.testing.assert_allclose(trajectory.reward, 2 * (reward + 3 * shaping), atol=1e-5)
    assert (returns <= 20).all()


def test_gru_is_flax_gru_cell_and_same_conv_is_flax_conv():
    key, size = jax.random.key(0), 5
    x, h = jax.random.normal(key, (4, 3, 7)), jax.random.normal(jax.random.key(1), (3, size))
    done = jax.random.bernoulli(jax.random.key(2), 0.4, (4, 3))
    ours, cell = pqn.GRU(size), nn.GRUCell(size)
    params = cell.init(key, h, x[0])["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(3), p.shape), params)

    def fuse(p):
        kernels = {
            f"{k}_kernel": jnp.concatenate([p[k[0] + g]["kernel"] for g in "rzn"], 1) for k in ("input", "hidden")
        }
        biases = {"input_bias": jnp.concatenate([p["i" + g]["bias"] for g in "rzn"]), "hidden_bias": p["hn"]["bias"]}
        return {"params": kernels | biases}

    def run_ours(p, x, h):
        out, last = ours.apply(fuse(p), x.reshape(-1, 7).T, h, done)
        return jnp.sum(jnp.sin(out.T)) + jnp.sum(last**2)

    def run_flax(p, x, h):
        total = 0.0
        for t in range(4):
            h, out = cell.apply({"params": p}, h, x[t])
            h, total = h * ~done[t][:, None], total + jnp.sum(jnp.sin(out))
        return total + jnp.sum(h**2)

    a, b = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(params, x, h) for f in (run_ours, run_flax))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), a, b)
    kernel = ours.init(key, x.reshape(-1, 7).T, h, done)["params"]["hidden_kernel"].reshape(size, 3, size)
    np.testing.assert_allclose(
        jnp.einsum("agb,agc->gbc", kernel, kernel), jnp.tile(jnp.eye(size), (3, 1, 1)), atol=1e-5
    )
    for kernel_size in (3, 5):
        theirs, image = nn.Conv(6, (kernel_size, kernel_size)), jax.random.normal(key, (2, 5, 4, 3))
        params = theirs.init(key, image)
        run = lambda p, x, k=kernel_size: pqn.SameConv(6, k).apply(p, x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)  # noqa: E731
        a, b = (
            jax.jit(jax.value_and_grad(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), (0, 1)))(params, image)
            for f in (run, theirs.apply)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), a, b)


@pytest.mark.parametrize("network", ["mlp", "rnn"])
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "none"])
def test_network(network, norm):
    """Shapes, running statistics, agents alike: the same parameters whatever the agent's place."""
    q_network = pqn.QNetwork(3, network, 8, 1, True, norm, norm == "batch_norm")
    obs, hidden = jax.random.normal(jax.random.key(0), (4, 2, 3, 5)), jax.random.normal(jax.random.key(1), (2, 3, 8))
    variables = q_network.init(jax.random.key(1), obs, hidden)
    q_values, after = q_network.apply(variables, obs, hidden)
    assert q_values.shape == (4, 2, 3, 3) and after.shape == hidden.shape
    turned, _ = q_network.apply(variables, obs[:, :, ::-1], hidden[:, ::-1])
    np.testing.assert_allclose(turned, q_values[:, :, ::-1], atol=1e-5)
    _, updated = q_network.apply(variables, obs, hidden, train=True, mutable=["batch_stats"])
    assert ("batch_stats" in variables) == (norm == "batch_norm") == ("batch_stats" in updated)


REAL = {
    "smax": {"ENV_NAME": "HeuristicEnemySMAX", "MAP_NAME": "3m", "ENV_KWARGS": {"max_steps": 6}, **RNN},
    "overcooked": {
        "ENV_NAME": "overcooked",
        "ENV_KWARGS": {"max_steps": 6},
        "NETWORK": "cnn",
        "REW_SHAPING_HORIZON": 1e3,
    },
    "hanabi": {"ENV_NAME": "hanabi", "DUELING": True},
}


@pytest.mark.parametrize("name", REAL)
def test_real_environments(name):
    """Available actions only; after an episode's end the environment's own first observation; an update is finite (of rnn
    on probes: see below)."""
    config, train, state = parts(NUM_STEPS=16, TOTAL_TIMESTEPS=1e4, NUM_MINIBATCHES=1, NUM_EPOCHS=1, **REAL[name])
    env = pqn.make_env(config)
    after, trajectory, (done, returns, lengths, _) = jax.jit(train.rollout)(state)
    chosen = np.take_along_axis(np.asarray(trajectory.available), np.asarray(trajectory.action)[..., None], -1)
    assert chosen.all() and np.isfinite(np.asarray(trajectory.value)).all()
    assert name == "overcooked" or not trajectory.available.all()
    if name != "hanabi":
        assert done.any() and (lengths[done] <= 7).all()
    get_obs = getattr(env.env, "get_obs", None)
    if name == "overcooked":
        own = jax.vmap(lambda state: env.stack(get_obs(state)))(after.env_state)
        np.testing.assert_array_equal(after.obs, own)
    ended = np.argwhere(done[:-1])
    for t, n in ended:  # a first observation is of all agents alive
        assert np.abs(np.asarray(trajectory.obs[t + 1, n])).reshape(len(env.agents), -1).max(1).min() > 0
    if config.NETWORK != "rnn":  # which compiles for long
        _, metrics = jax.jit(train.update)(state)
        assert all(np.isfinite(metrics[key]) for key in ("td_loss", "qvals", "grad_norm"))


@pytest.mark.parametrize("changes", [{}, RNN])
def test_seeds_vmapped_as_on_a_gpu_are_those_in_turn(changes):
    _, train, _ = parts(**changes)
    states = jax.jit(jax.vmap(train.init))(jax.random.split(jax.random.key(0), 2))
    together, in_turn = (jax.jit(f)(states)[1] for f in (jax.vmap(train.update), partial(jax.lax.map, train.update)))
    for key in ("td_loss", "qvals", "grad_norm"):
        np.testing.assert_allclose(together[key], in_turn[key], rtol=1e-3, atol=1e-5)


def test_an_empty_window_leaves_no_trace_in_the_statistics():
    """Before the first rollout the window holds observations of the environment's own: what is always 0 has mean 0."""
    config, train, state = parts(**RNN | {"NORM_INPUT": True, "NORM_TYPE": "batch_norm"})
    _, trajectory, _ = jax.jit(train.rollout)(state)
    always_0 = (np.asarray(trajectory.obs) == 0).all((0, 1, 2))
    after, _ = jax.jit(train.update)(state)
    assert always_0.any()
    np.testing.assert_array_equal(after.batch_stats["BatchNorm_0"]["mean"][always_0], 0)


def solve(**changes):
    """The Q-network after training on Door and its greedy return."""
    changes = {"NUM_ENVS": 32, "NUM_STEPS": 6, "TOTAL_TIMESTEPS": 32 * 6 * 400, "LR": 3e-3, "HIDDEN_SIZE": 32} | changes
    changes |= {"EPS_DECAY": 0.5, "EPS_FINISH": 0.1, "TEST_INTERVAL": 1.0, "TEST_NUM_ENVS": 64, "GAMMA": 0.95}
    _, train, _ = parts(ENV_NAME="door", LAMBDA=0.5, **changes)
    return train(jax.random.split(jax.random.key(0), 2))["metrics"]["test/returned_episode_returns"][:, -1]


def test_a_task_that_needs_both_agents_is_solved_as_a_team_and_not_by_each_alone():
    assert (solve() == 2).all()
    rng, q = np.random.default_rng(0), [np.zeros((2, 3)), np.zeros((2, 2, 3))]  # by cue, of agent 1 by cue and door
    for _ in range(20_000):  # each agent learns from its own reward
        cue, opened, action = rng.integers(2), 0, [0, 0]
        for i in range(2):
            values = q[i][0] if i == 0 else q[i][cue, opened]
            action[i] = rng.integers(3) if rng.random() < 0.2 else values.argmax()
            opened = int(action[0] == 1)
        own = (-1.0 * opened, 0.0 if action[1] == 2 else 3.0 if opened and action[1] == cue else -1.0)
        q[0][0, action[0]] += 0.05 * (own[0] - q[0][0, action[0]])
        q[1][cue, opened, action[1]] += 0.05 * (own[1] - q[1][cue, opened, action[1]])
    assert q[0][0].argmax() != 1 and (q[1][:, 0].argmax(-1) == 2).all()  # door shut, nothing tried: 0


def test_memory_is_needed_and_used():
    """The cue is shown in the first step only: without memory agent 1 can but guess, (3 - 1) / 2 - 1 = 0."""
    assert (solve(ENV_KWARGS={"forget": True}, **RNN) == 2).all()
    assert solve(ENV_KWARGS={"forget": True}).max() < 2


def test_chunks_and_resumed_runs_with_memory(tmp_path):
    changes = RNN | {"NORM_TYPE": "batch_norm", "NORM_INPUT": True, "TEST_DURING_TRAINING": False}
    config, train, _ = parts(**changes)
    whole = train(jax.random.split(jax.random.key(0), 2))
    short = pqn.Config(
        **SMALL | changes | {"TOTAL_TIMESTEPS": 32 * 5, "TOTAL_TIMESTEPS_DECAY": SMALL["TOTAL_TIMESTEPS"]}
    )
    longer = pqn.Config(**SMALL | changes | {"TOTAL_TIMESTEPS_DECAY": SMALL["TOTAL_TIMESTEPS"]})
    first = pqn.run(short, NUM_SEEDS=2, SAVE_PATH=str(tmp_path))
    resumed = pqn.run(longer, NUM_SEEDS=2, RESUME=str(first["folder"]), SAVE_PATH=str(tmp_path))
    for a, b in zip(*(jax.tree.leaves(x["runner_state"].replace(key=())) for x in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole["metrics"]["td_loss"], resumed["metrics"]["td_loss"])
    agent, state = pqn.load(first["folder"]), first["runner_state"]
    q_values, _ = agent.network.apply(
        jax.tree.map(lambda x: x[1], agent.variables), state.obs[1][None], state.hidden[1]
    )
    assert q_values.shape == (1, 4, 3, 4) and np.isfinite(q_values).all()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"ENV_NAME": "chess"}, "ENV_NAME='chess' .* HeuristicEnemySMAX, overcooked, hanabi"),
        ({"ENV_NAME": "HeuristicEnemySMAX", "MAP_NAME": "4m"}, "MAP_NAME='4m' .* 3m, 2s3z"),
        ({"ENV_NAME": "overcooked", "ENV_KWARGS": {"layout": "bar"}}, "layout.*'bar'.* cramped_room"),
        ({"ENV_NAME": "MPE_simple_spread_v3", "ENV_KWARGS": {"speed": 1}}, "unknown speed; it takes .*num_agents"),
        ({"ENV_NAME": "HeuristicEnemySMAX", "ENV_KWARGS": {"speed": 1}}, "speed"),
        (
            {"ENV_NAME": "HeuristicEnemySMAX", "ENV_KWARGS": {"enemy_shoots": "no"}},
            "ENV_KWARGS={'enemy_shoots': 'no'} cannot",
        ),
        ({"ENV_NAME": "HeuristicEnemySMAX", "ENV_KWARGS": {"attack_mode": "foo"}}, "attack_mode closest or random"),
        ({"ENV_NAME": "overcooked", "ENV_KWARGS": {"max_steps": -5}}, "with max_steps of at least 1"),
        ({"ENV_NAME": "MPE_simple_spread_v3", "ENV_KWARGS": {"kwargs": 1}}, "unknown kwargs; it takes .*damping"),
        (
            {"ENV_NAME": "MPE_simple_spread_v3", "MAP_NAME": "3m"},
            "MAP_NAME='3m' .* null: MPE_simple_spread_v3 has no maps",
        ),
        ({"NETWORK": "transformer"}, "NETWORK='transformer' .* rnn, cnn or mlp"),
        ({"NETWORK": "cnn"}, "NETWORK='cnn' .* no images"),
        ({"MEMORY_WINDOW": 2}, "MEMORY_WINDOW=2 .* at most 0"),
        ({"MEMORY_WINDOW": 9, "NETWORK": "rnn"}, "MEMORY_WINDOW=9 .* at most 8"),
        ({"NETWORK": "rnn", "NUM_MINIBATCHES": 8}, "NUM_MINIBATCHES=8 .* NUM_ENVS = 4"),
        ({"ENV_NAME": "overcooked", "REW_SHAPING_HORIZON": 0}, "REW_SHAPING_HORIZON=0 .* greater than 0"),
        (
            {"ENV_NAME": "MPE_simple_spread_v3", "REW_SHAPING_HORIZON": 1e5},
            "REW_SHAPING_HORIZON.* null: MPE_simple_spread_v3 has no shaped reward",
        ),
        ({"ENV_NAME": "HeuristicEnemySMAX", "ENV_KWARGS": {"num_allies": 9}}, "ENV_KWARGS.* MAP_NAME sets them"),
    ],
)
def test_mistakes_are_one_line(changes, text):
    with pytest.raises(pqn.UserError, match=text) as error:
        pqn.Config(**SMALL | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bonus, told", [(1.0, True), (0.05, False)])
def test_wins_are_told_only_where_the_bonus_exceeds_what_a_step_can_earn(bonus, told):
    changes = {"ENV_NAME": "HeuristicEnemySMAX", "ENV_KWARGS": {"won_battle_bonus": bonus}}
    assert (pqn.make_env(pqn.Config(**SMALL | changes)).win is not None) == told


def test_recipes_load_and_the_first_is_the_default():
    from omegaconf import OmegaConf

    recipes = {
        name: pqn.Config(**OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/pqn_vdn_{name}.yaml")))
        for name in ("mpe", "smax", "overcooked", "hanabi")
    }
    assert recipes["mpe"] == pqn.Config(**pqn.RECIPE)
    tasks = ["MPE_simple_spread_v3", "HeuristicEnemySMAX_2s3z", "overcooked_cramped_room", "hanabi"]
    assert [config.TASK for config in recipes.values()] == tasks
    hanabi = recipes["hanabi"]
    assert pqn.counters(hanabi, hanabi.NUM_UPDATES) == {"env_step": 10_000_000_000, "grad_steps": 9_765_625}
