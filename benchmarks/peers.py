"""Others' PQN on this machine, in turns with ours, each with its own packages: speed and score.

    git clone https://github.com/mttga/purejaxql ../purejaxql
    python benchmarks/peers.py ../purejaxql minatar cartpole memory_chain
    git clone https://github.com/FLAIROx/JaxMARL ../JaxMARL
    python benchmarks/peers.py ../JaxMARL smax overcooked
    git clone https://github.com/vwxyzjn/cleanrl ../cleanrl
    python benchmarks/peers.py ../cleanrl cleanrl_cartpole

Nothing of theirs is in this repository: a script is read from the checkout, and uv makes its environment. Evaluations are off on both sides. A row of
results/peers.csv for each task: steps_per_s, of all seeds together, compilation left out, the median over the turns; ratio, ours to theirs,
the median of the turns' ratios; return, in training over the last tenth of a turn. A row is of one task, number of seeds and --steps.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf
from scores import git_commit
from speed import hardware

ROOT = Path(__file__).resolve().parent.parent
PUREJAXQL = "jax==0.4.38 jaxlib==0.4.38 gymnax==0.0.6 flax<0.10.3 chex optax distrax safetensors wandb hydra-core omegaconf numpy<2"
JAXMARL = "jax<0.8 flax chex optax distrax flashbax safetensors wandb hydra-core omegaconf matplotlib pillow jaxtyping gymnax six imageio"
CLEANRL = "torch==2.4.1 gymnasium==0.29.1 numpy==1.24.4 tensorboard==2.11.2 tyro==0.5.10 setuptools<70"
QLEARNING = "baselines/QLearning"
LAYOUT = {"ENV_KWARGS": {"layout": "cramped_room"}}
MAP = {"MAP_NAME": "3m"}
INVADERS = {"ENV_NAME": "SpaceInvaders-MinAtar"}
TASKS = {  # task: (their packages, script, recipe, changes of it), (our script, recipe, changes), seeds, steps of a turn
    "minatar": (
        (PUREJAXQL, "purejaxql/pqn_minatar.py", "purejaxql/config/alg/pqn_minatar.yaml", {}),
        ("pqn_minatar", "pqn", {}),
        3,
        1e5,
    ),
    "minatar_space_invaders": (
        (PUREJAXQL, "purejaxql/pqn_minatar.py", "purejaxql/config/alg/pqn_minatar.yaml", INVADERS),
        ("pqn_minatar", "pqn", INVADERS),
        3,
        1e5,
    ),
    "cartpole": (
        (PUREJAXQL, "purejaxql/pqn_gymnax.py", "purejaxql/config/alg/pqn_cartpole.yaml", {}),
        ("pqn_gymnax", "pqn_cartpole", {}),
        1,
        5e5,
    ),
    "memory_chain": (
        (PUREJAXQL, "purejaxql/pqn_rnn_gymnax.py", "purejaxql/config/alg/pqn_rnn_memory_chain.yaml", {}),
        ("pqn_rnn_gymnax", "pqn_rnn_memory_chain", {}),
        5,
        1e5,
    ),
    "smax": (
        (JAXMARL, f"{QLEARNING}/pqn_vdn_rnn.py", f"{QLEARNING}/config/alg/pqn_vdn_rnn_smax.yaml", MAP),
        ("pqn_vdn_jaxmarl", "pqn_vdn_smax", MAP),
        1,
        2e5,
    ),
    "overcooked": (
        (
            JAXMARL,
            f"{QLEARNING}/pqn_vdn_cnn_overcooked.py",
            f"{QLEARNING}/config/alg/pqn_vdn_cnn_overcooked.yaml",
            LAYOUT,
        ),
        ("pqn_vdn_jaxmarl", "pqn_vdn_overcooked", {}),
        1,
        2e5,
    ),
    "cleanrl_cartpole": ((CLEANRL, "cleanrl/pqn.py", None, {}), ("pqn_gymnax", "pqn_cartpole", {}), 1, 1e5),
}
THEIRS = """
import copy, importlib.util, json, sys, time
import jax
from omegaconf import OmegaConf

path, recipe, changes, seeds = json.loads(sys.argv[1])
sys.path.insert(0, ".")
spec = importlib.util.spec_from_file_location("peer", path)
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)
config = {"WANDB_MODE": "disabled", "NUM_SEEDS": seeds, "SEED": 0, "WANDB_LOG_ALL_SEEDS": False, "TEST_DURING_TRAINING": False}
config = OmegaConf.to_container(OmegaConf.load(recipe)) | config | changes
env = [peer.env_from_config(copy.deepcopy(config))[0]] if hasattr(peer, "env_from_config") else []
train = jax.jit(jax.vmap(peer.make_train(config, *env))).lower(jax.random.split(jax.random.PRNGKey(0), seeds)).compile()
start = time.time()
metrics = jax.block_until_ready(train(jax.random.split(jax.random.PRNGKey(0), seeds)))["metrics"]
returns = metrics["returned_episode_returns"]
print(json.dumps([time.time() - start, float(returns[..., -max(1, returns.shape[-1] // 10) :].mean())]))
"""
OURS = """
import json, sys, tempfile
from importlib import import_module

script, alg, seeds = json.loads(sys.argv[1])
sys.path.insert(0, ".")
pqn = import_module(script)
config = pqn.Config(**alg | {"TEST_DURING_TRAINING": False, "TEST_NUM_ENVS": 1, "TEST_NUM_STEPS": 1})
settings = {"SAVE_PATH": tempfile.mkdtemp(), "COMPILATION_CACHE": None, "CHECKPOINT_INTERVAL": config.NUM_UPDATES}
table = pqn.run(config, NUM_SEEDS=seeds, **settings)["metrics"]
known = table.dropna(subset="returned_episode_returns")  # all of Overcooked's episodes end at once, every 25 updates
late = known[known.env_step > 0.9 * known.env_step.max()]
print(json.dumps([float(table.time.max()), float(late.returned_episode_returns.mean())]))
"""


def call(command, code, arguments, folder):
    """What a program prints in its last line, as JSON."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([*command, file.name, json.dumps(arguments)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"Error: {arguments[0]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def theirs(task, checkout, steps, seeds):
    """(seconds, return) of a peer's run, the first without compilation."""
    packages, path, recipe, changes = TASKS[task][0]
    uv = "uv run --no-project --python 3.11".split()
    command = [*uv, *(f"--with={name}" for name in packages.split()), "python"]
    if recipe:
        changes = changes | {"TOTAL_TIMESTEPS": steps, "TOTAL_TIMESTEPS_DECAY": steps}
        return call(command, THEIRS, [path, recipe, changes, seeds], checkout)
    options = [f"--total-timesteps={steps}", "--no-cuda"]
    done = subprocess.run([*command, path, *options], cwd=checkout, capture_output=True, text=True)  # CleanRL's
    if done.returncode:
        sys.exit(f"Error: {path} failed:\n{done.stderr[-2000:]}")
    speeds = [float(speed) for speed in re.findall(r"SPS: (\d+)", done.stdout)]
    returns = [
        (int(step), float(value))
        for step, value in re.findall(r"global_step=(\d+), episodic_return=\[?([-\d.]+)", done.stdout)
    ]
    late = [value for step, value in returns if step > 0.9 * steps]
    return [steps / speeds[-1], statistics.mean(late)]


def ours(task, steps, seeds):
    """The same of our script."""
    script, recipe, changes = TASKS[task][1]
    alg = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml"))
    alg |= changes | {"TOTAL_TIMESTEPS": steps}
    return call([sys.executable], OURS, [script, alg, seeds], ROOT)


def write(row):
    """Put a row into the table, in place of the one before."""
    path = ROOT / "results/peers.csv"
    table = pd.concat([pd.read_csv(path) if path.exists() else None, pd.DataFrame([row])])
    key = ["task", "seeds", "steps", "machine"]
    table.drop_duplicates(key, keep="last").sort_values(key).to_csv(path, index=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the folder of the peer's repository")
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--steps", type=float, help="of one seed in a turn")
    parser.add_argument("--seeds", type=int, help="in one program, on both sides")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    git = ["git", "-C", args.checkout, "log", "-1", "--format=%h of %cs"]
    revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    for task in args.tasks:
        _, _, seeds, steps = TASKS[task]
        steps, seeds = int(args.steps or steps), args.seeds or seeds
        turns = [(theirs(task, args.checkout, steps, seeds), ours(task, steps, seeds)) for _ in range(args.turns)]
        row = {"task": task, "peer": revision, "seeds": seeds, "steps": steps, "turns": args.turns}
        row["steps_per_s"] = round(statistics.median(seeds * steps / mine[0] for _, mine in turns))
        row["their_steps_per_s"] = round(statistics.median(seeds * steps / other[0] for other, _ in turns))
        row["ratio"] = round(statistics.median(other[0] / mine[0] for other, mine in turns), 2)
        row |= {"return": round(turns[-1][1][1], 2), "their_return": round(turns[-1][0][1], 2)}
        row |= {"machine": hardware(), "commit": git_commit(), "date": time.strftime("%Y-%m-%d")}
        print(row, flush=True)
        write(row)


if __name__ == "__main__":
    main()
