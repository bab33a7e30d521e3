"""Text in, text out, with a vocabulary trained here."""

import jax
import numpy as np
import pytest
from tiny_policies import tiny_config, varied_params
from tiny_tokenizers import sentencepiece_directory

from clp_jax.data.vocabulary import EOS_ID, Vocabulary, train_vocabulary
from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.steering import ConditionedPolicy
from clp_jax.sampling.text import bucket, complete, encode_prompts


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    text = "returns the mean of a sequence of numbers and raises an error when it is empty "
    train_vocabulary([text[i:] + text[:i] for i in range(0, len(text), 5)], 36, path)
    return Vocabulary.load(path)


@pytest.mark.parametrize(("length", "size"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 1024)])
def test_buckets_are_powers_of_two(length, size):
    assert bucket(length) == size


def test_prompts_are_padded_to_one_bucket(vocabulary):
    prompts = ["returns the mean", "of numbers"]
    batch, cut = encode_prompts(vocabulary, prompts, max_length=100)
    assert batch.shape == (2, 32) and batch.dtype == np.int32 and cut == []
    for row, prompt in zip(batch, prompts, strict=True):
        tokens = [*vocabulary.encode(prompt), EOS_ID]
        assert row.tolist() == tokens + [0] * (32 - len(tokens))


def test_prompts_that_are_too_long_lose_their_end_and_are_named(vocabulary):
    long = "returns the mean of a sequence of numbers"
    batch, cut = encode_prompts(vocabulary, ["mean", long], max_length=6)
    assert batch.shape == (2, 6) and cut == [1]
    assert batch[1].tolist() == vocabulary.encode(long)[:6]
    # As long as it may be, with the end of sequence, is not too long.
    tokens = len(vocabulary.encode(long)) + 1
    assert encode_prompts(vocabulary, [long], max_length=tokens)[1] == []
    assert encode_prompts(vocabulary, [long], max_length=tokens - 1)[1] == [0]


def test_prompts_of_decoders_have_a_start_and_no_end(tmp_path):
    ours = Vocabulary.load(sentencepiece_directory(tmp_path / "llama", "llama"))
    prompts = ["lazy dog", "quick brown foxes"]
    batch, cut = encode_prompts(ours, prompts, max_length=40)
    # Token 0 is a token of its own: padding must not be taken for it.
    assert ours.pad_id == -1 and cut == []
    for row, prompt in zip(batch, prompts, strict=True):
        tokens = [1, *ours.encode(prompt)]
        assert row.tolist() == tokens + [-1] * (batch.shape[1] - len(tokens))
        assert ours.decode(row) == prompt


@pytest.mark.parametrize("empty", ["", "   "])
def test_an_empty_prompt_is_named(vocabulary, empty):
    with pytest.raises(ValueError, match="prompt 1 is empty: expected some text"):
        encode_prompts(vocabulary, ["mean", empty], max_length=10)


def test_completions_are_the_texts_of_their_tokens(vocabulary):
    policy = Policy(tiny_config(vocab_size=vocabulary.size, num_encoder_layers=1, num_decoder_layers=1))
    params = jax.tree.map(lambda *x: np.stack(x), varied_params(policy, 0), varied_params(policy, 1))
    steerable = ConditionedPolicy(policy, ParameterConditioning("full", 2), params, varied_params(policy, 0))
    inputs, _ = encode_prompts(vocabulary, ["returns the mean", "of numbers", "empty"], max_length=32)
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
