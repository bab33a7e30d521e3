"""Attention by blocks: what the reference gives, forward and backward, in memory that grows with the length alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, assert_close, differentiated, inputs

from clp_jax.nn.attention_blockwise import blockwise_attention
from clp_jax.nn.attention_dense import reference_attention
from clp_jax.nn.visibility import Buckets, Pattern, Places

# Of sums of thousands of float32 terms in another order, relative to the largest of an array.
FLOAT32 = 3e-6


def blocks_of(case, query_block=32, key_block=16):
    return functools.partial(blockwise_attention, aligned=case.aligned, query_block=query_block, key_block=key_block)


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference_forward_and_backward(name):
    case = CASES[name]
    arrays, at = inputs(case)
    found = differentiated(blocks_of(case), case)(arrays, *at)
    assert_close(found, differentiated(reference_attention, case)(arrays, *at), FLOAT32)


def test_bfloat16_rounds_as_the_reference_does():
    case = CASES["all"]
    arrays, at = inputs(case, jnp.bfloat16)
    whole, at = inputs(case)
    exact = differentiated(reference_attention, case)(jax.tree.map(lambda x: x.astype(jnp.float32), arrays), *at)
    expected = differentiated(reference_attention, case)(arrays, *at)
    found = differentiated(blocks_of(case), case)(arrays, *at)
    for x, y, z, like in zip(*map(jax.tree.leaves, (found, expected, exact, (whole[0], *whole))), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16 and x.shape == like.shape
        errors = [float(jnp.linalg.norm(a.astype(jnp.float32) - z)) for a in (x, y)]
        # Both round weights once and results once; they differ in where the softmax is divided by its sum.
        assert errors[0] < 1.5 * errors[1]
        assert errors[1] < 0.02 * float(jnp.linalg.norm(z))


@pytest.mark.parametrize("name", ["odd", "t5_decoder"])
def test_bfloat16_is_within_two_roundings(name):
    """Of odd sizes, and with rows that see nothing: what a backward pass reads of the result was rounded once before."""
    case = CASES[name]
    arrays, at = inputs(case, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    exact = differentiated(reference_attention, case)(wide, *at)
    found = differentiated(blocks_of(case), case)(arrays, *at)
    for x, z in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        assert x.dtype == jnp.bfloat16
        assert float(jnp.linalg.norm(x.astype(jnp.float32) - z)) < 2 * 2.0**-8 * float(jnp.linalg.norm(z))


@pytest.mark.parametrize("sizes", [(70, 70), (1, 70), (13, 64), (100, 100)])
def test_the_size_of_the_blocks_does_not_matter(sizes):
    case = CASES["t5_decoder"]
    arrays, at = inputs(case)
    query, key, value, table = arrays
    settings = dict(pattern=case.pattern, queries=at[0], keys=at[1], table=table)
    out = blocks_of(case, *sizes)(query, key, value, **settings)
    assert_close(out, reference_attention(query, key, value, **settings), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gives_zeros_and_passes_no_gradient(dtype):
    case = CASES["t5_decoder"]
    arrays, (queries, keys) = inputs(case, dtype)
    blind = np.asarray(queries.segments == 0)
    out, gradients = differentiated(blocks_of(case), case)(arrays, queries, keys)
    assert blind.any() and not np.any(out[blind]) and not np.any(gradients[0][blind])
    assert not np.any(np.swapaxes(gradients[2], 1, 2)[blind])
    # Nobody sees anything at all.
    nothing = Places(keys.positions, jnp.zeros_like(keys.segments))
    out, gradients = differentiated(blocks_of(case), case)(arrays, queries, nothing)
    assert not any(np.any(x) for x in jax.tree.leaves((out, gradients)))


@pytest.mark.parametrize("transform", ["vmap", "scan", "checkpoint"])
def test_it_composes(transform):
    case = CASES["t5_decoder"]
    arrays, at = inputs(case)
    attend = blocks_of(case)

    def total(query, key, value, table):
        out = attend(query, key, value, pattern=case.pattern, queries=at[0], keys=at[1], table=table)
        return jnp.square(out).sum()

    gradient = jax.grad(total, argnums=(0, 1, 2, 3))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x / 2]), arrays)
    run = {
        "vmap": jax.vmap(gradient),
        "scan": lambda *xs: jax.lax.scan(lambda _, x: (None, gradient(*x)), None, xs)[1],
        "checkpoint": lambda *xs: jax.tree.map(
            lambda *gs: jnp.stack(gs),
            *(jax.grad(jax.checkpoint(total), argnums=(0, 1, 2, 3))(*(x[i] for x in xs)) for i in range(2)),
        ),
    }[transform]

    def reference_total(query, key, value, table):
        out = reference_attention(query, key, value, pattern=case.pattern, queries=at[0], keys=at[1], table=table)
        return jnp.square(out).sum()

    one = jax.jit(jax.grad(reference_total, argnums=(0, 1, 2, 3)))
    expected = [one(*arrays), one(*(x / 2 for x in arrays))]
    assert_close(jax.jit(run)(*stacked), jax.tree.map(lambda *gs: jnp.stack(gs), *expected), FLOAT32)


def _dropped_weights(key, rate=0.25):
    """The weights themselves: values are the identity, and every weight is 1/S before dropout."""
    size = 64
    at = Places(jnp.arange(size)[None], jnp.ones((1, size), jnp.int32))
    return blockwise_attention(
        jnp.zeros((1, size, 2, size)),
        jnp.ones((1, 2, size, size)),
        jnp.broadcast_to(jnp.eye(size), (1, 2, size, size)),
        pattern=Pattern(),
        queries=at,
        keys=at,
        dropout_rate=rate,
        dropout_key=key,
        query_block=32,
        key_block=16,
    )


def test_dropout_drops_weights_at_its_rate_by_its_key_alone():
    weights = 64 * np.asarray(_dropped_weights(jax.random.key(0)))
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 4 / 3, rtol=1e-6)  # Not renormalised.
    # 8192 weights: five standard deviations of their mean; blocks and heads are dropped apart.
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / kept.size)
    blocks = kept[0].reshape(2, 32, 2, 4, 16)
    flat = np.moveaxis(blocks, 1, 3).reshape(-1, 32 * 16)
    assert len({row.tobytes() for row in flat}) == len(flat) == 16
    np.testing.assert_array_equal(kept, np.asarray(_dropped_weights(jax.random.key(0))) > 0)
    assert np.any(kept != (np.asarray(_dropped_weights(jax.random.key(1))) > 0))
    np.testing.assert_allclose(_dropped_weights(None), 1 / 64, rtol=1e-6)


def test_the_backward_pass_drops_what_the_forward_pass_dropped():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 2, 8, 8)), jnp.float32) for _ in range(2))
    at = Places(jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32))
    identity = jnp.broadcast_to(jnp.eye(8), (1, 2, 8, 8))
    weights = jnp.asarray(rng.normal(size=(1, 2, 8, 8)), jnp.float32)

    def attend(query, key, value):
        out = blockwise_attention(
            jnp.swapaxes(query, 1, 2), key, value, pattern=Pattern(), queries=at, keys=at, dropout_rate=0.5,
            dropout_key=jax.random.key(3), query_block=4, key_block=4,
        )  # fmt: skip
        return jnp.swapaxes(out, 1, 2)

    kept = attend(query, key, identity) > 0

    def dense(query, key, value):
        probabilities = jax.nn.softmax(query @ jnp.swapaxes(key, 2, 3), axis=-1)
        return jnp.where(kept, 2 * probabilities, 0) @ value

    def gradients(function):
        return jax.grad(lambda *x: (function(*x) * weights).sum(), argnums=(0, 1, 2))(query, key, identity)

    assert 0.3 < kept.mean() < 0.7
    assert_close(gradients(attend), gradients(dense), 2e-6)


def _compiled(length: int, differentiate: bool):
    pattern = Pattern(causal=True, buckets=Buckets(32, 128, False))

    def total(query, key, value, table, positions):
        at = Places(positions, jnp.ones_like(positions))
        out = blockwise_attention(query, key, value, pattern=pattern, queries=at, keys=at, table=table, aligned=True)
        return jnp.sum(jnp.square(out))

    row = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
    query = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((1, 32), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = jax.grad(total, argnums=(0, 1, 2, 3)) if differentiate else total
    return jax.jit(run).lower(query, row, row, table, positions).compile()


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_alone(differentiate):
    sizes = {length: _compiled(length, differentiate) for length in (8192, 16384, 32768)}
    used = [program.memory_analysis().temp_size_in_bytes for program in sizes.values()]
    assert used[2] - used[1] <= 2.1 * (used[1] - used[0])
    assert used[2] < 32768 * 32768 // 16
    shapes = re.findall(r"[a-z]+\d*\[([\d,]+)\]", sizes[32768].as_text())
    largest = max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)
    assert largest <= 32768 * 32


def test_hidden_blocks_cost_nothing_where_sequences_are_aligned():
    """Keys that only hidden blocks hold are NaN: a block that is made, even if masked, shows."""
    length = 96
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, length, 1, 4)), jnp.float32) for _ in range(3))
    at = Places(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    for pattern, first, last in [
        (Pattern(causal=True), 0, 63),
        (Pattern(causal=True, window=17), 16, 63),
        (Pattern(window=17), 16, 79),
    ]:
        hidden = np.ones(length, bool)
        hidden[first : last + 1] = False
        spoilt = jnp.where(hidden[None, None, :, None], jnp.nan, jnp.swapaxes(value, 1, 2))
        attend = functools.partial(
            blockwise_attention, pattern=pattern, queries=at, keys=at, query_block=32, key_block=16, aligned=True
        )
        out = attend(query, jnp.swapaxes(key, 1, 2), spoilt)
        assert np.isfinite(out[:, 32:64]).all()
        assert np.isnan(attend(query, jnp.swapaxes(key, 1, 2), jnp.full_like(spoilt, jnp.nan))).all()


def test_wrong_promises_are_refused():
    at = Places(jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32))
    longer = Places(jnp.arange(4)[None], jnp.ones((1, 4), jnp.int32))
    query, key = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 1, 4, 4))
    with pytest.raises(ValueError, match="aligned, with 3 queries and 4 keys"):
        blockwise_attention(query, key, key, pattern=Pattern(), queries=at, keys=longer, aligned=True)
    with pytest.raises(ValueError, match="blocks of 0 queries and 4 keys"):
        blockwise_attention(query, key, key, pattern=Pattern(), queries=at, keys=longer, query_block=0, key_block=4)
