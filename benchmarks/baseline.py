"""A plain PQN on gymnax, only to be timed against: python baseline.py minatar|cartpole [steps] [seeds].

It trains the published recipe the way the existing implementations do (nn.Conv, one permutation a leaf, everything
stored), in one jit with vmapped seeds and without evaluation or logging. Time it and the project's script in turns on
the same machine and quote the ratio. purejaxql itself, with its own pinned packages, measured in turns with this
baseline on 2 cores of another machine without its evaluations: 1.15 times this on MinAtar Breakout (6,200 against 5,400 steps/s), 1.0
times on CartPole with one seed (30,000), 0.57 times with four (37,000 against 64,000, all seeds together).
"""

import sys
import time

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import optax

MINATAR = dict(
    env="Breakout-MinAtar", steps=2e5, envs=128, horizon=32, minibatches=32, epochs=2, lr=5e-4, q_lambda=0.65, scale=1.0
)
CARTPOLE = dict(
    env="CartPole-v1", steps=5e5, envs=32, horizon=64, minibatches=16, epochs=4, lr=1e-4, q_lambda=0.95, scale=0.1
)


class Network(nn.Module):
    actions: int
    conv: bool

    @nn.compact
    def __call__(self, x):
        if self.conv:
            x = nn.relu(nn.LayerNorm()(nn.Conv(16, (3, 3), padding="VALID")(x.astype(jnp.float32))))
            x = x.reshape(x.shape[0], -1)
        for width in (128,) if self.conv else (256, 256):
            x = nn.relu(nn.LayerNorm()(nn.Dense(width)(x)))
        return nn.Dense(self.actions)(x)


def make_train(c):
    env, params = gymnax.make(c["env"])
    reset = jax.vmap(env.reset, (0, None))
    step = jax.vmap(env.step, (0, 0, 0, None))
    network = Network(env.num_actions, c["env"].endswith("MinAtar"))
    updates = int(c["steps"]) // (c["envs"] * c["horizon"])
    tx = optax.chain(
        optax.clip_by_global_norm(10.0),
        optax.radam(optax.linear_schedule(c["lr"], 0.0, updates * c["epochs"] * c["minibatches"])),
    )

    def env_step(carry, key):
        weights, obs, env_state, epsilon = carry
        q = network.apply(weights, obs)
        k1, k2, k3 = jax.random.split(key, 3)
        random = jax.random.randint(k1, (c["envs"],), 0, env.num_actions)
        action = jnp.where(jax.random.uniform(k2, (c["envs"],)) < epsilon, random, q.argmax(-1))
        next_obs, env_state, reward, terminated, truncated, _ = step(
            jax.random.split(k3, c["envs"]), env_state, action, params
        )
        stored = dict(
            obs=obs, action=action, reward=c["scale"] * reward, done=terminated | truncated, next_obs=next_obs, q=q
        )
        return (weights, next_obs, env_state, epsilon), stored

    def target_step(carry, row):
        target, next_value = carry
        reward, done, q = row
        bootstrap = (1 - c["q_lambda"]) * next_value + c["q_lambda"] * target
        target = reward + 0.99 * (1 - done) * bootstrap
        return (target, q.max(-1)), target

    def learn(carry, minibatch):
        weights, opt_state = carry

        def loss(weights):
            q = network.apply(weights, minibatch["obs"])
            chosen = jnp.take_along_axis(q, minibatch["action"][:, None], -1)[:, 0]
            return 0.5 * jnp.square(chosen - minibatch["target"]).mean()

        changes, opt_state = tx.update(jax.grad(loss)(weights), opt_state, weights)
        return (optax.apply_updates(weights, changes), opt_state), None

    def update(state, index):
        weights, opt_state, obs, env_state, key = state
        key, *keys = jax.random.split(key, 2 + c["epochs"])
        epsilon = jnp.maximum(0.05, 1 - index / (0.1 * updates))
        (_, obs, env_state, _), batch = jax.lax.scan(
            env_step, (weights, obs, env_state, epsilon), jax.random.split(keys[0], c["horizon"])
        )
        last = network.apply(weights, obs).max(-1)
        _, batch["target"] = jax.lax.scan(
            target_step, (last, last), (batch["reward"], batch["done"], batch["q"]), reverse=True
        )
        for epoch_key in keys[1:]:
            shuffled = jax.tree.map(
                lambda x, epoch_key=epoch_key: jax.random.permutation(epoch_key, x.reshape(-1, *x.shape[2:])).reshape(
                    c["minibatches"], -1, *x.shape[2:]
                ),
                batch,
            )
            (weights, opt_state), _ = jax.lax.scan(learn, (weights, opt_state), shuffled)
        return (weights, opt_state, obs, env_state, key), batch["reward"].mean()

    def train(key):
        key, key_reset, key_init = jax.random.split(key, 3)
        obs, env_state = reset(jax.random.split(key_reset, c["envs"]), params)
        weights = network.init(key_init, obs)
        return jax.lax.scan(update, (weights, tx.init(weights), obs, env_state, key), jnp.arange(updates))

    return train


if __name__ == "__main__":
    config = dict(MINATAR if sys.argv[1] == "minatar" else CARTPOLE)
    if len(sys.argv) > 2:
        config["steps"] = float(sys.argv[2])
    seeds = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    keys = jax.random.split(jax.random.key(0), seeds)
    start = time.time()
    compiled = jax.jit(jax.vmap(make_train(config))).lower(keys).compile()
    compile_time, start = time.time() - start, time.time()
    jax.block_until_ready(compiled(keys))
    print(
        f"{config['env']} {seeds} seeds: compile {compile_time:.1f} s, {seeds * config['steps'] / (time.time() - start):,.0f} steps/s"
    )
