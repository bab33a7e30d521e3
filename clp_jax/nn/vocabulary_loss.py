"""What losses need of the logits over a large vocabulary, a chunk of positions at a time."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Bool, Float, Int
from clp_jax.partitioning import activation_sharding, constrain

# Float32 logits of a chunk, on one device.
CHUNK_BYTES = 64 * 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Of each position's distribution over the vocabulary.

    Attributes:
        log_probs: ``float32[B, T]``, of the targets.
        log_z: ``float32[B, T]``, logarithm of the normaliser; its square is the z-loss (PaLM, arXiv 2204.02311).
        correct: ``bool[B, T]``, whether the target has the largest logit, the first of equal ones.
        entropy: ``float32[B, T]`` in nats, or None where it was not asked for.
    """

    log_probs: Float[Array, "*chunks B T"]
    log_z: Float[Array, "*chunks B T"]
    correct: Bool[Array, "*chunks B T"]
    entropy: Float[Array, "*chunks B T"] | None = None


def token_statistics(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], *, with_entropy: bool = False
) -> TokenStatistics:
    """The statistics of logits that are there, in float32."""
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = None
    if with_entropy:
        entropy = log_z - jnp.sum(jnp.exp(logits - log_z[..., None]) * logits, axis=-1)
    return TokenStatistics(chosen - log_z, log_z, jnp.argmax(logits, axis=-1) == targets, entropy)


def chunked_token_statistics(
    hidden: Float[Array, "B T D"],
    head: Callable[[Float[Array, "B t D"]], Float[Array, "B t V"]],
    targets: Int[Array, "B T"],
    *,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> TokenStatistics:
    """`token_statistics` of ``head(hidden)``, whose ``B·T·V`` logits never exist, forward or backward.

    Chunks are cut along T, so a sharded batch stays sharded; of positions that are sharded, each device's are cut. The
    backward pass makes each chunk's logits again: one more product with the head.

    Args:
        hidden: what the head reads; gradients flow to it and to what `head` closes over.
        head: logits of some positions; treats positions alike.
        targets: token ids, in ``[0, V)``.
        chunk: positions of a chunk on a device; None takes as many as `CHUNK_BYTES` of float32 logits hold there, and at
            least as many as make ``D`` rows. Where all fit there is no loop, and nothing is made again.
        with_entropy: whether the entropy is wanted.

    Raises:
        ValueError: for a chunk below 1.
    """
    shards = _length_shards(targets.shape)
    length = targets.shape[1] // shards
    chunk = _fitting(hidden, head) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunked_token_statistics: chunk is {chunk}: expected at least 1, or None to choose.")
    if chunk >= length:
        return token_statistics(head(hidden), targets, with_entropy=with_entropy)

    @jax.checkpoint
    def statistics(hidden, targets):
        hidden = constrain(hidden, "batch", "length", "act_embed")
        return token_statistics(head(hidden), targets, with_entropy=with_entropy)

    xs = (_chunks(hidden, chunk, shards), _chunks(targets, chunk, shards))
    _, stacked = jax.lax.scan(lambda _, x: (None, statistics(*x)), None, xs)
    return jax.tree.map(lambda x: _positions(x, shards, length), stacked)


def _fitting(hidden: Float[Array, "B T D"], head: Callable) -> int:
    """Positions of a chunk on a device whose logits keep to the budget: as even as they come, and one at least."""
    batch, length, width = hidden.shape
    shape = (batch, length, jax.eval_shape(head, hidden).shape[-1])
    sharding = activation_sharding(shape, ("batch", "length", "act_vocab"))
    rows, length, vocabulary = shape if sharding is None else sharding.shard_shape(shape)
    # Every chunk adds to the head's gradient: with fewer rows than the model is wide, that moves more than the logits do.
    most = max(1, CHUNK_BYTES // (4 * rows * vocabulary), width // rows)
    return int(np.ceil(length / np.ceil(length / most)))


def _length_shards(shape: Sequence[int]) -> int:
    sharding = activation_sharding(shape, ("batch", "length"))
    return 1 if sharding is None else shape[1] // sharding.shard_shape(tuple(shape))[1]


def _chunks(x: Array, size: int, shards: int) -> Array:
    """``[B, T, ...]`` as ``[chunks, B, shards·size, ...]``, the last one filled up with what the last position holds.

    Zeros might be nothing a head is made for; a norm's gradient there can be NaN.
    """
    x = x.reshape(x.shape[0], shards, -1, *x.shape[2:])
    missing = -x.shape[2] % size
    last = jnp.broadcast_to(x[:, :, -1:], (*x.shape[:2], missing, *x.shape[3:]))
    padded = jnp.concatenate([x, last], axis=2)
    chunks = jnp.moveaxis(padded.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)
    return chunks.reshape(*chunks.shape[:2], shards * size, *x.shape[3:])


def _positions(x: Array, shards: int, length: int) -> Array:
    """``[chunks, B, shards·size]`` as ``[B, shards·length]``: what `_chunks` cut, without what filled it up."""
    chunks, batch, positions = x.shape
    cut = jnp.moveaxis(x.reshape(chunks, batch, shards, positions // shards), 0, 2)
    return cut.reshape(batch, shards, -1)[:, :, :length].reshape(batch, -1)
