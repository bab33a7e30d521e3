"""Attention and the chunked loss on eight virtual devices: the numbers of one, and nothing gathered."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import ONE_SIDED, Case, differentiated, inputs
from jax.sharding import NamedSharding, PartitionSpec
from rounding import assert_same_to_rounding, natural_scales

from clp_jax.nn import vocabulary_loss
from clp_jax.nn.attention_blockwise import blockwise_attention
from clp_jax.nn.attention_dense import reference_attention
from clp_jax.nn.attention_pallas import pallas_attention
from clp_jax.nn.visibility import Pattern, Places
from clp_jax.nn.vocabulary_loss import chunked_token_statistics
from clp_jax.partitioning import Rules, make_mesh, named_sharding, use_mesh

RULES = Rules((("batch", ("data",)), ("act_heads", "tensor")))
CASE = Case(Pattern(causal=True, scale=0.5, buckets=ONE_SIDED), heads=4, kv_heads=2, packed=True, aligned=True)
ATTEND = {
    "blockwise": functools.partial(blockwise_attention, query_block=32, key_block=32, aligned=True),
    "pallas": functools.partial(pallas_attention, interpret=True),
}


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "tensor"),
    [
        ("blockwise", 4, 2, 2),
        ("pallas", 4, 2, 2),
        # Fewer key heads than devices that share heads: each device has a part of the queries of one.
        ("pallas", 4, 1, 4),
        ("pallas", 8, 2, 4),
    ],
)
def test_attention_is_that_of_one_device(name, heads, kv_heads, tensor):
    case = dataclasses.replace(CASE, heads=heads, kv_heads=kv_heads)
    arrays, at = inputs(case)
    # Four examples: every device has its own, or those of one other, and its own heads.
    arrays = (*(jnp.concatenate([x, x / 2]) for x in arrays[:3]), arrays[3])
    at = tuple(jax.tree.map(lambda x: jnp.concatenate([x, x]), places) for places in at)
    reference = differentiated(reference_attention, case)
    expected, scales = reference(arrays, *at), natural_scales(lambda arrays: reference(arrays, *at), arrays)
    mesh = make_mesh(data=8 // tensor, tensor=tensor)
    attend = differentiated(ATTEND[name], case)
    # Of arrays alone: JAX lowers trees of things that are no arrays, which `Places` refuses where fields are checked.
    run = jax.jit(lambda arrays, *x: attend(arrays, Places(*x[:2]), Places(*x[2:])))
    of_keys = "tensor" if kv_heads % tensor == 0 else None
    specs = (("data", None, "tensor"), ("data", of_keys), ("data", of_keys), ("tensor",))
    placed = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(arrays, specs, strict=True)
    ]
    rows = jax.device_put(jax.tree.leaves(at), NamedSharding(mesh, PartitionSpec("data")))
    with use_mesh(mesh, RULES):
        program = run.lower(tuple(placed), *rows).compile()
    found = program(tuple(placed), *rows)
    assert_same_to_rounding(found, expected, scales)
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    assert found[0].sharding.shard_shape(found[0].shape) == (tensor // 2, 70, heads // tensor, 8)


def test_a_chunk_of_the_loss_is_as_large_as_a_device_allows(monkeypatch):
    kernel = jnp.ones((4, 16))
    seen = []

    def head(hidden):
        seen.append(hidden.shape[1])
        return hidden @ kernel

    def chunk():
        seen.clear()
        jax.make_jaxpr(lambda h: chunked_token_statistics(h, head, jnp.zeros((8, 12), jnp.int32)))(jnp.ones((8, 12, 4)))
        return seen[-1]

    monkeypatch.setattr(vocabulary_loss, "CHUNK_BYTES", 8 * 16 * 4)
    assert chunk() == 1
    with use_mesh(make_mesh(data=4, tensor=2), Rules((("batch", "data"), ("act_vocab", "tensor")))):
        assert chunk() == 6
    with use_mesh(make_mesh(data=2, sequence=4), Rules((("batch", "data"), ("length", "sequence")))):
        assert chunk() == 4 * 2


@pytest.mark.parametrize(
    ("table", "mesh", "chunk"),
    [
        ((("batch", "data"),), {}, 10),
        # Thirteen positions on each device: the last chunk of each is filled up.
        ((("batch", "data"), ("length", "sequence")), {"data": 2, "sequence": 4}, 5),
    ],
)
def test_the_loss_by_chunks_gathers_nothing(table, mesh, chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 52, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 16, size=(8, 52)), jnp.int32)

    def loss(hidden, kernel, targets, chunk):
        found = chunked_token_statistics(hidden, lambda h: h @ kernel, targets, chunk=chunk, with_entropy=True)
        weights = 1 + jnp.arange(targets.size, dtype=jnp.float32).reshape(targets.shape)
        return jnp.sum(weights * (jnp.square(found.log_z) - found.log_probs + found.entropy))

    run = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
    expected = run(hidden, kernel, targets, 52)
    mesh, rules = make_mesh(**mesh), Rules(table)
    rows = named_sharding(("batch", "length"), mesh, rules)
    placed = (jax.device_put(hidden, rows), jax.device_put(kernel, NamedSharding(mesh, PartitionSpec())))
    with use_mesh(mesh, rules):
        program = run.lower(*placed, jax.device_put(targets, rows), chunk).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    assert len(re.findall(r" while\(", program.as_text())) == 2
    assert_same_to_rounding(program(*placed, jax.device_put(targets, rows)), expected)
