"""Attention over positions that devices share: the numbers of the reference, and the work the same for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BATCH, HEAD_DIM, ONE_SIDED, TWO_SIDED, Case, differentiated, inputs, places
from jax.sharding import NamedSharding, PartitionSpec
from rounding import ROUNDING, assert_same_to_rounding, natural_scales

from clp_jax.nn.attention import look
from clp_jax.nn.attention_dense import reference_attention
from clp_jax.nn.attention_kernels import attention
from clp_jax.nn.attention_ring import KeySet, from_balanced, is_balanced, ring_attention, to_balanced
from clp_jax.nn.visibility import Pattern, Places, block_extents, may_meet
from clp_jax.partitioning import Rules, make_mesh, use_mesh

RULES = Rules((("batch", "data"), ("length", "sequence"), ("act_heads", "tensor")))
ALL = Pattern(causal=True, window=40, scale=0.5, cap=1.5, buckets=ONE_SIDED)
CASES = {
    "everything": (dict(data=2, sequence=4), Case(ALL, 64, 64, heads=4, kv_heads=2, packed=True, aligned=True)),
    "both_ways": (dict(data=1, sequence=4, tensor=2), Case(Pattern(buckets=TWO_SIDED), 64, 64)),
    "other_keys": (dict(data=2, sequence=4), Case(Pattern(scale=0.5), 24, 56, packed=True)),
    "one_key_head": (dict(data=2, sequence=2, tensor=2), Case(Pattern(causal=True), 32, 32, heads=4, kv_heads=1)),
}


def _ring(query, key, value, *, table, pattern, queries, keys, engine="blockwise"):
    sets = [KeySet(key, value, queries, keys, pattern)]
    return ring_attention(query, sets, table=table, engine=engine, interpret=True)


def _expected(case, arrays, at):
    """Of the reference on one device, and what it is made of."""
    run = differentiated(reference_attention, case)
    return run(arrays, *at), natural_scales(lambda arrays: run(arrays, *at), arrays)


def _on(mesh, attend, case, arrays, at):
    run = differentiated(attend, case)
    with use_mesh(mesh, RULES):
        return jax.jit(lambda arrays, *x: run(arrays, Places(*x[:2]), Places(*x[2:])))(arrays, *jax.tree.leaves(at))


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference_forward_and_backward(name):
    assert jax.device_count() == 8
    sizes, case = CASES[name]
    arrays, at = inputs(case)
    expected = _expected(case, arrays, at)
    assert_same_to_rounding(_on(make_mesh(**sizes), _ring, case, arrays, at), *expected)


def test_it_is_chosen_where_rules_share_positions():
    sizes, case = CASES["everything"]
    arrays, at = inputs(case)
    expected = _expected(case, arrays, at)
    mesh = make_mesh(**sizes)
    assert_same_to_rounding(_on(mesh, attention, case, arrays, at), *expected)
    with use_mesh(mesh, RULES):
        assert look(case.pattern, *at, arrays[3]).mask is None
        with pytest.raises(ValueError, match="a ring for 64 queries and 63 keys: expected active rules that shard"):
            _ring(
                arrays[0], *(x[:, :, :63] for x in arrays[1:3]), table=arrays[3], pattern=ALL, queries=at[0], keys=at[1]
            )
    with pytest.raises(ValueError, match="'ring' is for rules that shard 'length'"):
        attention(*arrays[:3], table=arrays[3], pattern=ALL, queries=at[0], keys=at[1], implementation="ring")


def test_pallas_kernels_compute_the_parts():
    case = Case(
        Pattern(causal=True, cap=2.0, buckets=ONE_SIDED), 64, 64, heads=2, kv_heads=1, packed=True, aligned=True
    )
    arrays, at = inputs(case)
    expected = _expected(case, arrays, at)
    found = _on(make_mesh(data=4, sequence=2), functools.partial(_ring, engine="pallas"), case, arrays, at)
    assert_same_to_rounding(found, *expected)


def test_samples_see_their_prompt_and_themselves():
    """Two sets of keys in one softmax; four rows share two prompts."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    query, own, prompt = normal(4, 16, 2, HEAD_DIM), normal(2, 4, 2, 16, HEAD_DIM), normal(2, BATCH, 2, 24, HEAD_DIM)
    pattern = Pattern(causal=True, scale=0.5)
    prompts = places(24, True, 3)
    stand = Places(30 + jnp.arange(16)[None], jnp.ones((4, 16), jnp.int32))
    seen = Places(jnp.tile(stand.positions, (BATCH, 2)), jnp.ones((BATCH, 32), jnp.int32))
    weights = jnp.sin(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)

    def ring(query, own, prompt):
        return ring_attention(query, [KeySet(*prompt, seen, prompts, pattern), KeySet(*own, stand, stand, pattern)])

    def reference(query, own, prompt):
        each = [jnp.repeat(x, 2, axis=0) for x in prompt]
        key, value = (jnp.concatenate(pair, axis=2) for pair in zip(each, own, strict=True))
        repeated = [
            jnp.repeat(jnp.broadcast_to(x, (BATCH, 24)), 2, axis=0) for x in (prompts.positions, prompts.segments)
        ]
        where = jnp.concatenate([repeated[0], jnp.broadcast_to(stand.positions, (4, 16))], axis=1)
        keys = Places(where, jnp.concatenate([repeated[1], stand.segments], axis=1))
        return reference_attention(query, key, value, pattern=pattern, queries=stand, keys=keys)

    def both(attend):
        return jax.jit(
            jax.value_and_grad(lambda *x: ((y := attend(*x)) * weights).sum() + jnp.square(y).sum(), argnums=(0, 1, 2))
        )

    with use_mesh(make_mesh(data=2, sequence=4), RULES):
        found = both(ring)(query, own, prompt)
    alone = both(reference)
    assert_same_to_rounding(found, alone(query, own, prompt), natural_scales(alone, query, own, prompt))


def test_the_backward_pass_drops_what_the_forward_pass_dropped():
    """Attention is linear in the values: their gradient, times them, is the output times its cotangent."""
    sizes, case = CASES["both_ways"]
    (query, key, value, table), at = inputs(case)
    weights = jnp.cos(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)

    def run(value, seed):
        sets = [KeySet(key, value, *at, case.pattern)]
        out = ring_attention(query, sets, table=table, dropout_rate=0.4, dropout_key=jax.random.key(seed))
        return (out * weights).sum(), out

    with use_mesh(make_mesh(**sizes), RULES):
        step = jax.jit(jax.grad(run, has_aux=True))
        gradient, out = step(value, 0)
        again, other = step(value, 0)[1], step(value, 1)[1]
    # Of the numbers that are summed; some are of the other sign.
    both = [np.asarray(x, np.float64) for x in (gradient * value, out * weights)]
    assert abs(both[0].sum() - both[1].sum()) < ROUNDING * min(np.abs(x).sum() for x in both)
    np.testing.assert_array_equal(out, again)
    assert np.abs(np.asarray(out - other)).max() > 0.01


def test_balanced_rows_come_back_and_every_device_has_the_same_work():
    length, count = 64, 4
    mesh = make_mesh(data=2, sequence=count)
    tokens = jnp.arange(2 * length).reshape(2, length)
    with use_mesh(mesh, RULES):
        there = jax.jit(lambda x: to_balanced(x, length))(tokens)
        back = jax.jit(lambda x: from_balanced(x, length))(there)
        assert is_balanced(length) and not is_balanced(length + count)
        assert to_balanced(tokens[:, :60], 60).shape == (2, 60)
    np.testing.assert_array_equal(back, tokens)
    assert not is_balanced(length)
    pieces = [[i, 2 * count - 1 - i] for i in range(count)]
    np.testing.assert_array_equal(np.asarray(there[0]).reshape(count, 2, -1)[:, :, 0] // (length // 8), pieces)

    def work(order):
        """Blocks of eight queries and keys that meet, for each device."""
        at = Places(jnp.asarray(order)[None], jnp.ones((1, length), jnp.int32))
        each = block_extents(at, 8)[0].T
        met = may_meet(Pattern(causal=True), list(each[:, :, None]), list(each[:, None, :]))
        return np.asarray(met).reshape(count, -1).sum(1)

    np.testing.assert_array_equal(work(there[0]), [9, 9, 9, 9])
    np.testing.assert_array_equal(work(tokens[0]), [3, 7, 11, 15])


def test_keys_travel_and_are_never_gathered():
    sizes, case = CASES["everything"]
    arrays, at = inputs(case)
    mesh = make_mesh(**sizes)
    specs = (("data", "sequence"), ("data", None, "sequence"), ("data", None, "sequence"), ())
    placed = tuple(
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(arrays, specs, strict=True)
    )
    run = differentiated(_ring, case)
    with use_mesh(mesh, RULES):
        program = jax.jit(lambda arrays, *x: run(arrays, Places(*x[:2]), Places(*x[2:])))
        text = program.lower(placed, *jax.tree.leaves(at)).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text
