"""The Pallas kernels: run as ordinary programs, they give what the reference gives; and a TPU's compiler takes them."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, assert_close, differentiated, inputs

from clp_jax.nn import attention_pallas_kernels
from clp_jax.nn.attention_dense import reference_attention
from clp_jax.nn.attention_pallas import pallas_attention
from clp_jax.nn.visibility import Pattern, Places

INTERPRETED = functools.partial(pallas_attention, query_block=128, key_block=128, interpret=True)


@pytest.mark.parametrize("name", ["odd", "t5_decoder", "single_kv", "window", "all"])
def test_it_equals_the_reference_forward_and_backward(name):
    case = CASES[name]
    arrays, at = inputs(case)
    found = differentiated(INTERPRETED, case)(arrays, *at)
    assert_close(found, differentiated(reference_attention, case)(arrays, *at), 3e-6)


BLOCK_OF_SUMS = 4 * 128 * 128


@pytest.mark.parametrize(
    ("name", "lengths", "blocks"),
    [
        # Three blocks of queries: segments of one, or of two and one; keys' gradients in parts.
        ("t5_decoder", (300, 300), 1),
        ("all", (300, 300), 2),
        ("single_kv", (300, 300), 2),
        # Gradients of all keys, and of all queries.
        ("single_kv", (300, 300), 6),
        ("grouped", (300, 300), 100),
        # Of all keys, and of eight blocks of queries in two segments.
        ("grouped", (1000, 300), 6),
    ],
)
def test_gradients_are_summed_on_the_chip_as_far_as_they_fit(name, lengths, blocks, monkeypatch):
    case = dataclasses.replace(CASES[name], length=lengths[0], keys_length=lengths[1])
    monkeypatch.setattr(attention_pallas_kernels, "SUM_BYTES", blocks * BLOCK_OF_SUMS)
    arrays, at = inputs(case)
    found = differentiated(INTERPRETED, case)(arrays, *at)
    assert_close(found, differentiated(reference_attention, case)(arrays, *at), 3e-6)


def test_bfloat16_rounds_as_the_reference_does():
    case = CASES["all"]
    arrays, at = inputs(case, jnp.bfloat16)
    attend = differentiated(reference_attention, case)
    exact = attend(jax.tree.map(lambda x: x.astype(jnp.float32), arrays), *at)
    expected, found = attend(arrays, *at), differentiated(INTERPRETED, case)(arrays, *at)
    for x, y, z in zip(*map(jax.tree.leaves, (found, expected, exact)), strict=True):
        assert x.dtype == jnp.bfloat16
        errors = [float(jnp.linalg.norm(a.astype(jnp.float32) - z)) for a in (x, y)]
        assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name", ["odd", "t5_decoder"])
def test_bfloat16_is_within_two_roundings(name):
    """Of odd sizes, and with rows that see nothing: what a backward pass reads of the result was rounded once before."""
    case = CASES[name]
    arrays, at = inputs(case, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    exact = differentiated(reference_attention, case)(wide, *at)
    found = differentiated(INTERPRETED, case)(arrays, *at)
    for x, z in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        assert x.dtype == jnp.bfloat16
        assert float(jnp.linalg.norm(x.astype(jnp.float32) - z)) < 2 * 2.0**-8 * float(jnp.linalg.norm(z))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gives_zeros_and_passes_no_gradient(dtype):
    case = CASES["t5_decoder"]
    arrays, (queries, keys) = inputs(case, dtype)
    run = differentiated(INTERPRETED, case)
    blind = np.asarray(queries.segments == 0)
    out, gradients = run(arrays, queries, keys)
    assert blind.any() and not np.any(out[blind]) and not np.any(gradients[0][blind])
    nothing = Places(keys.positions, jnp.zeros_like(keys.segments))
    assert not any(np.any(x) for x in jax.tree.leaves(run(arrays, queries, nothing)))


@pytest.mark.parametrize(
    ("pattern", "seen"),
    [
        (Pattern(), (0, 512)),
        (Pattern(causal=True), (0, 384)),
        (Pattern(causal=True, window=100), (128, 384)),
        (Pattern(window=100), (128, 512)),
    ],
    ids=["plain", "causal", "causal_window", "window"],
)
def test_blocks_in_which_nobody_sees_anybody_are_skipped(pattern, seen):
    """Values of blocks that ought to be skipped are NaN: one that is computed, even if masked, shows."""
    segments = jnp.asarray(np.arange(640) < 500, jnp.int32)[None]
    at = Places(jnp.arange(640)[None], segments)
    rows = Places(at.positions[:, 256:384], segments[:, 256:384])
    spoilt = (jnp.arange(640) < seen[0]) | (jnp.arange(640) >= seen[1])
    value = jnp.where(spoilt[None, None, :, None], jnp.nan, jnp.ones((1, 1, 640, 4)))
    settings = dict(pattern=pattern, queries=rows, keys=at)
    query, key = jnp.ones((1, 128, 1, 4)), jnp.ones((1, 1, 640, 4))
    np.testing.assert_allclose(INTERPRETED(query, key, value, **settings), 1, rtol=1e-6)
    for block in range(seen[0], seen[1], 128):
        assert np.isnan(INTERPRETED(query, key, value.at[:, :, block : block + 128].set(jnp.nan), **settings)).any()


def test_it_is_batched():
    case = CASES["single_kv"]
    (query, key, value, _), at = inputs(case)
    settings = dict(pattern=case.pattern, queries=at[0], keys=at[1])
    stacked = [jnp.stack([x, x / 2]) for x in (query, key, value)]
    out = jax.vmap(lambda *x: INTERPRETED(*x, **settings))(*stacked)
    expected = [reference_attention(*(x[i] for x in stacked), **settings) for i in range(2)]
    assert_close(out, jnp.stack(expected), 2e-6)


def test_blocks_are_of_whole_lanes():
    at = Places(jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="blocks of 64 queries and 512 keys: expected multiples of 128"):
        pallas_attention(
            jnp.ones((1, 3, 1, 4)),
            jnp.ones((1, 1, 3, 4)),
            jnp.ones((1, 1, 3, 4)),
            pattern=Pattern(),
            queries=at,
            keys=at,
            query_block=64,
        )


COMPILED = """
import dataclasses
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from clp_jax.nn.attention_kernels import attention
from clp_jax.nn.visibility import Buckets, Pattern, Places
from clp_jax.partitioning import Rules, make_mesh, use_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
rules = Rules((("batch", "data"), ("act_heads", "tensor")))
for mesh, length, pattern, dtype in [
    (make_mesh(devices=devices[:1]), 2048, Pattern(causal=True, buckets=Buckets(32, 128, False)), jnp.bfloat16),
    (make_mesh(data=2, tensor=2, devices=devices), 1000, Pattern(True, 300, 0.1, 30.0), jnp.float32),
]:
    def shaped(*shape, dtype=dtype):
        spec = PartitionSpec("data", *[None] * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    table = None if pattern.buckets is None else jax.ShapeDtypeStruct((4, 32), dtype)
    place = shaped(2, length, dtype=jnp.int32)

    def total(query, key, value, table, positions, segments):
        at = Places(positions, segments)
        settings = dict(pattern=pattern, queries=at, keys=at, table=table, aligned=True)
        return attention(query, key, value, **settings).astype(jnp.float32).sum()

    numbers = (0, 1, 2) if table is None else (0, 1, 2, 3)
    with use_mesh(mesh, rules):
        key = shaped(2, 2, length, 64)
        lowered = jax.jit(jax.grad(total, argnums=numbers)).lower(
            shaped(2, length, 4, 64), key, key, table, place, place
        )
    program = lowered.compile()
    text = program.as_text()
    print("kernels", text.count('custom_call_target="tpu_custom_call"'), "gathers", text.count(" all-gather("),
          "temp", program.memory_analysis().temp_size_in_bytes)

from clp_jax.nn.attention_pallas import pallas_attention

for name in ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]:
    device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    alone = jax.sharding.SingleDeviceSharding(device)

    def total(query, key, value):
        settings = dict(pattern=Pattern(causal=True), queries=at, keys=at)
        return pallas_attention(query, key, value, **settings).astype(jnp.float32).sum()

    for batch, length in [(1, 16384), (2, 8192)]:
        at = Places(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
        shapes = [(batch, length, 4, 256), (batch, 1, length, 256)]
        query, key = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=alone) for shape in shapes)
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(query, key, key).compile().as_text()
        print("long", text.count('custom_call_target="tpu_custom_call"'))
"""


def test_a_tpu_compiler_takes_them():
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra `aot`")
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("kernels")]
    # A forward pass, and a backward pass.
    assert [line[1] for line in lines] == ["2", "2"], done.stdout
    assert all(int(line[5]) < 2 * 4 * 1000 * 1000 for line in lines)
    # Gradients of all queries of a head in VMEM, then those of all keys, too.
    assert done.stdout.count("long 2") == 6
