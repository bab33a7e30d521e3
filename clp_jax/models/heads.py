"""Models around a trunk: a value baseline, and a scorer of documents and completions."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, Int, PRNGKeyArray
from clp_jax.models.config import T5Config
from clp_jax.models.language_model import in_order
from clp_jax.models.serialization import serializable
from clp_jax.models.transformer import Stack
from clp_jax.nn.embeddings import Embedding
from clp_jax.nn.linear import Linear, normal_parameter
from clp_jax.partitioning import constrain


@serializable
@dataclasses.dataclass(frozen=True)
class ValueHeadConfig:
    """A value of every token from a policy's states and features of the whole row.

    Attributes:
        embed_dim: ``D`` of the states.
        num_features: ``J``.
        hidden_dim: width of the hidden layer.
    """

    embed_dim: int
    num_features: int
    hidden_dim: int = 128

    def __post_init__(self):
        for name in ("embed_dim", "num_features", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"ValueHeadConfig.{name} is {getattr(self, name)}: expected at least 1.")

    def build(self, rngs: nnx.Rngs) -> "ValueHead":
        """A freshly initialised module."""
        return ValueHead(self, rngs=rngs)


class ValueHead(nnx.Module):
    """Two layers; the last starts at zero, so that the first advantages are the returns themselves."""

    def __init__(self, config: ValueHeadConfig, *, rngs: nnx.Rngs):
        width, dtype = config.hidden_dim, jnp.dtype("float32")
        self.states = Linear(
            rngs, config.embed_dim, width, axes=("embed", "mlp"), stddev=config.embed_dim**-0.5, dtype=dtype
        )
        self.features = Linear(rngs, config.num_features, width, axes=("objectives", "mlp"), stddev=1.0, dtype=dtype)
        self.out = normal_parameter(rngs, (width,), ("mlp",), 0.0, dtype)
        self.bias = normal_parameter(rngs, (), (), 0.0, dtype)

    def __call__(self, hidden: Float[Array, "B T D"], features: Float[Array, "B J"]) -> Float[Array, "B T"]:
        """The values, float32."""
        x = self.states(hidden.astype(jnp.float32)) + self.features(features.astype(jnp.float32))[:, None]
        return jax.nn.gelu(x) @ self.out[...] + self.bias[...]


@serializable
@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """A number for a text: a T5 encoder, mean pooling, one linear layer.

    Attributes:
        trunk: the encoder; its decoder's sizes are not used.
    """

    trunk: T5Config

    def build(self, rngs: nnx.Rngs) -> "Scorer":
        """A freshly initialised module."""
        return Scorer(self, rngs=rngs)

    def routed_by_row(self) -> "ScorerConfig":
        """See `ModelConfig.routed_by_row`."""
        trunk = self.trunk.routed_by_row()
        assert isinstance(trunk, T5Config)
        return dataclasses.replace(self, trunk=trunk)


class Scorer(nnx.Module):
    """Scores token sequences: the reward models' architecture."""

    def __init__(self, config: ScorerConfig, *, rngs: nnx.Rngs):
        trunk = config.trunk
        dtype = jnp.dtype(trunk.param_dtype)
        self.token_embedder = Embedding(rngs, trunk.vocab_size, trunk.embed_dim, stddev=1.0, dtype=dtype)
        # Added to the tokens, so that a word of the completion can look for itself in the document and not find itself.
        self.kind_embedding = normal_parameter(rngs, (2, trunk.embed_dim), (None, "embed"), 1.0, dtype)
        self.encoder = Stack(trunk, trunk.num_encoder_layers, rngs, causal=False)
        self.score_head = normal_parameter(rngs, (trunk.embed_dim,), ("embed",), trunk.embed_dim**-0.5, dtype)
        self.score_bias = normal_parameter(rngs, (), (), 0.0, dtype)
        self.config = config

    def score(
        self,
        tokens: Int[Array, "B S"],
        kinds: Int[Array, "B S"],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B"]:
        """One float32 number a row.

        Args:
            tokens: a document and a completion; what pads them is not read.
            kinds: 1 on the document, 2 on the completion, 0 on padding; both see each other, only the completion is
                pooled, so that its score is about it.
            dropout_key: None turns dropout off.
        """
        trunk = self.config.trunk
        x = self.token_embedder(tokens, jnp.dtype(trunk.dtype))
        marked = jnp.maximum(kinds - 1, 0)[..., None]
        x = x + jnp.where(marked == 0, self.kind_embedding[0], self.kind_embedding[1]).astype(x.dtype)
        x = constrain(x, "batch", "length", "act_embed")
        x = self.encoder(x, in_order((kinds > 0).astype(jnp.int32)), dropout_key=dropout_key).states.astype(jnp.float32)
        pooled = (kinds == 2).astype(jnp.float32)[..., None]
        mean = jnp.sum(x * pooled, axis=1) / jnp.maximum(jnp.sum(pooled, axis=1), 1.0)
        return mean @ self.score_head[...] + self.score_bias[...]
