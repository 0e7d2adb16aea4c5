"""Steps per second of pqn_vdn_jaxmarl.py, beside the environment's own and the arithmetic floor, and where the time goes.

    python benchmarks/throughput_vdn.py pqn_vdn_overcooked
    python benchmarks/throughput_vdn.py pqn_vdn_smax --updates 2 --turns 3 alg.MAP_NAME=3m
    python benchmarks/throughput_vdn.py pqn_vdn_smax --policies          # what the random and the untrained policy score

A recipe of configs/alg as published but for evaluations, which are off; `alg.KEY=value` changes it. Each figure is the median over the
turns; compilation is left out. The floor: the matrix products of an update, counted in its jaxpr, at the rate of a 2048^3 product on
this machine.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from speed import update_flops  # noqa: E402
from throughput import matrix_rate  # noqa: E402

import pqn_vdn_jaxmarl as pqn  # noqa: E402


def seconds(function, state, turns):
    """The median time of a call; function gives what it is called with next."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        state = jax.block_until_ready(function(state))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_play(config):
    """NUM_STEPS steps of every environment with random actions, (key, (states, observations)) -> the same."""
    env = pqn.make_env(config)

    def random_step(carry, key):
        key_act, key_step = jax.random.split(key)
        available = jax.vmap(env.available)(carry[0])
        action = pqn.explore(key_act, available, available, 1.0)
        obs, state, *_ = jax.vmap(env.step)(jax.random.split(key_step, config.NUM_ENVS), carry[0], action)
        return (state, obs), None  # observations are carried so that they are computed

    @jax.jit
    def play(carry):
        key, *keys = jax.random.split(carry[0], config.NUM_STEPS + 1)
        return key, jax.lax.scan(random_step, carry[1], jnp.stack(keys))[0]

    return play


def print_policies(config, num_seeds=5):
    """Evaluations of the random policy and of the greedy one before training, means over seeds."""
    for name, epsilon in (("random", 1.0), ("untrained", 0.0)):
        train = pqn.make_train(dataclasses.replace(config, EPS_TEST=epsilon))
        state = jax.vmap(train.init)(jax.random.split(jax.random.key(0), num_seeds))
        print(
            f"{config.TASK}, {name} policy:", {key: round(float(x.mean()), 3) for key, x in train.test(state).items()}
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*", metavar="alg.KEY=value")
    parser.add_argument("--updates", type=int, default=4, help="in one timing")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--policies", action="store_true", help="instead: scores without training")
    args = parser.parse_intermixed_args()
    recipe = OmegaConf.load(ROOT / f"configs/alg/{args.recipe}.yaml")
    changes = OmegaConf.from_dotlist([change.removeprefix("alg.") for change in args.changes])
    alg = OmegaConf.to_container(OmegaConf.merge(recipe, changes))
    config = pqn.Config(**alg | {"TEST_DURING_TRAINING": False})
    if args.policies:
        return print_policies(config)
    steps, train, play = config.NUM_ENVS * config.NUM_STEPS, pqn.make_train(config), random_play(config)
    start = time.perf_counter()
    updates = partial(train, num_updates=args.updates)
    state = jax.block_until_ready(updates(jax.random.split(jax.random.key(0), 1))["runner_state"])
    print(f"{config.TASK}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"  first call, compilation included: {time.perf_counter() - start:.1f} s", flush=True)
    flops = update_flops("pqn_vdn_jaxmarl", pqn, config, train, jax.random.key(0))
    floor = flops / (1e9 * matrix_rate())
    print(f"  arithmetic floor: {steps / floor:,.0f} steps/s ({flops / steps / 1e6:,.0f} MFLOP a step)", flush=True)
    one = jax.tree.map(lambda x: x[0], state)
    playing = seconds(play, play((one.key, (one.env_state, one.obs))), args.turns)
    print(f"  environment alone, random actions: {steps / playing:,.0f} steps/s", flush=True)
    rollout = jax.jit(lambda state: train.rollout(state)[0])
    acting = seconds(rollout, rollout(one), args.turns)
    print(f"  rollouts alone: {steps / acting:,.0f} steps/s", flush=True)
    update = seconds(lambda state: updates(state=state)["runner_state"], state, args.turns) / args.updates
    print(f"  training: {steps / update:,.0f} steps/s, {floor / update:.0%} of the floor")
    shares = (playing, acting - playing, update - acting)
    print("  time: environment {:.0%}, acting {:.0%}, learning {:.0%}".format(*(x / update for x in shares)))


if __name__ == "__main__":
    main()
