# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "hydra-core>=1.3.2", "omegaconf>=2.3", "pydantic>=2.10",
#   "orbax-checkpoint>=0.11", "safetensors>=0.5", "pandas>=2.2", "seaborn>=0.13", "matplotlib>=3.8", "scipy>=1.15",
#   "tqdm>=4.66", "wandb>=0.19", "gymnax>=1.0.1", "six", "envpool>=1.2.5", "craftax>=1.6", "jaxmarl>=0.2",
#   "imageio>=2.34", "imageio-ffmpeg>=0.5", "pillow>=10.1", "pygame>=2.5", "gymnasium>=1.0",
# ]
# ///
"""Play episodes with the agent in a run's folder, of any script, and draw the best one. Documentation: docs/tools.md

python watch.py runs/pqn_minatar_Breakout-MinAtar_s0/<time>          # ten episodes; the best as watch.gif
python watch.py <folder> --episodes 30 --seed-index 2 --out best.mp4
"""

import argparse
import importlib
import importlib.util
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import imageio
import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import OmegaConf
from PIL import Image, ImageDraw, ImageFont

FRAMES = {".gif": 1000, ".mp4": None}  # at most so many: GIFs are large, and made in memory
WIDTH = 480  # of a picture in pixels, at least
PALETTE = np.array(  # of MinAtar's channels, on black (Paul Tol's bright and vibrant, colour-blind safe)
    [[20, 20, 20], [68, 119, 170], [238, 102, 119], [34, 136, 51], [204, 187, 68], [102, 204, 238], [170, 51, 119],
     [187, 187, 187], [238, 119, 51], [0, 153, 136], [255, 255, 255]], np.uint8,
)  # fmt: skip


class Step(NamedTuple):
    """A step of an episode: what is drawn of it."""

    number: int
    key: jax.Array  # that the environment's step had
    obs: Any
    state: Any  # before the action
    action: jax.Array
    score: float  # with this step's reward


def load_script(folder):
    """The module of a run's script: the copy in its folder or, of a run made in a notebook, the one beside this file."""
    try:
        saved = OmegaConf.load(folder / "config.yaml")
        name = saved.get("about", saved).script
        path = next(path for path in (folder / f"{name}.py", Path(__file__).with_name(f"{name}.py")) if path.exists())
    except Exception:
        sys.exit(f"Error: {folder} is not the folder of a run: its config.yaml or its script cannot be read")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# AGENTS: (act(key, obs, memory) -> (action, memory), the memory before the first step)


def make_agent(pqn, config, network, variables, epsilon):
    """An agent with a hidden state sees its last action, too, and whether the observation is an episode's first."""
    q_values = partial(network.apply, variables)

    def feed_forward(key, obs, memory):
        return pqn.epsilon_greedy(key, q_values(obs[None])[0], epsilon), memory

    def recurrent(key, obs, memory):
        values, hidden = q_values(obs[None, None], *(x[None, None] for x in memory[:2]), memory[2])
        action = pqn.epsilon_greedy(key, values[0, 0], epsilon)
        return action, (jnp.array(False), action, hidden)

    def team(key, obs, hidden):
        values, hidden = q_values(obs[0][None, None], hidden)
        return pqn.epsilon_greedy(key, values[0, 0], obs[1], epsilon), hidden

    if hasattr(config, "MAP_NAME"):
        agents = len(pqn.make_env(config).agents)
        return jax.jit(team), jnp.zeros((1, agents, config.HIDDEN_SIZE)) if config.NETWORK == "rnn" else ()
    if hasattr(network, "initial_hidden"):
        return jax.jit(recurrent), (jnp.array(True), jnp.array(-1), network.initial_hidden(1))
    return jax.jit(feed_forward), ()


# GAMES: (reset(key) -> (obs, state), step(key, state, action) -> (obs, state, reward, done))


def array_game(pqn, config):
    """Of gymnax and Craftax; Craftax does not tell time limits from other ends."""
    env, params = pqn.make_env(config)

    def step(key, state, action):
        obs, state, reward, *ends, _ = env.step(key, state, action, params)
        return obs, state, reward, sum(ends) > 0

    return jax.jit(lambda key: env.reset(key, params)), jax.jit(step)


def team_game(pqn, config):
    """Of JaxMARL; a team's obs is (all agents' observations, the actions available to each)."""
    env = pqn.make_env(config)

    def seen(obs, state):
        available = env.get_valid_actions(jax.tree.map(lambda x: x[None], state))
        obs, available = (jnp.stack([values[agent] for agent in env.agents]) for values in (obs, available))
        return obs, available[:, 0] > 0

    def reset(key):
        obs, state = env.wrapped_reset(key)
        return seen(obs, state), state

    def step(key, state, action):
        obs, state, reward, done, _ = env.wrapped_step(key, state, dict(zip(env.agents, action, strict=True)))
        return seen(obs, state), state, reward["__all__"], done["__all__"]

    return jax.jit(reset), jax.jit(step)


def atari_game(pqn, config):
    """Of emulators, full games and raw scores; a state is (emulator, its twin, the twin's screen). The twin has the same
    seed and actions, and shows in colour what the agent sees otherwise."""
    screen = {"gray_scale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    colour = pqn.override(config, ENV_KWARGS=config.ENV_KWARGS | screen)

    def reset(key):
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        env, twin = pqn.make_env(config, [seed]), pqn.make_env(colour, [seed])
        return env.reset()[0][0], (env, twin, twin.reset()[0][0])

    def step(key, state, action):
        (env, twin, _), action = state, np.asarray(action)[None]
        obs, _, _, truncated, info = env.step(action)
        return obs[0], (env, twin, twin.step(action)[0][0]), info["reward"][0], truncated[0] or info["terminated"][0]

    return reset, step


def play(agent, game, key):
    """An episode, step by step. The same key plays the same episode."""
    (act, memory), (reset, step), score, done, number = agent, game, 0.0, False, 0
    obs, state = reset(key)
    while not done:
        key, key_act, key_step = jax.random.split(key, 3)
        action, memory = act(key_act, obs, memory)
        before, (obs, state, reward, done) = (obs, state), step(key_step, state, action)
        score, number = score + float(reward), number + 1
        yield Step(number, key_step, *before, action, score)


# PICTURES: for each step, (step, a frame [H, W, 3] of bytes)


def draw_minatar(pqn, config, steps):
    """Tiles: the uppermost channel of each cell in its colour."""
    for step in steps:
        obs = np.asarray(step.obs)
        yield step, PALETTE[(obs * np.arange(1, obs.shape[-1] + 1)).max(-1).astype(int)]


def draw_atari(pqn, config, steps):
    """The emulator's screen in colour."""
    for step in steps:
        yield step, np.moveaxis(step.state[-1], 0, -1)


def draw_craftax(pqn, config, steps):
    """By Craftax's renderer, 16 pixels a block."""
    module = "craftax.craftax_classic" if "Classic" in config.ENV_NAME else "craftax.craftax"
    render = jax.jit(importlib.import_module(f"{module}.renderer").make_craftax_pixel_renderer(16))
    for step in steps:
        yield step, np.asarray(render(step.state)).astype(np.uint8)


def draw_figure(visualiser, steps):
    """By a visualiser of gymnax's or JaxMARL's, which draws states in a figure of Matplotlib's."""
    for index, _ in enumerate(visualiser.state_seq):
        visualiser.update(index)
        visualiser.ax.set_title("")  # the step stands above
        visualiser.fig.canvas.draw()
        frame = np.asarray(visualiser.fig.canvas.buffer_rgba())[..., :3].copy()
        yield steps[index * len(steps) // len(visualiser.state_seq)], frame


def draw_gymnax(pqn, config, steps):
    """By gymnax's visualiser; only environments that it knows."""
    from gymnax.visualize import Visualizer

    steps = list(steps)
    visualiser = Visualizer(*pqn.make_env(config), [step.state for step in steps])
    visualiser.init()
    if not hasattr(visualiser, "im"):
        raise NotImplementedError
    yield from draw_figure(visualiser, steps)


def draw_overcooked(pqn, config, steps):
    """By JaxMARL's tiles."""
    from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer

    pad = pqn.make_env(config)._env._env.agent_view_size - 2
    for step in steps:
        grid = np.asarray(step.state.maze_map[pad:-pad, pad:-pad])
        shown = {"agent_dir_idx": step.state.agent_dir_idx, "agent_inv": step.state.agent_inv}
        yield step, np.asarray(OvercookedVisualizer._render_grid(grid, tile_size=32, highlight_mask=None, **shown))


def draw_smax(pqn, config, steps):
    """By JaxMARL's visualiser, which draws the simulator's steps within each of the agents'."""
    from jaxmarl.viz.visualizer import SMAXVisualizer

    env, steps = pqn.make_env(config)._env._env, list(steps)
    step_env = jax.jit(env.step_env, static_argnames="get_state_sequence")
    env.step_env = lambda *args, **kw: jax.device_get(step_env(*args, **kw))  # NumPy is quicker to draw from
    played = [(step.key, step.state, dict(zip(env.agents, step.action, strict=True))) for step in steps]
    visualiser = SMAXVisualizer(env, jax.device_get(played))
    visualiser.expand_state_seq()
    visualiser.state_seq = jax.device_get(visualiser.state_seq)
    visualiser.init()
    yield from draw_figure(visualiser, steps)


def draw_mpe(pqn, config, steps):
    """By JaxMARL's visualiser."""
    from jaxmarl.environments.mpe.mpe_visualizer import MPEVisualizer

    steps = list(steps)
    with redirect_stdout(None):
        visualiser = MPEVisualizer(pqn.make_env(config)._env._env, [step.state for step in steps])
    yield from draw_figure(visualiser, steps)


def draw_nothing(pqn, config, steps):
    """Of what has no renderer."""
    raise NotImplementedError


def finish(step, frame):
    """A frame at least WIDTH wide and of even size, as H.264 needs it, below a bar with the step and the score."""
    frame = frame.repeat(scale := -(-WIDTH // frame.shape[1]), 0).repeat(scale, 1)  # whole pixels: tiles stay sharp
    height, width = (n + n % 2 for n in frame.shape[:2])
    picture, font = Image.new("RGB", (width, height + 32), "#404040"), ImageFont.load_default(20)
    picture.paste(Image.fromarray(frame), (0, 32))
    draw = ImageDraw.Draw(picture)
    draw.text((8, 16), f"step {step.number}", "white", font, "lm")
    draw.text((width - 8, 16), f"score {step.score:.4g}", "white", font, "rm")
    return np.asarray(picture)


KINDS = {  # a word of an environment's name: the game, its pictures, how many of them a second
    "minatar": (array_game, draw_minatar, 10),
    "craftax": (array_game, draw_craftax, 8),
    "overcooked": (team_game, draw_overcooked, 8),
    "smax": (team_game, draw_smax, 30),
    "mpe_": (team_game, draw_mpe, 8),
    "hanabi": (team_game, draw_nothing, 1),
    "gymnax": (array_game, draw_gymnax, 25),  # all others,
    "atari": (atari_game, draw_atari, 15),  # and emulators
}


def kind_of(config):
    """The key in KINDS of what a run's Config plays, whatever its script is called."""
    if hasattr(config, "TEST_ENVS"):
        return "atari"
    return next((kind for kind in KINDS if kind in config.ENV_NAME.lower()), "gymnax")


def read_arguments():
    """The command line; a mistake in it ends with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's folder")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed-index", type=int, default=0, help="which of the run's NUM_SEEDS agents")
    parser.add_argument("--epsilon", type=float, default=0.01, help="probability of a random action")
    parser.add_argument("--import", dest="module", help="a module that registers your environment")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    parser.add_argument("--out", type=Path, default=Path("watch.gif"), help="a .gif or .mp4")
    args = parser.parse_args()
    for name, valid, allowed in (
        ("episodes", args.episodes >= 1, "at least 1"),
        ("epsilon", 0 <= args.epsilon <= 1, "from 0 to 1"),
        ("seed", 0 <= args.seed < 2**32, "from 0 to 4294967295"),
        ("out", args.out.suffix in FRAMES and args.out.parent.is_dir(), "a .gif or .mp4 in a folder that exists"),
    ):
        if not valid:
            sys.exit(f"Error: --{name}={getattr(args, name)} must be {allowed}")
    return args


def main():
    args = read_arguments()
    os.environ |= {"MPLBACKEND": "agg", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}  # no window, no sound
    pqn = load_script(args.folder)
    try:
        if args.module:
            sys.path.insert(0, os.getcwd())
            importlib.import_module(args.module)
        config, network, variables = pqn.load(args.folder)
    except (ValueError, OSError, ImportError, KeyError) as error:
        hint = "" if args.module else "; an environment of your own needs --import <the module that registers it>"
        sys.exit(f"Error: {args.folder} cannot be loaded: {' '.join(str(error).split())}{hint}")
    if not 0 <= args.seed_index < (num_seeds := len(jax.tree.leaves(variables)[0])):
        sys.exit(f"Error: --seed-index={args.seed_index} must be from 0 to {num_seeds - 1}, the run's seeds")
    variables = jax.tree.map(lambda x: x[args.seed_index], variables)
    agent = make_agent(pqn, config, network, variables, args.epsilon)
    make_game, draw, rate = KINDS[kind_of(config)]
    game, keys, scores = make_game(pqn, config), jax.random.split(jax.random.key(args.seed), args.episodes), []
    for key in keys:
        for step in play(agent, game, key):  # noqa: B007
            pass
        scores.append(step.score)
        print(f"episode {len(scores)}: return {step.score:g} in {step.number} steps", flush=True)
    which = "best" if len(set(scores)) > 1 else "first"
    print(f"mean {np.mean(scores):.2f},", f"best {max(scores):g}" if which == "best" else "all alike")
    gif, most = args.out.suffix == ".gif", FRAMES[args.out.suffix]
    steps = islice(play(agent, game, keys[np.argmax(scores)]), most)
    try:
        frames = islice((finish(*drawn) for drawn in draw(pqn, config, steps)), most)
        frames = chain([next(frames)], frames)
    except NotImplementedError:
        return print(f"No picture: nothing here can draw {config.ENV_NAME}")
    options = {"duration": 1000 / rate, "loop": 0} if gif else {"fps": rate, "macro_block_size": 2}
    try:
        with imageio.get_writer(args.out, **options) as file:
            for count, frame in enumerate(frames, 1):  # noqa: B007
                file.append_data(frame)
    except OSError as error:
        sys.exit(f"Error: --out={args.out} cannot be written: {str(error).splitlines()[0]}")
    print(f"Wrote {args.out}: the {which} episode, {count} frames")


if __name__ == "__main__":
    main()
