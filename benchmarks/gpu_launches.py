"""Kernels that one update launches on an NVIDIA GPU, counted without one: XLA compiles for an H100 on any machine.

    uv run --extra all --extra launches python benchmarks/gpu_launches.py                       # the recipes below, 1 and 10 seeds
    uv run --extra all --extra launches python benchmarks/gpu_launches.py --recipes pqn --seeds 1 alg.NUM_ENVS=1024

Small networks are bound by launches on a GPU: fewer, larger kernels are faster. A row of results/gpu_launches.csv for each recipe,
number of seeds and overrides, which replaces the one before. launches: of an update without an evaluation, all seeds vmapped; rollout and
minibatch: of the first loop and of the last, turns x launches of a turn (of two steps where the loop is unrolled); rest: all others;
convolutions: vmapped `nn.Conv` makes some in groups, which CUDA graphs cannot hold; graph: whether the update is one CUDA graph with
XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE; compile_s: on this machine; state_mib, temp_mib: memory by XLA's analysis. Emulators are
left out of Atari's. It measures no time, and on a real GPU autotuning may choose other matrix products.
"""

import argparse
import glob
import importlib
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {  # recipe: its script
    "pqn": "pqn_minatar",
    "pqn_cartpole": "pqn_gymnax",
    "pqn_rnn_cartpole": "pqn_rnn_gymnax",
    "pqn_atari": "pqn_atari_envpool",
    "pqn_craftax_rnn": "pqn_craftax_rnn",
    "pqn_vdn_smax": "pqn_vdn_jaxmarl",
    "pqn_vdn_overcooked": "pqn_vdn_jaxmarl",
    "pqn_vdn_hanabi": "pqn_vdn_jaxmarl",
    "pqn_vdn_mpe": "pqn_vdn_jaxmarl",
}
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=+WHILE"  # there is no GPU to tune on
H100 = """platform_name: "CUDA" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3" gpu_device_info { name: "NVIDIA H100 80GB HBM3" core_count: 132
cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } threads_per_warp: 32 fpus_per_core: 128
threads_per_block_limit: 1024 threads_per_core_limit: 2048 clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000
shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 device_address_bits: 64
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 device_memory_size: 84942979072
thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 driver_version: "13.0.0"
runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }"""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}


def computations(text):
    """An HLO module's text as {computation: [(opcode, line), ...]}; the entry's name is ENTRY."""
    found, current = {}, []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = found[head[1] and "ENTRY" or head[2]] = []
        elif operation := re.match(r" +(?:ROOT )?%?[\w.-]+ = .*?[\])}] ([a-z][\w-]*)\(", line):
            current.append((operation[1], line))
    return found


def count(module, name="ENTRY"):
    """Launches of one run of a computation, and its loops as [(turns, launches of a turn, loops in it), ...]."""
    total, loops = 0, []
    for opcode, line in module[name]:
        if opcode == "while":
            body = re.search(r"body=%?([\w.-]+)", line)[1]
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            turns, (launches, inner) = int(turns[1]) if turns else 1, count(module, body)
            loops.append((turns, launches, inner))
            total += turns * launches
        elif opcode == "call":
            launches, inner = count(module, re.search(r"to_apply=%?([\w.-]+)", line)[1])
            total, loops = total + launches, loops + inner
        elif opcode not in FREE and not opcode.endswith("-done"):
            total += 1  # of a conditional: the copy of its predicate; usually no evaluation is due
    return total, loops


class NoEmulators:
    """Stands for a pool of emulators: Atari's rollout without them, which run on the host."""

    def __init__(self, games):
        self.obs = games.obs

    def xla(self):
        import jax.numpy as jnp

        def step(handle, action):
            obs = jnp.broadcast_to(action.astype(jnp.uint8)[:, None, None, None], (len(action), *self.obs.shape[2:]))
            no, zeros = action < 0, action * 1.0
            return handle, (obs, zeros, no, no, {"terminated": action * 0, "elapsed_step": action, "reward": zeros})

        return None, None, None, step


def lower(recipe, num_seeds, device=None, **changes):
    """One update of vmapped seeds as `run` makes it, lowered for CUDA; to compile it, `device` is one of a topology."""
    import jax
    from omegaconf import OmegaConf

    sys.path.insert(0, str(ROOT))
    pqn, backend = importlib.import_module(RECIPES[recipe]), jax.default_backend
    config = pqn.Config(**OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/alg/{recipe}.yaml")) | changes)
    place = device and jax.sharding.SingleDeviceSharding(device)
    put = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)  # noqa: E731
    jax.default_backend = lambda: "gpu"  # the scripts ask
    try:
        init, update, _ = pqn.make_pqn(config)
        state = jax.eval_shape(
            jax.vmap(init), jax.eval_shape(partial(jax.random.split, num=num_seeds), jax.random.key(0))
        )
        one_update, args = jax.vmap(update, (0, None)), (put(state), put(jax.ShapeDtypeStruct((), int)))
        if recipe == "pqn_atari":
            shape, emulators = pqn.make_env(config).observation_space.shape, config.NUM_ENVS + config.TEST_ENVS
            kinds = {"obs": "uint8", "done": bool, "returns": float, "last_returns": float, "last_lengths": float}
            games = {
                k: jax.ShapeDtypeStruct((num_seeds, emulators, *shape * (k == "obs")), v) for k, v in kinds.items()
            }
            games = pqn.Games(**games)
            one_update, args = partial(update, NoEmulators(games)), (args[0], put(games), args[1])
        one_update = jax.jit(partial(one_update), donate_argnums=0)
        return one_update.trace(*args).lower(lowering_platforms=("cuda",))
    finally:
        jax.default_backend = backend


def measure(recipe, num_seeds, changes, dump):
    """A row: the update compiled for an H100, its launches counted."""
    from jax.experimental import topologies

    name = {"platform": "cuda", "topology_name": "", "topology": "1x1x1", "target_config": H100}
    lowered, start = lower(recipe, num_seeds, topologies.get_topology_desc(**name).devices[0], **changes), time.time()
    compiled = lowered.compile()
    seconds, text, memory = time.time() - start, compiled.as_text(), compiled.memory_analysis()
    total, loops = count(computations(text))
    thunks = max(glob.glob(f"{dump}/*after_thunk_passes.txt"), key=os.path.getmtime)
    pieces = re.findall(r"^\d+: (k\w+)", Path(thunks).read_text(), re.MULTILINE)
    row = {"recipe": recipe, "seeds": num_seeds, "changes": " ".join(f"{k}={v}" for k, v in changes.items())}
    row |= {"launches": total, "rollout": "{} x {}".format(*loops[0]), "minibatch": "{} x {}".format(*loops[-1])}
    row |= {"rest": total - loops[0][0] * loops[0][1] - loops[-1][0] * loops[-1][1]}
    row |= {"convolutions": len(re.findall(r"feature_group_count=|convolution\(|cudnn\$conv", text))}
    row |= {"graph": pieces == ["kCommandBuffer"], "compile_s": round(seconds)}
    return row | {"state_mib": memory.argument_size_in_bytes >> 20, "temp_mib": memory.temp_size_in_bytes >> 20}


def write(row):
    """Put a row into the table, in place of the one before."""
    path, key = ROOT / "results/gpu_launches.csv", ["recipe", "changes", "seeds"]
    table = pd.concat([pd.read_csv(path, keep_default_na=False) if path.exists() else None, pd.DataFrame([row])])
    table.drop_duplicates(key, keep="last").sort_values(key).to_csv(path, index=False)


def prepare():
    """Ask XLA, before JAX is used, to dump what it compiles: the folder. The CUDA plugin is only asked for its compiler."""
    dump = tempfile.mkdtemp()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*update.*"
    return dump


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 10])
    parser.add_argument("changes", nargs="*", help="alg.KEY=value")
    args = parser.parse_args()
    dump = prepare()
    from omegaconf import OmegaConf

    changes = OmegaConf.to_container(OmegaConf.from_dotlist(args.changes)).get("alg", {})
    for recipe in args.recipes:
        for num_seeds in args.seeds:
            row = measure(recipe, num_seeds, changes, dump)
            write(row)
            print(*(f"{name} {value}" for name, value in row.items() if value != ""), sep="  ", flush=True)


if __name__ == "__main__":
    main()
