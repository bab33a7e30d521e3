"""Scoring given completions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, tiny_config, varied_params

from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import TokenChoice
from clp_jax.sampling.score import score, shift_right, teacher_force

POLICY = Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1))
PARAMS = varied_params(POLICY)
SWITCH = MoEConfig(num_experts=4, router=TokenChoice(eval_capacity=1.25))
SPARSE = [
    Policy(tiny_config(num_encoder_layers=1, num_decoder_layers=1, moe=SWITCH)),
    Policy(PaLMConfig(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=2, moe=SWITCH)),
]
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


@pytest.mark.parametrize("policy", SPARSE, ids=lambda policy: type(policy.config).__name__)
def test_experts_do_not_see_padding_nor_other_rows(policy):
    """Experts that are full drop the same tokens whatever the lengths and the batch."""
    params = varied_params(policy)

    @jax.jit
    def forced(inputs, tokens, mask):
        return teacher_force(policy.bind(params), inputs, tokens, mask)

    inputs = np.asarray([[3, 4, 5, 6, 7, 8, 9, 10, 3, 1], [8, 9, 10, 3, 4, 1, 0, 0, 0, 0]], np.int32)
    tokens = np.asarray([[4, 4, 4, 5, 6, 1], [4, 3, 9, 0, 0, 0]], np.int32)
    mask = np.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], np.float32)
    whole = forced(inputs, tokens, mask)
    assert all((np.asarray(stack.dropped) > 0).any() for stack in whole.routing)

    def pad(x, more):
        return np.pad(x, ((0, 0), (0, more)))

    for ahead, behind in ((0, 3), (22, 0), (7, 13)):
        longer = forced(pad(inputs, ahead), pad(tokens, behind), pad(mask, behind))
        np.testing.assert_allclose(longer.log_probs[:, :6], whole.log_probs, rtol=1e-5, atol=1e-5)
        for a, b in zip(jax.tree.leaves(longer.routing), jax.tree.leaves(whole.routing), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for row, (prompt, length) in enumerate(((10, 6), (6, 3))):
        alone = forced(*(x[row : row + 1, :size] for x, size in ((inputs, prompt), (tokens, length), (mask, length))))
        np.testing.assert_allclose(alone.log_probs[0], whole.log_probs[row, :length], rtol=1e-5, atol=1e-5)
