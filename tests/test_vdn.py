"""The VDN script: targets and hidden states against oracles, availability, episode ends, probes that need a team."""

import json
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import team_probes  # noqa: F401
from conftest import ROOT, TINY
from omegaconf import OmegaConf
from test_algorithm import oracle

import pqn_vdn_jaxmarl as pqn

PLAIN = {"NETWORK": "mlp", "MEMORY_WINDOW": 0, "NORM_TYPE": "layer_norm", "NORM_INPUT": False, "REW_SCALE": 1.0}
PLAIN |= {"ALG_NAME": "probe", "MAP_NAME": None, "HIDDEN_SIZE": 16, "NUM_LAYERS": 1, "GAMMA": 0.9, "LAMBDA": 0.7}
SMALL = TINY | PLAIN | {"ENV_NAME": "clock", "LR": 5e-4, "LR_LINEAR_DECAY": False, "EPS_FINISH": 0.1}
RNN = {"NETWORK": "rnn", "MEMORY_WINDOW": 3}


def parts(**changes):
    """A Config, its (init, update, evaluate) and a state after initialisation with one seed."""
    config = pqn.Config(**SMALL | changes)
    functions = pqn.make_pqn(config)
    return config, functions, jax.jit(functions[0])(jax.random.key(1))


def spied(monkeypatch, config):
    """update(state, i) that returns the state after it, its metrics, and what it learns from, as shuffle_minibatches gets
    it: (hidden state, steps, targets)."""
    seen, shuffle = [], pqn.shuffle_minibatches

    def spy(keys, batch, num_minibatches):
        jax.debug.callback(lambda batch: seen.append(jax.tree.map(np.asarray, batch)), batch)
        return shuffle(keys, batch, num_minibatches)

    monkeypatch.setattr(pqn, "shuffle_minibatches", spy)
    compiled = jax.jit(pqn.make_pqn(config)[1])

    def update(state, i):
        seen.clear()
        after, metrics = jax.block_until_ready(compiled(state, i))
        jax.effects_barrier()
        return after, metrics, seen[0]

    return update


@cache
def compiled_network(values):
    """The network of a Config's values, compiled once for all calls."""
    return jax.jit(pqn.make_network(pqn.Config(**json.loads(values))).apply)


def stepper(config):
    return compiled_network(json.dumps(vars(config)))


def played(config, variables, trajectory, after, hidden):
    """Of a rollout and the state after it, stepped one by one with the hidden state 0 at each start: Q-values and
    available actions [T + 1, N, A, num_actions], and the hidden states before each step."""
    q_values, hiddens, step = [], [], stepper(config)
    for t, obs in enumerate([*trajectory.obs, after.now.obs]):
        hiddens.append(hidden)
        q, hidden = step(variables, obs[None], hidden)
        q_values.append(np.asarray(q[0]))
        if t < len(trajectory.obs):
            hidden = jax.tree.map(lambda h, t=t: h * ~trajectory.done[t][:, None, None], hidden)
    return np.stack(q_values), np.concatenate([trajectory.available, after.now.available[None]]), hiddens


def best(q_values, available):
    """The team's value by a loop over agents and actions."""
    value = np.zeros(q_values.shape[:-2])
    for index in np.ndindex(value.shape):
        for q, can in zip(q_values[index], available[index], strict=True):
            value[index] += max(x for x, a in zip(q, can, strict=True) if a)
    return value


def expected_targets(config, q_values, available, trajectory):
    reward, done = config.REW_SCALE * np.asarray(trajectory.reward), np.asarray(trajectory.done)
    return oracle(reward, done, done & False, best(q_values, available)[1:], config.GAMMA, config.LAMBDA)


def test_feed_forward_targets_equal_the_oracle(monkeypatch):
    """Agents with unlike actions, some unavailable, some dead; episode ends are terminal."""
    few = {"NUM_STEPS": 16, "TOTAL_TIMESTEPS": 16 * 4, "NUM_EPOCHS": 1, "NUM_MINIBATCHES": 1}
    config, _, state = parts(**few, REW_SCALE=0.5)
    after, losses, (_, steps, targets) = spied(monkeypatch, config)(state, 0)
    assert steps.done.any() and not steps.available.all() and (steps.obs == 0).all(-1).any() and steps.mask.all()
    q_values, available, _ = played(config, state.variables, steps, after, ())
    np.testing.assert_allclose(targets, expected_targets(config, q_values, available, steps), atol=1e-4)
    # the team's Q is the sum over agents, of the actions they took
    chosen = np.take_along_axis(q_values[:-1], np.asarray(steps.action)[..., None], -1).sum((2, 3))
    assert losses["td_loss"] == pytest.approx(0.5 * np.square(chosen - targets).mean(), rel=1e-4)
    assert losses["qvals"] == pytest.approx(chosen.mean(), rel=1e-3)


@pytest.mark.parametrize("window", [0, 3, 8])
def test_recurrent_loss_equals_the_oracle_and_no_hidden_state_crosses_an_episode_end(window, monkeypatch):
    """The losses of three rollouts, the parameters left as they are; before the first there is no window."""
    once = {"NUM_MINIBATCHES": 1, "NUM_EPOCHS": 1, "TOTAL_TIMESTEPS": 1e3}
    config, _, state = parts(NETWORK="rnn", MEMORY_WINDOW=window, **once)
    update, history, variables = spied(monkeypatch, config), [], state.variables
    for i in range(3):
        after, losses, (hidden, sequence, _) = update(state, i)
        sequence = jax.tree.map(lambda x: x[0].swapaxes(0, 1), sequence)
        history.append(jax.tree.map(lambda x: x[window:-1], sequence))
        steps = jax.tree.map(lambda *x: np.concatenate(x), *history)
        q_values, available, hiddens = played(config, variables, steps, after, jnp.zeros((4, 3, 16)))
        np.testing.assert_allclose(after.hidden, hiddens[-1], atol=1e-5)
        begin = max(0, 8 * i - window)
        assert sequence.done.shape == (8 + window + 1, 4)
        assert sequence.mask[window:-1].all() and (sequence.mask[:window] == (i > 0)).all()
        np.testing.assert_allclose(hidden[0], hiddens[begin], atol=1e-5)
        trained = jax.tree.map(lambda x, begin=begin: x[begin:], steps)
        targets = expected_targets(config, q_values[begin:], available[begin:], trained)
        chosen = np.take_along_axis(q_values[begin:-1], trained.action[..., None], -1).sum((2, 3))
        assert losses["td_loss"] == pytest.approx(0.5 * np.square(chosen - targets).mean(), rel=1e-4)
        assert losses["qvals"] == pytest.approx(chosen.mean(), rel=1e-3, abs=1e-5)
        assert np.isfinite(losses["grad_norm"])
        state = after._replace(variables=variables)
    assert steps.done[:-1].any() and (hiddens[-1] != 0).any()


def test_unavailable_actions_are_never_chosen():
    available = jax.random.bernoulli(jax.random.key(0), 0.4, (5, 3, 6)).at[..., 2].set(True)
    q_values = jax.random.normal(jax.random.key(1), available.shape) - 10.0 * available
    act = jax.jit(jax.vmap(pqn.epsilon_greedy, (0, None, None, None)))
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
    config, _, _ = parts(TEST_NUM_ENVS=64, EPS_TEST=0.5, NUM_STEPS=16, TOTAL_TIMESTEPS=16 * 4 * 4, **changes)
    metrics = jax.jit(jax.vmap(pqn.make_train(config)))(jax.random.split(jax.random.key(0), 2))["metrics"]
    for prefix in ("", "test/"):
        returns, lengths = (metrics[f"{prefix}returned_episode_{x}"][:, -1] for x in ("returns", "lengths"))
        assert (returns >= 0).all() and (returns <= 20).all() and (lengths >= 4).all() and (lengths <= 9).all()
    assert (metrics["test/unfinished"][:, -1] == 0).all() and np.isfinite(metrics["td_loss"]).all()


def test_evaluation_counts_first_episodes_and_wins():
    """Greedy on zero Q-values is action 0 for ever, and wins nothing; the last available actions earn 3, then 6: won."""
    config, (_, _, evaluate), state = parts(TEST_NUM_ENVS=1024, TEST_NUM_STEPS=6)
    state = state._replace(variables=jax.tree.map(jnp.zeros_like, state.variables))
    metrics = evaluate(state, jax.random.key(0))
    assert metrics["test/returned_episode_returns"] == 0 == metrics["test/returned_won_episode"]
    # lengths are 4 to 9, of which 4, 5 and 6 end in time: the others count as far as they got
    assert abs(metrics["test/returned_episode_lengths"] - (4 + 5 + 4 * 6) / 6) < 0.1
    assert abs(metrics["test/unfinished"] - 0.5) < 0.06
    config, (_, _, evaluate), state = parts(
        TEST_NUM_ENVS=64, TEST_NUM_STEPS=2, ENV_KWARGS={"shortest": 2, "longest": 2}, DUELING=True
    )
    zeros = jax.tree.map(jnp.zeros_like, state.variables)
    heads = [name for name, layer in zeros["params"].items() if "bias" in layer and layer["bias"].shape == (4,)]
    zeros["params"][heads[0]]["bias"] = jnp.arange(4.0)  # the last available action
    metrics = evaluate(state._replace(variables=zeros), jax.random.key(0))
    assert metrics["test/returned_episode_returns"] == (0 + 1 + 2) + (1 + 2 + 3)
    assert metrics["test/returned_won_episode"] == 1


def test_observations_are_the_environments_own(monkeypatch):
    """Padded, with ids; blank only for an agent that died while the others play on, and never at a start."""
    config, _, state = parts(NUM_STEPS=32, TOTAL_TIMESTEPS=32 * 4)
    _, _, (_, trajectory, _) = spied(monkeypatch, config)(state, 0)
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
    _, state = env.batch_reset(jax.random.key(0))
    for t in range(3):
        obs, state, reward, done, _ = env.batch_step(
            jax.random.key(t), state, dict.fromkeys(env.agents, jnp.zeros(1, int))
        )
        assert done["__all__"] == (t == 2)  # MPE ends one step late
    own = env.get_obs(jax.tree.map(lambda x: x[0], state))
    for i, agent in enumerate(env.agents):
        np.testing.assert_allclose(obs[agent][0, : len(own[agent])], own[agent], atol=1e-6)
        assert obs[agent][0, env.max_obs_length :].tolist() == np.eye(len(env.agents))[i].tolist()
    assert state.step == 0 and reward["__all__"] == sum(reward[agent] for agent in env.agents)


def test_shaped_reward_fades_out_and_is_not_reported(monkeypatch):
    """Three agents are given 1 a step each; over two updates it fades to 0."""
    config, _, state = parts(REW_SHAPING_HORIZON=2 * 32)
    update = spied(monkeypatch, config)
    for i, shaping in enumerate((1.0, 0.5, 0.0, 0.0)):
        after, metrics, (_, trajectory, _) = update(state, i)
        reward = np.diff(trajectory.returns, axis=0, prepend=0)  # what is reported
        reward = np.where(np.roll(trajectory.done, 1, 0), trajectory.returns, reward)
        np.testing.assert_allclose(trajectory.reward, reward + 3 * shaping, atol=1e-5)
        assert trajectory.returns.max() <= 20 and metrics["returned_episode_returns"] <= 20


def test_gru_is_flax_gru_cell_and_same_conv_is_flax_conv():
    key, size = jax.random.key(0), 5
    x, h = jax.random.normal(key, (4, 3, 7)), jax.random.normal(jax.random.key(1), (3, size))
    done = jax.random.bernoulli(jax.random.key(2), 0.4, (4, 3))
    ours, cell = pqn.GRU(), nn.GRUCell(size)
    params = cell.init(key, h, x[0])["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(3), p.shape), params)

    def fuse(p):
        inputs = {k: jnp.concatenate([p["i" + gate][k] for gate in "rzn"], -1) for k in ("kernel", "bias")}
        hidden = {f"hidden_{name}": p["h" + name[0].translate({117: "z", 99: "n"})]["kernel"] for name in GATES}
        return {"params": {"Einsum_0": inputs, "hidden_bias": p["hn"]["bias"]} | hidden}

    def run_ours(p, x, h):
        out, last = ours.apply(fuse(p), x.reshape(-1, 7).T, h[:, None], done)
        return jnp.sum(jnp.sin(out.T)) + jnp.sum(last**2)

    def run_flax(p, x, h):
        total = 0.0
        for t in range(4):
            h, out = cell.apply({"params": p}, h, x[t])
            h, total = h * ~done[t][:, None], total + jnp.sum(jnp.sin(out))
        return total + jnp.sum(h**2)

    a, b = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(params, x, h) for f in (run_ours, run_flax))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), a, b)
    drawn = ours.init(key, x.reshape(-1, 7).T, h[:, None], done)["params"]
    for gate in GATES:
        kernel = drawn[f"hidden_{gate}"]
        np.testing.assert_allclose(kernel.T @ kernel, jnp.eye(size), atol=1e-5)
    for kernel_size in (3, 5):
        theirs, image = nn.Conv(6, (kernel_size, kernel_size)), jax.random.normal(key, (2, 5, 4, 3))
        params = theirs.init(key, image)
        conv = Convolution(kernel_size)

        def run(p, x, conv=conv):
            kernel = p["params"]["kernel"].reshape(-1, 6)
            params = {"params": {"Einsum_0": {"kernel": kernel, "bias": p["params"]["bias"]}}}
            return conv.apply(params, x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0)

        a, b = (
            jax.jit(jax.value_and_grad(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), (0, 1)))(params, image)
            for f in (run, theirs.apply)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), a, b)


GATES = ("reset", "update", "candidate")


class Convolution(nn.Module):
    """The script's conv to 6 features, padded with zeros, as a module."""

    size: int

    @nn.compact
    def __call__(self, x):
        return pqn.conv(jnp.pad(x, ((0, 0), *[(self.size // 2, self.size // 2)] * 2, (0, 0))), 6, self.size)


def test_kernels_are_drawn_as_in_the_published_networks():
    """LeCun-normal everywhere but in the GRU's recurrent kernels: a standard deviation of sqrt(1 / inputs)."""
    config = pqn.Config(**SMALL | {"ENV_NAME": "overcooked", "NETWORK": "cnn", "HIDDEN_SIZE": 256})
    params = jax.jit(pqn.make_pqn(config)[0])(jax.random.key(0)).variables["params"]
    inputs = [layer["kernel"].shape[0] for name, layer in sorted(params.items()) if "Einsum" in name]
    assert inputs == [25 * 26, 9 * 32, 9 * 32, 4 * 5 * 32, 256]
    for i, count in enumerate(inputs):
        assert abs(params[f"Einsum_{i}"]["kernel"].std() * np.sqrt(count) - 1) < 0.1


@pytest.mark.parametrize("network", ["mlp", "rnn"])
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "none"])
def test_network(network, norm):
    """Shapes, running statistics, agents alike: the same parameters whatever the agent's place."""
    values = {"NETWORK": network, "HIDDEN_SIZE": 8, "DUELING": True, "NORM_TYPE": norm}
    q_network = pqn.QNetwork(pqn.Config(**SMALL | values | {"NORM_INPUT": norm == "batch_norm"}), 3)
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
def test_real_environments(name, monkeypatch):
    """Available actions only; after an episode's end the environment's own first observation; an update is finite."""
    config, _, state = parts(NUM_STEPS=16, TOTAL_TIMESTEPS=1e4, NUM_MINIBATCHES=1, NUM_EPOCHS=1, **REAL[name])
    env = pqn.make_env(config)
    after, metrics, (_, trajectory, _) = spied(monkeypatch, config)(state, 0)
    if config.NETWORK == "rnn":
        trajectory = jax.tree.map(lambda x: x[0].swapaxes(0, 1)[config.MEMORY_WINDOW : -1], trajectory)
    done = trajectory.done
    chosen = np.take_along_axis(np.asarray(trajectory.available), np.asarray(trajectory.action)[..., None], -1)
    assert chosen.all() and np.isfinite(np.asarray(trajectory.value)).all()
    assert name == "overcooked" or not trajectory.available.all()
    if name != "hanabi":
        assert done.any() and (trajectory.lengths[done] <= 7).all()
    if name == "overcooked":
        own = jax.vmap(env.get_obs)(after.env_state)
        np.testing.assert_array_equal(after.now.obs, np.stack([own[agent] for agent in env.agents], 1))
    ended = np.argwhere(done[:-1])
    for t, n in ended:  # a first observation is of all agents alive
        assert np.abs(np.asarray(trajectory.obs[t + 1, n])).reshape(len(env.agents), -1).max(1).min() > 0
    assert all(np.isfinite(metrics[key]) for key in ("td_loss", "qvals", "grad_norm"))


@pytest.mark.parametrize("changes", [{}, RNN])
def test_seeds_vmapped_as_on_a_gpu_are_those_in_turn(changes):
    _, (init, update, _), _ = parts(**changes)
    states = jax.jit(partial(jax.lax.map, init))(jax.random.split(jax.random.key(0), 2))
    step = partial(update, i=0)
    together, in_turn = (jax.jit(f)(states)[1] for f in (jax.vmap(step), partial(jax.lax.map, step)))
    for key in ("td_loss", "qvals", "grad_norm"):
        np.testing.assert_allclose(together[key], in_turn[key], rtol=1e-3, atol=1e-5)


def test_an_empty_window_leaves_no_trace_in_the_statistics(monkeypatch):
    """Before the first rollout the window holds observations of the environment's own: what is always 0 has mean 0."""
    config, _, state = parts(**RNN | {"NORM_INPUT": True, "NORM_TYPE": "batch_norm"})
    after, _, (_, sequence, _) = spied(monkeypatch, config)(state, 0)
    always_0 = (sequence.obs[0, :, config.MEMORY_WINDOW : -1] == 0).all((0, 1, 2))
    assert always_0.any()
    np.testing.assert_array_equal(after.variables["batch_stats"]["BatchNorm_0"]["mean"][always_0], 0)


def solve(**changes):
    """The greedy return after training on Door, of two seeds."""
    changes = {"NUM_ENVS": 32, "NUM_STEPS": 6, "TOTAL_TIMESTEPS": 32 * 6 * 400, "LR": 3e-3, "HIDDEN_SIZE": 32} | changes
    changes |= {"EPS_DECAY": 0.5, "EPS_FINISH": 0.1, "TEST_INTERVAL": 1.0, "TEST_NUM_ENVS": 64, "GAMMA": 0.95}
    config, _, _ = parts(ENV_NAME="door", LAMBDA=0.5, **changes)
    keys = jax.random.split(jax.random.key(0), 2)
    out = jax.jit(partial(jax.lax.map, pqn.make_train(config)))(keys)
    return out["metrics"]["test/returned_episode_returns"][:, -1]


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


def test_resumed_runs_with_memory(tmp_path):
    """A run that goes on ends as one that never stopped: window, hidden states and statistics are in the checkpoint."""
    changes = SMALL | RNN | {"NORM_TYPE": "batch_norm", "NORM_INPUT": True, "TEST_DURING_TRAINING": False}
    short = changes | {"TOTAL_TIMESTEPS": 32 * 5, "TOTAL_TIMESTEPS_DECAY": SMALL["TOTAL_TIMESTEPS"]}
    longer = pqn.Config(**changes | {"TOTAL_TIMESTEPS_DECAY": SMALL["TOTAL_TIMESTEPS"]})
    whole = pqn.run(longer, NUM_SEEDS=2, SAVE_PATH=tmp_path / "whole")
    first = pqn.run(pqn.Config(**short), NUM_SEEDS=2, SAVE_PATH=tmp_path)
    resumed = pqn.run(longer, NUM_SEEDS=2, RESUME=first["folder"], SAVE_PATH=tmp_path)
    states = (jax.tree.leaves(x["runner_state"]._replace(key=())) for x in (whole, resumed))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole["metrics"].td_loss, resumed["metrics"].td_loss)
    _, network, variables = pqn.load(first["folder"])
    state = resumed["runner_state"]
    q_values, _ = network.apply(jax.tree.map(lambda x: x[1], variables), state.now.obs[1][None], state.hidden[1])
    assert q_values.shape == (1, 4, 3, 4) and np.isfinite(q_values).all()


SMAX, SPREAD = {"ENV_NAME": "HeuristicEnemySMAX", "MAP_NAME": "2s3z"}, {"ENV_NAME": "MPE_simple_spread_v3"}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"ENV_NAME": "chess"}, "ENV_NAME=chess .* HeuristicEnemySMAX, overcooked, hanabi"),
        (SMAX | {"MAP_NAME": "4m"}, "MAP_NAME=4m .* 3m or 2s3z"),
        (SMAX | {"MAP_NAME": None}, "MAP_NAME=None .* 3m or 2s3z"),
        (
            {"ENV_NAME": "overcooked", "ENV_KWARGS": {"layout": "bar"}},
            "'layout': 'bar'.* must be one of .*cramped_room",
        ),
        (SMAX | {"ENV_KWARGS": {"speed": 1}}, "ENV_KWARGS={'speed': 1} .* must be .*'speed'"),
        (SMAX | {"ENV_KWARGS": {"enemy_shoots": "no"}}, "ENV_KWARGS={'enemy_shoots': 'no'} .* must be"),
        (SPREAD | {"MAP_NAME": "3m"}, "MAP_NAME=3m .*MPE_simple_spread_v3 must be null"),
        ({"NETWORK": "transformer"}, "NETWORK\n.*'rnn', 'cnn' or 'mlp'"),
        ({"NETWORK": "cnn"}, "NETWORK=cnn .* no images"),
        ({"MEMORY_WINDOW": 2}, "MEMORY_WINDOW=2 .* at most 0"),
        ({"MEMORY_WINDOW": 9, "NETWORK": "rnn"}, "MEMORY_WINDOW=9 .* at most 8"),
        ({"NETWORK": "rnn", "NUM_MINIBATCHES": 8}, "NUM_MINIBATCHES=8 .* a divisor of 4"),
        ({"ENV_NAME": "overcooked", "REW_SHAPING_HORIZON": 0}, "REW_SHAPING_HORIZON\n.*greater than 0"),
        (
            SPREAD | {"REW_SHAPING_HORIZON": 1e5},
            "REW_SHAPING_HORIZON.*MPE_simple_spread_v3 must be null: none here",
        ),
        (SMAX | {"ENV_KWARGS": {"num_allies": 9}}, "ENV_KWARGS.* without MAP_NAME's own"),
        ({"ENV_NAME": "hanabi", "ALG_NAME": "pqn_vdn_smax"}, r"ALG_NAME=pqn_vdn_smax .*hanabi .*\+alg=pqn_vdn_hanabi"),
        (SMAX | {"ALG_NAME": "pqn_vdn_mpe"}, r"ALG_NAME=pqn_vdn_mpe .*SMAX .*\+alg=pqn_vdn_smax"),
    ],
)
def test_mistakes_are_one_line(changes, text):
    with pytest.raises(ValueError, match=text) as error:
        pqn.Config(**SMALL | changes)
    assert "\n" not in error.value.errors()[0]["msg"] and len(error.value.errors()) == 1


@pytest.mark.parametrize("name", ["overcooked", "hanabi", "MPE_simple_spread_v3"])
def test_another_suite_does_not_train_with_the_defaults(name):
    """Whose network and numbers are SMAX's: the message names the recipe."""
    with pytest.raises(ValueError, match=rf"ENV_NAME={name} must be its recipe, \+alg=pqn_vdn_"):
        pqn.Config(ENV_NAME=name)


@pytest.mark.parametrize("bonus, told", [(1.0, True), (0.05, False)])
def test_wins_are_told_only_where_the_bonus_exceeds_what_a_step_can_earn(bonus, told):
    config = pqn.Config(**SMALL | SMAX | {"ENV_KWARGS": {"won_battle_bonus": bonus}})
    init, _, evaluate = pqn.make_pqn(config)
    metrics = jax.eval_shape(lambda key: evaluate(init(key), key), jax.random.key(0))
    assert ("test/returned_won_episode" in metrics) == told


def test_recipes_load_and_the_first_is_the_default():
    names = ("smax", "overcooked", "hanabi", "mpe")
    files = [OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/pqn_vdn_{name}.yaml")) for name in names]
    recipes = [pqn.Config(**file) for file in files]
    assert recipes[0] == pqn.Config() and all(set(file) == set(vars(pqn.Config())) for file in files)
    tasks = ["HeuristicEnemySMAX_2s3z", "overcooked_cramped_room", "hanabi", "MPE_simple_spread_v3"]
    assert [config.TASK for config in recipes] == tasks
    hanabi = recipes[2]
    assert hanabi.NUM_UPDATES == 9_765_625 == 10_000_000_000 / (hanabi.NUM_ENVS * hanabi.NUM_STEPS)
