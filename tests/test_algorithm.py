"""The algorithm against oracles: targets, time limits, exploration, minibatches, layers, episodes and evaluation."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes  # noqa: F401
import pytest
from conftest import TINY
from pydantic import ValidationError

import pqn_minatar as pqn


def oracle(reward, terminated, truncated, next_value, gamma, lam):
    """Q(lambda) from its definition: the lambda-weighted mean of all n-step returns, term by term."""
    steps, envs = reward.shape
    targets = np.zeros((steps, envs))
    for t in range(steps):
        for n in range(envs):
            weight, discounted_rewards, discount = 1.0, 0.0, 1.0
            for k in range(t, steps):
                discounted_rewards += discount * reward[k, n]
                discount *= gamma * (not terminated[k, n])
                n_step_return = discounted_rewards + discount * next_value[k, n]
                last = k == steps - 1 or terminated[k, n] or truncated[k, n]
                targets[t, n] += weight * (1.0 if last else 1 - lam) * n_step_return
                weight *= lam
                if last:
                    break
    return targets


@pytest.mark.parametrize("lam", [0.0, 0.65, 1.0])
def test_targets_equal_the_definition(lam):
    rng = np.random.default_rng(0)
    for steps in [17] * 15 + [70] * 3:  # the loop over steps is unrolled in blocks of 16
        reward, next_value = rng.normal(size=(2, steps, 6))
        terminated, truncated = rng.random((2, steps, 6)) < 0.15
        discount, trace = 0.97 * (1.0 - terminated), lam * (1.0 - (terminated | truncated))
        targets = pqn.q_lambda_targets(*map(jnp.float32, (reward, discount, next_value, trace)))
        np.testing.assert_allclose(targets, oracle(reward, terminated, truncated, next_value, 0.97, lam), atol=1e-5)


def parts(**changes):
    """A tiny Config, its (init, update, evaluate) and a state after initialisation with one seed."""
    config = pqn.Config(**(TINY | changes))
    functions = pqn.make_pqn(config)
    return config, functions, jax.jit(functions[0])(jax.random.key(1))


def first_batch(monkeypatch, config, state):
    """What update number 0 learns from: (obs, action, target, mask), each [T, N, ...], as shuffle_minibatches gets it."""
    seen, shuffle = [], pqn.shuffle_minibatches

    def spy(keys, batch, num_minibatches):
        jax.debug.callback(lambda *batch: seen.append([np.asarray(x) for x in batch]), *batch)
        return shuffle(keys, batch, num_minibatches)

    monkeypatch.setattr(pqn, "shuffle_minibatches", spy)
    jax.block_until_ready(jax.jit(pqn.make_pqn(config)[1])(state, 0))
    jax.effects_barrier()
    return seen[0]


@pytest.mark.parametrize("limit, steps", [(5, 8), (3, 16), (5, 5), (100, 16), (1, 4)])
def test_targets_of_a_rollout_bootstrap_at_time_limits(limit, steps, monkeypatch):
    """Breakout is deterministic but for its two starts, so that a rollout can be played again outside the script. A
    transition that the limit cut is masked, and the steps before it have the value of its state as their last one."""
    changes = {"ENV_KWARGS": {"max_steps_in_episode": limit}, "NUM_STEPS": steps, "TOTAL_TIMESTEPS": steps * 4}
    config, _, state = parts(GAMMA=0.9, REW_SCALE=2.0, EPS_FINISH=1.0, TEST_DURING_TRAINING=False, **changes)
    env, params = pqn.make_env(config)
    noisy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), state.variables)
    state = state._replace(variables=noisy)
    obs, action, target, mask = first_batch(monkeypatch, config, state)
    reward, terminated, cut = (np.zeros(action.shape) for _ in range(3))
    next_obs = np.zeros(obs.shape)
    starts = [env.reset_env(jax.random.key(i), params) for i in range(10)]
    for n in range(config.NUM_ENVS):
        env_state = jax.tree.map(lambda x, n=n: x[n], state.env_state)
        for t in range(steps):
            next_obs[t, n], env_state, reward[t, n], terminated[t, n], _ = env.step_env(
                jax.random.key(0), env_state, action[t, n], params
            )
            cut[t, n] = env.is_truncated(env_state, params) and not terminated[t, n]
            if (terminated[t, n] or cut[t, n]) and t < steps - 1:
                env_state = next(s for o, s in starts if (o == obs[t + 1, n]).all())
    assert cut.any() == (limit <= steps) and (mask == (cut == 0)).all()
    next_value = np.array(pqn.make_network(config).apply(noisy, next_obs).max(-1))
    before_cut = np.concatenate([cut[1:], np.zeros_like(cut[:1])])
    expected = oracle(2 * reward, terminated, before_cut, next_value, 0.9, config.LAMBDA)
    np.testing.assert_allclose(target[mask], expected[mask], atol=1e-5)


def test_a_minibatch_that_is_masked_as_a_whole_changes_nothing_and_is_no_nan():
    """Every episode lasts one step: all transitions are cut."""
    _, (_, update, _), state = parts(ENV_NAME="Clock-MinAtar", ENV_KWARGS={"max_steps_in_episode": 1})
    after, metrics = jax.jit(update)(state, 0)
    assert metrics["td_loss"] == metrics["grad_norm"] == 0 and np.isfinite(metrics["qvals"])
    jax.tree.map(np.testing.assert_array_equal, state.variables, after.variables)


def test_epsilon_greedy():
    q_values = jnp.tile(jnp.array([0.0, 3.0, 1.0, 2.0]), (40_000, 1))
    act = jax.jit(pqn.epsilon_greedy)
    assert (act(jax.random.key(0), q_values, 0.0) == 1).all()
    for epsilon in (0.3, 1.0):
        shares = np.bincount(act(jax.random.key(1), q_values, epsilon), minlength=4) / 40_000
        expected = np.array([epsilon / 4, 1 - epsilon * 3 / 4, epsilon / 4, epsilon / 4])
        np.testing.assert_allclose(shares, expected, atol=0.012)


def test_shuffle_minibatches_is_one_permutation_of_all_leaves_for_each_epoch():
    batch = {"a": jnp.arange(24).reshape(6, 4), "b": jnp.tile(jnp.arange(24).reshape(6, 4)[..., None], 3)}
    shuffled = pqn.shuffle_minibatches(jax.random.split(jax.random.key(0), 2), batch, 8)
    assert shuffled["a"].shape == (16, 3) and shuffled["b"].shape == (16, 3, 3)
    epochs = [shuffled["a"][i : i + 8].ravel().tolist() for i in (0, 8)]
    assert all(sorted(epoch) == list(range(24)) != epoch for epoch in epochs) and epochs[0] != epochs[1]
    assert (shuffled["b"] == shuffled["a"][..., None]).all()


class Layer(nn.Module):
    """A function of the script's that makes layers, as a module; `flat` removes its own scope."""

    function: Any

    @nn.compact
    def __call__(self, x):
        return self.function(x)


def compare_layers(ours, theirs, x):
    """Ours, features first and batch last, is theirs, and so are its gradients; x is laid out as theirs wants it."""
    params = jax.tree.leaves(theirs.init(jax.random.key(0), x), is_leaf=lambda tree: "bias" in tree)[0]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    flip = lambda x: x.transpose(*range(1, x.ndim), 0) if x.ndim == 2 else x.transpose(3, 1, 2, 0)  # noqa: E731
    shapes = jax.tree.map(jnp.shape, ours.init(jax.random.key(0), flip(x)))
    tree = jax.tree.structure(shapes, is_leaf=lambda x: isinstance(x, tuple))

    def of_ours(params):
        leaves = [params[name].reshape(-1, params[name].shape[-1]) if name == "kernel" else params[name]
                  for name in sorted(params)]  # fmt: skip
        return jax.tree.unflatten(tree, leaves)

    def loss(apply, params, x):
        y = apply(params, x)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape) / y.size)

    applies = (lambda p, x: flip(ours.apply(of_ours(p), flip(x))), lambda p, x: theirs.apply({"params": p}, x))
    ours, theirs = (jax.value_and_grad(partial(loss, apply), argnums=(0, 1))(params, x) for apply in applies)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4), ours, theirs)


@pytest.mark.parametrize("shape", [(6, 256), (5, 8, 8, 16)])
def test_layer_norm_is_flax_layer_norm(shape):
    compare_layers(pqn.LayerNorm(), nn.LayerNorm(), 3 + 2 * jax.random.normal(jax.random.key(2), shape))


def test_dense_and_conv_are_flax_dense_and_conv():
    x = jax.random.normal(jax.random.key(2), (6, 5))
    compare_layers(Layer(lambda x: pqn.dense(x, 7)), nn.Dense(7), x)
    x = jax.random.normal(jax.random.key(2), (5, 10, 10, 4))
    compare_layers(Layer(lambda x: pqn.conv(x, 16)), nn.Conv(16, (3, 3), padding="VALID"), x)


def test_kernels_are_drawn_as_in_the_papers_network():
    """He-normal in hidden layers, LeCun-normal in the last one: standard deviations of sqrt(2 / n) and sqrt(1 / n)."""
    params = pqn.make_network(pqn.Config()).init(jax.random.key(0), jnp.zeros((1, 10, 10, 4)))["params"]
    for i, (inputs, gain) in enumerate([(36, 2), (1024, 2), (128, 1)]):
        kernel = params[f"Einsum_{i}"]["kernel"]
        assert len(kernel) == inputs and abs(kernel.std() * np.sqrt(inputs / gain) - 1) < 0.1


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "none"])
@pytest.mark.parametrize("norm_input", [False, True])
def test_network_takes_any_leading_axes_and_tracks_statistics(norm, norm_input):
    config = pqn.Config(NORM_TYPE=norm, NORM_INPUT=norm_input)
    network = pqn.QNetwork(config, 3)
    obs = (jax.random.uniform(jax.random.key(0), (2, 5, 10, 10, 4)) < 0.3).astype(jnp.float32)
    variables = network.init(jax.random.key(1), obs)
    assert network.apply(variables, obs).shape == (2, 5, 3)
    np.testing.assert_allclose(network.apply(variables, obs)[1], network.apply(variables, obs[1]), atol=1e-5)
    divided = pqn.QNetwork(pqn.override(config, OBS_DIVISOR=255), 3)  # of no use where inputs are normalised
    scale = 1 if norm_input else 255
    np.testing.assert_allclose(divided.apply(variables, scale * obs), network.apply(variables, obs), atol=1e-4)
    _, updated = network.apply(variables, obs, train=True, mutable=["batch_stats"])
    assert ("batch_stats" in variables) == (norm == "batch_norm" or norm_input) == ("batch_stats" in updated)


def test_episode_statistics():
    """Episodes of 5 steps with reward 1 each in rollouts of 4: none ends in the first, all in the second."""
    _, (_, update, _), state = parts(ENV_NAME="Clock-MinAtar", NUM_STEPS=4, TOTAL_TIMESTEPS=400, REW_SCALE=0.1)
    update, returns = jax.jit(update), []
    for i in range(5):
        state, metrics = update(state, i)
        returns.append((float(metrics["returned_episode_returns"]), float(metrics["returned_episode_lengths"])))
    assert np.isnan(returns[0]).all()
    assert returns[1:] == [(5.0, 5.0)] * 4


def test_evaluation_is_the_mean_over_all_first_episodes():
    """Lengths are uniform over 2..9: a fixed window of steps would see short ones more often, and a mean over those that
    ended only (up to the fifth step: 3.5) would leave out the best."""
    changes = {"ENV_NAME": "Clock-MinAtar", "ENV_KWARGS": {"shortest": 2, "longest": 9}, "TEST_NUM_ENVS": 4096}
    _, (_, _, evaluate), state = parts(**changes, TEST_NUM_STEPS=100)
    metrics = evaluate(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - 5.5) < 0.15
    assert metrics["test/returned_episode_returns"] == metrics["test/returned_episode_lengths"]
    assert metrics["test/unfinished"] == 0
    _, (_, _, evaluate), state = parts(**changes, TEST_NUM_STEPS=5)
    metrics = evaluate(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - (2 + 3 + 4 + 5 * 5) / 8) < 0.1
    assert abs(metrics["test/unfinished"] - 0.5) < 0.05


def test_evaluations_are_spread_evenly_and_the_last_one_follows_the_last_update():
    key = jax.random.key(0)
    for changes, updates in (
        ({}, [2, 5, 8, 11]),
        ({"TEST_DURING_TRAINING": False}, [11]),
        ({"TEST_INTERVAL": 1}, [11]),
    ):
        metrics = jax.jit(pqn.make_train(pqn.Config(**TINY | changes)))(key)["metrics"]
        assert np.flatnonzero(np.isfinite(metrics["test/unfinished"])).tolist() == updates


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_learns_the_values_of_a_probe(lam):
    """With reward 1 for one action, terminated after 3 steps: V = 1 + 0.5 + 0.25, 1 + 0.5, 1 by the time shown."""
    kwargs = {"choose": True, "shortest": 3, "longest": 3}
    config, _, _ = parts(
        ENV_NAME="Clock-MinAtar", ENV_KWARGS=kwargs, GAMMA=0.5, LAMBDA=lam, LR=3e-3, NUM_ENVS=16,
        TOTAL_TIMESTEPS=16 * 8 * 300, EPS_DECAY=0.5, EPS_FINISH=0.3 if lam == 0 else 0.05,
    )  # fmt: skip
    state = jax.jit(pqn.make_train(config))(jax.random.key(0))["runner_state"]
    env, params = pqn.make_env(config)
    for time, value in enumerate((1.75, 1.5, 1.0)):
        obs = env.observe_state(probes.State(time, 3))[None]
        q_values = pqn.make_network(config).apply(state.variables, obs)[0]
        np.testing.assert_allclose(q_values, value - np.array([1, 0, 1]), atol=0.15)


def test_a_time_limit_is_no_terminal_state():
    """Reward 1 a step, cut every 4 steps, never terminated: V = 1 / (1 - 0.5) = 2 at all times, not 1 + 0.5 + ... ."""
    kwargs = {"shortest": 1000, "longest": 1000, "max_steps_in_episode": 4}
    config, _, _ = parts(
        ENV_NAME="Clock-MinAtar", ENV_KWARGS=kwargs, GAMMA=0.5, LR=3e-3, NUM_ENVS=16, TOTAL_TIMESTEPS=16 * 8 * 200
    )
    state = jax.jit(pqn.make_train(config))(jax.random.key(0))["runner_state"]
    env, params = pqn.make_env(config)
    for time in range(4):
        obs = env.observe_state(probes.State(time, 1000))[None]
        np.testing.assert_allclose(pqn.make_network(config).apply(state.variables, obs)[0], 2, atol=0.1)


def test_vmap_over_hyper_parameters_gives_each_row_its_own_run():
    """A row for each hyper-parameter changed alone, beside runs whose Config has that value from the start."""
    rows = [
        {"LR": 1e-2},
        {"GAMMA": 0.5},
        {"LAMBDA": 0.1},
        {"EPS_FINISH": 0.9},
        {"MAX_GRAD_NORM": 1e-2},
        {"REW_SCALE": 3.0},
    ]
    few = {
        "ENV_NAME": "Clock-MinAtar",
        "TOTAL_TIMESTEPS": 4 * 8 * 3,
        "TEST_DURING_TRAINING": False,
        "LR_LINEAR_DECAY": False,
    }
    config = pqn.Config(**TINY | few)
    values = {key: jnp.array([row.get(key, vars(config)[key]) for row in rows]) for row in rows for key in row}
    train = lambda values, key: pqn.make_train(pqn.override(config, **values))(key)["metrics"]  # noqa: E731
    swept = jax.jit(jax.vmap(train, (0, None)))(values, jax.random.key(0))
    plain = jax.jit(pqn.make_train(config))(jax.random.key(0))["metrics"]
    for i, row in enumerate(rows):
        own = jax.jit(pqn.make_train(pqn.Config(**vars(config) | row)))(jax.random.key(0))["metrics"]
        for name in ("td_loss", "qvals", "grad_norm", "epsilon", "learning_rate"):
            np.testing.assert_allclose(swept[name][i], own[name], rtol=2e-3, atol=1e-4, err_msg=f"{row} {name}")
        assert any(not np.allclose(own[name], plain[name], rtol=1e-2) for name in ("qvals", "td_loss", "epsilon")), row


@pytest.mark.parametrize("norm", [1e-2, 1e3])
def test_a_gradient_step_is_radam_on_the_clipped_gradient_of_the_masked_loss(norm, monkeypatch):
    """By optax and a loss written out: parameters, moments, the loss and the gradient's norm before clipping."""
    once = {"NUM_MINIBATCHES": 1, "NUM_EPOCHS": 1, "MAX_GRAD_NORM": norm, "LR_LINEAR_DECAY": False}
    config, (_, update, _), state = parts(**once, ENV_KWARGS={"max_steps_in_episode": 5})
    obs, action, target, mask = first_batch(monkeypatch, config, state)
    assert 0 < mask.mean() < 1

    def loss(params):
        q_values = pqn.make_network(config).apply({"params": params}, obs)
        q_action = jnp.take_along_axis(q_values, action[..., None], -1)[..., 0]
        return 0.5 * jnp.square(q_action - target)[mask].mean()

    params = state.variables["params"]
    td_loss, grads = jax.value_and_grad(loss)(params)
    optimizer = optax.chain(optax.clip_by_global_norm(norm), optax.radam(optax.constant_schedule(config.LR)))
    changes, (_, opt_state) = optimizer.update(grads, optimizer.init(params))
    after, metrics = jax.jit(update)(state, 0)
    change = jax.tree.map(jnp.subtract, after.variables["params"], params)
    close = partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-7)
    jax.tree.map(close, (change, after.opt_state), (changes, opt_state))
    assert metrics["td_loss"] == pytest.approx(float(td_loss), rel=1e-4)
    assert (
        metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4) and metrics["grad_norm"] > 1e-2
    )


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_what_is_done_for_a_gpu_changes_no_number(norm, monkeypatch):
    """Parameters as one vector, unrolled loops."""
    config, (_, update, _), state = parts(NORM_TYPE=norm)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        vector_update = pqn.make_pqn(config)[1]
    plain = vector = state
    for i in range(2):
        (plain, expected), (vector, metrics) = jax.jit(update)(plain, i), jax.jit(vector_update)(vector, i)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), metrics, expected)
    assert jax.tree.structure(vector) == jax.tree.structure(plain)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, (vector.variables, vector.opt_state), (plain.variables, plain.opt_state))


def test_the_idiom_of_purejaxrl_and_later_edits_of_a_config():
    config = pqn.Config(**TINY | {"TOTAL_TIMESTEPS": 96, "GAMMA": 0.5})
    train = pqn.make_train(config)
    config.GAMMA, config.TOTAL_TIMESTEPS = 0.99, 64
    keys = jax.random.split(jax.random.key(0), 2)
    out = jax.jit(jax.vmap(train))(keys)
    assert out["metrics"]["returned_episode_returns"].shape == out["metrics"]["td_loss"].shape == (2, 3)
    other = jax.jit(jax.vmap(pqn.make_train(pqn.Config(**TINY | {"TOTAL_TIMESTEPS": 96, "GAMMA": 0.5}))))(keys)
    np.testing.assert_array_equal(out["metrics"]["td_loss"], other["metrics"]["td_loss"])
    with pytest.raises(ValidationError):
        config.NUM_ENVS = 2.5
    config.NUM_ENVS = 1e1
    assert config.NUM_ENVS == 10 and isinstance(config.NUM_ENVS, int)
