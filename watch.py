# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10", "flax>=0.12", "optax>=0.2.6", "numpy>=2.0", "gymnax>=1.0.1", "six", "envpool>=1.2.5",
#   "craftax>=1.6", "jaxmarl>=0.2", "omegaconf>=2.3", "safetensors>=0.5", "tqdm>=4.66", "matplotlib>=3.8",
#   "imageio>=2.34", "pillow>=10", "pygame>=2.5", "gymnasium>=1.0",
# ]
# ///
"""Play episodes with the agent in a run's folder, of any script, and draw the best one. Documentation: docs/tools.md

    python watch.py runs/pqn_minatar_Breakout-MinAtar_s0/<time>           # ten episodes; the best as watch.gif
    python watch.py <folder> --episodes 30 --seed-index 2 --epsilon 0.01 --out breakout.gif

The agent plays with the script that trained it, of which the folder has a copy (from a notebook: with the one here).
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

FRAMES = 1000  # a picture has at most so many
PALETTE = np.array(  # of MinAtar's channels, on black (Paul Tol's bright and vibrant, colour-blind safe)
    [[20, 20, 20], [68, 119, 170], [238, 102, 119], [34, 136, 51], [204, 187, 68], [102, 204, 238], [170, 51, 119],
     [187, 187, 187], [238, 119, 51], [0, 153, 136], [255, 255, 255]], np.uint8,
)  # fmt: skip


def load_script(folder):
    """The module of a run's script: the copy in its folder or, of a run made in a notebook, the one beside this file."""
    try:
        saved = OmegaConf.load(folder / "config.yaml")
        name = saved.get("about", saved).script
        path = next(path for path in (folder / f"{name}.py", Path(__file__).with_name(f"{name}.py")) if path.exists())
    except Exception:
        sys.exit(f"Error: {folder} is not the folder of a run: its config.yaml or its script cannot be read")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# PLAYING: for each script, `reset(key) -> carry` and `step(carry, key) -> carry, reward, done, what is to be drawn`


def gymnax_game(pqn, config, q_values, epsilon):
    """Of pqn_minatar and pqn_gymnax; a carry is (obs, environment's state)."""
    import jax

    env, params = pqn.make_env(config)

    def step(carry, key):
        key_act, key_step = jax.random.split(key)
        action = pqn.epsilon_greedy(key_act, q_values(carry[0][None]), epsilon)[0]
        obs, state, reward, terminated, truncated, _ = env.step(key_step, carry[1], action, params)
        return (obs, state), reward, terminated | truncated, carry

    return lambda key: env.reset(key, params), step


def craftax_game(pqn, config, q_values, epsilon):
    """Of pqn_craftax_rnn; a carry is (obs, environment's state, hidden state, whether it is the first, last action)."""
    import jax
    import jax.numpy as jnp

    env, params = pqn.make_env(config)
    hidden = pqn.make_network(config).initial_hidden(1)

    def step(carry, key):
        obs, state, hidden, first, action = carry
        key_act, key_step = jax.random.split(key)
        shown, (values, hidden) = state, q_values(obs[None, None], first[None, None], action[None, None], hidden)
        action = pqn.epsilon_greedy(key_act, values[0], epsilon)[0]
        obs, state, reward, done, _ = env.step_env(key_step, state, action, params)
        return (obs, state, hidden, jnp.array(False), action), reward, done, shown

    return lambda key: (*env.reset_env(key, params), hidden, jnp.array(True), jnp.array(-1)), step


def team_game(pqn, config, q_values, epsilon):
    """Of pqn_vdn_jaxmarl; a carry is (obs, environment's state, hidden state)."""
    import jax
    import jax.numpy as jnp

    env = pqn.make_env(config)
    hidden = jnp.zeros((1, len(env.agents), config.HIDDEN_SIZE)) if config.NETWORK == "rnn" else ()

    def stack(values):
        return jnp.stack([values[agent] for agent in env.agents])

    def step(carry, key):
        obs, state, hidden = carry
        key_act, key_step = jax.random.split(key)
        values, hidden = q_values(stack(obs)[None, None], hidden)
        available = stack(env.get_valid_actions(jax.tree.map(lambda x: x[None], state)))[:, 0] > 0
        action = pqn.epsilon_greedy(key_act, values[0, 0], available, epsilon)
        shown = key_step, state, dict(zip(env.agents, action, strict=True))
        obs, state, reward, done, _ = env.wrapped_step(*shown)
        return (obs, state, hidden), reward["__all__"], done["__all__"], shown

    return lambda key: (*env.wrapped_reset(key), hidden), step


def play(game, key):
    """An episode: its return, and what is to be drawn of each step."""
    import jax

    reset, step = game
    key, key_reset = jax.random.split(key)
    carry, score, done, steps = reset(key_reset), 0.0, False, []
    while not done:
        key, key_step = jax.random.split(key)
        carry, reward, done, shown = step(carry, key_step)
        score += float(reward)
        steps.append(shown)
    return score, steps


def play_atari(pqn, config, q_values, epsilon, seed):
    """A full game: its raw score, and the emulator's screen at each step.

    A twin with the same seed and actions shows the screen in colour, which the agent does not see.
    """
    import jax

    kwargs = config.ENV_KWARGS
    screen = {"gray_scale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    env = pqn.make_env(config, [seed])
    config.ENV_KWARGS = kwargs | screen
    twin = pqn.make_env(config, [seed])
    config.ENV_KWARGS = kwargs
    act = jax.jit(lambda key, obs: pqn.epsilon_greedy(key, q_values(obs), epsilon))
    key, obs, picture, score, over, frames = jax.random.key(seed), env.reset()[0], twin.reset()[0], 0.0, False, []
    while not over:
        frames.append(np.moveaxis(picture[0], 0, -1))
        key, key_act = jax.random.split(key)
        action = np.asarray(act(key_act, obs))
        obs, _, _, truncated, info = env.step(action)
        picture, *_ = twin.step(action)
        score += float(info["reward"][0])
        over = bool(truncated[0]) or bool(info["terminated"][0])
    return score, frames


# DRAWING: steps -> frames [H, W, 3], bytes


def figure_frames(visualiser, count):
    """The frames of a visualiser of gymnax's or JaxMARL's, which draws in a figure of Matplotlib's."""
    for index in range(count):
        visualiser.update(index)
        visualiser.fig.canvas.draw()
        yield np.asarray(visualiser.fig.canvas.buffer_rgba())[..., :3].copy()


def draw_minatar(pqn, config, steps):
    """Tiles: the uppermost channel of each cell in its colour."""
    for obs, _ in steps:
        obs = np.asarray(obs)
        channel = (obs * np.arange(1, obs.shape[-1] + 1)).max(-1).astype(int)
        yield PALETTE[channel].repeat(16, 0).repeat(16, 1)


def draw_gymnax(pqn, config, steps):
    """By gymnax's visualiser; only environments that it knows."""
    from gymnax.visualize import Visualizer

    visualiser = Visualizer(*pqn.make_env(config), [state for _, state in steps])
    visualiser.init()
    if not hasattr(visualiser, "im"):
        raise NotImplementedError(f"gymnax cannot draw {config.ENV_NAME}")
    return figure_frames(visualiser, len(steps))


def draw_craftax(pqn, config, steps):
    """By Craftax's renderer, 16 pixels a block."""
    import jax

    if "Classic" in config.ENV_NAME:
        from craftax.craftax_classic.renderer import make_craftax_pixel_renderer
    else:
        from craftax.craftax.renderer import make_craftax_pixel_renderer
    render = jax.jit(make_craftax_pixel_renderer(16))
    return (np.asarray(render(state)).astype(np.uint8) for state in steps)


def draw_team(pqn, config, steps):
    """By JaxMARL's visualisers; Hanabi has none that draws."""
    import jax

    env, states = pqn.make_env(config)._env._env, [state for _, state, _ in steps]
    if config.ENV_NAME == "overcooked":
        from jaxmarl.viz.overcooked_visualizer import OvercookedVisualizer

        pad = env.agent_view_size - 2
        for state in states:
            grid = np.asarray(state.maze_map[pad:-pad, pad:-pad])
            shown = {"agent_dir_idx": state.agent_dir_idx, "agent_inv": state.agent_inv}
            yield np.asarray(OvercookedVisualizer._render_grid(grid, tile_size=32, highlight_mask=None, **shown))
    elif "SMAX" in config.ENV_NAME:
        from jaxmarl.viz.visualizer import SMAXVisualizer

        step = jax.jit(env.step_env, static_argnames="get_state_sequence")
        env.step_env = lambda *args, **kw: jax.device_get(step(*args, **kw))  # NumPy is quicker to draw from
        visualiser = SMAXVisualizer(env, jax.device_get(steps))
        visualiser.expand_state_seq()
        visualiser.state_seq = jax.device_get(visualiser.state_seq)
        visualiser.init()
        yield from figure_frames(visualiser, len(visualiser.state_seq))
    elif "MPE" in config.ENV_NAME:
        from jaxmarl.environments.mpe.mpe_visualizer import MPEVisualizer

        with contextlib.redirect_stdout(io.StringIO()):
            visualiser = MPEVisualizer(env, states)
        yield from figure_frames(visualiser, len(states))
    else:
        raise NotImplementedError(f"JaxMARL cannot draw {config.ENV_NAME}")


GAMES = {
    "minatar": (gymnax_game, draw_minatar, 10),  # frames per second
    "gymnax": (gymnax_game, draw_gymnax, 25),
    "craftax": (craftax_game, draw_craftax, 8),
    "team": (team_game, draw_team, 8),
    "atari": (None, None, 15),
}


def kind_of(config):
    """The key in GAMES of what a run's Config plays, whatever its script is called."""
    if config.ENV_NAME.startswith("Craftax"):
        return "craftax"
    if hasattr(config, "TEST_ENVS"):  # emulators
        return "atari"
    if hasattr(config, "NETWORK"):
        return "team"
    return "minatar" if config.ENV_NAME.endswith("-MinAtar") else "gymnax"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run's folder")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed-index", type=int, default=0, help="which of the run's NUM_SEEDS agents")
    parser.add_argument("--epsilon", type=float, default=0.0, help="probability of a random action")
    parser.add_argument(
        "--import", dest="module", metavar="MODULE", help="imported first: it registers your environment"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    parser.add_argument(
        "--out", type=Path, default=Path("watch.gif"), help="a .gif; .mp4 with imageio-ffmpeg installed"
    )
    args = parser.parse_args()
    if args.episodes < 1:
        sys.exit(f"Error: --episodes={args.episodes} is not allowed: must be at least 1")
    os.environ |= {"MPLBACKEND": "agg", "SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}  # no window, no sound
    pqn = load_script(args.folder)
    import imageio
    import jax

    try:
        if args.module:
            sys.path.insert(0, os.getcwd())
            importlib.import_module(args.module)
        config, network, variables = pqn.load(args.folder)
    except (ValueError, OSError, ImportError) as error:
        hint = "" if args.module else "; an environment of your own needs --import <the module that registers it>"
        sys.exit(f"Error: {' '.join(str(error).split())}{hint}")
    num_seeds = len(jax.tree.leaves(variables)[0])
    if not 0 <= args.seed_index < num_seeds:
        sys.exit(f"Error: --seed-index={args.seed_index} is not allowed: the run has seeds 0 to {num_seeds - 1}")
    q_values = partial(network.apply, jax.tree.map(lambda x: x[args.seed_index], variables))
    make_game, draw, rate = GAMES[kind_of(config)]
    if make_game:
        reset, step = make_game(pqn, config, q_values, args.epsilon)
        game = jax.jit(reset), jax.jit(step)
    best, scores = None, []
    for key in jax.random.split(jax.random.key(args.seed), args.episodes):
        if make_game:
            score, steps = play(game, key)
        else:
            seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
            score, steps = play_atari(pqn, config, q_values, args.epsilon, seed)
        scores.append(score)
        print(f"episode {len(scores)}: return {score:g} in {len(steps)} steps", flush=True)
        if score == max(scores):
            best = steps[:FRAMES]
    print(f"mean {np.mean(scores):.2f}, best {max(scores):g}")
    try:
        frames = list(draw(pqn, config, best) if make_game else best)
    except NotImplementedError as error:
        sys.exit(f"No picture: {error}")
    options = {"duration": 1000 / rate, "loop": 0} if args.out.suffix == ".gif" else {"fps": rate}
    try:
        imageio.mimwrite(args.out, frames, **options)
    except Exception as error:
        sys.exit(f"Error: --out={args.out} cannot be written: {str(error).splitlines()[0]}")
    print(f"Wrote {args.out}: the best episode, {len(frames)} frames")


if __name__ == "__main__":
    main()
