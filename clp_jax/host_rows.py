"""The rows of a batch that this process holds: what it reads, rewards and puts on its devices.

Which rows these are follows from where the active mesh puts a batch, whatever axes cross processes: where the batch is
spread over processes each has its own, where a tensor axis crosses them several have the same. With one device everything
is here, and arrays stay as they are.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax import processes
from clp_jax.array_types import PyTree
from clp_jax.partitioning import activation_sharding


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
        return jax.make_array_from_callback(shape, self._sharding, block)

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
            for shard in jax.device_put(array, self._sharding).addressable_shards
        }
        return np.concatenate([np.asarray(blocks[start]) for start in sorted(blocks)])

    @property
    def _sharding(self) -> NamedSharding:
        assert self.mesh is not None and self.spec is not None
        return NamedSharding(self.mesh, self.spec)


def row_indices(count: int) -> np.ndarray:
    """Places of this process's rows in a batch of `count`, on the active mesh; see `HostRows`."""
    return HostRows.of(count).indices


def place_whole(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every process has whole, on the devices of all.

    Args:
        tree: numpy arrays, or jax arrays on one device; the same in every process.
        shardings: of each.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, shardings)


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
    held = rows._sharding.addressable_devices_indices_map((rows.count,)).values()
    starts = {index[0].indices(rows.count)[:2] for index in held if index is not None}
    return np.concatenate([np.arange(*block) for block in sorted(starts)])
