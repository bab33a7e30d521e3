"""A policy that serves prompts: stops cut text and tokens alike, the best of n is the most probable, tokens are streamed."""

import numpy as np
import pytest
from tiny_policies import varied_params

from clp_jax.data.vocabulary import TokenIds
from clp_jax.models.conditioning import Unconditioned
from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.session import Server, ServingConfig

POLICY = Policy(
    PaLMConfig.llama(vocab_size=31, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=1, start_id=1)
)
PARAMS = varied_params(POLICY)
IDS = TokenIds(31, 0, (1,))
PROMPTS = [((3, 4, 5), 0), ((9,) * 40, 1), ((7,), 2)]


def serve(prompts=PROMPTS, on_tokens=None, **settings):
    """Completions by prompt; tokens are their own text."""
    config = ServingConfig(SamplingConfig(12), slots=2, **settings)
    shown = [] if on_tokens is None else on_tokens
    server = Server(POLICY, Unconditioned(), IDS, config, lambda *event: shown.append(event))
    return dict(server.complete(PARAMS, Preference.of([1.0], 0.0), prompts))


@pytest.fixture(scope="module")
def plain():
    return serve()


def test_every_prompt_is_answered_and_streamed(plain):
    events = []
    found = serve(on_tokens=events)
    assert found == plain and set(found) == {0, 1, 2}
    for number, (completion,) in found.items():
        streamed = tuple(token for prompt, _, tokens in events if prompt == number for token in tokens)
        assert streamed == completion.tokens == tuple(map(int, completion.text.split()))


def test_a_stop_cuts_text_tokens_and_log_probabilities(plain):
    (whole,) = plain[1]
    token = whole.tokens[4]
    first = whole.tokens.index(token)
    (cut,) = serve(stop=(f" {token} ",))[1]
    # The stop is complete when the token behind it is written.
    assert cut.tokens == whole.tokens[: first + 2]
    np.testing.assert_array_equal(cut.log_probs, whole.log_probs[: first + 2])
    assert cut.text == " ".join(map(str, whole.tokens[:first]))


def test_the_best_of_n_is_the_most_probable(plain):
    several = serve(num_samples=3)
    best = serve(num_samples=3, best=True)
    for number, samples in several.items():
        assert samples[0].tokens == plain[number][0].tokens
        assert best[number] == [max(samples, key=lambda c: float(np.sum(c.log_probs, dtype=np.float64)))]
