"""Text in, text out, with a vocabulary trained here."""

import jax
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params
from tiny_tokenizers import sentencepiece_directory

from clp_jax.data.vocabulary import EOS_ID, TokenIds, Vocabulary, train_vocabulary
from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.json_lines import pad_rows
from clp_jax.sampling.steering import ConditionedPolicy
from clp_jax.sampling.text import bucket, complete, prompt_tokens


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    text = "returns the mean of a sequence of numbers and raises an error when it is empty "
    train_vocabulary([text[i:] + text[:i] for i in range(0, len(text), 5)], 36, path)
    return Vocabulary.load(path)


@pytest.mark.parametrize(("length", "size"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 1024)])
def test_buckets_are_powers_of_two(length, size):
    assert bucket(length) == size


def test_prompts_of_encoder_decoders_end(vocabulary):
    assert prompt_tokens(vocabulary, "of numbers", 100) == ([*vocabulary.encode("of numbers"), EOS_ID], False)


def test_prompts_of_decoders_have_a_start_and_no_end(tmp_path):
    ours = Vocabulary.load(sentencepiece_directory(tmp_path / "llama", "llama"))
    assert prompt_tokens(ours, "lazy dog", 40) == ([1, *ours.encode("lazy dog")], False)


def test_prompts_that_are_too_long_lose_the_end_of_their_text(vocabulary):
    long = "returns the mean of a sequence of numbers"
    assert prompt_tokens(vocabulary, long, 6) == ([*vocabulary.encode(long)[:5], EOS_ID], True)
    with pytest.raises(ValueError, match="expected at most 1; give a greater --max_prompt"):
        prompt_tokens(vocabulary, long, 1)
    # As long as it may be, with the end of sequence, is not too long.
    tokens = len(vocabulary.encode(long)) + 1
    assert not prompt_tokens(vocabulary, long, tokens)[1]
    assert prompt_tokens(vocabulary, long, tokens - 1)[1]


def test_prompts_of_decoders_that_are_too_long_are_refused(tmp_path):
    ours = Vocabulary.load(sentencepiece_directory(tmp_path / "llama", "llama"))
    length = len(ours.encode_prompt("lazy dog"))
    assert prompt_tokens(ours, "lazy dog", length)[1] is False
    with pytest.raises(
        ValueError, match=rf"has {length} tokens: expected at most {length - 1}; give a greater --max_prompt"
    ):
        prompt_tokens(ours, "lazy dog", length - 1)


@pytest.mark.parametrize("empty", ["", "   "])
def test_an_empty_prompt_is_refused(vocabulary, empty):
    with pytest.raises(ValueError, match="the prompt is empty: expected some text"):
        prompt_tokens(vocabulary, empty, 10)


def test_a_policy_without_a_tokenizer_takes_ids_alone():
    ids = TokenIds(7, 0, (1,))
    with pytest.raises(ValueError, match="this policy has no tokenizer: give lists of token ids"):
        prompt_tokens(ids, "text", 10)
    assert ids.decode_batch(np.asarray([[3, 1], [4, 0]])) == ["3 1", "4 0"]


def test_completions_are_the_texts_of_their_tokens(vocabulary):
    policy = Policy(tiny_config(vocab_size=vocabulary.size, num_encoder_layers=1, num_decoder_layers=1))
    params = jax.tree.map(lambda *x: np.stack(x), varied_params(policy, 0), varied_params(policy, 1))
    steerable = ConditionedPolicy(policy, ParameterConditioning("full", 2), params, varied_params(policy, 0))
    prompts = [prompt_tokens(vocabulary, text, 32)[0] for text in ("returns the mean", "of numbers", "empty")]
    inputs = pad_rows(prompts, 3, 0)
    preference, config = Preference.of([0.4, 0.6], 0.1), SamplingConfig(max_length=24)
    groups = complete(steerable, vocabulary, inputs, preference, jax.random.key(0), config, num_samples=2)
    out = steerable.generate(inputs, preference, jax.random.key(0), config, 2)
    assert [len(group) for group in groups] == [2, 2, 2]
    for i, completion in enumerate(completion for group in groups for completion in group):
        length = int(out.mask[i].sum())
        assert completion.tokens == tuple(np.asarray(out.tokens)[i, :length].tolist())
        assert completion.log_probs == tuple(np.asarray(out.log_probs)[i, :length].tolist())
        assert completion.text == vocabulary.decode(completion.tokens)
        assert EOS_ID not in completion.tokens[:-1]
    lengths = np.asarray(out.mask).sum(-1)
    assert lengths.min() < 24 and len(set(lengths.tolist())) > 1
