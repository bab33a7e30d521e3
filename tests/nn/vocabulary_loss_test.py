"""The chunked loss over the vocabulary: the numbers of the whole one, without its logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_logits import loss_of_logits

from clp_jax.nn import vocabulary_loss
from clp_jax.nn.vocabulary_loss import chunked_token_statistics, token_statistics
from clp_jax.objectives.log_probs import token_log_probs

B, T, D, V = 2, 13, 4, 11
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, V, size=(B, T)), jnp.int32)
WEIGHTS = jnp.asarray(RNG.random((B, T)), jnp.float32)
Z_LOSS = 0.1


def chunked_loss(hidden, kernel, chunk):
    found = chunked_token_statistics(hidden, lambda h: h @ kernel, TARGETS, chunk=chunk)
    return jnp.sum((Z_LOSS * jnp.square(found.log_z) - found.log_probs) * WEIGHTS), jnp.sum(found.correct * WEIGHTS)


def whole_loss(hidden, kernel):
    loss, _, metrics = loss_of_logits(hidden @ kernel, TARGETS, WEIGHTS, Z_LOSS)
    return loss, metrics["accuracy"]


@pytest.mark.parametrize("chunk", [1, 5, 13, 100, None])
def test_losses_and_gradients_are_those_of_all_logits(chunk):
    run = jax.jit(jax.value_and_grad(chunked_loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (loss, correct), gradients = run(HIDDEN, KERNEL, chunk)
    (expected, right), expected_gradients = jax.value_and_grad(whole_loss, argnums=(0, 1), has_aux=True)(HIDDEN, KERNEL)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(correct, right, rtol=1e-6)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        assert np.abs(gradient).max() > 0.1
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 13])
def test_gradients_in_bfloat16_are_rounded_no_more_than_those_of_all_logits(chunk):
    """Activations in bfloat16, parameters in float32, where every chunk adds to the head's gradient."""
    hidden = HIDDEN.astype(jnp.bfloat16)

    def in_chunks(hidden, kernel):
        found = chunked_token_statistics(hidden, lambda h: h @ kernel.astype(h.dtype), TARGETS, chunk=chunk)
        return jnp.sum((Z_LOSS * jnp.square(found.log_z) - found.log_probs) * WEIGHTS)

    def as_a_whole(hidden, kernel):
        return whole_loss(hidden, kernel.astype(hidden.dtype))[0]

    gradients = [jax.jit(jax.grad(loss, argnums=(0, 1))) for loss in (in_chunks, as_a_whole)]
    found, expected = (gradient(hidden, KERNEL) for gradient in gradients)
    wide, rounded = hidden.astype(jnp.float32), KERNEL.astype(jnp.bfloat16).astype(jnp.float32)
    exact = gradients[1](wide, rounded)
    for x, y, z, dtype in zip(found, expected, exact, (jnp.bfloat16, jnp.float32), strict=True):
        assert x.dtype == y.dtype == dtype
        errors = [float(jnp.linalg.norm(a.astype(jnp.float32) - z)) for a in (x, y)]
        assert errors[0] < 1.5 * errors[1] and errors[1] < 0.01 * float(jnp.linalg.norm(z))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probs_are_those_of_scoring(dtype):
    hidden, kernel = HIDDEN.astype(dtype), KERNEL.astype(dtype)
    found = chunked_token_statistics(hidden, lambda h: h @ kernel, TARGETS, chunk=4)
    assert found.log_probs.dtype == found.log_z.dtype == jnp.float32
    assert found.entropy is None
    np.testing.assert_allclose(found.log_probs, token_log_probs(hidden @ kernel, TARGETS), rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_the_distribution():
    logits = np.asarray(HIDDEN, np.float64) @ np.asarray(KERNEL, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = chunked_token_statistics(HIDDEN, lambda h: h @ KERNEL, TARGETS, chunk=6, with_entropy=True)
    np.testing.assert_allclose(found.log_z, np.log(np.exp(logits).sum(-1)), rtol=1e-5)
    np.testing.assert_array_equal(found.correct, logits.argmax(-1) == TARGETS)
    entropy = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4)
    uniform = token_statistics(jnp.zeros((B, T, V)), TARGETS, with_entropy=True)
    np.testing.assert_allclose(uniform.entropy, np.log(V), rtol=1e-6)
    np.testing.assert_array_equal(uniform.correct, TARGETS == 0)


def _program(length, chunk, vocabulary=2048, batch=2):
    def loss(hidden, kernel, targets):
        found = chunked_token_statistics(hidden, lambda h: h @ kernel, targets, chunk=chunk)
        return jnp.sum(jnp.square(found.log_z) - found.log_probs)

    shapes = (
        jax.ShapeDtypeStruct((batch, length, 8), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, vocabulary), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()


def _largest(program) -> int:
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def test_no_array_holds_the_logits_of_all_positions():
    assert _largest(_program(128, 128)) >= 2 * 128 * 2048  # They would be found.
    short, long = _program(128, 16), _program(1024, 16)
    assert _largest(short) == _largest(long) == 2 * 16 * 2048
    used = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    # What the longer one needs more is less than the logits of a single chunk.
    assert used[1] - used[0] < 2 * 16 * 2048 * 4


def test_a_chunk_is_as_large_as_the_budget_allows(monkeypatch):
    seen = []

    def head(hidden):
        seen.append(hidden.shape[1])
        return hidden @ KERNEL

    def chunk():
        seen.clear()
        jax.make_jaxpr(lambda h: chunked_token_statistics(h, head, TARGETS))(HIDDEN)
        return seen[-1]

    assert chunk() == T
    row = B * V * 4
    least = -(-T // -(-T // max(1, HIDDEN.shape[-1] // B)))  # As many rows as the states are wide, evenly.
    for budget, expected in [(13 * row, 13), (13 * row - 1, 7), (6 * row, 5), (row, least), (1, least)]:
        monkeypatch.setattr(vocabulary_loss, "CHUNK_BYTES", budget)
        assert chunk() == expected


def test_a_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk is 0: expected at least 1"):
        chunked_token_statistics(HIDDEN, lambda h: h @ KERNEL, TARGETS, chunk=0)
