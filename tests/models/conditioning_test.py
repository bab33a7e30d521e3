"""Conditioning: mixing is exact at the corners, linear in the gradient, and the reference at α = 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models import conditioning
from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning, Unconditioned
from clp_jax.preferences import Preference


def _params(seed: int = 0) -> dict:
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return {
        "token_embedder": {"embedding": jax.random.normal(next(keys), (5, 4))},
        "decoder": {
            "self_attention": {"query": {"kernel": jax.random.normal(next(keys), (2, 4, 4))}},
            "self_attention_norm": {"scale": jax.random.normal(next(keys), (2, 4))},
            "mlp": {"wi": {"kernel": jax.random.normal(next(keys), (2, 4, 8))}},
        },
        "logits_head": {"kernel": jax.random.normal(next(keys), (4, 5))},
    }


def _separate(params, seed: int = 1):
    """Components that differ, as after training."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), params)


def _assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("full", {"embedding", "self_attention", "self_attention_norm", "mlp", "logits_head"}),
        ("attention", {"self_attention"}),
        ("logits", {"logits_head"}),
    ],
)
def test_subsets_select_by_path(subset, expected):
    expanded = ParameterConditioning(subset, 3).expand(_params())
    stacked = set()
    for path, (leaf, original) in [
        (path, pair)
        for path, pair in jax.tree_util.tree_flatten_with_path(
            jax.tree.map(lambda a, b: (a, b), expanded, _params()), is_leaf=lambda x: isinstance(x, tuple)
        )[0]
    ]:
        names = [str(k.key) for k in path]
        if leaf.ndim > original.ndim:
            assert leaf.shape == (3, *original.shape)
            stacked.add(next(name for name in names if name in expected | {"?"}))
        else:
            np.testing.assert_array_equal(leaf, original)
    assert stacked == expected


@pytest.mark.parametrize("subset", ["full", "attention", "logits"])
def test_a_corner_is_a_component_to_the_bit(subset):
    how = ParameterConditioning(subset, 3)
    params = _separate(how.expand(_params()))
    selected = how.selected(_params())
    for k in range(3):
        mixed = how.mix(params, _params(), Preference.of(np.eye(3)[k], 0.1))
        component = jax.tree.map(lambda chosen, x, k=k: x[k] if chosen else x, selected, params)
        _assert_trees_equal(mixed, component)


@pytest.mark.parametrize("subset", ["full", "attention", "logits"])
@pytest.mark.parametrize("alpha_min", [None, 0.05])
def test_gradient_of_a_component_is_its_coefficient_times_the_mixed_gradient(subset, alpha_min):
    how = ParameterConditioning(subset, 2, alpha_min=alpha_min)
    reference, params = _params(), _separate(how.expand(_params()))
    preference = Preference.of([0.3, 0.7], 0.2)

    def loss(mixed):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(mixed))

    grads = jax.grad(lambda p: loss(how.mix(p, reference, preference)))(params)
    mixed_grads = jax.grad(loss)(how.mix(params, reference, preference))
    scale = 1.0 if alpha_min is None else float((1 - 0.2) / 0.2 * 0.05 / 0.95)

    def check(chosen, grad, mixed):
        expected = np.stack([0.3 * mixed, 0.7 * mixed]) * scale if chosen else mixed * scale
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)

    jax.tree.map(check, how.selected(reference), grads, mixed_grads)


@pytest.mark.parametrize("subset", ["full", "attention", "logits"])
def test_alpha_one_is_the_reference_to_the_bit(subset):
    how = ParameterConditioning(subset, 2, alpha_min=0.01)
    params = _separate(how.expand(_params()))
    _assert_trees_equal(how.mix(params, _params(), Preference.of([0.4, 0.6], 1.0)), _params())


def test_the_reference_gets_no_gradient():
    how = ParameterConditioning("full", 2, alpha_min=0.01)
    params = how.expand(_params())
    grads = jax.grad(
        lambda r: sum(x.sum() for x in jax.tree.leaves(how.mix(params, r, Preference.of([0.4, 0.6], 0.5))))
    )(_params())
    assert all(not np.any(x) for x in jax.tree.leaves(grads))


def test_mixing_logits_parameters_equals_mixing_the_logits():
    how = ParameterConditioning("logits", 2)
    params = _separate(how.expand(_params()))
    hidden = jax.random.normal(jax.random.key(5), (3, 4))
    mixed = how.mix(params, _params(), Preference.of([0.3, 0.7], 0.1))
    heads = params["logits_head"]["kernel"]
    np.testing.assert_allclose(
        hidden @ mixed["logits_head"]["kernel"], 0.3 * hidden @ heads[0] + 0.7 * hidden @ heads[1], rtol=1e-5, atol=1e-6
    )


def test_equal_components_make_the_mixture_independent_of_the_weights():
    how = ParameterConditioning("full", 2)
    params = how.expand(_params())
    for weights in ([1.0, 0.0], [0.5, 0.5], [0.25, 0.75]):
        mixed = how.mix(params, _params(), Preference.of(weights, 0.1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mixed, _params())


def test_mixing_several_preferences_under_vmap():
    how = ParameterConditioning("attention", 2)
    params = _separate(how.expand(_params()))
    weights = jnp.asarray([[1.0, 0.0], [0.5, 0.5]])
    both = jax.vmap(how.mix, in_axes=(None, None, 0))(params, _params(), Preference(weights, jnp.zeros(2)))
    for g in range(2):
        alone = how.mix(params, _params(), Preference(weights[g], jnp.zeros(())))
        jax.tree.map(lambda a, b, g=g: np.testing.assert_allclose(a[g], b, rtol=1e-6), both, alone)


def test_bfloat16_components_are_mixed_in_float32():
    leaf = jnp.asarray([[1.0], [1.0078125]], jnp.bfloat16)
    assert conditioning.contract(leaf, jnp.asarray([0.5, 0.5])).dtype == jnp.bfloat16
    # 1.00390625 lies between two bfloat16 numbers; products rounded to bfloat16 first would give 1.0 as well, so compare
    # with a weight whose product is not representable.
    mixed = conditioning.contract(leaf, jnp.asarray([0.1, 0.9]))
    np.testing.assert_array_equal(mixed, jnp.asarray([np.float32(0.1) + np.float32(0.9) * 1.0078125], jnp.bfloat16))


def test_logical_axes_follow_the_components():
    axes = {"logits_head": {"kernel": ("embed", "vocab")}, "mlp": {"kernel": ("embed", "mlp")}}
    assert ParameterConditioning("logits", 2).logical_axes(axes) == {
        "logits_head": {"kernel": ("component", "embed", "vocab")},
        "mlp": {"kernel": ("embed", "mlp")},
    }


def test_soup_of_experts_is_full_conditioning():
    experts = [_params(1), _params(2)]
    mixed = ParameterConditioning("full", 2).mix(
        conditioning.stack_experts(experts), _params(), Preference.of([0.25, 0.75], 0.1)
    )
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, *experts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), mixed, expected)


def test_prompt_conditioning_writes_the_preference():
    def encode(text):
        return [ord(c) for c in text]

    how = PromptConditioning.of(["faithful", "brief"], encode, with_alpha=True, bins=11)
    preference = Preference(jnp.asarray([[0.3, 0.7], [1.0, 0.0]]), jnp.asarray([0.1, 0.0]))
    tokens = how.condition_inputs(jnp.full((2, 3), 7, jnp.int32), preference)
    texts = ["".join(chr(t) for t in row if t > 7) for row in np.asarray(tokens)]
    assert texts == ["faithful 0.30brief 0.70kl 0.10", "faithful 1.00brief 0.00kl 0.00"]
    np.testing.assert_array_equal(tokens[:, -3:], 7)


def test_the_written_preference_leaves_padding_at_the_end_and_the_start_of_text_in_front():
    tables = (((3, -1), (4, 5)), ((6, 7), (8, -1)))
    how = PromptConditioning(tables=tables, num_objectives=2, pad_id=-1, keep_first=1)
    prompts = jnp.asarray([[1, 9, 10], [1, 9, -1]], jnp.int32)
    tokens = how.condition_inputs(prompts, Preference(jnp.asarray([[0.0, 1.0], [1.0, 0.0]]), jnp.zeros(2)))
    np.testing.assert_array_equal(tokens, [[1, 3, 8, 9, 10, -1, -1], [1, 4, 5, 6, 7, 9, -1]])


def test_unconditioned_changes_nothing():
    how, params = Unconditioned(), _params()
    assert how.expand(params) is params and how.mix(params, params, Preference.of([1.0], 0.1)) is params


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterConditioning("atention", 2), "expected one of full, attention, logits"),
        (lambda: ParameterConditioning("full", 0), "at least 1"),
        (lambda: ParameterConditioning("full", 2, alpha_min=0.0), "alpha_min"),
        (lambda: ParameterConditioning("logits", 2).expand({"mlp": {"kernel": jnp.ones((2, 2))}}), "tied_head=False"),
        (
            lambda: ParameterConditioning("full", 2).mix(_params(), _params(), Preference.of([0.2, 0.3, 0.5], 0.1)),
            "2 objectives",
        ),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
