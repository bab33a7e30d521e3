"""Decoding as transformers does: beams of every family, and what its options do to a policy without an encoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
pytest.importorskip("transformers", reason="the parity reference needs the extra `hf` (transformers)")

import torch_models
from torch_cases import BEAMS, COMPLETION, ENDS, FAMILIES, LENGTH_PENALTY, VOCAB

from clp_jax.interop import huggingface
from clp_jax.models.policy import Policy
from clp_jax.sampling.beam_policies import PowerPenalty
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.processors import BannedSequences, NoRepeatNGram, RepetitionPenalty
from clp_jax.sampling.strategies import Greedy

LENGTH = 10


@functools.partial(jax.jit, static_argnames=("policy", "config"))
def run(policy, params, inputs, config):
    decoder = CachedDecoder(policy.bind(params))
    if isinstance(config, BeamConfig):
        found = beam_search(decoder, inputs, config)
        return found.completions.tokens, found.scores
    return generate(decoder, inputs, keys=row_keys(jax.random.key(0), len(inputs)), config=config).tokens, None


def read(model, directory):
    """The policy and its parameters, of a model that transformers saved."""
    torch_models.save(model, directory)
    imported = huggingface.open_checkpoint(directory).loaded()
    return Policy(dataclasses.replace(imported.config, eos_ids=ENDS)), jax.tree.map(jnp.asarray, imported.params)


@pytest.mark.parametrize("case", FAMILIES)
def test_beams_of_every_family(case, tmp_path):
    model, inputs = torch_models.make(case), torch_models.rows().inputs
    expected = torch_models.write_beams(model, inputs)
    assert np.isin(expected["tokens"][:, :-1], ENDS).any()  # Some end early, and lengths differ.
    policy, params = read(model, tmp_path)
    config = BeamConfig(COMPLETION, BEAMS, BEAMS, length_penalty=PowerPenalty(LENGTH_PENALTY))
    tokens, scores = run(policy, params, jnp.asarray(inputs), config)
    np.testing.assert_array_equal(tokens, expected["tokens"])
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Llama:
    """A Llama of one layer, two prompts in which its next token has followed the last one before, and one that it ends.

    Attributes:
        model: torch's.
        policy: ours.
        params: its parameters.
        inputs: the prompts, padded at the end.
        plain: what it writes without options, the most probable tokens.
    """

    model: torch.nn.Module
    policy: Policy
    params: dict
    inputs: np.ndarray
    plain: np.ndarray


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Llama:
    model = torch_models.make("llama_linear", num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight *= 2
    inputs, rng = np.zeros((3, 7), np.int32), np.random.default_rng(0)
    for row, length, ends in zip(inputs, (7, 3, 5), (False, False, True), strict=True):
        prompts = rng.integers(3, VOCAB, (400, length))
        prompts[:, ::2] = prompts[:, :1]
        with torch.no_grad():
            likely = model(input_ids=torch.tensor(prompts)).logits[:, -1].argmax(-1).numpy()
        repeats = (prompts[:, 1::2] == likely[:, None]).any(1)
        row[:length] = prompts[repeats & (np.isin(likely, ENDS) == ends)][0]
    plain = torch_models.write(model, inputs, LENGTH)["tokens"]
    return Llama(model, *read(model, tmp_path_factory.mktemp("llama")), inputs, plain)


def banned(llama: Llama) -> tuple[tuple[int, ...], ...]:
    """Words whose first two tokens end the first two prompts, and a token of the second completion."""
    words = [(*row[row != 0][-2:], written[0]) for row, written in zip(llama.inputs[:2], llama.plain[:2], strict=True)]
    return tuple(tuple(int(token) for token in word) for word in (*words, llama.plain[1, 1:2]))


def options(llama: Llama, names: str) -> tuple[dict, tuple, int]:
    """Settings of transformers' `generate`, our processors, and the tokens at least."""
    words, chosen = banned(llama), names.split()
    known = {
        "repetition_penalty": (1.7, RepetitionPenalty(1.7, "prompt")),
        "no_repeat_ngram_size": (2, NoRepeatNGram(2, "prompt")),
        "bad_words_ids": ([list(word) for word in words], BannedSequences(words, "prompt")),
    }
    settings = {name: known[name][0] for name in chosen if name in known}
    least = 8 if "min_new_tokens" in chosen else 0
    settings |= {"min_new_tokens": least} if least else {}
    return settings, tuple(known[name][1] for name in chosen if name in known), least


OPTIONS = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "bad_words_ids")


@pytest.mark.parametrize("names", [*OPTIONS, " ".join(OPTIONS)])
def test_options_count_the_prompt(llama, names):
    settings, processors, least = options(llama, names)
    expected = torch_models.write(llama.model, llama.inputs, LENGTH, **settings)["tokens"]
    assert (expected != llama.plain).any(axis=1)[2 if names == "min_new_tokens" else slice(2)].all()
    config = SamplingConfig(LENGTH, Greedy(), processors, min_length=least)
    tokens, _ = run(llama.policy, llama.params, jnp.asarray(llama.inputs), config)
    np.testing.assert_array_equal(tokens, expected)


def test_options_count_the_prompt_of_beams(llama):
    settings, processors, least = options(llama, " ".join(OPTIONS))
    expected = torch_models.write(
        llama.model, llama.inputs, LENGTH, num_beams=BEAMS, num_return_sequences=BEAMS, **settings
    )
    config = BeamConfig(LENGTH, BEAMS, BEAMS, processors=processors, min_length=least)
    tokens, scores = run(llama.policy, llama.params, jnp.asarray(llama.inputs), config)
    np.testing.assert_array_equal(tokens, expected["tokens"])
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-5)
