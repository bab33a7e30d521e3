"""The estimate against closed forms: products at the peak, copies at the memory's bandwidth, exchanges at the links'."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = """
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from clp_jax.compilation.analysis import Work, analyse
from clp_jax.compilation.topology import Topology
from clp_jax.partitioning import make_mesh

found = {}
for name in ("v5e:2x2", "v5p:2x2x1"):
    topology = Topology.parse(name)
    mesh = make_mesh(data=1, fsdp=4, devices=topology.devices())

    def shaped(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    size, numbers = 4096, 2**28
    whole = NamedSharding(mesh, PartitionSpec())
    square = shaped((size, size), jnp.bfloat16)
    long = shaped((4 * numbers,), jnp.float32, "fsdp")
    parts = shaped((4 * numbers // 8,), jnp.float32, "fsdp")
    programs = {
        "product": jax.jit(lambda a, b: a @ b).lower(square, square),
        "copy": jax.jit(lambda a: a + 1).lower(long),
        "gather": jax.jit(lambda a: a, out_shardings=whole).lower(parts),
    }
    for kind, lowered in programs.items():
        report = analyse(lowered, Work(kind, 4 * 2.0 * size**3, 1), topology, mesh)
        chip = topology.chip
        bound = {
            "product": 2 * size**3 / chip.peak_flops,
            "copy": 2 * 4 * numbers / chip.hbm_bandwidth,
            # And a copy: what a program returns is no array of an exchange.
            "gather": 2 * numbers * (3 / 4 / (2 * chip.link_bandwidth) + 2 / chip.hbm_bandwidth),
        }[kind]
        found[f"{name} {kind}"] = {
            "ratio": report.seconds / bound,
            "mfu": report.mfu,
            "executed": report.executed_flops,
            "exchanges": [(item.kind, item.axes) for item in report.exchanges],
            "arguments": report.memory.arguments,
        }
    one = shaped((2**36,), jnp.float32)
    refused = analyse(jax.jit(lambda a: a + 1).lower(one), Work("too much", 0.0, 1), topology, mesh)
    found[f"{name} refused"] = {"fits": refused.memory.fits, "needed": refused.memory.needed, "advice": refused.advice,
                                "arguments": refused.memory.arguments, "limit": refused.memory.limit}
print(json.dumps(found))
"""


def in_process(program: str) -> str:
    """What a program prints in a process of its own, whose compiler optimises."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]),
        "XLA_FLAGS": "",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict:
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra `aot`")
    return json.loads(in_process(PROGRAMS).splitlines()[-1])


@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("kind", ["product", "copy", "gather"])
def test_the_estimate_is_the_closed_form_within_15_percent(found, chip, kind):
    assert 0.85 < found[f"{chip} {kind}"]["ratio"] < 1.15


@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1"])
def test_operations_and_exchanges_are_counted(found, chip):
    product, gather = found[f"{chip} product"], found[f"{chip} gather"]
    assert product["executed"] == 4 * 2 * 4096**3 and product["exchanges"] == []
    assert product["mfu"] == pytest.approx(1 / product["ratio"])
    assert gather["exchanges"] == [["all-gather", ["fsdp"]]]
    assert product["arguments"] == 2 * 2 * 4096**2


@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1"])
def test_what_does_not_fit_says_by_how_much(found, chip):
    refused = found[f"{chip} refused"]
    assert not refused["fits"] and refused["arguments"] == 2**38 and refused["needed"] >= 2**38 > refused["limit"]
    assert "shard" in refused["advice"]
