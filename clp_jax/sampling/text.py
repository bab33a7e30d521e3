"""Text in, text out: tokenising prompts to fixed lengths, generating in batches, and detokenising."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Int, PRNGKeyArray
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.steering import Steerable


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be completed, and how, where it says so itself.

    Attributes:
        tokens: ids, without padding.
        seed: decides the samples; 0 to 2^32 - 1.
        num_samples: completions; None are as many as of any prompt.
        max_tokens: of a completion at most; None are as many as of any prompt.
        stop: texts, and sequences of token ids, that end a completion besides those that end every one.
    """

    tokens: tuple[int, ...]
    seed: int = 0
    num_samples: int | None = None
    max_tokens: int | None = None
    stop: tuple[str | tuple[int, ...], ...] = ()

    @property
    def has_wishes(self) -> bool:
        """Whether it says how it is to be completed."""
        return (self.num_samples, self.max_tokens, self.stop) != (None, None, ())


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        text: without special tokens.
        tokens: up to and including the end of sequence.
        log_probs: of the tokens, under the policy at this preference.
        rewards: of each objective, standardised as in training; none where nobody asked.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    rewards: tuple[float, ...] = ()


def bucket(length: int, smallest: int = 32) -> int:
    """The next power of two, so that programs are compiled for a few lengths only."""
    size = smallest
    while size < length:
        size *= 2
    return size


def alike(lengths: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of requests whose lengths have the same buckets, for one batch each.

    Few programs serve all, and little is padding; and how far a request is padded does not depend on the others.

    Args:
        lengths: of each request: of its prompt, and of its completion where it has one.
        batch_size: requests together, at most.
    """
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, sizes in enumerate(lengths):
        by_shape.setdefault(tuple(map(bucket, sizes)), []).append(number)
    for group in by_shape.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def prompt_tokens(vocabulary: Vocabulary | TokenIds, prompt: str, max_length: int) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether it was too long and was cut.

    A prompt that ends with an end of sequence loses the end of its text and keeps that token, as in transformers. A
    decoder's goes on where the text ends, with a question or a turn: it is refused instead.

    Args:
        vocabulary: of the policy.
        prompt: text.
        max_length: tokens at most.

    Raises:
        ValueError: for a prompt without a token, or too long a one of a decoder.
    """
    if not vocabulary.encode(prompt):
        raise ValueError("the prompt is empty: expected some text.")
    tokens, end = vocabulary.encode_prompt(prompt), vocabulary.prompt_end
    if len(tokens) <= max_length:
        return tokens, False
    if not end or len(end) >= max_length:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens: expected at most {max_length}; give a greater --max_prompt, or cut it."
        )
    return [*tokens[: max_length - len(end)], *end], True


def complete(
    steerable: Steerable,
    vocabulary: Vocabulary | TokenIds,
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
