"""Logit processors against plain Python, and against transformers' own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.sampling.history import History, align_right
from clp_jax.sampling.processors import (
    BannedSequences,
    ForcedFirst,
    ForcedLast,
    LogitProcessor,
    MinLength,
    NoRepeatNGram,
    OccurrencePenalty,
    RepetitionPenalty,
    process,
)

VOCAB, LIMIT = 7, 8
PROMPTS = np.asarray([[0, 0, 5, 2], [3, 3, 2, 4], [0, 6, 3, 2], [2, 3, 2, 3], [0, 0, 0, 6]], np.int32)
EOS = (1, 4)
RNG = np.random.default_rng(0)
# Few tokens and long rows, so that all repetitions occur.
TOKENS = RNG.integers(2, VOCAB, (5, LIMIT)).astype(np.int32)
TOKENS[3] = [2, 3, 2, 3, 2, 3, 2, 3]
LOGITS = RNG.normal(size=(5, VOCAB)).astype(np.float32)
PREFIXES = (((2,),), ((3, 2),), ((5,), (2, 3, 2), (2, 3), (0, 2), (0,)))
PROCESSORS = [
    *[RepetitionPenalty(1.7, before) for before in ("start", "prompt", "nothing")],
    RepetitionPenalty(0.5),
    *[NoRepeatNGram(size, before) for size in (1, 2, 3) for before in ("start", "prompt", "nothing")],
    NoRepeatNGram(40),
    *[BannedSequences(sequences, before) for sequences in PREFIXES for before in ("start", "prompt", "nothing")],
    OccurrencePenalty(presence=0.7, frequency=0.3),
    OccurrencePenalty(presence=-0.2, frequency=0.1, before="prompt"),
    MinLength(0),
    MinLength(3),
    ForcedFirst(5),
    ForcedLast(),
    ForcedLast((3, 6)),
]


@functools.partial(jax.jit, static_argnames="processor")
def run(processor, logits, tokens, length, prompts=PROMPTS):
    rows = len(prompts)
    zeros, limit = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), LIMIT)
    return processor(logits, History(jnp.asarray(prompts), zeros, tokens, length, limit, 0, EOS))


def seen(before: str, row: int, length: int) -> list[int]:
    prompt = [token for token in PROMPTS[row].tolist() if token != 0]
    return {"start": [0], "prompt": prompt, "nothing": []}[before] + TOKENS[row, :length].tolist()


def expected(processor, row: int, length: int) -> np.ndarray:
    """What the docstrings say, token by token."""
    out = LOGITS[row].copy()
    context = seen(getattr(processor, "before", "nothing"), row, length)
    for token in range(VOCAB):
        match processor:
            case RepetitionPenalty(penalty=penalty):
                if token in context:
                    out[token] = (
                        out[token] * np.float32(penalty) if out[token] < 0 else out[token] / np.float32(penalty)
                    )
            case NoRepeatNGram(size=n):
                grams = [context[i : i + n] for i in range(len(context) - n + 1)]
                if len(context) >= n - 1 and [*context[len(context) - n + 1 :], token] in grams:
                    out[token] = -np.inf
            case BannedSequences(sequences=sequences):
                for *prefix, last in sequences:
                    if token == last and context[len(context) - len(prefix) :] == prefix:
                        out[token] = -np.inf
            case OccurrencePenalty(presence=presence, frequency=frequency):
                count = context.count(token)
                out[token] = out[token] - np.float32(presence) * (count > 0) - np.float32(frequency) * count
            case MinLength(length=least):
                out[token] = -np.inf if length < least and token in EOS else out[token]
            case ForcedFirst(token=first) if length == 0:
                out[token] = 0.0 if token == first else -np.inf
            case ForcedLast(tokens=last) if length == LIMIT - 1:
                out[token] = 0.0 if token in (last or EOS) else -np.inf
    return out


@pytest.mark.parametrize("processor", PROCESSORS, ids=repr)
def test_processors_do_what_they_say(processor):
    """Rows of different lengths at once; what lies behind their length has no influence."""
    assert isinstance(processor, LogitProcessor) and hash(processor) == hash(processor)
    for shift in range(LIMIT):
        lengths = (np.arange(5) * 3 + shift) % LIMIT
        ours = run(processor, LOGITS, TOKENS, lengths)
        theirs = [expected(processor, row, length) for row, length in enumerate(lengths)]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_all_processors_change_something():
    """The comparison above would miss nothing that never happens."""
    idle = [MinLength(0), NoRepeatNGram(40)]
    for processor in PROCESSORS:
        changed = [np.any(expected(processor, row, n) != LOGITS[row]) for row in range(5) for n in range(LIMIT)]
        assert any(changed) == (processor not in idle), processor


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("processor", "name", "arguments"),
    [
        (RepetitionPenalty(1.7), "RepetitionPenaltyLogitsProcessor", dict(penalty=1.7)),
        (RepetitionPenalty(0.4), "RepetitionPenaltyLogitsProcessor", dict(penalty=0.4)),
        (NoRepeatNGram(1), "NoRepeatNGramLogitsProcessor", dict(ngram_size=1)),
        (NoRepeatNGram(2), "NoRepeatNGramLogitsProcessor", dict(ngram_size=2)),
        (NoRepeatNGram(3), "NoRepeatNGramLogitsProcessor", dict(ngram_size=3)),
        (
            BannedSequences(((5,), (2, 3), (0, 4), (2, 3, 2))),
            "NoBadWordsLogitsProcessor",
            dict(bad_words_ids=[[5], [2, 3], [0, 4], [2, 3, 2]]),
        ),
        (
            MinLength(3),
            "MinNewTokensLengthLogitsProcessor",
            dict(prompt_length_to_skip=1, min_new_tokens=3, eos_token_id=list(EOS)),
        ),
        (ForcedFirst(5), "ForcedBOSTokenLogitsProcessor", dict(bos_token_id=5)),
        (ForcedLast(), "ForcedEOSTokenLogitsProcessor", dict(max_length=LIMIT + 1, eos_token_id=list(EOS))),
    ],
    ids=lambda value: repr(value) if isinstance(value, LogitProcessor) else "",
)
def test_transformers_processors(processor, name, arguments, start):
    """Of an encoder-decoder: what it has read is the start token and the completion."""
    torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
    module = pytest.importorskip(
        "transformers.generation.logits_process", reason="the parity reference needs the extra `hf` (transformers)"
    )
    theirs = getattr(module, name)(**arguments)
    rng = np.random.default_rng(start)
    for length in range(LIMIT):
        tokens, logits = rng.integers(0, VOCAB, (5, LIMIT)).astype(np.int32), rng.normal(size=(5, VOCAB))
        logits = logits.astype(np.float32)
        read = np.concatenate([np.zeros((5, 1), np.int64), tokens[:, :length]], axis=1)
        expected = theirs(torch.tensor(read), torch.tensor(logits)).numpy()
        np.testing.assert_allclose(run(processor, logits, tokens, np.full(5, length)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("processor", "name", "argument"),
    [
        (RepetitionPenalty(1.7, "prompt"), "RepetitionPenaltyLogitsProcessor", 1.7),
        (NoRepeatNGram(2, "prompt"), "NoRepeatNGramLogitsProcessor", 2),
        (BannedSequences(((3, 2), (4, 2, 5)), "prompt"), "NoBadWordsLogitsProcessor", [[3, 2], [4, 2, 5]]),
    ],
)
def test_transformers_processors_of_a_decoder_only_policy(processor, name, argument):
    """It reads the prompt."""
    torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
    module = pytest.importorskip(
        "transformers.generation.logits_process", reason="the parity reference needs the extra `hf` (transformers)"
    )
    theirs = getattr(module, name)(argument)
    prompts = np.random.default_rng(4).integers(1, VOCAB, (5, 4)).astype(np.int32)
    for length in range(LIMIT):
        read = np.concatenate([prompts, TOKENS[:, :length]], axis=1).astype(np.int64)
        expected = theirs(torch.tensor(read), torch.tensor(LOGITS)).numpy()
        ours = run(processor, LOGITS, TOKENS, np.full(5, length), prompts)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_first_processor_comes_first_and_all_is_float32():
    zeros = jnp.zeros((5,), jnp.int32)
    history = History(jnp.asarray(PROMPTS), zeros, jnp.asarray(TOKENS), zeros + 2, zeros + LIMIT, 0, EOS)
    one, two = RepetitionPenalty(2.0), OccurrencePenalty(presence=1.0)
    out = process((one, two), jnp.asarray(LOGITS, jnp.bfloat16), history)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(
        out, two(one(jnp.asarray(LOGITS, jnp.bfloat16).astype(jnp.float32), history), history)
    )
    assert np.any(out != process((two, one), jnp.asarray(LOGITS, jnp.bfloat16), history))


def test_prompts_padded_on_either_side_are_read_alike():
    right = np.asarray([[5, 2, 0, 0], [3, 3, 2, 4], [6, 3, 2, 0], [2, 3, 2, 3], [6, 0, 0, 0]], np.int32)
    np.testing.assert_array_equal(align_right(jnp.asarray(right), 0), PROMPTS)
    np.testing.assert_array_equal(align_right(jnp.asarray(PROMPTS), 0), PROMPTS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepetitionPenalty(0.0), r"RepetitionPenalty\.penalty is 0\.0: expected a positive number"),
        (lambda: NoRepeatNGram(0), r"NoRepeatNGram\.size is 0: expected at least 1"),
        (lambda: BannedSequences(((3,), ())), r"BannedSequences\.sequences has \(\): expected one or more token ids"),
        (lambda: BannedSequences(((3, -1),)), r"BannedSequences\.sequences has \(3, -1\): expected"),
        (
            lambda: run(BannedSequences(((3, 7), (2,))), LOGITS, TOKENS, np.zeros(5, int)),
            r"BannedSequences\.sequences has token 7: expected ids below the 7 of the vocabulary",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
