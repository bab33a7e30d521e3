"""Scoring given completions."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_policies import PROMPTS, tiny_config, varied_params

from clp_jax.models.policy import Policy
from clp_jax.sampling.score import score, shift_right, teacher_force

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
PARAMS = varied_params(POLICY)
# Ended, ended at once, not ended, and with a padding token inside.
COMPLETIONS = np.asarray([[4, 5, 1, 0, 0], [1, 0, 0, 0, 0], [7, 8, 9, 2, 3], [6, 0, 4, 1, 0]], np.int32)
COUNTED = np.asarray([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@jax.jit
def force(inputs, tokens):
    return teacher_force(POLICY.bind(PARAMS), inputs, tokens)


@jax.jit
def forward(inputs, decoder_inputs):
    return POLICY.bind(PARAMS)(inputs, decoder_inputs)


def test_decoder_inputs_start_with_padding():
    shifted = shift_right(jnp.asarray(COMPLETIONS), 0)
    np.testing.assert_array_equal(shifted, np.concatenate([np.zeros((4, 1)), COMPLETIONS[:, :-1]], axis=1))


def test_log_probs_are_those_of_the_forward_and_zero_after_the_end():
    shifted = np.concatenate([np.zeros((4, 1), np.int32), COMPLETIONS[:, :-1]], axis=1)
    logits = np.asarray(forward(PROMPTS, shifted), np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_softmax, COMPLETIONS[..., None], -1)[..., 0] * COUNTED
    forced = force(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(forced.log_probs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(forced.log_probs) != 0, COUNTED == 1)
    scored = jax.jit(lambda x, y: score(POLICY.bind(PARAMS), x, y))(PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(scored, forced.log_probs, rtol=1e-6)


def test_what_is_behind_the_end_does_not_matter():
    junk = np.where(COUNTED == 1, COMPLETIONS, 9)
    np.testing.assert_array_equal(force(PROMPTS, junk).log_probs, force(PROMPTS, COMPLETIONS).log_probs)


def test_a_state_is_of_the_tokens_before_it():
    """So that a value baseline of it is a valid one."""
    before = force(PROMPTS, COMPLETIONS).hidden
    changed = COMPLETIONS.copy()
    changed[:, 2] = 10
    after = force(PROMPTS, changed).hidden
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert np.all(np.any(after[:, 3] != before[:, 3], axis=-1))


def test_completions_of_one_prompt_share_its_encoding():
    apart = force(np.repeat(PROMPTS[:2], 2, axis=0), COMPLETIONS)
    together = force(PROMPTS[:2], COMPLETIONS)
    np.testing.assert_allclose(together.log_probs, apart.log_probs, rtol=1e-5, atol=1e-5)
