"""Where arrays live: the mesh, the logical axis names, and the table that maps one to the other.

Parameters and activations are annotated with logical names; a `Rules` table, one per layout, maps each name to mesh
axes. Nothing else in the project knows the mesh.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clp_jax.array_types import Array, PyTree

MESH_AXES = ("slice", "data", "fsdp", "expert", "sequence", "tensor", "stage")

LOGICAL_AXES: Mapping[str, str] = {
    # Parameters.
    "component": "mixture components of conditioned parameters",
    "layers": "the stacked layers of a scan",
    "vocab": "vocabulary",
    "embed": "model dimension of a parameter",
    "heads": "query heads times head size",
    "kv_heads": "key/value heads times head size",
    "head_dim": "head size",
    "mlp": "feed-forward dimension",
    "buckets": "relative position buckets",
    "objectives": "reward objectives",
    "expert": "experts",
    "rank": "adapter rank",
    # Activations.
    "group": "examples that share a preference",
    "batch": "examples",
    "length": "positions",
    "act_embed": "model dimension of an activation",
    "act_heads": "heads of an activation",
    "act_mlp": "feed-forward dimension of an activation",
    "act_vocab": "vocabulary of an activation",
    "act_expert": "experts that tokens move to",
}

AxisNames: TypeAlias = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """A table from logical axis names to mesh axes.

    Attributes:
        table: pairs of a logical name and a mesh axis, several mesh axes, or None (replicated). A name that is left
            out is replicated.

    Raises:
        ValueError: for an unknown logical name or mesh axis, or a name given twice.
    """

    table: Sequence[tuple[str, str | tuple[str, ...] | None]] = (("batch", ("slice", "data", "fsdp")),)

    def __post_init__(self):
        object.__setattr__(self, "table", tuple(self.table))  # Hashable, whatever it was given as.
        seen = set()
        for name, axes in self.table:
            _check_name(name)
            if name in seen:
                raise ValueError(f"Rules: logical axis {name!r} is given twice.")
            seen.add(name)
            for axis in _as_tuple(axes):
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"Rules: {name!r} maps to mesh axis {axis!r}: expected one of {', '.join(MESH_AXES)}."
                    )

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The partition spec of an array with these logical axes; a mesh axis is used once, by the first that asks."""
        table = dict(self.table)
        used: set[str] = set()
        parts: list[Any] = []
        for name in axes:
            if name is None:
                parts.append(None)
                continue
            _check_name(name)
            mine = tuple(axis for axis in _as_tuple(table.get(name)) if axis not in used)
            used.update(mine)
            parts.append(mine if len(mine) > 1 else (mine[0] if mine else None))
        return PartitionSpec(*parts)


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None, **other: int
) -> Mesh:
    """Makes the mesh; every axis of `MESH_AXES` is there, of size 1 unless asked for.

    Args:
        data: data-parallel replicas; -1 takes the devices that the other axes leave.
        fsdp: shards of parameters and optimizer state over data-parallel replicas.
        tensor: tensor-parallel shards.
        devices: all devices by default, or those of `use_devices`.
        **other: sizes of the other mesh axes, by name.

    Raises:
        ValueError: for an unknown axis, or sizes whose product is not the number of devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in other.items():
        if name not in sizes:
            raise ValueError(f"make_mesh: unknown axis {name!r}{_nearest(name, MESH_AXES)}.")
        sizes[name] = size
    devices = list((_devices.get() or jax.devices()) if devices is None else devices)
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise ValueError(f"make_mesh({given}): the sizes must multiply to the {len(devices)} devices (one may be -1).")
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in MESH_AXES)
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


_devices: contextvars.ContextVar[Sequence[jax.Device] | None] = contextvars.ContextVar("clp_jax_devices", default=None)


@contextlib.contextmanager
def use_devices(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Makes meshes of these devices inside the context: those of another machine, to compile for it."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("clp_jax_mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes `constrain` act on `mesh` by `rules` while functions are traced inside the context."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: Array, *axes: str | None) -> Array:
    """States the logical axes of an activation, and shards it by the active rules.

    Args:
        x: any array.
        *axes: one logical name, or None, for each dimension.

    Returns:
        `x`; without an active mesh only the names and the rank are checked. A dimension is sharded over the first of
        its mesh axes that divide it, never padded.

    Raises:
        ValueError: for an unknown name or a wrong number of names, with or without a mesh.
    """
    sharding = activation_sharding(x.shape, axes)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def activation_sharding(shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding | None:
    """The sharding that `constrain` gives an array, or None without an active mesh.

    Args:
        shape: of the array.
        axes: one logical name, or None, for each dimension.

    Raises:
        ValueError: for an unknown name or a wrong number of names, with or without a mesh.
    """
    if len(axes) != len(shape):
        raise ValueError(f"constrain: {len(axes)} axis names {tuple(axes)} for an array of shape {tuple(shape)}.")
    for name in axes:
        if name is not None:
            _check_name(name)
    active = _active.get()
    if active is None:
        return None
    mesh, rules = active
    parts = [_dividing(mesh, _as_tuple(part), size) for part, size in zip(rules.spec(axes), shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*(part or None for part in parts)))


@contextlib.contextmanager
def use_groups(num_groups: int) -> Iterator[tuple[str, ...]]:
    """Shards groups of rows before the rows in them, while a function of one group is traced under `jax.vmap`.

    The mesh axes of ``batch`` go to ``group``, from the first on, as long as they divide the groups and shard no experts;
    the rest stay. So the rows of all groups together lie on the devices as a batch does.

    Yields:
        The mesh axes of the groups, for ``jax.vmap(..., spmd_axis_name=...)``.
    """
    active = _active.get()
    if active is None:
        yield ()
        return
    mesh, rules = active
    table = dict(rules.table)
    axes = _as_tuple(table.get("batch"))
    # Where experts are, a device has some of them for all groups.
    experts = _as_tuple(table.get("act_expert"))
    groups = _dividing(mesh, tuple(itertools.takewhile(lambda axis: axis not in experts, axes)), num_groups)
    table |= {"group": groups, "batch": axes[len(groups) :]}
    with use_mesh(mesh, Rules(tuple(table.items()))):
        yield groups


def is_sharded(axis: str) -> bool:
    """Whether the active rules shard a logical axis.

    Raises:
        ValueError: for an unknown name.
    """
    _check_name(axis)
    active = _active.get()
    return active is not None and active[1].spec((axis,))[0] is not None


def active_mesh() -> Mesh | None:
    """The mesh of the innermost `use_mesh`, if any."""
    active = _active.get()
    return None if active is None else active[0]


def active_axes(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes, larger than 1, over which the active rules shard a dimension of this size.

    Raises:
        ValueError: for an unknown name.
    """
    _check_name(axis)
    active = _active.get()
    if active is None:
        return ()
    mesh, rules = active
    axes = _dividing(mesh, _as_tuple(dict(rules.table).get(axis)), size)
    return tuple(name for name in axes if mesh.shape[name] > 1)


def named_sharding(axes: Sequence[str | None], mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, rules.spec(axes))


def tree_shardings(logical_axes: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """The shardings of a tree whose leaves are tuples of logical names (or None for a replicated leaf)."""
    return jax.tree.map(
        lambda axes: named_sharding(axes or (), mesh, rules), logical_axes, is_leaf=lambda x: x is None or is_axes(x)
    )


def is_axes(x: object) -> bool:
    """Whether `x` is a leaf of a tree of logical axes."""
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _dividing(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The first of these mesh axes whose sizes together divide a dimension."""
    shards = 1
    for number, axis in enumerate(axes):
        shards *= mesh.shape[axis]
        if size % shards:
            return axes[:number]
    return axes


def _check_name(name: str) -> None:
    if name not in LOGICAL_AXES:
        raise ValueError(
            f"unknown logical axis {name!r}{_nearest(name, LOGICAL_AXES)}. Known: {', '.join(LOGICAL_AXES)}."
        )


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
