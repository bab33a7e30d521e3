"""The routers' part of the loss: closed forms for layers that favour different experts."""

import jax.numpy as jnp
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
