"""How the next token is chosen from logits. Temperature, top-k, top-p and min-p compose; greedy stands alone."""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, Key
from clp_jax.partitioning import over_rows


def largest(x: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """The first of the largest entries of the last dimension.

    As `jnp.argmax`, whose loop XLA's CPU backend does not vectorise, nor anything that it fuses into it. Of numbers among
    which one is NaN, the last.
    """
    size = x.shape[-1]
    places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), x.shape)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), places, size - 1), axis=-1)


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most probable token."""

    def __call__(self, keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        """One token a row."""
        return largest(logits)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A sample from the (filtered) distribution.

    Attributes:
        temperature: logits are divided by it; 1 samples the policy itself, as training must.
        top_k: keeps the k most probable tokens; 0 keeps all.
        top_p: keeps the smallest set of tokens whose probability reaches it; 1 keeps all (arXiv 1904.09751).
        min_p: keeps tokens at least this fraction as probable as the most probable one; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"Sampling.temperature is {self.temperature}: expected a positive number (or use greedy).")
        if self.top_k < 0:
            raise ValueError(f"Sampling.top_k is {self.top_k}: expected 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p is {self.top_p}: expected a number in (0, 1].")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling.min_p is {self.min_p}: expected a number in [0, 1].")

    def __call__(self, keys: Key[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        """One token a row; `keys` has one key for each row, so that a row never depends on the others."""
        logits = self.filter(logits)
        # The largest of logits with Gumbel noise is a sample of the softmax.
        uniform = jax.vmap(lambda key: jax.random.uniform(key, logits.shape[-1:], minval=1e-20, maxval=1.0))(keys)
        return largest(logits - jnp.log(-jnp.log(uniform)))

    def filter(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits divided by the temperature, ``-inf`` for tokens that are not kept."""
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            threshold = over_rows(lambda rows: jax.lax.top_k(rows, self.top_k)[0][..., -1:], logits)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
            probs = jax.nn.softmax(ordered, axis=-1)
            # A token stays if the tokens before it do not reach top_p yet: the first always does.
            kept = (jnp.cumsum(probs, axis=-1) - probs) < self.top_p
            threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        if self.min_p > 0:
            threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        return logits
