"""Decoder-only policies: PaLM (arXiv 2204.02311), Llama, Mistral, Mixtral, Qwen, Gemma.

A prompt is read first; completions see its keys and values and their own. Both are one causal sequence: the last token of
a prompt is the first that a completion feeds, and only there its keys are seen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.models.config import PaLMConfig
from clp_jax.models.incremental import decode_step, init_cache, loop_weights
from clp_jax.models.language_model import Decoded, Encoded, LanguageModel, in_order, make_head
from clp_jax.models.transformer import Prefix, Stack
from clp_jax.nn.kv_cache import Cache
from clp_jax.nn.routing_statistics import RoutingStatistics
from clp_jax.nn.visibility import Places


class PaLM(LanguageModel):
    """A decoder-only policy; segments tell packed examples apart, 0 is padding."""

    config: PaLMConfig

    def __init__(self, config: PaLMConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.decoder = Stack(config, config.num_layers, rngs, causal=True)
        if not config.tied_head:
            self.logits_head = make_head(config, rngs)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None = None,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Encoded:
        """Reads prompts.

        Args:
            tokens: ids in ``[0, V)``; no positions at all, ``S = 0``, where there are no prompts.
            segments: packed examples; by default one, wherever there is no padding, which stands at the end.
            dropout_key: None is evaluation.
        """
        if not tokens.shape[1]:
            return Encoded(None, tokens, in_order(tokens), ())
        unpacked = segments is None
        places = in_order((tokens != self.config.pad_id).astype(jnp.int32) if segments is None else segments)
        # A completion reads the last token again: experts see it once. In a prefix the other tokens see what they make of it.
        present = None
        if not self.config.prefix_lm:
            last = jnp.take_along_axis(_ends(places.segments), places.segments, axis=1)
            present = (places.segments > 0) & (jnp.arange(tokens.shape[1])[None] != last)
        ran = self.decoder(
            self.embed(tokens),
            places,
            present=present,
            dropout_key=dropout_key,
            keep=True,
            causal=not self.config.prefix_lm,
            unpacked=unpacked,
        )
        return Encoded(ran.keys_values, tokens, places, ran.routing)

    def decode(
        self,
        decoder_inputs: Int[Array, "R T"],
        encoded: Encoded,
        segments: Int[Array, "R T"] | None = None,
        *,
        present: Bool[Array, "R T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Decoded:
        """States before the head, of completions given whole.

        Args:
            decoder_inputs: the completions, shifted right; the first token of each is that of `first_tokens`, whatever
                it is here.
            encoded: the prompts; with ``n = R/B > 1`` each serves ``n`` consecutive rows.
            segments: packed examples; by default every row is one, with its padding at the end.
            present: which tokens experts make room for; by default all of any segment.
            dropout_key: None is evaluation.
        """
        batch, unpacked = encoded.tokens.shape[0], segments is None
        if segments is None:
            segments = jnp.ones_like(decoder_inputs)
            one = (encoded.places.segments > 0).astype(jnp.int32)
            encoded = dataclasses.replace(encoded, places=in_order(one))
        since = _since_start(segments)
        if encoded.content is None:
            tokens = jnp.where(since == 0, self.config.start_id, decoder_inputs)
            ran = self.decoder(self.embed(tokens), in_order(segments), dropout_key=dropout_key, unpacked=unpacked)
            return Decoded(ran.states, ran.routing)
        ends = _ends(encoded.places.segments)
        mine = jnp.minimum(segments, ends.shape[1] - 1).reshape(batch, -1)
        last = jnp.take_along_axis(ends, mine, axis=1)
        first = self._last_tokens(encoded, last).reshape(segments.shape)
        tokens = jnp.where(since == 0, first, decoder_inputs)
        positions = jnp.maximum(last, 0) + since.reshape(batch, -1)
        queries = Places(positions, segments.reshape(batch, -1))
        prefix = Prefix(encoded.content, self._without_last(encoded, ends), queries)
        ran = self.decoder(
            self.embed(tokens), in_order(segments), prefix=prefix, present=present, dropout_key=dropout_key
        )
        return Decoded(ran.states, _joined(encoded.routing, ran.routing))

    def first_tokens(self, encoded: Encoded) -> Int[Array, "B"]:
        """What every row feeds first: the last token of its prompt."""
        if encoded.content is None:
            return jnp.full(encoded.tokens.shape[:1], self.config.start_id, encoded.tokens.dtype)
        return self._last_tokens(encoded, _ends(encoded.places.segments)[:, 1:2])[:, 0]

    def init_cache(self, encoded: Encoded, *, max_length: int, num_samples: int = 1, int8: bool = False) -> Cache:
        """What `decode_step` starts from.

        Args:
            encoded: the prompts, not packed.
            max_length: tokens of a completion at most.
            num_samples: completions of each prompt.
            int8: whether keys and values are kept in eight bits.
        """
        if encoded.content is None:  # One position of padding, so that no array is empty.
            padding = jnp.full((encoded.tokens.shape[0], 1), self.config.pad_id, encoded.tokens.dtype)
            encoded = self.encode(padding, jnp.zeros_like(padding))
        ends = _ends(encoded.places.segments)
        return init_cache(
            self.decoder,
            encoded.content,
            self._without_last(encoded, ends),
            jnp.maximum(ends[:, 1], 0),
            max_length=max_length,
            num_samples=num_samples,
            int8=int8,
        )

    def loop_weights(self) -> tuple[Any, ...]:
        """What a loop of `decode_step` computes before it begins."""
        return loop_weights(self.decoder)

    def decode_step(
        self, tokens: Int[Array, "R"], cache: Cache, weights: tuple[Any, ...]
    ) -> tuple[Float[Array, "R D"], Cache]:
        """The states before the head that follow one more token of every row, rows prompt-major.

        Args:
            tokens: the newest.
            cache: of the tokens before.
            weights: `loop_weights`.
        """
        return decode_step(self.decoder, self.embed(tokens[:, None]), cache, weights, cross=None)

    def _last_tokens(self, encoded: Encoded, last: Int[Array, "B X"]) -> Int[Array, "B X"]:
        tokens = jnp.take_along_axis(encoded.tokens, jnp.maximum(last, 0), axis=1)
        return jnp.where(last < 0, self.config.start_id, tokens)

    def _without_last(self, encoded: Encoded, ends: Int[Array, "B X"]) -> Places:
        """Where the keys stand that completions see: the last token's are the completion's own."""
        segments = encoded.places.segments
        is_last = jnp.arange(segments.shape[1])[None] == jnp.take_along_axis(ends, segments, axis=1)
        return Places(encoded.places.positions, jnp.where(is_last, 0, segments))


def _ends(segments: Int[Array, "B S"]) -> Int[Array, "B X"]:
    """The last position of every segment, by its number; -1 for those that are not there."""
    size = segments.shape[1]
    empty = jnp.full((segments.shape[0], size + 2), -1, jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(size), segments.shape)
    return jax.vmap(lambda row, where, number: row.at[where].max(number))(empty, segments, numbers)


def _since_start(segments: Int[Array, "R T"]) -> Int[Array, "R T"]:
    """Positions counted from the start of each segment."""
    numbers = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return numbers - jax.lax.cummax(jnp.where(begins, numbers, 0), axis=1)


def _joined(prompts: tuple[RoutingStatistics, ...], completions: tuple[RoutingStatistics, ...]) -> tuple[Any, ...]:
    """What the routers of each layer did with both."""
    return tuple(a.joined(b) for a, b in zip(prompts, completions, strict=True))
