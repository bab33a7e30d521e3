"""The Pallas kernels of attention, and how they walk over blocks of queries and keys (`clp_jax.nn.attention_pallas`)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from clp_jax.array_types import Array, Bool, Float, Int
from clp_jax.nn.attention_blockwise import FLOOR
from clp_jax.nn.attention_dense import MASKED, cap_logits
from clp_jax.nn.position import relative_position_bucket
from clp_jax.nn.visibility import Pattern, Places, block_extents, may_meet

LANES = 128
SUBLANES = 8
# What blocks may take of VMEM; and, besides, the gradients of queries that a backward pass sums up there, and those of keys.
BLOCK_BYTES = 15 * 2**20
SUM_BYTES = 16 * 2**20


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def lay_out(queries: Places, keys: Places) -> tuple[Int[Array, "b 8 T"], Int[Array, "b 8 S"]]:
    """Positions and segments as two sublanes of a tile; rows that are all alike stay one."""
    leading = max(x.shape[0] for places in (queries, keys) for x in (places.positions, places.segments))

    def tile(places: Places) -> Array:
        both = [jnp.broadcast_to(x, (leading, x.shape[1])) for x in (places.positions, places.segments)]
        return jnp.pad(jnp.stack(both, axis=1), ((0, 0), (0, SUBLANES - 2), (0, 0)))

    return tile(queries), tile(keys)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of one call: `columns` keys by `rows` queries are a block; `shared` heads use one key head."""

    pattern: Pattern
    rows: int
    columns: int
    shared: int
    interpret: bool


def forward_pass(plan: Plan, query, key, value, table, queries, keys, *, dtype) -> tuple[Array, Array]:
    """The output in `dtype`, and the logarithm of each query's normaliser, ``float32[B, N, 1, T]``."""
    out, log_z = _Pass(plan, query.shape, key.shape, queries.shape[0], by_key=False).run(
        _forward_kernel,
        inputs=[(query, "query"), (key, "key"), (value, "key"), (queries, "at"), (keys, "key_at"), (table, "table")],
        outputs=[(dtype, "query"), (jnp.float32, "log_z")],
        scratch=[(1, plan.rows), (1, plan.rows), (query.shape[-1], plan.rows)],
        extents=_extents(plan, queries, keys),
        products=2,
    )
    return out, log_z


def backward_pass(
    plan: Plan, arrays: Sequence[Any], gradient, log_z, common, *, wide: bool
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of queries, keys, values and table, in the types of these, or `wide` in float32."""
    query, key, value, table, queries, keys = arrays
    walk = _Pass(plan, query.shape, key.shape, queries.shape[0], by_key=True)
    types = [jnp.float32 if wide else x.dtype for x in (query, key, value)]
    size, (batch, groups, length, _) = query.shape[-1], key.shape
    parts = 1 if walk.holds_keys else walk.members
    part_types = types[1:] if parts == 1 else [jnp.float32] * 2
    held = length if walk.holds_keys else plan.columns
    to_query, *to_keys = walk.run(
        _backward_kernel,
        inputs=[
            (query, "query"), (key, "key"), (value, "key"), (queries, "at"), (keys, "key_at"), (table, "table"),
            (gradient, "query"), (log_z, "log_z"), (common, "log_z"),
        ],
        outputs=[
            (types[0], "to_query"), *((dtype, "to_key") for dtype in part_types),
            *(() if table is None else ((jnp.float32, "buckets"),)),
        ],
        scratch=[(walk.segment * plan.rows, size), (held, size), (held, size)],
        extents=_extents(plan, queries, keys),
        products=5,
    )  # fmt: skip
    to_key, to_value = (
        x.reshape(batch, groups, parts, length, size).sum(axis=2).astype(dtype)
        for x, dtype in zip(to_keys[:2], types[1:], strict=True)
    )
    if plan.pattern.buckets is None:
        return to_query, to_key, to_value, None
    by_head = to_keys[2].sum(axis=0).reshape(query.shape[1], walk.segments, -1).sum(axis=1)
    return to_query, to_key, to_value, by_head[:, : plan.pattern.buckets.num_buckets].reshape(-1)


@dataclasses.dataclass(frozen=True)
class _Step:
    """Where in the grid a kernel stands: an example, a head, a block of queries and one of keys.

    The inner loop runs over the blocks of keys, or of queries: `inner` is the number there, `outer` that of the other loop,
    `member` that of the loop around both. Not `inside`, the block of queries is past the last.
    """

    example: Int[Array, ""]
    head: Int[Array, ""]
    row: Int[Array, ""]
    column: Int[Array, ""]
    inside: Bool[Array, ""]
    member: Int[Array, ""]
    outer: Int[Array, ""]
    inner: Int[Array, ""]
    walk: "_Pass"

    @property
    def first(self) -> Bool[Array, ""]:
        """Whether the inner loop begins."""
        return self.inner == 0

    @property
    def last(self) -> Bool[Array, ""]:
        """Whether it ends."""
        return self.inner == self.walk.grid[4] - 1

    @property
    def first_sweep(self) -> Bool[Array, ""]:
        """Whether the outer loop begins."""
        return self.outer == 0

    @property
    def last_sweep(self) -> Bool[Array, ""]:
        """Whether it ends."""
        return self.outer == self.walk.grid[3] - 1

    @property
    def keys_begin(self) -> Bool[Array, ""]:
        """Whether nothing has been summed of this block of keys."""
        return self.first & (self.member == 0) if self.walk.holds_keys else self.first

    @property
    def keys_end(self) -> Bool[Array, ""]:
        """Whether all is summed of this block of keys, or of this part of its sums."""
        return self.last & (self.member == self.walk.grid[2] - 1) if self.walk.holds_keys else self.last


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One pass over all blocks, and which part of each array a step of it holds.

    Keys run fastest, so that what belongs to a query is summed in place; or, `by_key`, queries do, so that what belongs to a
    key is, while what belongs to queries is summed in VMEM: of a segment of them, as many as fit there. Around that are the
    members of a key head: the heads that use it, by segments. `leading` is the number of rows that differ in their places.
    """

    plan: Plan
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    leading: int
    by_key: bool

    @property
    def blocks(self) -> tuple[int, int]:
        """Of queries and of keys."""
        return self.query_shape[2] // self.plan.rows, self.key_shape[2] // self.plan.columns

    @property
    def segments(self) -> int:
        """Of queries: parts of a row, each with a sweep over all keys."""
        if not self.by_key:
            return 1
        row_bytes = 4 * self.plan.rows * round_up(self.query_shape[-1], LANES)
        return -(-self.blocks[0] // max(1, SUM_BYTES // row_bytes))

    @property
    def segment(self) -> int:
        """Blocks of queries of a segment; the last one may have fewer."""
        return -(-self.blocks[0] // self.segments)

    @property
    def members(self) -> int:
        """Of a key head."""
        return self.plan.shared * self.segments

    @property
    def holds_keys(self) -> bool:
        """Whether the gradients of all of a head's keys are summed over its members in VMEM; else parts are summed later.

        Members come one after another then: only where a chip's two cores have other heads or examples to share.
        """
        batch, groups, length, size = self.key_shape
        fits = 2 * 4 * length * round_up(size, LANES) <= SUM_BYTES
        return self.by_key and self.members > 1 and fits and batch * groups > 1

    @property
    def grid(self) -> tuple[int, ...]:
        loops = (self.blocks[1], self.segment) if self.by_key else self.blocks
        return *self.key_shape[:2], self.members, *loops

    def place(self, ids) -> tuple:
        """The example, the head, and the blocks of queries and of keys of a step; a block of queries may be past the last."""
        example, group, member, outer, inner = ids
        if not self.by_key:
            return example, group * self.plan.shared + member, outer, inner
        # Python's division of integers asks for a sign, and lowering that for the kind of the chip.
        head = group * self.plan.shared + jax.lax.div(member, self.segments)
        return example, head, jax.lax.rem(member, self.segments) * self.segment + inner, outer

    def meet(self, example, row, column, extents) -> Bool[Array, ""]:
        """Whether a query of the block may see a key of the block, by the extents of their places."""
        rows, columns = self.blocks
        example = example if self.leading > 1 else 0
        inside = jnp.minimum(row, rows - 1)
        query = [extents[0][4 * (example * rows + inside) + i] for i in range(4)]
        key = [extents[1][4 * (example * columns + column) + i] for i in range(4)]
        return (row < rows) & may_meet(self.plan.pattern, query, key)

    def spec(self, kind: str) -> pl.BlockSpec:
        """What a step holds of an array of this kind."""
        plan, size = self.plan, self.query_shape[-1]
        if kind == "table":
            return pl.BlockSpec(memory_space=pltpu.SMEM)

        def index(*arguments):
            *ids, queries, keys = arguments
            example, head, row, column = self.place(ids)
            met = self.meet(example, row, column, (queries, keys))
            part = ids[1] * self.members + ids[2]
            # What is not complete is not written: queries are in the last sweep over them, keys that are held with their
            # last member.
            to_query = jnp.minimum(jnp.where(ids[3] == self.grid[3] - 1, row, row - ids[4]), self.blocks[0] - 1)
            to_key = (part, column)
            if self.holds_keys:
                to_key = (ids[1], jnp.where(ids[2] == self.members - 1, column, 0))
            # A step that is skipped asks for the first block, which the next sweep starts with: nothing is copied twice.
            if self.by_key:
                row = jnp.where(met, row, row - ids[4])
            else:
                column = jnp.where(met, column, 0)
            lane = example if self.leading > 1 else 0
            return {
                "query": (example, head, row, 0),
                "key": (example, ids[1], column, 0),
                "log_z": (example, head, 0, row),
                "at": (lane, 0, row),
                "key_at": (lane, 0, column),
                "to_query": (example, head, to_query, 0),
                "to_key": (example, *to_key, 0),
                "buckets": (example, part, 0, 0),
            }[kind]

        shape = {
            "query": (None, None, plan.rows, size),
            "key": (None, None, plan.columns, size),
            "log_z": (None, None, 1, plan.rows),
            "at": (None, SUBLANES, plan.rows),
            "key_at": (None, SUBLANES, plan.columns),
            "to_query": (None, None, plan.rows, size),
            "to_key": (None, None, plan.columns, size),
            "buckets": (None, None, 1, self.bucket_lanes),
        }[kind]
        return pl.BlockSpec(shape, index)

    @property
    def bucket_lanes(self) -> int:
        buckets = self.plan.pattern.buckets
        return LANES if buckets is None else round_up(buckets.num_buckets, LANES)

    def shape(self, kind: str) -> tuple[int, ...]:
        """The shape of a whole output of this kind."""
        batch, heads, length, _ = self.query_shape
        return {
            "query": self.query_shape,
            "log_z": (batch, heads, 1, length),
            "to_query": self.query_shape,
            "to_key": self.key_shape if self.holds_keys else (batch, heads * self.segments, *self.key_shape[2:]),
            "buckets": (batch, heads * self.segments, 1, self.bucket_lanes),
        }[kind]

    def cost(self, products: int, arrays: Sequence[Any]) -> pl.CostEstimate:
        """What the compiler is told of a kernel: it sees no further than its arrays.

        Args:
            products: matrix products of a block of queries and a block of keys.
            arrays: all it reads and writes, as far as they have shapes.
        """
        batch, heads, length, size = self.query_shape
        keys, pattern = self.key_shape[2], self.plan.pattern
        seen = float(keys)
        if pattern.causal and length == keys:  # Blocks on the diagonal are computed whole.
            seen = (keys + self.plan.columns) / 2
        if pattern.window is not None:
            seen = min(seen, pattern.window + self.plan.columns)
        pairs = int(batch * heads * length * min(seen, keys))
        moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
        return pl.CostEstimate(flops=2 * products * pairs * size, transcendentals=pairs, bytes_accessed=moved)

    def run(self, kernel, *, inputs, outputs, scratch, extents, products) -> Sequence[Array]:
        """Runs a kernel of so many products over the grid; an input that is None reaches it as None."""

        def body(*refs):
            ids = [pl.program_id(axis) for axis in range(5)]
            example, head, row, column = self.place(ids)
            step = _Step(example, head, row, column, row < self.blocks[0], ids[2], ids[3], ids[4], self)
            given = iter(refs[2:])
            read = [None if x is None else next(given) for x, _ in inputs]
            met = self.meet(step.example, step.row, step.column, refs[:2])
            kernel(self.plan, step, met, read, list(given))

        present = [(x, kind) for x, kind in inputs if x is not None]
        made = [jax.ShapeDtypeStruct(self.shape(kind), dtype) for dtype, kind in outputs]
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=self.grid,
                in_specs=[self.spec(kind) for _, kind in present],
                out_specs=[self.spec(kind) for _, kind in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=made,
            cost_estimate=self.cost(products, [*(x for x, _ in present), *made]),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(
                    "parallel",
                    "parallel",
                    "arbitrary" if self.holds_keys else "parallel",
                    "arbitrary",
                    "arbitrary",
                ),
                vmem_limit_bytes=BLOCK_BYTES + 4 * sum(map(math.prod, scratch)),
            ),
            interpret=self.plan.interpret,
        )(*extents, *(x for x, _ in present))


def _extents(plan: Plan, *tiles: Int[Array, "_ 8 _"]) -> tuple[Array, ...]:
    """Of each block of queries and of keys the four numbers, one after another."""
    sizes = zip(tiles, (plan.rows, plan.columns), strict=True)
    return tuple(block_extents(Places(tile[:, 0], tile[:, 1]), size).reshape(-1) for tile, size in sizes)


def _product(x: Float[Array, "..."], y: Float[Array, "..."], over: tuple[int, int]) -> Float[Array, "..."]:
    """A product of matrices that sums over these dimensions, float32."""
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _logits(plan: Plan, head, query, key, at, key_at, table):
    """Logits of a block of keys by queries, masked; the slope of the cap; and the buckets of the distances."""
    pattern = plan.pattern
    logits = cap_logits(_product(key[...], query[...], (1, 1)), pattern.cap)
    slope = 1.0 if pattern.cap is None else 1 - jnp.square(logits / pattern.cap)
    turned = jnp.transpose(key_at[...])
    distance = at[0:1, :] - turned[:, 0:1]
    seen = (at[1:2, :] == turned[:, 1:2]) & (turned[:, 1:2] > 0)
    if pattern.causal:
        seen = seen & (distance >= 0)
    if pattern.window is not None:
        seen = seen & (jnp.abs(distance) < pattern.window)
    bucket = None
    if pattern.buckets is not None:
        bucket = relative_position_bucket(-distance, **dataclasses.asdict(pattern.buckets))
        start = head * pattern.buckets.num_buckets
        logits = _over_buckets(bucket, lambda i, x: jnp.where(bucket == i, x + table[start + i], x), logits)
    return jnp.where(seen, logits, MASKED), slope, bucket


def _over_buckets(bucket: Int[Array, "S T"], body, start: Array) -> Array:
    """A loop over the buckets that a block has: far from the diagonal it has one."""
    numbers = bucket.astype(jnp.float32)  # Reduced to a scalar, where integers cannot be.
    first, last = jnp.min(numbers).astype(jnp.int32), jnp.max(numbers).astype(jnp.int32)
    return jax.lax.fori_loop(first, last + 1, body, start)


def _forward_kernel(plan: Plan, step: _Step, met, inputs, results) -> None:
    query, key, value, at, key_at, table = inputs
    out, log_z, largest, total, summed = results

    @pl.when(step.first)
    def start():
        largest[...] = jnp.full_like(largest, FLOOR)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(met)
    def block():
        logits, _, _ = _logits(plan, step.head, query, key, at, key_at, table)
        larger = jnp.maximum(largest[...], logits.max(axis=0, keepdims=True))
        weights = jnp.exp(logits - larger)
        shrink = jnp.exp(largest[...] - larger)
        largest[...] = larger
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        summed[...] = summed[...] * shrink + _product(value[...], weights.astype(value.dtype), (0, 0))

    @pl.when(step.last)
    def end():
        some = total[...] > 0
        norm = jnp.where(some, total[...], 1)
        out[...] = jnp.transpose(summed[...] / norm).astype(out.dtype)
        log_z[...] = jnp.where(some, largest[...] + jnp.log(norm), FLOOR)


def _weights(plan: Plan, step: _Step, inputs):
    """A block's weights, the gradients of its logits and of its products, and its buckets."""
    query, key, value, at, key_at, table, gradient, log_z, common = inputs
    logits, slope, bucket = _logits(plan, step.head, query, key, at, key_at, table)
    weights = jnp.exp(logits - log_z[...])
    to_logits = weights * (_product(value[...], gradient[...], (1, 1)) - common[...])
    return weights, to_logits, (to_logits * slope).astype(query.dtype), bucket


def _backward_kernel(plan: Plan, step: _Step, met, inputs, results) -> None:
    to_query, to_key, to_value, *to_table, query_sum, key_sum, value_sum = results
    query, key, gradient = inputs[0], inputs[1], inputs[6]
    here = pl.ds(pl.multiple_of(step.inner * plan.rows, plan.rows), plan.rows)
    there = pl.ds(0, plan.columns)
    if step.walk.holds_keys:
        there = pl.ds(pl.multiple_of(step.outer * plan.columns, plan.columns), plan.columns)

    @pl.when(step.keys_begin)
    def start_keys():
        for sums in (key_sum, value_sum):
            sums[there, :] = jnp.zeros((plan.columns, sums.shape[1]), sums.dtype)

    @pl.when(step.first_sweep)
    def start_queries():
        query_sum[here, :] = jnp.zeros((plan.rows, query_sum.shape[1]), query_sum.dtype)

    for table_gradient in to_table:

        @pl.when(step.first_sweep & step.first)
        def start_table(table_gradient=table_gradient):
            table_gradient[...] = jnp.zeros_like(table_gradient)

    @pl.when(met)
    def block():
        weights, to_logits, to_products, bucket = _weights(plan, step, inputs)
        value_sum[there, :] += _product(weights.astype(gradient.dtype), gradient[...], (1, 0))
        key_sum[there, :] += _product(to_products, query[...], (1, 0))
        query_sum[here, :] += _product(to_products, key[...], (0, 0))
        for table_gradient in to_table:
            lanes = jax.lax.broadcasted_iota(jnp.int32, table_gradient.shape, 1)

            def add(i, sums, lanes=lanes):
                return jnp.where(lanes == i, sums + jnp.sum(jnp.where(bucket == i, to_logits, 0)), sums)

            table_gradient[...] = _over_buckets(bucket, add, table_gradient[...])

    @pl.when(step.keys_end)
    def end_keys():
        to_key[...] = key_sum[there, :].astype(to_key.dtype)
        to_value[...] = value_sum[there, :].astype(to_value.dtype)

    @pl.when(step.last_sweep & step.inside)
    def end_queries():
        to_query[...] = query_sum[here, :].astype(to_query.dtype)
