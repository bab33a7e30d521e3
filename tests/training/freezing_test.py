"""Frozen groups: exactly the named leaves stand still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_policies import tiny_config, varied_params

from clp_jax.models.config import MoEConfig
from clp_jax.models.policy import Policy
from clp_jax.training.freezing import GROUPS, Frozen
from clp_jax.training.optimizers import AdamW

POLICY = Policy(tiny_config(moe=MoEConfig(num_experts=2, every=2)))


def names(tree) -> set[str]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in paths if leaf}


@pytest.mark.parametrize("group", GROUPS)
def test_the_rest_learns_as_without(group):
    params = {"policy": varied_params(POLICY)}
    axes = {"policy": POLICY.logical_axes()}
    gradient = jax.tree.map(jnp.ones_like, params)
    inner = AdamW(learning_rate=0.1, weight_decay=0.1, max_grad_norm=None)
    updates = []
    for optimizer in (Frozen(inner, group), inner):
        transformation = optimizer.build(axes)
        update, _ = transformation.update(gradient, transformation.init(params), params)
        updates.append(update)
    frozen, free = updates
    still = jax.tree.map(lambda x: not np.any(x), frozen)
    chosen = {name for name in names(jax.tree.map(lambda _: True, params)) if GROUPS[group](tuple(name.split("/")))}
    assert names(still) == chosen
    expected = jax.tree.map(lambda is_still, x: jnp.zeros_like(x) if is_still else x, still, free)
    jax.tree.map(np.testing.assert_array_equal, frozen, expected)


def test_groups_are_what_they_say():
    every = names(jax.tree.map(lambda _: True, POLICY.abstract()))
    gate, experts = ({n for n in every if GROUPS[group](tuple(n.split("/")))} for group in ("gate", "experts"))
    assert gate == {f"{stack}/layers/layer_1/mlp/router/kernel" for stack in ("encoder", "decoder")}
    assert experts == {n for n in every if "/experts/" in n} and len(experts) == 6


def test_frozen_gradients_do_not_count_in_the_norm():
    params = {"mlp": {"router": {"kernel": jnp.ones(2)}, "experts": {"wo": jnp.ones(2)}}}
    gradient = {"mlp": {"router": {"kernel": jnp.full(2, 1e6)}, "experts": {"wo": jnp.ones(2)}}}
    transformation = Frozen(AdamW(learning_rate=1.0, max_grad_norm=10.0, epsilon=1.0), "gate").build(None)
    update, _ = transformation.update(gradient, transformation.init(params), params)
    adam = optax.scale_by_adam(eps=1.0)
    expected, _ = adam.update(gradient, adam.init(params))
    np.testing.assert_allclose(update["mlp"]["experts"]["wo"], -expected["mlp"]["experts"]["wo"], rtol=1e-6)
    assert not np.any(update["mlp"]["router"]["kernel"])


def test_what_can_not_be_frozen():
    with pytest.raises(ValueError, match="Frozen.group is 'gates': expected one of gate, experts, moe"):
        Frozen(AdamW(), "gates")
    with pytest.raises(ValueError, match="'gate' selects no parameter of this model"):
        Frozen(AdamW(), "gate").build(Policy(tiny_config()).logical_axes())
