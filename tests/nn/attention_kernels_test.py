"""Which implementation is chosen, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, TWO_SIDED, Case, assert_close, differentiated, inputs

from clp_jax.nn import attention_kernels
from clp_jax.nn.attention_dense import reference_attention
from clp_jax.nn.attention_kernels import attention, cudnn_attention, implementations
from clp_jax.nn.visibility import Pattern, Places

LONG = 600
CUDNN = dict(pattern=Pattern(causal=True, scale=0.25), unpacked=True)


@pytest.fixture
def chosen(monkeypatch):
    """Runs `attention` of a length on a pretended platform; tells which implementation would compute it."""
    called = []
    for name in ("reference", "blockwise", "pallas", "cudnn"):

        def record(query, key, value, *, name=name, **settings):
            called.append((name, settings))
            return query

        monkeypatch.setattr(attention_kernels, f"{name}_attention", record)

    def run(platform, length=LONG, keys_length=None, dtype=jnp.bfloat16, head_dim=16, **settings):
        monkeypatch.setattr(attention_kernels, "_platform", lambda: platform)
        called.clear()
        keys_length = length if keys_length is None else keys_length
        key = jnp.zeros((1, 1, keys_length, head_dim), dtype)
        at = [Places(jnp.arange(n)[None], jnp.ones((1, n), jnp.int32)) for n in (length, keys_length)]
        settings = {"pattern": Pattern(), "queries": at[0], "keys": at[1]} | settings
        attention(jnp.zeros((1, length, 2, head_dim), dtype), key, key, **settings)
        ((name, given),) = called
        assert given["pattern"] == settings["pattern"] and given["keys"] is settings["keys"]
        return name, given

    return run


@pytest.mark.parametrize(
    ("name", "platform", "settings"),
    [
        ("reference", "cpu", dict(length=511, keys_length=512)),
        ("reference", "tpu", dict(length=511, keys_length=512)),
        ("reference", "gpu", dict(length=1, keys_length=512 * 512 + 1)),
        ("blockwise", "cpu", dict(length=512)),
        ("blockwise", "cpu", dict(length=2, keys_length=256 * 512)),
        ("pallas", "tpu", dict(length=512)),
        ("pallas", "tpu", dict(pattern=Pattern(window=3, cap=2.0, buckets=TWO_SIDED), table=jnp.zeros((2, 8)))),
        ("pallas", "tpu", dict(dropout_rate=0.1)),
        ("pallas", "tpu", dict(dropout_rate=0.0, dropout_key=jax.random.key(0))),
        ("blockwise", "tpu", dict(dropout_rate=0.1, dropout_key=jax.random.key(0))),
        ("cudnn", "gpu", CUDNN),
        ("cudnn", "cuda", dict(pattern=Pattern(causal=True, window=3), unpacked=True)),
        ("blockwise", "gpu", dict(pattern=CUDNN["pattern"])),
        ("blockwise", "gpu", dict(pattern=Pattern(window=3), unpacked=True)),
        ("blockwise", "gpu", dict(pattern=Pattern(cap=3.0), unpacked=True)),
        ("blockwise", "gpu", dict(pattern=Pattern(buckets=TWO_SIDED), table=jnp.zeros((2, 8)), unpacked=True)),
        ("blockwise", "gpu", dict(dtype=jnp.float32, **CUDNN)),
        ("blockwise", "gpu", dict(head_dim=136, **CUDNN)),
        ("blockwise", "gpu", dict(head_dim=12, **CUDNN)),
        ("reference", "cpu", dict(implementation="reference")),
        ("blockwise", "tpu", dict(length=2, implementation="blockwise")),
        ("pallas", "tpu", dict(length=2, implementation="pallas")),
    ],
)
def test_the_choice(chosen, name, platform, settings):
    assert chosen(platform, **settings)[0] == name


def test_what_is_asked_for_arrives(chosen):
    key = jax.random.key(0)
    _, given = chosen("cpu", dropout_rate=0.1, dropout_key=key, aligned=True)
    assert given["aligned"] and given["dropout_rate"] == 0.1 and given["dropout_key"] is key
    _, given = chosen("cpu", length=4, dropout_rate=0.1, dropout_key=key)
    assert given["dropout_rate"] == 0.1 and given["dropout_key"] is key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(implementation="flash"),
            "unknown implementation 'flash': expected one of ring, pallas, cudnn, blockwise, refer",
        ),
        (dict(implementation="pallas"), "'pallas' runs on tpu, and this is for gpu"),
        (dict(implementation="cudnn"), "'cudnn' needs the promise unpacked=True"),
        (dict(implementation="cudnn", dropout_rate=0.1, dropout_key=jax.random.key(0)), "'cudnn' has no dropout"),
        (dict(implementation="cudnn", pattern=Pattern(cap=1.0)), "'cudnn' has no cap of logits"),
        (dict(implementation="cudnn", pattern=Pattern(window=3), unpacked=True), "windows of causal patterns only"),
        (dict(implementation="cudnn", dtype=jnp.float32, **CUDNN), "takes bfloat16 or float16, not float32"),
        (dict(implementation="cudnn", head_dim=256, **CUDNN), "takes heads of up to 128, not 256"),
        (dict(implementation="cudnn", head_dim=12, **CUDNN), "takes heads of a multiple of 8, not 12"),
        (dict(pattern=Pattern(buckets=TWO_SIDED)), "table is None: a relative position bias needs both"),
        (dict(length=3, keys_length=4, aligned=True), "aligned, with 3 queries and 4 keys"),
    ],
)
def test_what_cannot_be_is_refused(chosen, settings, message):
    with pytest.raises(ValueError, match=message):
        chosen("gpu", **settings)


def test_the_table_says_who_is_there():
    able = {each.name: each for each in implementations()}
    assert list(able) == ["ring", "pallas", "cudnn", "blockwise", "reference"]
    assert [each.name for each in able.values() if each.dropout] == ["ring", "blockwise", "reference"]
    assert [each.name for each in able.values() if not each.linear] == ["reference"]


@pytest.mark.parametrize("implementation", [None, "blockwise"])
def test_the_numbers_are_those_of_the_reference(implementation):
    case = CASES["all"]
    arrays, at = inputs(case)

    def attend(*inputs, **settings):
        return attention(*inputs, aligned=True, implementation=implementation, **settings)

    found = differentiated(attend, case)(arrays, *at)
    assert_close(found, differentiated(reference_attention, case)(arrays, *at), 3e-6)


@pytest.mark.parametrize(
    "pattern",
    [Pattern(scale=0.3), Pattern(causal=True, scale=0.3), Pattern(causal=True, window=3)],
    ids=["plain", "causal", "window"],
)
def test_cudnn_is_told_what_the_reference_is_told(pattern):
    """JAX's own implementation takes what cuDNN takes; rows differ in their lengths, and one is padding only."""
    case = Case(pattern, 9, 7, heads=4, kv_heads=2)
    (query, key, value, _), _ = inputs(case)
    query, key, value = (jnp.concatenate([x, x]) for x in (query, key, value))

    def places(length, lengths):
        segments = jnp.asarray(np.arange(length) < np.asarray(lengths)[:, None], jnp.int32)
        return Places(jnp.arange(length)[None], segments)

    queries, keys = places(9, [9, 5, 4, 0]), places(7, [7, 3, 0, 2])

    def attend(*inputs, table, **settings):
        return cudnn_attention(*inputs, implementation="xla", **settings)

    found = differentiated(attend, case)((query, key, value, None), queries, keys)
    expected = differentiated(reference_attention, case)((query, key, value, None), queries, keys)
    assert_close(found, expected, 2e-6)
