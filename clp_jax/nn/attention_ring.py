"""Attention where devices share the positions of a row: keys and values go round in a ring (arXiv 2310.01889).

Each device keeps its queries, and computes a part of their attention for the keys it holds while the next device's keys are on
their way. Parts are merged by their normalisers; in the backward pass the gradients of keys travel with them. Positions and
segments travel, too, so that any order of the tokens will do: `to_balanced` gives each device an early and a late piece of
every row, which makes causal work even (arXiv 2311.09431).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clp_jax.array_types import Array, Float, PRNGKeyArray, Shaped
from clp_jax.nn.attention_blockwise import FLOOR, Part, blockwise_part, blockwise_part_gradients
from clp_jax.nn.attention_dense import check_bias, check_heads, scale_query
from clp_jax.nn.attention_heads import as_axes, axes_size, head_axes
from clp_jax.nn.attention_pallas import pallas_part, pallas_part_gradients
from clp_jax.nn.remat import keep
from clp_jax.nn.visibility import Pattern, Places
from clp_jax.partitioning import activation_sharding, active_mesh

ENGINES = ("blockwise", "pallas")


@dataclasses.dataclass(frozen=True)
class KeySet:
    """Keys and values, and how the queries see them. With ``R = B·n`` rows of queries, each row serves ``n`` of them.

    Attributes:
        key: heads first.
        value: heads first.
        queries: where the queries stand, the ``n`` rows of each prompt one after another: ``[B, n·T]``.
        keys: where the keys stand.
        pattern: who sees whom; scales are the same for all sets of a call.
    """

    key: Float[Array, "B G S H"]
    value: Float[Array, "B G S H"]
    queries: Places
    keys: Places
    pattern: Pattern


def ring_axes(*lengths: int) -> tuple[str, ...]:
    """The mesh axes that share positions: by the active rules, and the same for rows of all these lengths; or none."""
    found = {_length_axes(length) for length in lengths}
    return found.pop() if len(found) == 1 else ()


def ring_attention(
    query: Float[Array, "R T N H"],
    sets: Sequence[KeySet],
    *,
    table: Float[Array, "N buckets"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: PRNGKeyArray | None = None,
    engine: str = "blockwise",
    interpret: bool = False,
) -> Float[Array, "R T N H"]:
    """`reference_attention` over all sets in one softmax, on the active mesh, whose rules share positions.

    Args:
        query: queries; head ``n`` uses key head ``n // (N // G)``.
        sets: what they see.
        table: relative position bias of each head and bucket; given exactly where the patterns have buckets.
        dropout_rate: of the attention weights, in ``[0, 1)``.
        dropout_key: None turns dropout off.
        engine: computes a device's part: ``"blockwise"``, or ``"pallas"``, without dropout.
        interpret: runs Pallas kernels as ordinary programs.

    Returns:
        The mean of the values by the weights, in the type of `query`; zeros for a query that sees nothing.

    Raises:
        ValueError: where positions are not shared, or the inputs do not fit.
    """
    rows, length, heads, _ = query.shape
    batch, groups = sets[0].key.shape[:2]
    axes = ring_axes(length, *(one.key.shape[2] for one in sets))
    mesh = active_mesh()
    if mesh is None or not axes:
        sizes = ", ".join(str(one.key.shape[2]) for one in sets)
        raise ValueError(
            f"attention: a ring for {length} queries and {sizes} keys: expected active rules that shard 'length' over "
            "devices which divide all of them."
        )
    for one in sets:
        check_heads(heads, one.key.shape[1])
        check_bias(one.pattern, table)
    lie = head_axes(batch, heads, groups)
    plan = _Plan(
        patterns=tuple(one.pattern for one in sets),
        axes=axes,
        others=(*lie.rows, *lie.queries),
        engine=engine,
        interpret=interpret,
        dropout_rate=0.0 if dropout_key is None else dropout_rate,
    )
    arrays = tuple((one.key, one.value) for one in sets)
    places = tuple((_of_rows(one, rows, length), _pair(one.keys)) for one in sets)

    def place_spec(x: Array) -> PartitionSpec:
        return PartitionSpec(lie.rows if x.shape[0] > 1 else None, axes)

    row_spec = PartitionSpec(lie.rows, lie.queries, axes, None)
    specs = (
        row_spec,
        jax.tree.map(lambda _: PartitionSpec(lie.rows, lie.keys, axes, None), arrays),
        None if table is None else PartitionSpec(lie.queries, None),
        jax.tree.map(place_spec, places),
        PartitionSpec(),
    )
    heads_first = jnp.swapaxes(scale_query(query, sets[0].pattern), 1, 2)

    def ring(query: Array, arrays: Any, *rest: Any) -> Array:
        return _ring(plan, query, jax.tree.map(lie.own_keys, arrays), *rest)

    run = jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=row_spec, check_vma=False)
    out = run(heads_first, arrays, table, places, dropout_key if plan.dropout_rate else None)
    return jnp.swapaxes(out, 1, 2)


def to_balanced(x: Shaped[Array, "B T *rest"], length: int) -> Shaped[Array, "B T *rest"]:
    """Gives each device of the ring an early and a late piece of every row; the rows stay where they were without a ring.

    With ``n`` devices a row is ``2n`` pieces; device ``i`` gets pieces ``i`` and ``2n-1-i``.

    Args:
        x: what the tokens have, positions second; may lead with 1.
        length: ``T``.
    """
    return _exchange(x, length, _spread)


def from_balanced(x: Shaped[Array, "B T *rest"], length: int) -> Shaped[Array, "B T *rest"]:
    """Undoes `to_balanced`."""
    return _exchange(x, length, _gather)


def is_balanced(length: int) -> bool:
    """Whether `to_balanced` moves anything: positions are shared, and the pieces come out even."""
    axes, mesh = ring_axes(length), active_mesh()
    return mesh is not None and bool(axes) and length % (2 * axes_size(mesh, axes)) == 0


def _exchange(x: Array, length: int, move: Callable[..., Array]) -> Array:
    axes, mesh = ring_axes(length), active_mesh()
    if mesh is None or not is_balanced(length):
        return x
    sharding = activation_sharding(x.shape, ("batch", "length", *[None] * (x.ndim - 2)))
    assert sharding is not None
    spec = PartitionSpec(sharding.spec[0], axes, *[None] * (x.ndim - 2))
    local = functools.partial(move, axes=axes, count=axes_size(mesh, axes))
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _spread(x: Array, *, axes: tuple[str, ...], count: int) -> Array:
    """Pieces 2i and 2i+1 of device i to the devices that they belong to: those of each parity have different ones."""
    arrived = []
    for parity, piece in enumerate(jnp.split(x, 2, axis=1)):
        arrived.append(jax.lax.ppermute(piece, axes, [(i, _home(2 * i + parity, count)) for i in range(count)]))
    # Device i has asked for piece i, which has the parity of i.
    odd = jax.lax.axis_index(axes) % 2 == 1
    return jnp.where(odd, jnp.concatenate(arrived[::-1], 1), jnp.concatenate(arrived, 1))


def _gather(x: Array, *, axes: tuple[str, ...], count: int) -> Array:
    odd = jax.lax.axis_index(axes) % 2 == 1
    first, second = jnp.split(x, 2, axis=1)
    pieces = (jnp.where(odd, second, first), jnp.where(odd, first, second))
    back = []
    for parity, piece in enumerate(pieces):
        back.append(jax.lax.ppermute(piece, axes, [(_home(2 * i + parity, count), i) for i in range(count)]))
    return jnp.concatenate(back, axis=1)


def _home(piece: int, count: int) -> int:
    return min(piece, 2 * count - 1 - piece)


def _length_axes(length: int) -> tuple[str, ...]:
    # A batch of any size, so that the axes which it would take do not count.
    sharding = activation_sharding((0, length), ("batch", "length"))
    if sharding is None:
        return ()
    axes = as_axes(sharding.spec[1])
    return axes if axes_size(sharding.mesh, axes) > 1 else ()


def _pair(places: Places) -> tuple[Array, Array]:
    # Cotangents fill trees with what is no array, which `Places` would refuse where its fields are checked.
    return places.positions, places.segments


def _of_rows(one: KeySet, rows: int, length: int) -> tuple[Array, Array]:
    """Where the queries stand, ``[B, n·T]`` as ``[R, T]``."""
    batch = one.key.shape[0]

    def each(x: Array) -> Array:
        return x if rows == batch else jnp.broadcast_to(x, (batch, x.shape[1])).reshape(rows, length)

    return each(one.queries.positions), each(one.queries.segments)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static of one call: the ring's axes, and the others that inputs differ along."""

    patterns: tuple[Pattern, ...]
    axes: tuple[str, ...]
    others: tuple[str, ...]
    engine: str
    interpret: bool
    dropout_rate: float

    def part(self, number: int, query, moving, table, queries) -> Part:
        """The keys that are here, and the queries that see them: the rows of a prompt as further positions of one."""
        key, value, positions, segments = moving
        at = tuple(_merge(x[:, None], key.shape[0])[:, 0] if x.shape[0] > 1 else x for x in queries)
        merged = _merge(query, key.shape[0])
        return Part(merged, key, value, table, Places(*at), Places(positions, segments), self.patterns[number])

    def passes(
        self, number: int, step: Array, key: PRNGKeyArray | None
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Forward and backward of a part; its dropout is told by where its queries and its keys come from."""
        if self.engine == "pallas":
            return (
                functools.partial(pallas_part, interpret=self.interpret),
                functools.partial(pallas_part_gradients, interpret=self.interpret),
            )
        if key is not None:
            for axes in (self.axes, self.others):
                key = jax.random.fold_in(key, jax.lax.axis_index(axes) if axes else 0)
            key = jax.random.fold_in(jax.random.fold_in(key, number), step)
        settings: dict[str, Any] = {"dropout_rate": self.dropout_rate, "dropout_key": key}
        return (
            functools.partial(blockwise_part, **settings),
            functools.partial(blockwise_part_gradients, **settings),
        )

    def send(self, tree: Any) -> Any:
        """To the next device."""
        count = jax.lax.axis_size(self.axes)
        return jax.tree.map(
            lambda x: jax.lax.ppermute(x, self.axes, [(i, (i + 1) % count) for i in range(count)]), tree
        )

    def around(self, body: Callable[[Any, Any, Array], tuple[Any, Any]], moving: Any, carry: Any) -> tuple[Any, Any]:
        """Runs ``(moving, carry, step) -> (what it makes of moving's gradients, carry)`` where everything comes by."""
        count = jax.lax.axis_size(self.axes)

        def step(both, number):
            moving, carry = both
            coming = self.send(moving)  # Before the work, so that it goes on meanwhile.
            return (coming, body(moving, carry, number)), None

        # What was here last need not be sent on.
        (moving, carry), _ = jax.lax.scan(step, (moving, carry), jnp.arange(count - 1))
        return moving, body(moving, carry, jnp.asarray(count - 1))


def _merge(x: Shaped[Array, "R N T *H"], batch: int) -> Shaped[Array, "B N nT *H"]:
    """Rows that share keys as further positions of one."""
    if x.shape[0] == batch:
        return x
    x = jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
    return x.reshape(batch, x.shape[1], -1, *x.shape[4:])


def _unmerge(x: Shaped[Array, "B N nT *H"], rows: int) -> Shaped[Array, "R N T *H"]:
    if x.shape[0] == rows:
        return x
    x = x.reshape(*x.shape[:2], rows // x.shape[0], -1, *x.shape[3:])
    return jnp.swapaxes(x, 1, 2).reshape(rows, x.shape[1], *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: _Plan, query, arrays, table, places, dropout_key) -> Float[Array, "R N T H"]:
    return _ring_forward(plan, query, arrays, table, places, dropout_key)[0]


def _ring_forward(plan: _Plan, query, arrays, table, places, dropout_key):
    rows = query.shape[0]
    merged = jnp.zeros(query.shape), jnp.full(query.shape[:3], FLOOR)
    for number, (kv, (queries, keys)) in enumerate(zip(arrays, places, strict=True)):

        def see(moving, merged, step, number=number, queries=queries):
            out, log_z = merged
            forward, _ = plan.passes(number, step, dropout_key)
            more = tuple(_unmerge(x, rows) for x in forward(plan.part(number, query, moving, table, queries)))
            both = jnp.logaddexp(log_z, more[1])
            old, new = (jnp.exp(z - both)[..., None] for z in (log_z, more[1]))
            return out * old + more[0] * new, both

        _, merged = plan.around(see, (*kv, *keys), merged)
    out, log_z = keep(merged[0].astype(query.dtype)), keep(merged[1])
    return out, (query, arrays, table, places, dropout_key, out, log_z)


def _ring_backward(plan: _Plan, saved, gradient):
    query, arrays, table, places, dropout_key, out, log_z = saved
    rows = query.shape[0]
    common = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    carry = (jnp.zeros(query.shape), None if table is None else jnp.zeros(table.shape))
    to_arrays = []
    for number, (kv, (queries, keys)) in enumerate(zip(arrays, places, strict=True)):

        def see(moving, carry, step, number=number, queries=queries):
            to_query, to_table, to_kv = carry
            _, backward = plan.passes(number, step, dropout_key)
            batch = moving[0].shape[0]
            of_rows = (_merge(x, batch) for x in (gradient, log_z, common))
            more = backward(plan.part(number, query, moving, table, queries), *of_rows)
            # The gradients follow the keys: sent on after each device, they are home after the last.
            to_kv = plan.send(tuple(x + y for x, y in zip(to_kv, more[1:3], strict=True)))
            return to_query + _unmerge(more[0], rows), None if table is None else to_table + more[3], to_kv

        start = (*carry, tuple(jnp.zeros(x.shape) for x in kv))
        _, (*carry, to_kv) = plan.around(see, (*kv, *keys), start)
        to_arrays.append(tuple(x.astype(y.dtype) for x, y in zip(to_kv, kv, strict=True)))
    to_query, to_table = carry
    return (
        to_query.astype(query.dtype),
        tuple(to_arrays),
        None if to_table is None else to_table.astype(table.dtype),
        None,
        None,
    )


_ring.defvjp(_ring_forward, _ring_backward)
