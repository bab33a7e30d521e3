"""The functional edge: parameters in, a module out, and nothing accepted that is not the model's."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_policies import tiny_config, varied_params

from clp_jax.models.heads import ScorerConfig, ValueHeadConfig
from clp_jax.models.policy import Policy
from clp_jax.partitioning import LOGICAL_AXES, is_axes

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=3))


def test_initialisation_is_decided_by_the_key():
    first, again, other = (POLICY.init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first["logits_head"]["kernel"] != other["logits_head"]["kernel"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
        lambda x: (x.shape, x.dtype), POLICY.abstract()
    )
    # No two matrices start alike.
    draws = [leaf.ravel()[0] for path, leaf in jax.tree_util.tree_leaves_with_path(first) if path[-1].key != "scale"]
    assert len({float(x) for x in draws}) == len(draws)


def test_bind_gives_the_module_these_parameters():
    params = varied_params(POLICY)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(POLICY.bind(params))), params)


def test_the_number_of_parameters():
    d, f, inner, v, buckets, heads = 8, 12, 8, 11, 8, 2
    attention, mlp = 4 * d * inner, 3 * d * f
    encoder = 1 * (attention + mlp + 2 * d) + heads * buckets + d
    decoder = 3 * (2 * attention + mlp + 3 * d) + heads * buckets + d
    assert POLICY.num_params() == encoder + decoder + 2 * v * d
    assert POLICY.num_params() == sum(leaf.size for leaf in jax.tree.leaves(varied_params(POLICY)))


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_config(tied_head=True, gated=False), ScorerConfig(tiny_config()), ValueHeadConfig(8, 3)],
    ids=["untied", "tied", "scorer", "value"],
)
def test_parameters_have_known_logical_axes_one_for_each_dimension(config):
    policy = Policy(config)

    def check(axes, leaf):
        assert is_axes(axes) and len(axes) == leaf.ndim and set(axes) <= {None, *LOGICAL_AXES}

    jax.tree.map(check, policy.logical_axes(), policy.abstract(), is_leaf=is_axes)


def test_stacked_layers_lead_with_their_axis():
    axes = POLICY.logical_axes()
    assert axes["decoder"]["layers"]["mlp"]["wo"]["kernel"] == ("layers", "mlp", "embed")
    assert axes["decoder"]["relpos_bias"]["embedding"] == ("heads", "buckets")
    assert axes["token_embedder"]["embedding"] == ("vocab", "embed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["logits_head"].pop("kernel"), "parameter 'logits_head/kernel' is missing: .* another model"),
        (lambda p: p.update(extra=jnp.zeros(1)), "parameter 'extra' is unknown: .* another model"),
        (
            lambda p: p["decoder"]["norm"].update(scale=jnp.zeros(9)),
            r"parameter 'decoder/norm/scale' has shape \(9,\), the model's has \(8,\)",
        ),
    ],
)
def test_parameters_of_another_model_are_refused(change, message):
    params = copy.deepcopy(varied_params(POLICY))
    change(params)
    with pytest.raises(ValueError, match=message):
        POLICY.bind(params)


def test_nothing_is_allocated_for_the_shapes():
    huge = Policy(tiny_config(vocab_size=10**9, embed_dim=10**4))
    leaves = jax.tree.leaves(huge.abstract())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert huge.num_params() == sum(math.prod(leaf.shape) for leaf in leaves) > 2 * 10**13
