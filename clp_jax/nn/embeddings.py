"""Token embeddings, which may serve as the output head as well."""

import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Float, Int
from clp_jax.nn.linear import flat_product, normal_parameter
from clp_jax.partitioning import constrain, is_sharded


class Embedding(nnx.Module):
    """A table of vectors, one for each token.

    Attributes:
        embedding: ``[V, D]``.
    """

    def __init__(self, rngs: nnx.Rngs, vocab_size: int, embed_dim: int, *, stddev: float, dtype: jnp.dtype):
        self.embedding = normal_parameter(rngs, (vocab_size, embed_dim), ("vocab", "embed"), stddev, dtype)

    def __call__(self, tokens: Int[Array, "*batch"], dtype: jnp.dtype) -> Float[Array, "*batch D"]:
        """Looks tokens up, in `dtype`; ids outside the vocabulary are clipped to it.

        A gather: a product with one-hot rows, which TPUs once preferred, costs ``V`` times the arithmetic.
        """
        x = jnp.take(self.embedding[...].astype(dtype), tokens, axis=0, mode="clip")
        # Rows go to their devices before positions do: XLA makes no single exchange of both, but gathers everything.
        return constrain(x, "batch", None, "embed") if tokens.ndim == 2 and is_sharded("length") else x

    def attend(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """The tied head, float32."""
        x = x.astype(jnp.float32)
        return flat_product(x, self.embedding[...].astype(jnp.float32).T)
