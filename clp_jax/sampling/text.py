"""Text in, text out: tokenising prompts to fixed lengths, generating in batches, and detokenising."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Int, PRNGKeyArray
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.steering import Steerable


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        text: without special tokens.
        tokens: up to and including the end of sequence.
        log_probs: of the tokens, under the policy at this preference.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]


def bucket(length: int, smallest: int = 32) -> int:
    """The next power of two, so that programs are compiled for a few lengths only."""
    size = smallest
    while size < length:
        size *= 2
    return size


def encode_prompts(
    vocabulary: Vocabulary, prompts: Sequence[str], max_length: int
) -> tuple[Int[np.ndarray, "B S"], list[int]]:
    """Token ids of prompts, padded to one bucketed length.

    Args:
        vocabulary: of the policy.
        prompts: texts.
        max_length: tokens of a prompt at most; longer ones lose their end.

    Returns:
        ``int32[B, S]``, filled up with the vocabulary's `pad_id`, and the numbers of the prompts that were cut.

    Raises:
        ValueError: for a prompt without a token.
    """
    encoded, cut = [], []
    for number, prompt in enumerate(prompts):
        if not vocabulary.encode(prompt):
            raise ValueError(f"prompt {number} is empty: expected some text.")
        tokens = vocabulary.encode_prompt(prompt)
        if len(tokens) > max_length:
            cut.append(number)
        encoded.append(tokens[:max_length])
    size = min(max_length, bucket(max(map(len, encoded))))
    batch = np.full((len(encoded), size), vocabulary.pad_id, np.int32)
    for row, tokens in zip(batch, encoded, strict=True):
        row[: len(tokens)] = tokens
    return batch, cut


def complete(
    steerable: Steerable,
    vocabulary: Vocabulary,
    inputs: Int[np.ndarray, "B S"],
    preference: Preference,
    key: PRNGKeyArray,
    config: SamplingConfig,
    num_samples: int = 1,
) -> list[list[Completion]]:
    """Completions of encoded prompts at one preference: a list for each prompt."""
    out = steerable.generate(jnp.asarray(inputs), preference, key, config, num_samples)
    texts = vocabulary.decode_batch(np.asarray(out.tokens))
    lengths = np.asarray(out.mask).sum(-1).astype(int)
    tokens, log_probs = np.asarray(out.tokens), np.asarray(out.log_probs)
    rows = [
        Completion(text, tuple(tokens[i, :n].tolist()), tuple(log_probs[i, :n].tolist()))
        for i, (text, n) in enumerate(zip(texts, lengths, strict=True))
    ]
    return [rows[i : i + num_samples] for i in range(0, len(rows), num_samples)]
