"""The token-level loss: sums over what counts, z-loss, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_logits import loss_of_logits

RNG = np.random.default_rng(1)
LOGITS = RNG.normal(size=(2, 3, 4)).astype(np.float32)
TARGETS = np.asarray([[1, 2, 0], [3, 0, 0]], np.int32)
WEIGHTS = np.asarray([[1, 1, 0], [1, 0, 0]], np.float32)
BATCH = tuple(map(jnp.asarray, (LOGITS, TARGETS, WEIGHTS)))


def log_z():
    return np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_sums_over_the_tokens_that_count(z_loss):
    chosen = np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0]
    loss, weight, metrics = loss_of_logits(*BATCH, z_loss)
    expected = ((log_z() - chosen) * WEIGHTS).sum()
    np.testing.assert_allclose(metrics["cross_entropy"], expected, rtol=1e-6)
    np.testing.assert_allclose(loss, expected + z_loss * (log_z() ** 2 * WEIGHTS).sum(), rtol=1e-6)
    assert weight == 3
    assert metrics["accuracy"] == ((LOGITS.argmax(-1) == TARGETS) * WEIGHTS).sum()


def test_the_gradient_is_probabilities_minus_targets():
    z = log_z()[..., None]
    probs = np.exp(LOGITS - z)
    expected = (probs - np.eye(4)[TARGETS] + 2 * 0.01 * z * probs) * WEIGHTS[..., None]
    grads = jax.grad(lambda x: loss_of_logits(x, *BATCH[1:], 0.01)[0])(BATCH[0])
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads[0, 2], 0)


def test_a_batch_is_the_sum_of_its_rows():
    whole = loss_of_logits(*BATCH, 0.1)
    rows = [loss_of_logits(*(x[i : i + 1] for x in BATCH), 0.1) for i in (0, 1)]
    jax.tree.map(lambda a, *b: np.testing.assert_allclose(a, sum(b), rtol=1e-6), whole, *rows)
