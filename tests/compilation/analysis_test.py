"""The estimate against closed forms: products at the peak, copies at the memory's bandwidth, exchanges at the links'."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = """
import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from clp_jax.compilation.analysis import Work, analyse
from clp_jax.compilation.topology import Topology
from clp_jax.partitioning import make_mesh

size, numbers = 4096, 2**28
whole, rows = PartitionSpec(), 2**14


def programs(mesh, axes, rows=rows):
    \"\"\"One exchange each, along one mesh axis; its arrays have 2**28 bytes on each device, where it is whole.\"\"\"

    def lowered(function, length, *after, width=1):
        shape = (length, width) if width > 1 else (length,)
        array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(axes)))
        specs = {"in_specs": PartitionSpec(axes), "out_specs": PartitionSpec(*after), "check_vma": False}
        return jax.jit(jax.shard_map(function, mesh=mesh, **specs)).lower(array)

    axis, count, devices = axes[0], mesh.shape[axes[0]], mesh.size
    pairs = [(i, i ^ 1) for i in range(count)]
    return {
        "gather": lowered(lambda x: jax.lax.all_gather(x, axis, tiled=True), numbers // 4 * devices // count, axes[1:] or None),
        "reduce": lowered(lambda x: jax.lax.psum(x, axis), numbers // 4 * devices, axes[1:] or None),
        "scatter": lowered(
            lambda x: jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True),
            numbers // 4 // rows * devices, axes, width=rows,
        ),
        "permute": lowered(lambda x: jax.lax.ppermute(x, axis, pairs), numbers // 4 * devices, axes),
        "exchange": lowered(lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True), numbers // 4 * devices, axes),
    }


def bounds(chip):
    copied = 2 * numbers / chip.hbm_bandwidth  # What a program returns is no array of an exchange.
    ring = 2 * chip.link_bandwidth
    return {
        "product": 2 * size**3 / chip.peak_flops,
        "copy": 2 * 4 * numbers / chip.hbm_bandwidth,
        # Four devices on two lines of two.
        "gather": 3 / 4 * numbers / ring + copied,
        "reduce": 2 * 3 / 4 * numbers / ring,
        "scatter": 3 / 4 * numbers / ring,
        "permute": numbers / chip.link_bandwidth + copied,
        "exchange": numbers / 2 / chip.link_bandwidth + copied,
        # Two slices: each device has half of what the other needs.
        "gather between slices": numbers / 2 / chip.dcn_bandwidth + copied,
        "reduce between slices": 2 * numbers / 2 / chip.dcn_bandwidth + copied,
        "scatter between slices": numbers / 2 / chip.dcn_bandwidth + copied / 2,
        "permute between slices": numbers / chip.dcn_bandwidth + copied,
    }


found = {}
for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    topology = Topology.parse(name)
    mesh = make_mesh(data=1, fsdp=4, devices=topology.devices())

    def shaped(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    square = shaped((size, size), jnp.bfloat16)
    jobs = {
        "product": (jax.jit(lambda a, b: a @ b).lower(square, square), topology, mesh),
        "copy": (jax.jit(lambda a: a + 1).lower(shaped((4 * numbers,), jnp.float32, "fsdp")), topology, mesh),
    }
    jobs |= {kind: (lowered, topology, mesh) for kind, lowered in programs(mesh, ("fsdp",)).items()}
    slices = Topology.parse(name, 2)
    both = make_mesh(data=1, slice=2, fsdp=4, devices=slices.devices())
    between = programs(both, ("slice", "fsdp"), rows=1)
    del between["exchange"]
    jobs |= {f"{kind} between slices": (lowered, slices, both) for kind, lowered in between.items()}
    for kind, (lowered, where, on) in jobs.items():
        report = analyse(lowered, Work(kind, 4 * 2.0 * size**3, 1), where, on)
        found[f"{name} {kind}"] = {
            "ratio": report.seconds / bounds(topology.chip)[kind],
            "mfu": report.mfu,
            "executed": report.executed_flops,
            "exchanges": [(item.kind, item.axes) for item in report.exchanges],
            "arguments": report.memory.arguments,
            "memory": dataclasses.asdict(report.memory),
        }
    one = shaped((2**36,), jnp.float32)
    refused = analyse(jax.jit(lambda a: a + 1).lower(one), Work("too much", 0.0, 1), topology, mesh)
    found[f"{name} refused"] = {"fits": refused.memory.fits, "needed": refused.memory.needed, "advice": refused.advice,
                                "arguments": refused.memory.arguments, "limit": refused.memory.limit}
print(json.dumps(found))
"""
CHIPS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
EXCHANGES = {
    "gather": "all-gather",
    "reduce": "all-reduce",
    "scatter": "reduce-scatter",
    "permute": "collective-permute",
    "exchange": "all-to-all",
}
# What libtpu makes of these is further from the bound: docs/scale.md, "Where not to trust it".
FURTHER = {"v6e:2x2 product": 1.29, "v6e:2x2 scatter": 1.28, "v5e:2x2 scatter": 1.175}


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


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", ["product", "copy", *EXCHANGES])
def test_the_estimate_is_the_closed_form_within_15_percent(found, chip, kind):
    further = FURTHER.get(f"{chip} {kind}", 1.0)
    assert found[f"{chip} {kind}"]["ratio"] == pytest.approx(further, abs=0.01 if further > 1 else 0.15)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", sorted(EXCHANGES.keys() - {"exchange"}))
def test_what_leaves_a_slice_takes_the_network_s_time(found, chip, kind):
    """The compiler leaves it to the hosts, and writes no collective for it."""
    between = found[f"{chip} {kind} between slices"]
    assert between["ratio"] == pytest.approx(1.0, abs=0.15)
    assert between["exchanges"] == [[EXCHANGES[kind], ["slice"]]]


@pytest.mark.parametrize("chip", CHIPS)
def test_operations_and_exchanges_are_counted(found, chip):
    product = found[f"{chip} product"]
    assert product["executed"] == 4 * 2 * 4096**3 and product["exchanges"] == []
    assert product["mfu"] == pytest.approx(1 / product["ratio"])
    assert product["arguments"] == 2 * 2 * 4096**2
    for kind, name in EXCHANGES.items():
        assert found[f"{chip} {kind}"]["exchanges"][0] == [name, ["fsdp"]]


@pytest.mark.parametrize("chip", CHIPS)
def test_memory_is_what_must_be_free_and_the_peak_what_is_in_use(found, chip):
    """Of a gather: a quarter is given, the whole comes together, and is copied to where it is returned."""
    memory = found[f"{chip} gather"]["memory"]
    parts = [memory[name] for name in ("arguments", "outputs", "temporaries", "code")]
    assert memory["needed"] == sum(parts) < memory["limit"]
    assert memory["arguments"] == 2**26 and memory["outputs"] == 2**28 and 0 <= memory["temporaries"] - 2**28 < 2**21
    assert 2**26 + 2 * 2**28 <= memory["peak"] <= memory["needed"]


@pytest.mark.parametrize("chip", CHIPS)
def test_what_does_not_fit_says_by_how_much(found, chip):
    refused = found[f"{chip} refused"]
    assert not refused["fits"] and refused["arguments"] == 2**38 and refused["needed"] >= 2**38 > refused["limit"]
    assert "shard" in refused["advice"]
