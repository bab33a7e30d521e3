"""The value baseline and the scorer against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params

from clp_jax.models.heads import ScorerConfig, ValueHeadConfig
from clp_jax.models.language_model import in_order
from clp_jax.models.policy import Policy

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 5, 8)).astype(np.float32)
FEATURES = RNG.normal(size=(2, 3)).astype(np.float32)

VALUE = Policy(ValueHeadConfig(embed_dim=8, num_features=3, hidden_dim=6))
SCORER = Policy(ScorerConfig(tiny_config()))

DOCUMENTS = np.asarray([[3, 4, 5, 9, 8, 0], [5, 6, 7, 8, 9, 10]], np.int32)
KINDS = np.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]], np.int32)


@jax.jit
def value(params, hidden, features):
    return VALUE.bind(params)(hidden, features)


@jax.jit
def score(params, tokens, kinds):
    return SCORER.bind(params).score(tokens, kinds)


def test_values_start_at_zero():
    """So that the first advantages are the returns themselves, and the last layer's gradient is not zero."""
    params = VALUE.init(jax.random.key(0))
    np.testing.assert_array_equal(value(params, HIDDEN, FEATURES), np.zeros((2, 5)))
    gradient = jax.grad(lambda p: value(p, HIDDEN, FEATURES).sum())(params)
    assert np.all(gradient["out"] != 0)


def test_a_value_sees_its_state_and_the_rows_features():
    params = varied_params(VALUE)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = HIDDEN @ wide["states"]["kernel"] + (FEATURES @ wide["features"]["kernel"])[:, None]
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = gelu @ wide["out"] + wide["bias"]
    np.testing.assert_allclose(value(params, HIDDEN, FEATURES), expected, rtol=1e-5, atol=1e-6)
    assert value(params, jnp.asarray(HIDDEN, jnp.bfloat16), FEATURES).dtype == jnp.float32


def test_a_score_is_the_mean_over_the_completion():
    params = varied_params(SCORER)

    @jax.jit
    def encode(params, tokens, kinds):
        model = SCORER.bind(params)
        embedded = model.token_embedder(tokens, jnp.dtype("float32"))
        # Document and completion are told apart by a vector added to each.
        marks = params["kind_embedding"][jnp.asarray([0, 0, 1])[kinds]]
        return model.encoder(embedded + marks, in_order((kinds > 0).astype(jnp.int32))).states

    states = np.asarray(encode(params, DOCUMENTS, KINDS), np.float64)
    means = np.stack([states[0, 3:5].mean(0), states[1, 1:].mean(0)])
    expected = means @ np.asarray(params["score_head"], np.float64) + float(params["score_bias"])
    np.testing.assert_allclose(score(params, DOCUMENTS, KINDS), expected, rtol=1e-5, atol=1e-6)


def test_a_score_depends_on_the_document_and_not_on_padding():
    params = varied_params(SCORER)
    before = score(params, DOCUMENTS, KINDS)
    junk = np.where(KINDS == 0, 7, DOCUMENTS)
    np.testing.assert_array_equal(score(params, junk, KINDS), before)
    longer = score(params, np.pad(DOCUMENTS, ((0, 0), (0, 4))), np.pad(KINDS, ((0, 0), (0, 4))))
    np.testing.assert_allclose(longer, before, rtol=1e-5, atol=1e-6)
    other = np.where(KINDS == 1, 10, DOCUMENTS)
    assert np.all(score(params, other, KINDS) != before)


def test_a_row_without_a_completion_scores_the_bias():
    params = varied_params(SCORER)
    np.testing.assert_array_equal(score(params, DOCUMENTS, np.minimum(KINDS, 1)), np.full(2, params["score_bias"]))


def test_a_scorer_has_no_decoder():
    assert set(SCORER.abstract()) == {"token_embedder", "kind_embedding", "encoder", "score_head", "score_bias"}


@pytest.mark.parametrize("name", ["embed_dim", "num_features", "hidden_dim"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=rf"ValueHeadConfig\.{name} is 0: expected at least 1"):
        ValueHeadConfig(**(dict(embed_dim=8, num_features=3) | {name: 0}))
