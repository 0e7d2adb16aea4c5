"""Teams with known values, as JaxMARL environments: `import team_probes` makes them known to pqn_vdn_jaxmarl.py."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxmarl
from flax import struct
from jaxmarl.environments.multi_agent_env import MultiAgentEnv
from jaxmarl.environments.spaces import Box, Discrete

import pqn_vdn_jaxmarl as pqn


@struct.dataclass
class ClockState:
    time: Any
    length: Any


class Clock(MultiAgentEnv):
    """Three agents with 2, 3 and 4 actions and as many observed numbers; episodes of `shortest` to `longest` steps.

    Agent i dies after step i + 2: from then on only action 0 is available to it. While it lives, action a is available
    if a + i + time is even, or a is 0. The reward is the sum of the actions, 100 less for each unavailable one. Agents
    see 1 + time and the length, both divided by 10. The shaped reward of an agent is 1 a step.
    """

    won_battle_bonus = 4.0  # "won" is an episode whose last reward, of at most 6, is at least 4

    def __init__(self, shortest=4, longest=9):
        super().__init__(num_agents=3)
        self.shortest, self.longest, self.max_steps = shortest, longest, longest
        self.action_spaces = {agent: Discrete(2 + i) for i, agent in enumerate(self.agents)}
        self.observation_spaces = {agent: Box(0, 1, (2 + i,)) for i, agent in enumerate(self.agents)}

    def get_obs(self, state):
        seen = jnp.zeros(4).at[:2].set(jnp.stack([1 + state.time, state.length]) / 10)
        return {agent: seen[: 2 + i] for i, agent in enumerate(self.agents)}

    def reset(self, key):
        state = ClockState(jnp.int32(0), jax.random.randint(key, (), self.shortest, self.longest + 1))
        return self.get_obs(state), state

    @property
    def name(self):
        return "hanabi's manager: the reward is one, and there are legal moves"

    def get_legal_moves(self, state):
        def mask(i):
            action = jnp.arange(4)
            return (action == 0) | ((action < 2 + i) & ((action + i + state.time) % 2 == 0) & (state.time < i + 2))

        return {agent: mask(i) for i, agent in enumerate(self.agents)}

    def step_env(self, key, state, actions):
        available = self.get_legal_moves(state)
        reward = sum(1.0 * a - 100.0 * ~available[agent][a] for agent, a in actions.items())
        state = state.replace(time=state.time + 1)
        done = {agent: state.time >= i + 2 for i, agent in enumerate(self.agents)}
        done["__all__"] = state.time >= state.length
        info = {"shaped_reward": dict.fromkeys(self.agents, jnp.float32(1))}
        return self.get_obs(state), state, dict.fromkeys(self.agents, reward), done, info


@struct.dataclass
class DoorState:
    time: Any
    cue: Any
    open: Any


class Door(MultiAgentEnv):
    """Two agents, rewards of their own, three steps. Opening the door in the first step (action 1) costs agent 0 one.

    In the last step agent 1 earns 3 through an open door, where its action is the cue's, 0 or 1; else it loses 1, or
    takes action 2 and nothing. Only agent 1 sees the cue, in the first step or, with `forget` false, always. Together
    they make 2; alone, agent 0 gains nothing by opening.
    """

    def __init__(self, forget=False):
        super().__init__(num_agents=2)
        self.forget, self.max_steps = forget, 3
        self.action_spaces = dict.fromkeys(self.agents, Discrete(3))
        self.observation_spaces = dict.fromkeys(self.agents, Box(0, 1, (6,)))

    def get_obs(self, state):
        seen = jnp.concatenate([jax.nn.one_hot(state.time, 3), jnp.float32(state.open)[None]])
        cue = jax.nn.one_hot(state.cue, 2) * ((state.time == 0) | (not self.forget))
        return {"agent_0": jnp.concatenate([seen, 0 * cue]), "agent_1": jnp.concatenate([seen, cue])}

    def reset(self, key):
        state = DoorState(jnp.int32(0), jax.random.randint(key, (), 0, 2), jnp.bool_(False))
        return self.get_obs(state), state

    def step_env(self, key, state, actions):
        opens = (state.time == 0) & (actions["agent_0"] == 1)
        right = state.open & (actions["agent_1"] == state.cue)
        tries = (state.time == 2) & (actions["agent_1"] < 2)
        reward = {"agent_0": -1.0 * opens, "agent_1": tries * jnp.where(right, 3.0, -1.0)}
        state = state.replace(time=state.time + 1, open=state.open | opens)
        done = dict.fromkeys([*self.agents, "__all__"], state.time >= 3)
        return self.get_obs(state), state, reward, done, {}


PROBES = {"clock": Clock, "door": Door}
make = jaxmarl.make
jaxmarl.make = lambda name, **kwargs: PROBES[name](**kwargs) if name in PROBES else make(name, **kwargs)
pqn.RECIPES.update(clock=None, door=None)
