"""The routers' part of the loss: closed forms for layers that favour different experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models.config import MoEConfig
from clp_jax.models.language_model import routing_loss
from clp_jax.nn.routing_statistics import RoutingStatistics


def statistics(favourites, tokens):
    """Layers whose router gives all tokens of a group to one of two experts, with probability 3/4."""
    chosen = jnp.eye(2)[jnp.asarray(favourites)]
    zeros = jnp.zeros(len(favourites))
    return RoutingStatistics(
        z_loss=zeros + 0.5,
        load=chosen[:, 0],
        dropped=zeros,
        entropy=zeros,
        choice_share=chosen,
        mean_probability=0.25 + 0.5 * chosen,
        tokens=jnp.asarray(tokens),
    )


def balance(share):
    """``2 Σ f P`` of two experts with ``f = (a, 1 - a)`` and ``P = 1/4 + f/2``."""
    return 0.5 + share**2 + (1 - share) ** 2


TWO_LAYERS = statistics([[0], [1]], [[3.0], [3.0]])
# Rows, of different lengths: the first has one favourite in all layers, the second another one in each.
TWO_ROWS = statistics([[0, 0], [0, 1]], [[1.0, 3.0], [1.0, 3.0]])


@pytest.mark.parametrize(
    ("by", "stacks", "expected"),
    [
        ("layer", [TWO_LAYERS], 1.5),
        ("stack", [TWO_LAYERS], 1.0),
        ("model", [TWO_LAYERS], 1.0),
        ("model", [statistics([[0], [0]], [[3.0], [3.0]])], 1.5),
        ("layer", [statistics([[0]], [[3.0]]), statistics([[1]], [[1.0]])], 1.5),
        ("stack", [statistics([[0]], [[3.0]]), statistics([[1]], [[1.0]])], 3.0),
        ("model", [statistics([[0]], [[3.0]]), statistics([[1]], [[1.0]])], balance(0.75)),
        ("layer", [TWO_ROWS], 1.5),
        ("stack", [TWO_ROWS], 0.25 * 1.5 + 0.75 * 1.0),
        ("stack", [TWO_ROWS, TWO_LAYERS], 0.25 * 1.5 + 0.75 * 1.0 + 1.0),
        ("model", [TWO_ROWS], balance(5 / 8)),
        *((by, [statistics([[0, 1]], [[0.0, 0.0]])], 0.0) for by in ("layer", "stack", "model")),
    ],
)
def test_balance_of_each_layer_or_of_all_tokens_of_all_layers(by, stacks, expected):
    moe = MoEConfig(num_experts=2, balance_weight=0.25, balance_by=by, z_weight=2.0)
    loss, metrics = routing_loss(moe, stacks)
    assert float(metrics["router/balance_loss"]) == expected
    z_loss = 0.5 * len(stacks) if by == "stack" else 0.5
    assert float(metrics["router/z_loss"]) == z_loss
    assert float(loss) == 0.25 * expected + 2 * z_loss


def test_statistics_of_batches_are_those_of_all_their_groups():
    rows = [statistics([[0, 1], [0, 1]], [[1.0, 3.0], [1.0, 3.0]]), statistics([[1], [1]], [[4.0], [4.0]])]
    rows[1] = dataclasses.replace(rows[1], z_loss=jnp.asarray([1.5, 0.5]))
    joined = rows[0].joined(rows[1])
    np.testing.assert_array_equal(joined.tokens, [[1, 3, 4], [1, 3, 4]])
    np.testing.assert_array_equal(joined.choice_share[:, :, 1], [[0, 1, 1], [0, 1, 1]])
    np.testing.assert_array_equal(joined.z_loss, [1.0, 0.5])
    np.testing.assert_array_equal(joined.load, [[0.5, 0.5]] * 2)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), rows[0], rows[0])
    for a, b in zip(jax.tree.leaves(stacked.merged()), jax.tree.leaves(rows[0].joined(rows[0])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("num_experts", "are_told"), [(128, True), (129, False)])
def test_a_router_that_has_collapsed_in_one_layer_shows(num_experts, are_told):
    even = np.full((4, num_experts), 1 / num_experts, np.float32)
    collapsed = even.copy()
    collapsed[2] = np.eye(num_experts)[5]
    layers, groups = statistics([[0], [1], [0], [1]], [[1.0]] * 4), ("choice_share", "mean_probability")
    stacks = [
        dataclasses.replace(layers, load=jnp.asarray(x), **dict.fromkeys(groups, jnp.asarray(x)[:, None]))
        for x in (even, collapsed)
    ]
    _, metrics = routing_loss(MoEConfig(num_experts=num_experts), stacks)
    assert (float(metrics["router/load_max"]), float(metrics["router/load_min"])) == (1.0, 0.0)
    assert ("router/load_05" in metrics) is are_told
    if are_told:
        assert float(metrics["router/load_05"]) == pytest.approx((7 / 128 + 1) / 8, rel=1e-6)
