"""Where an update's time goes: the compiled program's operations by time, with the line of the algorithm each comes from.

    python benchmarks/hotspots.py pqn_vdn_smax alg.MAP_NAME=3m
    python benchmarks/hotspots.py pqn_atari --rows 30

Measured by JAX's profiler over one update of one seed on a CPU, evaluations off. The name beside an operation is that of the JAX operation it computes;
of fused ones, of the last. Loops contain what runs inside them and are left out. Operations may run beside each other: their sum may exceed the update's time.
"""

import argparse
import collections
import importlib
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from speed import RECIPES  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("changes", nargs="*", metavar="alg.KEY=value")
    args = parser.parse_intermixed_args()
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
    os.environ |= {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PLATFORMS": "cpu",
    }  # elsewhere a kernel has not its operation's name
    module = importlib.import_module(RECIPES[args.recipe][0])
    import jax
    from omegaconf import OmegaConf

    alg = OmegaConf.load(ROOT / f"configs/alg/{args.recipe}.yaml")
    changes = OmegaConf.from_dotlist([change.removeprefix("alg.") for change in args.changes])
    keys = OmegaConf.to_container(OmegaConf.merge(alg, changes)) | {"TEST_DURING_TRAINING": False}
    try:
        config = module.Config(**keys)
    except (TypeError, module.UserError) as error:
        sys.exit(f"Error: {error}")
    train, key = module.make_train(config), jax.random.split(jax.random.key(0), 1)
    state = train(key, num_updates=1, length=1)["runner_state"]
    jax.block_until_ready(state)
    with jax.profiler.trace(folder / "trace"):
        jax.block_until_ready(train(state=state, num_updates=1, length=1))
    (profile,) = (folder / "trace").rglob("*.xplane.pb")

    programs = [path.read_text() for path in (folder / "hlo").glob("*updates*after_optimizations.txt")]
    named = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?(?: |\))([\w-]+)\(.*op_name="([^"]*)"', re.M)
    sources = {name: (kind, source) for name, kind, source in named.findall(max(programs, key=len))}
    spent, calls = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(profile)).planes:
        for event in (event for line in plane.lines for event in line.events):
            if sources.get(event.name, ("while",))[0] not in ("while", "conditional", "call"):
                spent[event.name] += event.duration_ns / 1e6
                calls[event.name] += 1
    total = sum(spent.values())
    print(
        f"{args.recipe} on {config.TASK}, {jax.devices()[0].device_kind}, jax {jax.__version__}: {total:.0f} ms in all"
    )
    for name, milliseconds in spent.most_common(args.rows):
        source = "/".join(sources[name][1].split("/")[-4:])
        print(f"{milliseconds:9.1f} ms {milliseconds / total:5.1%} {calls[name]:6} x {name:32} {source}")


if __name__ == "__main__":
    main()
