"""Encoder-decoder policies (T5, arXiv 1910.10683; 1.1 as released by T5X; Switch, arXiv 2101.03961)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.models.config import T5Config
from clp_jax.models.incremental import decode_step, init_cache, loop_weights
from clp_jax.models.language_model import Decoded, Encoded, LanguageModel, in_order, make_head
from clp_jax.models.transformer import Stack, layers_of
from clp_jax.nn.attention import look
from clp_jax.nn.kv_cache import Cache
from clp_jax.nn.stack import scan_layers
from clp_jax.nn.visibility import Pattern


class T5(LanguageModel):
    """An encoder-decoder policy; segments tell packed examples apart, 0 is padding."""

    config: T5Config

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.encoder = Stack(config, config.num_encoder_layers, rngs, causal=False)
        self.decoder = Stack(config, config.num_decoder_layers, rngs, causal=True, cross=True)
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
            tokens: ids in ``[0, V)``.
            segments: packed examples; by default one, wherever there is no padding.
            dropout_key: None is evaluation.
        """
        unpacked = segments is None
        places = in_order((tokens != self.config.pad_id).astype(jnp.int32) if segments is None else segments)
        ran = self.encoder(self.embed(tokens), places, dropout_key=dropout_key, unpacked=unpacked)
        return Encoded(ran.states, tokens, places, ran.routing)

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
            decoder_inputs: the completions, shifted right.
            encoded: the prompts; with ``n = R/B > 1`` each serves ``n`` consecutive rows.
            segments: packed examples; by default every row is one, with its padding at the end.
            present: which tokens experts make room for; by default all of any segment.
            dropout_key: None is evaluation.
        """
        prompts, unpacked = encoded.places, segments is None
        if segments is None:
            segments = jnp.ones_like(decoder_inputs)
            prompts = in_order((prompts.segments > 0).astype(jnp.int32))
        # The samples of a prompt see its keys as further positions of its row: nothing is repeated.
        queries = in_order(segments.reshape(encoded.tokens.shape[0], -1))
        ran = self.decoder(
            self.embed(decoder_inputs),
            in_order(segments),
            cross=(encoded.content, look(self._cross_pattern(), queries, prompts, unpacked=unpacked)),
            present=present,
            dropout_key=dropout_key,
            unpacked=unpacked,
        )
        return Decoded(ran.states, (*encoded.routing, *ran.routing))

    def first_tokens(self, encoded: Encoded) -> Int[Array, "B"]:
        """What every row feeds first."""
        return jnp.full(encoded.tokens.shape[:1], self.config.start_id, encoded.tokens.dtype)

    def init_cache(self, encoded: Encoded, *, max_length: int, num_samples: int = 1, int8: bool = False) -> Cache:
        """What `decode_step` starts from.

        Args:
            encoded: the prompts, not packed.
            max_length: tokens of a completion at most.
            num_samples: completions of each prompt.
            int8: whether keys and values are kept in eight bits.
        """

        def project(period, carry, _):
            return carry, tuple(layer.project_cross_kv(encoded.content) for layer in layers_of(period))

        keys_values = [scan_layers(run, project, None)[1] for run in self.decoder.runs()]
        offsets = jnp.zeros(encoded.tokens.shape[:1], jnp.int32)
        return init_cache(
            self.decoder,
            keys_values,
            encoded.places,
            offsets,
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
        return decode_step(self.decoder, self.embed(tokens[:, None]), cache, weights, cross=self._cross_pattern())

    def _cross_pattern(self) -> Pattern:
        return Pattern(scale=self.config.attention_scale, cap=self.config.attention_cap)
