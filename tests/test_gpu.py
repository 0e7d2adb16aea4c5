"""What a GPU would run, without one: benchmarks/gpu_launches.py lowers and, where CUDA's compiler is installed, compiles."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_launches  # noqa: E402

HLO = """HloModule jit_f
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %fusion = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %copy = f32[4]{0} copy(%fusion)
  ROOT %t = (s32[], f32[4]{0}) tuple(%x, %copy)
}
%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %call = f32[4]{0} custom-call(%p), custom_call_target="gemm"
  ROOT %w = (s32[], f32[4]{0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %start = f32[4]{0} fusion(%a), kind=kLoop, calls=%fused
  %w = (s32[], f32[4]{0}) while(%a), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %b = f32[4]{0} bitcast(%start)
  ROOT %end = f32[4]{0} copy(%b)
}
"""


def test_launches_of_a_small_program():
    """Two outside of loops; a loop of three turns with one launch and an inner loop of five turns with two."""
    assert gpu_launches.count(gpu_launches.computations(HLO)) == (2 + 3 * (1 + 5 * 2), [(3, 11, [(5, 2, [])])])


SMALL = {"NUM_ENVS": 4, "NUM_STEPS": 2, "NUM_MINIBATCHES": 2, "TOTAL_TIMESTEPS": 80}


@pytest.mark.parametrize("recipe", ["pqn", "pqn_cartpole", "pqn_atari", "pqn_vdn_overcooked"])
def test_no_convolution_where_seeds_are_vmapped(recipe):
    """It would be one in groups, which is slow and breaks CUDA graphs; products over slices become batched products.
    (Craftax's network has none; its environment has one of its own, in groups with one seed, too.)"""
    changes = {} if recipe == "pqn_atari" else {"TEST_NUM_ENVS": 2, "TEST_NUM_STEPS": 2}
    program = gpu_launches.lower(recipe, 10, **SMALL, **changes).as_text()
    assert "dot_general" in program and "convolution" not in program


COUNT = """
import json, sys
sys.path.insert(0, "benchmarks")
import gpu_launches
dump = gpu_launches.prepare()
print(json.dumps(gpu_launches.measure(sys.argv[1], 1, {}, dump)))
"""


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs CUDA's compiler: extra [launches]")
@pytest.mark.parametrize("recipe, most", [("pqn", 3700), ("pqn_cartpole", 4000)])
def test_an_update_is_one_graph_of_few_launches(recipe, most):
    done = subprocess.run([sys.executable, "-c", COUNT, recipe], cwd=ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["launches"] <= most and row["graph"] and row["convolutions"] == 0
