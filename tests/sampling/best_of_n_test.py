"""Best-of-n against the samples that it chooses from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slot_policies import HashDecoder, hash_table

from clp_jax.sampling.best_of_n import best_of, generate_best, mean_log_prob, total_log_prob
from clp_jax.sampling.generate import SamplingConfig, generate, request_keys

PROMPTS = jnp.asarray([[3, 4], [5, 0], [8, 7]], jnp.int32)
KEYS = request_keys(jnp.asarray([1, 2, 3], jnp.uint32), 4)
CONFIG = SamplingConfig(6)


def count_of_three(completions):
    return jnp.sum((completions.tokens == 3) * completions.mask, axis=-1)


@functools.partial(jax.jit, static_argnames="score")
def run(score):
    decoder = HashDecoder(hash_table())
    best = generate_best(decoder, PROMPTS, keys=KEYS, config=CONFIG, num_samples=4, score=score)
    return best, generate(decoder, PROMPTS, keys=KEYS, config=CONFIG, num_samples=4)


@pytest.mark.parametrize("score", [total_log_prob, mean_log_prob, count_of_three])
def test_the_best_of_the_samples(score):
    best, every = run(score)
    tokens, log_probs = np.asarray(every.tokens).reshape(3, 4, 6), np.asarray(every.log_probs).reshape(3, 4, 6)
    mask = np.asarray(every.mask).reshape(3, 4, 6)
    expected = {
        total_log_prob: log_probs.sum(-1),
        mean_log_prob: log_probs.sum(-1) / mask.sum(-1),
        count_of_three: ((tokens == 3) * mask).sum(-1),
    }[score]
    np.testing.assert_allclose(best.scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(best.chosen, expected.argmax(-1))
    assert len(set(expected.argmax(-1).tolist())) > 1
    for ours, theirs in ((best.tokens, tokens), (best.log_probs, log_probs), (best.mask, mask)):
        np.testing.assert_array_equal(ours, theirs[np.arange(3), expected.argmax(-1)])


def test_the_first_of_equals_and_never_what_is_no_number():
    _, every = run(total_log_prob)
    scores = jnp.asarray([1, 2, 2, 0, jnp.nan, -3, jnp.nan, -jnp.inf, jnp.nan, -jnp.inf, jnp.nan, -1e30], jnp.float32)
    np.testing.assert_array_equal(best_of(every, scores, 4).chosen, [1, 1, 3])


def test_rows_that_are_no_samples_are_refused():
    _, every = run(total_log_prob)
    with pytest.raises(ValueError, match=r"num_samples is 5: expected a divisor of the 12 completions"):
        best_of(every, jnp.zeros((12,)), 5)
