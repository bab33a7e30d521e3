"""The rows of a batch that this process holds: what it reads, rewards and puts on its devices.

Which rows these are follows from where the active mesh puts a batch, whatever axes cross processes: where the batch is
spread over processes each has its own, where a tensor axis crosses them several have the same. With one device everything
is here, and arrays stay as they are.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from clp_jax import processes
from clp_jax.array_types import PyTree
from clp_jax.partitioning import activation_sharding, is_axes


@dataclasses.dataclass(frozen=True)
class HostRows:
    """Rows of a batch, those that this process holds.

    Attributes:
        count: of the whole batch.
        mesh: where it goes; None where that is one device, or nothing says where.
        spec: how its rows lie on the mesh.
    """

    count: int
    mesh: Mesh | None = None
    spec: PartitionSpec | None = None

    @classmethod
    def of(cls, count: int) -> "HostRows":
        """The rows of a batch of `count`, on the active mesh.

        Raises:
            RuntimeError: when there are several processes and no active mesh.
        """
        sharding = activation_sharding((count,), ("batch",))
        if jax.process_count() == 1 and (sharding is None or sharding.mesh.size == 1):
            return cls(count)
        if sharding is None:
            raise RuntimeError(f"a batch of {count} rows is read without an active mesh, in one of several processes.")
        assert isinstance(sharding.mesh, Mesh)
        return cls(count, sharding.mesh, sharding.spec)

    @property
    def indices(self) -> np.ndarray:
        """``int[b]`` places of this process's rows in the batch, ascending."""
        return _indices(self)

    def place(self, tree: PyTree) -> PyTree:
        """Global arrays of this process's rows and those of the others.

        Args:
            tree: numpy arrays ``[b·n, ...]``, ``n`` rows for each row of the batch.

        Returns:
            jax arrays ``[count·n, ...]``; the arrays themselves where there is no mesh.
        """
        if self.mesh is None:
            return tree
        return jax.tree.map(self._place, tree)

    def _place(self, local: Any) -> jax.Array:
        local = np.asarray(local)
        each = local.shape[0] // len(self.indices)
        first = {int(row): place for place, row in enumerate(self.indices)}

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(self.count * each)
            place = first[start // each] * each
            return local[(slice(place, place + stop - start), *index[1:])]

        shape = (self.count * each, *local.shape[1:])
        return jax.make_array_from_callback(shape, self.sharding, block)

    def fetch(self, array: Any) -> np.ndarray:
        """This process's rows of a global array.

        Args:
            array: ``[count·n, ...]``.

        Returns:
            ``[b·n, ...]``, in the order of the batch.
        """
        if self.mesh is None or jax.process_count() == 1:
            return np.asarray(array)
        blocks = {
            shard.index[0].indices(array.shape[0])[0]: shard.data
            for shard in jax.device_put(array, self.sharding).addressable_shards
        }
        return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])

    @property
    def sharding(self) -> NamedSharding:
        """Of global arrays; where there is a mesh."""
        assert self.mesh is not None and self.spec is not None
        return NamedSharding(self.mesh, self.spec)


def row_indices(count: int) -> np.ndarray:
    """Places of this process's rows in a batch of `count`, on the active mesh; see `HostRows`."""
    return HostRows.of(count).indices


@runtime_checkable
class InParts(Protocol):
    """An array that is read where it is needed, as `clp_jax.interop.arrays.LazyArray` is."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of it."""


def place_whole(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays on the devices of all processes.

    Args:
        tree: of numpy arrays and of jax arrays on one device, the same in every process; of global arrays; and of arrays that
            are read in parts (`InParts`): one after another, and of each a process reads what its devices hold.
        shardings: of each.
    """
    return jax.tree.map(_place_one, tree, shardings)


def _place_one(leaf: Any, sharding: Sharding) -> jax.Array:
    if isinstance(leaf, InParts):
        held, shape = _Held.of(leaf, sharding), leaf.shape
        array = jax.make_array_from_callback(shape, sharding, lambda index: held.part(index, shape))
        return jax.block_until_ready(array)  # Its buffers on the host go before those of the next come.
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def place_active(tree: PyTree, logical_axes: PyTree) -> PyTree:
    """`place_whole` on the active mesh, or on the default device without one.

    Args:
        tree: as `place_whole` takes it.
        logical_axes: a tuple of names for each array.
    """

    def sharding(axes: Any, leaf: Any) -> Sharding:
        return activation_sharding(leaf.shape, axes) or SingleDeviceSharding(jnp.zeros(()).devices().pop())

    return place_whole(tree, jax.tree.map(sharding, logical_axes, tree, is_leaf=is_axes))


@dataclasses.dataclass(frozen=True)
class _Held:
    """What this process's devices hold of an array, read once: files keep chunks, which are decoded whole.

    Attributes:
        boxes: what was read, by its bounds.
    """

    boxes: dict[tuple[tuple[int, int], ...], np.ndarray]

    @classmethod
    def of(cls, leaf: InParts, sharding: Sharding) -> "_Held":
        """Reads it: as one box where the parts make one."""
        indices = sharding.addressable_devices_indices_map(leaf.shape).values()
        parts = {_bounds(index, leaf.shape) for index in indices if index is not None}
        box = tuple(
            (min(low for low, _ in bounds), max(high for _, high in bounds)) for bounds in zip(*parts, strict=True)
        )
        if math.prod(high - low for low, high in box) == sum(math.prod(b - a for a, b in part) for part in parts):
            parts = {box}
        return cls({part: leaf.read(tuple(slice(*bounds) for bounds in part)) for part in parts})

    def part(self, index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> np.ndarray:
        """One device's part."""
        assert index is not None
        wanted = _bounds(index, shape)
        box = wanted if wanted in self.boxes else next(iter(self.boxes))
        part: Any = (*(slice(a - low, b - low) for (a, b), (low, _) in zip(wanted, box, strict=True)), ...)
        return self.boxes[box][part]  # With the dots a part of an array without axes is an array, too.


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def meet(mesh: Mesh) -> Mesh:
    """Connects the processes along all axes of a mesh, at one time, and returns it.

    On CPUs a group of devices waits 30 s, and no longer, for all of its members when it first has something to exchange:
    less than one process may compile longer than another.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return mesh
    axes = [name for name, size in mesh.shape.items() if size > 1]
    for chosen in itertools.chain(*(itertools.combinations(axes, n + 1) for n in range(len(axes)))):
        spread = NamedSharding(mesh, PartitionSpec(chosen))
        values = np.zeros(math.prod(mesh.shape[name] for name in chosen), np.float32)
        array = place_whole(values, spread)
        gather = jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(array).compile()
        processes.wait_for_all("meeting")
        jax.block_until_ready(gather(array))
    return mesh


@functools.lru_cache(maxsize=64)
def _indices(rows: HostRows) -> np.ndarray:
    if rows.mesh is None:
        return np.arange(rows.count)
    held = rows.sharding.addressable_devices_indices_map((rows.count,)).values()
    starts = {index[0].indices(rows.count)[:2] for index in held if index is not None}
    return np.concatenate([np.arange(*block) for block in sorted(starts)])
