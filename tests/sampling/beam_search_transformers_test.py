"""Beam search against transformers' on a random T5: the same tokens and scores under every setting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
transformers = pytest.importorskip("transformers", reason="the parity reference needs the extra `hf` (transformers)")

from torch_t5 import converted, torch_model

from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.sampling.beam_policies import CurrentBound, FirstFinished, PowerPenalty, ReachableBound
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.processors import BannedSequences, ForcedFirst, ForcedLast, NoRepeatNGram, RepetitionPenalty

LENGTH = 9
STOPPING = {True: FirstFinished(), False: CurrentBound(), "never": ReachableBound()}
SIZES = dict(
    vocab_size=13, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_encoder_layers=1, num_decoder_layers=1
)
BAD_WORDS = ((5,), (7, 7), (3, 4))


@pytest.fixture(scope="module")
def models():
    """The torch model, and ours with its parameters: peaked distributions, ends likely enough to come early."""
    config = T5Config.t5_1_1(**SIZES, num_buckets=8, max_distance=12)
    model = torch_model(config)
    with torch.no_grad():
        model.shared.weight *= 0.3
        model.lm_head.weight *= 4
        model.lm_head.weight[1] *= 2
    return model, Policy(config), converted(model, config)


@pytest.fixture(scope="module")
def plain(models) -> np.ndarray:
    return check(models, 3, returned=3)[0]


@functools.partial(jax.jit, static_argnames=("policy", "ends", "config"))
def run(policy, params, inputs, ends, config):
    class WithEnds(CachedDecoder):
        eos_ids = ends

    return beam_search(WithEnds(policy.bind(params)), inputs, config)


def prompts() -> np.ndarray:
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, SIZES["vocab_size"], (8, 6))
    return np.where(np.arange(6) < rng.integers(1, 7, (8, 1)), tokens, 0).astype(np.int32)


def until_the_end(sequences: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """Transformers' tokens without the start token, with padding behind the end as we have it."""
    tokens = np.zeros((len(sequences), LENGTH), np.int32)
    for row, sequence in zip(tokens, sequences[:, 1:], strict=True):
        found = np.flatnonzero(np.isin(sequence, ends))
        length = found[0] + 1 if len(found) else len(sequence)
        row[:length] = sequence[:length]
    return tokens


def check(models, beams: int, ends: tuple[int, ...] = (1,), **settings) -> tuple[np.ndarray, np.ndarray]:
    model, policy, params = models
    inputs, returned = prompts(), settings.pop("returned", 1)
    penalty, early = settings.pop("length_penalty", 1.0), settings.pop("early_stopping", False)
    processors = settings.pop("processors", ())
    least = settings.get("min_new_tokens", 0)
    with torch.no_grad():
        out = model.generate(
            torch.tensor(inputs, dtype=torch.long),
            attention_mask=torch.tensor(inputs != 0, dtype=torch.long),
            max_new_tokens=LENGTH,
            num_beams=beams,
            num_return_sequences=returned,
            length_penalty=penalty,
            early_stopping=early,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
    config = BeamConfig(
        LENGTH,
        beams,
        returned,
        length_penalty=PowerPenalty(penalty),
        stopping=STOPPING[early],
        processors=processors,
        min_length=least,
    )
    found = run(policy, params, jnp.asarray(inputs), ends, config)
    tokens = until_the_end(out.sequences.numpy(), ends)
    np.testing.assert_array_equal(found.completions.tokens, tokens)
    if beams > 1:
        np.testing.assert_allclose(found.scores, out.sequences_scores.numpy(), rtol=1e-5)
    lengths = np.asarray(found.completions.mask).sum(-1)
    return tokens, lengths


@pytest.mark.parametrize(
    ("beams", "penalty", "early"),
    [
        (1, 1.0, False),
        (2, 0.0, False),
        (2, 2.0, True),
        (3, 0.6, False),
        (3, 0.6, "never"),
        (4, 0.0, True),
        (4, 1.0, False),
        (4, 2.0, False),
        (4, 2.0, "never"),
        (4, -1.0, "never"),
    ],
)
def test_length_penalties_and_stopping(models, beams, penalty, early):
    tokens, lengths = check(models, beams, length_penalty=penalty, early_stopping=early, returned=beams)
    assert len({tuple(row) for row in tokens.tolist()}) >= 4
    assert np.any(lengths < LENGTH) or early == "never"


@pytest.mark.parametrize(
    "settings",
    [
        dict(repetition_penalty=1.8, processors=(RepetitionPenalty(1.8),)),
        dict(no_repeat_ngram_size=2, processors=(NoRepeatNGram(2),)),
        dict(min_new_tokens=5, length_penalty=0.0),
        dict(bad_words_ids=[list(word) for word in BAD_WORDS], processors=(BannedSequences(BAD_WORDS),)),
        dict(forced_bos_token_id=6, forced_eos_token_id=1, processors=(ForcedFirst(6), ForcedLast())),
        dict(ends=(1, 4), length_penalty=0.6),
        dict(
            ends=(1, 4, 9),
            repetition_penalty=1.3,
            no_repeat_ngram_size=3,
            min_new_tokens=2,
            forced_eos_token_id=4,
            processors=(RepetitionPenalty(1.3), NoRepeatNGram(3), ForcedLast((4,))),
        ),
    ],
    ids=lambda settings: "-".join(name for name in settings if name != "processors"),
)
def test_processors_and_several_ends(models, plain, settings):
    tokens, _ = check(models, 3, returned=3, **settings)
    assert np.any(tokens != plain)
