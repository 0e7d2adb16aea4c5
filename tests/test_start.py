"""Starting several seeds of a recurrent agent: LAPACK's batched QR once waited for its own threads for ever."""

import json

import pytest

START = """
import gymnax, jax, json, sys
pqn = __import__(sys.argv[1])
if sys.argv[1] == "pqn_craftax_rnn":  # its worlds take long to compile
    pqn.make_env = lambda config: gymnax.make("MemoryChain-bsuite")
init = jax.jit(jax.vmap(pqn.make_pqn(pqn.Config(**json.loads(sys.argv[2])))[0]))
for num_seeds in (2, 4):
    for i in range(50):
        jax.block_until_ready(init(jax.random.split(jax.random.key(i), num_seeds)))
print("started")
"""
SMALL = {"NUM_ENVS": 1, "NUM_MINIBATCHES": 1, "HIDDEN_SIZE": 64, "TEST_NUM_ENVS": 1}
RECURRENT = {
    "pqn_craftax_rnn": {},
    "pqn_rnn_gymnax": {},
    "pqn_vdn_jaxmarl": {"ENV_NAME": "MPE_simple_spread_v3", "MAP_NAME": None, "ALG_NAME": "a recurrent agent"},
}


@pytest.mark.parametrize("script", RECURRENT)
def test_seeds_vmapped_start_a_hundred_times(script, command, tmp_path):
    """`init` under vmap, as in `jax.vmap(make_train(config))`; `run` starts seeds one after the other."""
    (tmp_path / "start.py").write_text(START)
    process = command("start.py", script, json.dumps(SMALL | RECURRENT[script]))
    process.process.join(120)
    assert not process.running, f"{script} hangs: {process.err}"
    assert process.code == 0 and "started" in process.out, process.err
