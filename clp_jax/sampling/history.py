"""What rows have read and written before their next token: what logit processors and stop sequences look at."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias

import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Int

# What counts besides the completion: the start token (encoder-decoders, as in transformers), the prompt (decoder-only
# policies, as in transformers), or nothing.
Before: TypeAlias = Literal["start", "prompt", "nothing"]


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of tokens of each row.

    Attributes:
        tokens: ``int32[R, C]``.
        begin: ``int32[R]`` the first column that counts.
        end: ``int32[R]`` the column behind the last that counts.
    """

    tokens: Int[Array, "R C"]
    begin: Int[Array, "R"]
    end: Int[Array, "R"]

    def inside(self) -> Bool[Array, "R C"]:
        """Which columns count."""
        columns = jnp.arange(self.tokens.shape[1])[None]
        return (columns >= self.begin[:, None]) & (columns < self.end[:, None])

    def counts(self, vocab_size: int) -> Int[Array, "R V"]:
        """How often each token of the vocabulary occurs."""
        rows = jnp.arange(self.tokens.shape[0])[:, None]
        ids = jnp.where(self.inside(), self.tokens, vocab_size)
        return jnp.zeros((self.tokens.shape[0], vocab_size), jnp.int32).at[rows, ids].add(1, mode="drop")

    def last(self, number: int) -> Int[Array, "R"]:
        """The token `number` places before the end (1 is the last); anything where there are fewer."""
        column = jnp.maximum(self.end - number, 0)
        return jnp.take_along_axis(self.tokens, column[:, None], axis=1)[:, 0]

    def ends_with(self, sequence: Sequence[int]) -> Bool[Array, "R"]:
        """Which rows end with a sequence of tokens; every row ends with the empty one."""
        found = self.end - self.begin >= len(sequence)
        for number, token in enumerate(reversed(sequence), start=1):
            found = found & (self.last(number) == token)
        return found


@dataclasses.dataclass(frozen=True)
class History:
    """What ``R`` rows have read and written.

    Attributes:
        prompts: ``int32[R, S]`` the rows' prompts, padding first (`align_right`).
        first: ``int32[R]`` the token that each row fed first.
        tokens: ``int32[R, T]`` completions so far, anything behind their length.
        length: ``int32[R]`` tokens written.
        limit: ``int32[R]`` tokens that may be written in all.
        pad_id: pads the prompts.
        eos_ids: the tokens that end a completion.
    """

    prompts: Int[Array, "R S"]
    first: Int[Array, "R"]
    tokens: Int[Array, "R T"]
    length: Int[Array, "R"]
    limit: Int[Array, "R"]
    pad_id: int
    eos_ids: tuple[int, ...]

    def span(self, before: Before = "nothing") -> Span:
        """The completions so far, behind what came before them."""
        none = jnp.zeros_like(self.length)
        if before == "nothing":
            return Span(self.tokens, none, self.length)
        if before == "start":
            return Span(jnp.concatenate([self.first[:, None], self.tokens], axis=1), none, self.length + 1)
        size = self.prompts.shape[1]
        padding = jnp.sum(self.prompts == self.pad_id, axis=1, dtype=jnp.int32)
        return Span(jnp.concatenate([self.prompts, self.tokens], axis=1), padding, self.length + size)


def align_right(prompts: Int[Array, "R S"], pad_id: int) -> Int[Array, "R S"]:
    """Prompts with all padding moved to the front, so that what is written follows what was read."""
    order = jnp.argsort(prompts != pad_id, axis=1, stable=True)
    return jnp.take_along_axis(prompts, order, axis=1)


def is_one_of(tokens: Int[Array, "*shape"], ids: Sequence[int]) -> Bool[Array, "*shape"]:
    """Which tokens are among a few."""
    found = jnp.zeros(tokens.shape, bool)
    for token in ids:
        found = found | (tokens == token)
    return found
