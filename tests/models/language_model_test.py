"""The routers' part of the loss: closed forms for layers that favour different experts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models.config import MoEConfig
from clp_jax.models.language_model import routing_loss
from clp_jax.nn.routing import RoutingStatistics


def statistics(favourites, tokens):
    """Layers whose router gives all tokens to one of two experts, with probability 3/4."""
    chosen = jnp.asarray([[1.0, 0.0] if favourite == 0 else [0.0, 1.0] for favourite in favourites])
    probability, zeros = 0.25 + 0.5 * chosen, jnp.zeros(len(favourites))
    return RoutingStatistics(
        balance_loss=2 * (chosen * probability).sum(-1),
        z_loss=zeros + 0.5,
        load=chosen,
        dropped=zeros,
        entropy=zeros,
        choice_share=chosen,
        mean_probability=probability,
        tokens=jnp.asarray(tokens),
    )


# Two experts: f = (a, 1 - a) and P = 1/4 + f/2 give 2 Σ f P = 1/2 + a² + (1 - a)², where a is a share of the tokens.
@pytest.mark.parametrize(
    ("by", "stacks", "balance"),
    [
        ("layer", [statistics([0, 1], [3.0, 3.0])], 1.5),
        ("model", [statistics([0, 1], [3.0, 3.0])], 1.0),
        ("model", [statistics([0, 0], [3.0, 3.0])], 1.5),
        ("layer", [statistics([0], [3.0]), statistics([1], [1.0])], 1.5),
        ("model", [statistics([0], [3.0]), statistics([1], [1.0])], 0.5 + 0.75**2 + 0.25**2),
        ("model", [statistics([0, 1], [0.0, 0.0])], 0.0),
    ],
)
def test_balance_of_each_layer_or_of_all_tokens_of_all_layers(by, stacks, balance):
    moe = MoEConfig(num_experts=2, balance_weight=0.25, balance_by=by, z_weight=2.0)
    loss, metrics = routing_loss(moe, stacks)
    assert float(metrics["router/balance_loss"]) == balance
    assert float(loss) == 0.25 * balance + 1.0


@pytest.mark.parametrize(("num_experts", "are_told"), [(128, True), (129, False)])
def test_a_router_that_has_collapsed_in_one_layer_shows(num_experts, are_told):
    even = np.full((4, num_experts), 1 / num_experts, np.float32)
    collapsed = even.copy()
    collapsed[2] = np.eye(num_experts)[5]
    layers = statistics([0, 1, 0, 1], [1.0] * 4)
    stacks = [
        dataclasses.replace(layers, **dict.fromkeys(("load", "choice_share", "mean_probability"), jnp.asarray(x)))
        for x in (even, collapsed)
    ]
    _, metrics = routing_loss(MoEConfig(num_experts=num_experts), stacks)
    assert (float(metrics["router/load_max"]), float(metrics["router/load_min"])) == (1.0, 0.0)
    assert ("router/load_05" in metrics) is are_told
    if are_told:
        assert float(metrics["router/load_05"]) == pytest.approx((7 / 128 + 1) / 8, rel=1e-6)
