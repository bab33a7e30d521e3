"""The rows that the tokens of a group take in the experts' input, and the way there and back.

Tokens are sorted by expert. A row knows its token and a token its rows, so that both directions, and their gradients, gather.
"""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the tokens of a group went; a leading dimension for groups, if any.

    Attributes:
        source: the token in each row of the experts' input, the number of tokens where the row is empty.
        gates: ``float32``, the weight of each row's output, 0 where it is empty.
        slot_of: the row that each choice of each token took, the number of rows where it took none; None if the experts
            choose.
        owned: rows of each expert that hold something to compute, from its first row on.
        chosen: how many of its choices each token gave each expert, before any cut; 0 for padding and where experts choose.
        kept: tokens that each expert computes.
        dropped: valid choices that took no row (tokens that no expert took, if the experts choose).
        offered: valid choices (valid tokens, if the experts choose).
    """

    source: Int[Array, "*groups rows"]
    gates: Float[Array, "*groups rows"]
    slot_of: Int[Array, "*groups choices tokens"] | None
    owned: Int[Array, "*groups E"]
    chosen: Float[Array, "*groups tokens E"]
    kept: Int[Array, "*groups E"]
    dropped: Int[Array, "*groups"]
    offered: Int[Array, "*groups"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranking:
    """The choices of a group, ``choice * tokens + token``, sorted by expert and, within an expert, by priority."""

    order: Int[Array, "pairs"]
    rank: Int[Array, "pairs"]
    starts: Int[Array, "E"]
    counts: Int[Array, "E"]


def rank_choices(
    experts: Int[Array, "k tokens"], num_experts: int, priority: Int[Array, "pairs"] | None = None
) -> Ranking:
    """Sorts the choices of a group: all first choices before all second ones, each in the order of the tokens.

    Args:
        experts: of each choice; `num_experts` for none.
        num_experts: ``E``.
        priority: of each choice, the smallest first, in place of that order.
    """
    flat = experts.reshape(-1)
    if priority is None:
        order = jnp.argsort(flat, stable=True)
    else:
        order = jax.lax.sort((flat, priority, jnp.arange(flat.size)), num_keys=2)[2]
    counts = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32).sum(0)
    return Ranking(order, jnp.argsort(order), jnp.cumsum(counts) - counts, counts)


def fill_slots(
    experts: Int[Array, "k tokens"],
    gates: Float[Array, "k tokens"],
    ranking: Ranking,
    owner: Int[Array, "rows"],
    firsts: Int[Array, "E"],
    kept: Int[Array, "E"],
    owned: Int[Array, "E"],
) -> Slots:
    """Gives the first choices of each expert its rows.

    Args:
        experts: of each choice; ``E`` for none.
        gates: ``float32``, the weight of each choice.
        ranking: of the choices.
        owner: the expert of each row.
        firsts: the first row of each expert.
        kept: choices that get rows.
        owned: see `Slots`.
    """
    k, num_tokens = experts.shape
    num_rows, num_experts = len(owner), len(firsts)
    index = jnp.arange(num_rows) - firsts[owner]
    holds = index < kept[owner]
    pair = ranking.order[jnp.where(holds, ranking.starts[owner] + index, 0)]
    pair = jnp.where(holds, pair, k * num_tokens)

    flat = experts.reshape(-1)
    expert = jnp.minimum(flat, num_experts - 1)
    place = ranking.rank - ranking.starts[expert]
    fits = (flat < num_experts) & (place < kept[expert])
    slot_of = jnp.where(fits, firsts[expert] + place, num_rows)
    return Slots(
        source=jnp.where(holds, pair % num_tokens, num_tokens),
        # Through `distribute`, whose gradient is no scatter.
        gates=distribute(gates.reshape(-1, 1), pair, slot_of[None])[:, 0],
        slot_of=slot_of.reshape(k, num_tokens),
        owned=owned,
        chosen=count_choices(experts, num_experts),
        kept=kept,
        dropped=ranking.counts.sum() - kept.sum(),
        offered=ranking.counts.sum(),
    )


def count_choices(experts: Int[Array, "k tokens"], num_experts: int) -> Float[Array, "tokens E"]:
    """How many of its choices each token gave each expert."""
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined:
    """The rows of several groups as those of one, which lead with experts and go on with groups; as in `Slots`."""

    source: Int[Array, "rows"]
    gates: Float[Array, "rows"]
    slot_of: Int[Array, "choices tokens"] | None


def join_groups(slots: Slots, group_size: int, num_experts: int) -> Joined:
    """Numbers the tokens and the rows of all groups through.

    Gathered by these numbers, rows are where their experts want them: nothing has to be transposed.

    Args:
        slots: of several groups, whose experts have equally many rows.
        group_size: tokens of each group.
        num_experts: ``E``.
    """
    num_groups, num_rows = slots.source.shape
    capacity, group = num_rows // num_experts, jnp.arange(num_groups)[:, None]
    source = jnp.where(slots.source < group_size, slots.source + group * group_size, num_groups * group_size)

    def by_expert(x: Array) -> Array:
        return x.reshape(num_groups, num_experts, capacity).swapaxes(0, 1).reshape(-1)

    slot_of = slots.slot_of
    if slot_of is not None:
        expert, index = slot_of // capacity, slot_of % capacity
        row = (expert * num_groups + group[:, :, None]) * capacity + index
        row = jnp.where(slot_of < num_rows, row, num_groups * num_rows)
        slot_of = row.swapaxes(0, 1).reshape(slot_of.shape[1], -1)
    return Joined(by_expert(source), by_expert(slots.gates), slot_of)


@jax.custom_vjp
def distribute(
    x: Float[Array, "tokens D"], source: Int[Array, "rows"], slot_of: Int[Array, "choices tokens"] | None
) -> Float[Array, "rows D"]:
    """Copies tokens to the rows they took: ``y[r] = x[source[r]]``, and 0 where the source is out of range.

    Args:
        x: one vector for each token.
        source: the token of each row.
        slot_of: the rows of each token, which make the gradient a gather too; None makes it a scatter.
    """
    del slot_of
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def collect(
    rows: Float[Array, "rows D"],
    source: Int[Array, "rows"],
    slot_of: Int[Array, "choices tokens"] | None,
    num_tokens: Bool[Array, "tokens"],
) -> Float[Array, "tokens D"]:
    """Sums for each token the rows it took, the transpose of `distribute`; the last argument's length counts the tokens."""
    if slot_of is None:
        return jnp.zeros((len(num_tokens), rows.shape[-1]), rows.dtype).at[source].add(rows, mode="drop")
    return jnp.take(rows, slot_of, axis=0, mode="fill", fill_value=0).sum(0)


def _distribute_forward(x, source, slot_of):
    return distribute(x, source, slot_of), (source, slot_of, jnp.zeros(len(x), bool))


def _distribute_backward(saved, gradient):
    source, slot_of, tokens = saved
    return collect(gradient, source, slot_of, tokens), None, None


def _collect_forward(rows, source, slot_of, num_tokens):
    return collect(rows, source, slot_of, num_tokens), (source, slot_of)


def _collect_backward(saved, gradient):
    source, slot_of = saved
    return distribute(gradient, source, slot_of), None, None, None


distribute.defvjp(_distribute_forward, _distribute_backward)
collect.defvjp(_collect_forward, _collect_backward)
