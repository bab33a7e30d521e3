"""Where the heads of attention lie on a mesh: several devices may share the queries of one key head."""

import dataclasses
import math
from typing import Any

import jax

from clp_jax.array_types import Array, Shaped
from clp_jax.partitioning import activation_sharding, active_mesh


@dataclasses.dataclass(frozen=True)
class HeadAxes:
    """Mesh axes of one call of attention.

    Attributes:
        rows: of examples.
        queries: of query heads.
        keys: of key heads: the first of the queries' axes. Over the others the queries of a key head are shared.
    """

    rows: tuple[str, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]

    def own_keys(self, x: Shaped[Array, "B G *rest"]) -> Shaped[Array, "B g *rest"]:
        """Inside of `jax.shard_map`: those key heads that this device's query heads use.

        Args:
            x: the key heads that the device was given.
        """
        others, held = self.queries[len(self.keys) :], x.shape[1]
        if not others or held == 1:
            return x
        one = jax.lax.axis_index(others) * held // jax.lax.axis_size(others)
        return jax.lax.dynamic_slice_in_dim(x, one, 1, axis=1)


def head_axes(batch: int, heads: int, groups: int) -> HeadAxes:
    """How the active rules share rows and heads.

    Query heads are shared as far as they divide. Where key heads are too few for that (multi-query and grouped-query
    attention), each of them is on all devices that share its queries, if each device then has queries of one key head.

    Args:
        batch: examples.
        heads: query heads.
        groups: key heads; divide the query heads.
    """
    mesh = active_mesh()

    def axes(number: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        sharding = activation_sharding((batch, 0, number), ("batch", "length", "act_heads"))
        return (as_axes(sharding.spec[0]), as_axes(sharding.spec[2])) if sharding is not None else ((), ())

    rows, keys = axes(groups)
    _, queries = axes(heads)
    held = groups // axes_size(mesh, keys)
    shared = queries[: len(keys)] == keys and axes_size(mesh, queries[len(keys) :]) % held == 0
    return HeadAxes(rows, queries if shared else keys, keys)


def as_axes(part: Any) -> tuple[str, ...]:
    """The mesh axes in one part of a `PartitionSpec`."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def axes_size(mesh: Any, axes: tuple[str, ...]) -> int:
    """Devices along mesh axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
