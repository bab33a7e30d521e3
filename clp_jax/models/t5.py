"""T5 1.0 and 1.1 encoder-decoder (arXiv 1910.10683; 1.1 as released by T5X)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, Int, PRNGKeyArray
from clp_jax.models.config import T5Config
from clp_jax.nn.attention import Attention, segment_mask, swap_heads
from clp_jax.nn.embeddings import Embedding
from clp_jax.nn.kv_cache import Cache, StackCache
from clp_jax.nn.linear import Linear, dropout
from clp_jax.nn.mlp import MLP
from clp_jax.nn.norms import RMSNorm
from clp_jax.nn.position import RelativePositionBias
from clp_jax.nn.stack import cut, scan_layers, stacked
from clp_jax.partitioning import constrain


def _norm(config: T5Config) -> RMSNorm:
    return RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=jnp.dtype(config.param_dtype))


def _attention(config: T5Config, rngs: nnx.Rngs) -> Attention:
    return Attention(
        rngs,
        config.embed_dim,
        config.num_heads,
        config.head_dim,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.param_dtype),
    )


def _mlp(config: T5Config, rngs: nnx.Rngs) -> MLP:
    return MLP(
        rngs,
        config.embed_dim,
        config.mlp_dim,
        activation=config.activation,
        gated=config.gated,
        dropout_rate=config.dropout_rate,
        dtype=jnp.dtype(config.param_dtype),
    )


def _position_bias(config: T5Config, rngs: nnx.Rngs, bidirectional: bool) -> RelativePositionBias:
    return RelativePositionBias(
        rngs,
        config.num_heads,
        num_buckets=config.num_buckets,
        max_distance=config.max_distance,
        bidirectional=bidirectional,
        stddev=config.embed_dim**-0.5,
        dtype=jnp.dtype(config.param_dtype),
    )


def _fold(key: PRNGKeyArray | None, salt: int) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, salt)


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.attention_norm = _norm(config)
        self.self_attention = _attention(config, rngs)
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config, rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self, x: Float[Array, "B S D"], mask: Array, bias: Float[Array, "N S S"], key: PRNGKeyArray | None
    ) -> Float[Array, "B S D"]:
        """One layer; `key` None turns dropout off."""
        q, k, v = self.self_attention.project_qkv(self.attention_norm(x))
        y = self.self_attention.attend(q, k, v, mask=mask, bias=bias, dropout_key=_fold(key, 0))
        x = x + dropout(y, self.dropout_rate, key, salt=1)
        y = self.mlp(self.mlp_norm(x), _fold(key, 2))
        return constrain(x + dropout(y, self.dropout_rate, key, salt=3), "batch", "length", "act_embed")


class DecoderLayer(nnx.Module):
    """Self-attention, attention to the encoder, and feed-forward."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.self_attention_norm = _norm(config)
        self.self_attention = _attention(config, rngs)
        self.cross_attention_norm = _norm(config)
        self.cross_attention = _attention(config, rngs)
        self.mlp_norm = _norm(config)
        self.mlp = _mlp(config, rngs)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: Float[Array, "R T D"],
        encoded: Float[Array, "B S D"],
        mask: Array,
        cross_mask: Array,
        bias: Float[Array, "N T T"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "R T D"]:
        """One layer over whole sequences; ``R`` is a multiple of ``B``, rows prompt-major."""
        q, k, v = self.self_attention.project_qkv(self.self_attention_norm(x))
        y = self.self_attention.attend(q, k, v, mask=mask, bias=bias, dropout_key=_fold(key, 0))
        x = x + dropout(y, self.dropout_rate, key, salt=1)
        return self._after_self_attention(x, self.project_cross_kv(encoded), cross_mask, _fold(key, 4))

    def project_cross_kv(
        self, encoded: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B N S H"], Float[Array, "B N S H"]]:
        """Keys and values of the encoded prompts, heads first, as a cache keeps them."""
        key, value = self.cross_attention.project_kv(encoded)
        return swap_heads(key), swap_heads(value)

    def decode_step(
        self,
        x: Float[Array, "R 1 D"],
        cached: tuple[Array, Array],
        layer: Int[Array, ""],
        cross_kv: tuple[Array, Array],
        index: Int[Array, ""],
        mask: Array,
        cross_mask: Array,
        bias: Float[Array, "N 1 T"],
    ) -> tuple[Float[Array, "R 1 D"], tuple[Array, Array]]:
        """One layer for one new token; writes its key and value at ``[layer, :, :, index]`` of the stack's cache."""
        q, k, v = self.self_attention.project_qkv(self.self_attention_norm(x))
        zero = jnp.zeros_like(index)
        start = (layer, zero, zero, index, zero)
        keys, values = (
            jax.lax.dynamic_update_slice(old, swap_heads(new)[None], start)
            for old, new in zip(cached, (k, v), strict=True)
        )
        cached = keys, values
        k, v = (jax.lax.dynamic_index_in_dim(old, layer, keepdims=False) for old in cached)
        x = x + self.self_attention.attend_cached(q, k, v, mask=mask, bias=bias)
        return self._after_self_attention(x, cross_kv, cross_mask, None), cached

    def _after_self_attention(self, x: Array, cross_kv: tuple[Array, Array], cross_mask: Array, key) -> Array:
        # The samples of a prompt attend to its keys as further query positions: nothing is repeated.
        y = self.cross_attention.project_q(self.cross_attention_norm(x))
        rows, length = y.shape[:2]
        y = y.reshape(cross_kv[0].shape[0], -1, *y.shape[2:])
        y = self.cross_attention.attend_cached(y, *cross_kv, mask=cross_mask, dropout_key=_fold(key, 0))
        x = x + dropout(y.reshape(rows, length, -1), self.dropout_rate, key, salt=1)
        y = self.mlp(self.mlp_norm(x), _fold(key, 2))
        return constrain(x + dropout(y, self.dropout_rate, key, salt=3), "batch", "length", "act_embed")


class Encoder(nnx.Module):
    """The stack that reads the prompt; reward models use it alone."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.relpos_bias = _position_bias(config, rngs, bidirectional=True)
        self.layers = stacked(lambda r: EncoderLayer(config, r), config.num_encoder_layers, rngs)
        self.norm = _norm(config)
        self.config = config

    def __call__(
        self, x: Float[Array, "B S D"], segments: Int[Array, "B S"], dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B S D"]:
        """Encodes embedded tokens."""
        config = self.config
        positions = jnp.arange(x.shape[1])
        bias = self.relpos_bias(positions, positions)
        mask = segment_mask(segments, segments)
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_encoder_layers)
        x, _ = scan_layers(
            self.layers,
            lambda layer, x, key: (layer(x, mask, bias, key), None),
            dropout(x, config.dropout_rate, dropout_key, salt=1),
            keys,
            remat=config.remat,
            unroll=config.scan_unroll,
        )
        return dropout(self.norm(x), config.dropout_rate, dropout_key, salt=2)


class Decoder(nnx.Module):
    """The stack that writes the completion."""

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.relpos_bias = _position_bias(config, rngs, bidirectional=False)
        self.layers = stacked(lambda r: DecoderLayer(config, r), config.num_decoder_layers, rngs)
        self.norm = _norm(config)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "R T D"],
        encoded: Float[Array, "B S D"],
        segments: Int[Array, "R T"],
        encoder_segments: Int[Array, "B S"],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R T D"]:
        """States of embedded tokens, after the last norm."""
        config = self.config
        positions = jnp.arange(x.shape[1])
        bias = self.relpos_bias(positions, positions)
        mask = segment_mask(segments, segments) & (positions[None, :] <= positions[:, None])[None]
        per_prompt = segments.reshape(encoded.shape[0], -1)
        cross_mask = segment_mask(per_prompt, encoder_segments)
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_decoder_layers)
        x, _ = scan_layers(
            self.layers,
            lambda layer, x, key: (layer(x, encoded, mask, cross_mask, bias, key), None),
            dropout(x, config.dropout_rate, dropout_key, salt=1),
            keys,
            remat=config.remat,
            unroll=config.scan_unroll,
        )
        return dropout(self.norm(x), config.dropout_rate, dropout_key, salt=2)

    def init_cache(
        self, encoded: Float[Array, "B S D"], encoder_segments: Int[Array, "B S"], max_length: int, num_samples: int
    ) -> Cache:
        """Computes every layer's cross-attention keys and values, and makes room for the tokens to come."""
        config = self.config
        rows = encoded.shape[0] * num_samples
        stacks = []
        for layers in cut(self.layers, config.scan_unroll):
            weights = nnx.state(layers)
            _, cross = scan_layers(layers, lambda layer, carry, _: (carry, layer.project_cross_kv(encoded)), None)
            empty = jnp.zeros((cross[0].shape[0], rows, config.num_heads, max_length, config.head_dim), encoded.dtype)
            stacks.append(StackCache(weights, empty, empty, *cross))
        return Cache(tuple(stacks), encoder_segments, index=jnp.zeros((), jnp.int32))

    def decode_step(self, x: Float[Array, "R 1 D"], cache: Cache) -> tuple[Float[Array, "R D"], Cache]:
        """The state of one more embedded token of every row."""
        config = self.config
        positions = jnp.arange(cache.stacks[0].keys.shape[3])
        bias = self.relpos_bias(cache.index[None], positions)
        mask = jnp.broadcast_to((positions <= cache.index)[None, None], (x.shape[0], 1, positions.shape[0]))
        prompts, length = cache.encoder_segments.shape
        samples = x.shape[0] // prompts
        cross_mask = jnp.broadcast_to((cache.encoder_segments > 0)[:, None], (prompts, samples, length))

        def body(layer, carry, xs):
            x, cached = carry
            number, *cross_kv = xs
            return layer.decode_step(x, cached, number, tuple(cross_kv), cache.index, mask, cross_mask, bias), None

        graph = nnx.graphdef(self.layers)
        stacks = []
        for stack in cache.stacks:
            (x, (keys, values)), _ = scan_layers(
                nnx.merge(graph, stack.weights),
                body,
                (x, (stack.keys, stack.values)),
                (jnp.arange(stack.keys.shape[0]), stack.cross_keys, stack.cross_values),
                unroll=config.scan_unroll,
            )
            stacks.append(dataclasses.replace(stack, keys=keys, values=values))
        return self.norm(x)[:, 0], dataclasses.replace(cache, stacks=tuple(stacks), index=cache.index + 1)


class T5(nnx.Module):
    """An encoder-decoder policy.

    Padding is token 0, which also starts every completion; segments tell packed examples apart, 0 is padding.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        self.token_embedder = Embedding(rngs, config.vocab_size, config.embed_dim, stddev=1.0, dtype=dtype)
        self.encoder = Encoder(config, rngs)
        self.decoder = Decoder(config, rngs)
        if not config.tied_head:
            self.logits_head = Linear(
                rngs,
                config.embed_dim,
                config.vocab_size,
                axes=("embed", "vocab"),
                stddev=config.embed_dim**-0.5,
                dtype=dtype,
            )
        self.config = config

    def __call__(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "R T"],
        *,
        encoder_segments: Int[Array, "B S"] | None = None,
        decoder_segments: Int[Array, "R T"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R T V"]:
        """Logits of every next token, float32; see `encode` and `decode`."""
        if encoder_segments is None:
            encoder_segments = (inputs != 0).astype(jnp.int32)
        encoded = self.encode(inputs, encoder_segments, dropout_key=_fold(dropout_key, 0))
        hidden = self.decode(
            decoder_inputs, encoded, encoder_segments, decoder_segments, dropout_key=_fold(dropout_key, 1)
        )
        return self.logits(hidden)

    def encode(
        self,
        tokens: Int[Array, "B S"],
        segments: Int[Array, "B S"] | None = None,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B S D"]:
        """Encodes prompts.

        Args:
            tokens: ids in ``[0, V)``.
            segments: packed examples; by default one, wherever the token is not 0.
            dropout_key: None turns dropout off.
        """
        if segments is None:
            segments = (tokens != 0).astype(jnp.int32)
        return self.encoder(self._embed(tokens), segments, dropout_key)

    def decode(
        self,
        decoder_inputs: Int[Array, "R T"],
        encoded: Float[Array, "B S D"],
        encoder_segments: Int[Array, "B S"],
        decoder_segments: Int[Array, "R T"] | None = None,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "R T D"]:
        """States before the head, of completions given whole.

        Args:
            decoder_inputs: the completions, shifted right.
            encoded: the encoded prompts; with ``n = R/B > 1`` each serves ``n`` consecutive rows.
            encoder_segments: of the prompts.
            decoder_segments: packed examples; by default everything is one example, with its padding at the end.
            dropout_key: None turns dropout off.
        """
        if decoder_segments is None:
            decoder_segments = jnp.ones_like(decoder_inputs)
            encoder_segments = (encoder_segments > 0).astype(jnp.int32)
        return self.decoder(self._embed(decoder_inputs), encoded, decoder_segments, encoder_segments, dropout_key)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The head, in float32."""
        if self.config.tied_head:
            return self.token_embedder.attend(hidden)
        return self.logits_head(hidden.astype(jnp.float32))

    def init_cache(
        self,
        encoded: Float[Array, "B S D"],
        encoder_segments: Int[Array, "B S"],
        *,
        max_length: int,
        num_samples: int = 1,
    ) -> Cache:
        """What `decode_step` starts from.

        Args:
            encoded: the encoded prompts.
            encoder_segments: of the prompts; not packed.
            max_length: tokens of a completion at most.
            num_samples: completions of each prompt.
        """
        return self.decoder.init_cache(encoded, encoder_segments, max_length, num_samples)

    def decode_step(self, tokens: Int[Array, "R"], cache: Cache) -> tuple[Float[Array, "R D"], Cache]:
        """The states before the head that follow one more token of every row, rows prompt-major."""
        return self.decoder.decode_step(self._embed(tokens[:, None]), cache)

    def _embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        x = self.token_embedder(tokens, jnp.dtype(self.config.dtype))
        return constrain(x, "batch", "length", "act_embed")
