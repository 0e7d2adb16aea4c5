"""Environments with known values, as gymnax environments whose observations have MinAtar's shape."""

from typing import Any

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class State:
    time: Any
    length: Any  # the episode ends after this many steps


@struct.dataclass
class Params:
    max_steps_in_episode: int = 1000
    shortest: int = 5  # lengths are drawn between these two, both included
    longest: int = 5


class Clock(environment.Environment):
    """Reward 1 a step, or 1 for action 1 and 0 for the others with `choose`; terminates after `length` steps.

    The observation shows the time in [0, 0, 0] and the length in [0, 0, 1], both divided by 10.
    """

    def __init__(self, choose: bool = False, shape: tuple = (10, 10, 2)):
        super().__init__()
        self.choose, self.shape = choose, tuple(shape)

    @property
    def default_params(self):
        return Params()

    def observe_state(self, state):
        return (
            jnp.zeros(self.shape).reshape(-1).at[:2].set(jnp.stack([state.time, state.length]) / 10).reshape(self.shape)
        )

    def reset_env(self, key, params):
        state = State(jnp.int32(0), jax.random.randint(key, (), params.shortest, params.longest + 1))
        return self.observe_state(state), state

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        reward = jnp.float32(action == 1) if self.choose else jnp.float32(1)
        return self.observe_state(state), state, reward, state.time >= state.length, {}

    @property
    def num_actions(self):
        return 3

    def action_space(self, params=None):
        return spaces.Discrete(3)

    def observation_space(self, params):
        return spaces.Box(0, 1, self.shape)


if "Clock-MinAtar" not in gymnax.registered_envs:
    gymnax.registration.register("Clock-MinAtar", Clock)
