"""Who sees whom, pair by pair."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.nn.visibility import Pattern, Places, visible

QUERIES = Places(jnp.asarray([[0, 1, 0, 0], [0, 1, 2, 3]]), jnp.asarray([[1, 1, 2, 0], [3, 3, 3, 3]]))
KEYS = Places(jnp.asarray([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]), jnp.asarray([[1, 2, 2, 0, 0], [0, 3, 3, 2, 3]]))


@pytest.mark.parametrize(("causal", "window"), [*itertools.product([False, True], [None, 1, 2])])
def test_pairs(causal, window):
    mask = np.asarray(visible(Pattern(causal=causal, window=window), QUERIES, KEYS))
    for b, t, s in np.ndindex(2, 4, 5):
        distance = int(QUERIES.positions[b, t] - KEYS.positions[b, s])
        expected = QUERIES.segments[b, t] == KEYS.segments[b, s] != 0
        expected = expected and (distance >= 0 or not causal) and (window is None or abs(distance) < window)
        assert mask[b, t, s] == bool(expected)


def test_rows_that_are_alike_may_lead_with_one():
    mask = visible(Pattern(causal=True), Places(jnp.arange(4)[None], QUERIES.segments), KEYS)
    assert mask.shape == (2, 4, 5)
