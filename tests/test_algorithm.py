"""The algorithm against oracles: targets, time limits, exploration, minibatches, layers, episodes and evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import probes  # noqa: F401
import pytest
from conftest import TINY

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
    for _ in range(20):
        reward, next_value = rng.normal(size=(2, 17, 6))
        terminated, truncated = rng.random((2, 17, 6)) < 0.15
        discount, trace = 0.97 * (1.0 - terminated), lam * (1.0 - (terminated | truncated))
        targets = pqn.q_lambda_targets(*map(jnp.float32, (reward, discount, next_value, trace)))
        np.testing.assert_allclose(targets, oracle(reward, terminated, truncated, next_value, 0.97, lam), atol=1e-5)


def parts(**changes):
    """A tiny Config, its train function and a state after initialisation with one seed."""
    config = pqn.Config(**(TINY | changes))
    train = pqn.make_train(config)
    return config, train, jax.jit(train.init)(jax.random.key(1))


@pytest.mark.parametrize("limit, steps", [(5, 8), (3, 16), (5, 5), (100, 16)])
def test_targets_of_a_rollout_bootstrap_from_final_observations(limit, steps):
    """Breakout is deterministic but for its two starts, so that a rollout can be played again outside the script."""
    kwargs = {"max_steps_in_episode": limit}
    config, train, state = parts(
        ENV_KWARGS=kwargs, NUM_STEPS=steps, GAMMA=0.9, REW_SCALE=2.0, TOTAL_TIMESTEPS=steps * 4
    )
    env, params = pqn.make_env(config)
    network = pqn.make_network(config)
    state = state.replace(
        params=jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), state.params)
    )
    after, trajectory, *_ = rollout = jax.jit(train.rollout)(state)
    targets = jax.jit(train.targets)(*rollout[:3])
    starts = [env.reset_env(jax.random.key(i), params) for i in range(10)]
    next_obs = np.zeros(trajectory.obs.shape)
    for n in range(config.NUM_ENVS):
        env_state = jax.tree.map(lambda x, n=n: x[n], state.env_state)
        for t in range(steps):
            obs, env_state, *_ = env.step_env(jax.random.key(0), env_state, trajectory.action[t, n], params)
            next_obs[t, n] = obs
            if trajectory.terminated[t, n] or trajectory.truncated[t, n]:
                seen = after.obs[n] if t == steps - 1 else trajectory.obs[t + 1, n]
                env_state = next(s for o, s in starts if (o == seen).all())
    next_value = network.apply({"params": state.params}, jnp.float32(next_obs)).max(-1)
    assert trajectory.truncated.any() == (limit <= steps)
    expected = oracle(
        2 * np.asarray(trajectory.reward),
        np.asarray(trajectory.terminated),
        np.asarray(trajectory.truncated),
        np.asarray(next_value),
        0.9,
        config.LAMBDA,
    )
    np.testing.assert_allclose(targets, expected, atol=1e-5)


def test_epsilon_greedy():
    q_values = jnp.tile(jnp.array([0.0, 3.0, 1.0, 2.0]), (40_000, 1))
    act = jax.jit(pqn.epsilon_greedy)
    assert (act(jax.random.key(0), q_values, 0.0) == 1).all()
    for epsilon in (0.3, 1.0):
        shares = np.bincount(act(jax.random.key(1), q_values, epsilon), minlength=4) / 40_000
        expected = np.array([epsilon / 4, 1 - epsilon * 3 / 4, epsilon / 4, epsilon / 4])
        np.testing.assert_allclose(shares, expected, atol=0.012)


def test_shuffle_minibatches_is_one_permutation_of_all_leaves():
    batch = {"a": jnp.arange(24).reshape(6, 4), "b": jnp.tile(jnp.arange(24).reshape(6, 4)[..., None], 3)}
    shuffled = pqn.shuffle_minibatches(jax.random.key(0), batch, 8)
    assert shuffled["a"].shape == (8, 3) and shuffled["b"].shape == (8, 3, 3)
    assert sorted(shuffled["a"].ravel().tolist()) == list(range(24)) != shuffled["a"].ravel().tolist()
    assert (shuffled["b"] == shuffled["a"][..., None]).all()


def compare_layers(ours, theirs, x):
    """Ours, features first and batch last, is theirs, and so are its gradients; x is laid out as theirs wants it."""
    params = theirs.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    flip = lambda x: x.transpose(*range(1, x.ndim), 0) if x.ndim == 2 else x.transpose(3, 1, 2, 0)  # noqa: E731
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), flip(x))) == jax.tree.map(jnp.shape, params)

    def loss(module, params, x):
        y = module(params, x)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape) / y.size)

    modules = (lambda p, x: flip(ours.apply(p, flip(x))), theirs.apply)
    ours, theirs = (jax.value_and_grad(lambda p, x, m=m: loss(m, p, x), argnums=(0, 1))(params, x) for m in modules)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4), ours, theirs)


@pytest.mark.parametrize("shape", [(6, 256), (5, 8, 8, 16)])
def test_layer_norm_is_flax_layer_norm(shape):
    compare_layers(pqn.LayerNorm(), nn.LayerNorm(), 3 + 2 * jax.random.normal(jax.random.key(2), shape))


def test_dense_and_conv_are_flax_dense_and_conv():
    compare_layers(pqn.Dense(7), nn.Dense(7), jax.random.normal(jax.random.key(2), (6, 5)))
    x = jax.random.normal(jax.random.key(2), (5, 10, 10, 4))
    compare_layers(pqn.Conv(16), nn.Conv(16, (3, 3), padding="VALID"), x)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "none"])
@pytest.mark.parametrize("norm_input", [False, True])
def test_network_takes_any_leading_axes_and_tracks_statistics(norm, norm_input):
    network = pqn.QNetwork(3, norm, norm_input)
    obs = (jax.random.uniform(jax.random.key(0), (2, 5, 10, 10, 4)) < 0.3).astype(jnp.float32)
    variables = network.init(jax.random.key(1), obs)
    assert network.apply(variables, obs).shape == (2, 5, 3)
    np.testing.assert_allclose(network.apply(variables, obs)[1], network.apply(variables, obs[1]), atol=1e-5)
    divided = pqn.make_network(pqn.Config(NORM_TYPE=norm, NORM_INPUT=norm_input, OBS_DIVISOR=255))
    np.testing.assert_allclose(divided.apply(variables, 255 * obs), network.apply(variables, obs), atol=1e-4)
    _, updated = network.apply(variables, obs, train=True, mutable=["batch_stats"])
    assert ("batch_stats" in variables) == (norm == "batch_norm" or norm_input) == ("batch_stats" in updated)


def test_episode_statistics():
    """Episodes of 5 steps with reward 1 each in rollouts of 4: none ends in the first, all in the second."""
    _, train, state = parts(ENV_NAME="Clock-MinAtar", NUM_STEPS=4, TOTAL_TIMESTEPS=400, REW_SCALE=0.1)
    update = jax.jit(train.update)
    returns = []
    for _ in range(5):
        state, metrics = update(state)
        returns.append((float(metrics["returned_episode_returns"]), float(metrics["returned_episode_lengths"])))
    assert np.isnan(returns[0]).all()
    assert returns[1:] == [(5.0, 5.0)] * 4


def test_evaluation_plays_first_episodes_and_counts_the_unfinished():
    """Lengths are uniform over 2..9: a fixed window of steps would see short ones more often."""
    kwargs = {"shortest": 2, "longest": 9}
    _, train, state = parts(ENV_NAME="Clock-MinAtar", ENV_KWARGS=kwargs, TEST_NUM_ENVS=4096, TEST_NUM_STEPS=100)
    metrics = jax.jit(train.evaluate)(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - 5.5) < 0.15
    assert metrics["test/returned_episode_returns"] == metrics["test/returned_episode_lengths"]
    assert metrics["test/unfinished"] == 0
    _, train, state = parts(ENV_NAME="Clock-MinAtar", ENV_KWARGS=kwargs, TEST_NUM_ENVS=4096, TEST_NUM_STEPS=5)
    metrics = jax.jit(train.evaluate)(state, jax.random.key(3))
    assert abs(metrics["test/returned_episode_returns"] - 3.5) < 0.1  # lengths 2..5
    assert abs(metrics["test/unfinished"] / 4096 - 0.5) < 0.05


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_learns_the_values_of_a_probe(lam):
    """With reward 1 for one action, terminated after 3 steps: V = 1 + 0.5 + 0.25, 1 + 0.5, 1 by the time shown."""
    kwargs = {"choose": True, "shortest": 3, "longest": 3}
    config, train, _ = parts(
        ENV_NAME="Clock-MinAtar", ENV_KWARGS=kwargs, GAMMA=0.5, LAMBDA=lam, LR=3e-3, NUM_ENVS=16,
        TOTAL_TIMESTEPS=16 * 8 * 300, EPS_DECAY=0.5, EPS_FINISH=0.3 if lam == 0 else 0.05,
    )  # fmt: skip
    out = train(jax.random.split(jax.random.key(0), 2))
    state = jax.tree.map(lambda x: x[0], out["runner_state"])
    env, params = pqn.make_env(config)
    for time, value in enumerate((1.75, 1.5, 1.0)):
        obs = env.observe_state(probes.State(time, 3))[None]
        q_values = pqn.make_network(config).apply({"params": state.params}, obs)[0]
        assert q_values.argmax() == 1 and abs(q_values[1] - value) < 0.05
    assert (out["metrics"]["test/returned_episode_returns"][:, -1] == 3).all()


def test_truncation_is_not_terminal():
    """Reward 1 for ever, cut every 5 steps: V = 1 / (1 - gamma), whatever the time."""
    kwargs = {"shortest": 1000, "longest": 1000, "max_steps_in_episode": 5}
    config, train, _ = parts(
        ENV_NAME="Clock-MinAtar", ENV_KWARGS=kwargs, GAMMA=0.8, LR=3e-3, NUM_ENVS=16, TOTAL_TIMESTEPS=16 * 8 * 200
    )
    out = train(jax.random.split(jax.random.key(0), 1))
    assert abs(float(out["metrics"]["qvals"][0, -20:].mean()) - 5) < 0.25
