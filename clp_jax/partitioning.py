"""Where arrays live: the mesh, the logical axis names, and the table that maps one to the other.

Parameters and activations are annotated with logical names; a `Rules` table, one per layout, maps each name to mesh
axes. Nothing else in the project knows the mesh.
"""

import contextlib
import contextvars
import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clp_jax.array_types import Array, PyTree

# The more is said along an axis, the later it stands: `make_mesh` gives the last ones the shortest ways.
MESH_AXES = ("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor")

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
            out is replicated. Where ``layers`` has mesh axes, they are a pipeline's stages.
        microbatches: that pass through a pipeline; the others know none.

    Raises:
        ValueError: for an unknown logical name or mesh axis, a name given twice, or fewer than 1 micro-batch.
    """

    table: Sequence[tuple[str, str | tuple[str, ...] | None]] = (("batch", ("slice", "data", "fsdp")),)
    microbatches: int = 1

    def __post_init__(self):
        if self.microbatches < 1:
            raise ValueError(f"Rules: microbatches is {self.microbatches}: expected at least 1.")
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
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    num_devices: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    **other: int,
) -> Mesh:
    """Makes the mesh; every axis of `MESH_AXES` is there, of size 1 unless asked for.

    On TPUs axes lie along the torus, and ``slice`` alone crosses the data-centre network; the devices may be those of a
    topology that is only described.

    Args:
        data: data-parallel replicas; -1 takes the devices that the other axes leave.
        fsdp: shards of parameters and optimizer state over data-parallel replicas.
        tensor: tensor-parallel shards.
        num_devices: takes the first so many devices; None takes all.
        devices: all devices by default, or those of `use_devices`.
        **other: sizes of the other mesh axes, by name.

    Raises:
        ValueError: for an unknown axis, or sizes that do not fit the devices or their slices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in other.items():
        if name not in sizes:
            raise ValueError(f"make_mesh: unknown axis {name!r}{_nearest(name, MESH_AXES)}.")
        sizes[name] = size
    given = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"make_mesh({given}): {name} is {size}: expected at least 1, or -1 for what is left.")
    devices = list((_devices.get() or jax.devices()) if devices is None else devices)
    if num_devices is not None:
        if not 1 <= num_devices <= len(devices):
            raise ValueError(f"make_mesh: num_devices is {num_devices}: expected 1 to {len(devices)}, as there are.")
        devices = devices[:num_devices]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(f"make_mesh({given}): the sizes must multiply to the {len(devices)} devices (one may be -1).")
    if free:
        sizes[free[0]] = len(devices) // fixed
    return Mesh(_arranged(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> np.ndarray:
    """The devices as an array of the mesh's shape, neighbours on an axis near each other."""
    shape = tuple(sizes[name] for name in MESH_AXES)
    if devices[0].platform != "tpu":
        # Processes hold consecutive devices: with the largest strides first, those of one are neighbours on later axes.
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes["slice"] != slices:
        raise ValueError(
            f"make_mesh: slice is {sizes['slice']}, and the devices belong to {slices} slices: expected slice={slices}."
        )

    def arrange(split: bool) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
        within = tuple(1 if name == "slice" else sizes[name] for name in MESH_AXES)
        between = tuple(slices if name == "slice" else 1 for name in MESH_AXES)
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=split)

    try:
        return arrange(False)
    except NotImplementedError:  # An axis of the mesh is no product of whole axes of the torus.
        return arrange(True)


_devices: contextvars.ContextVar[Sequence[Any] | None] = contextvars.ContextVar("clp_jax_devices", default=None)


@contextlib.contextmanager
def use_devices(devices: Sequence[Any]) -> Iterator[None]:
    """Makes meshes of these devices inside the context: those of another machine, to compile for it, or stand-ins."""
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


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """Leaves everything where it is inside the context, for what one device computes alone."""
    token = _active.set(None)
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


def constrain_tree(tree: PyTree, logical_axes: PyTree) -> PyTree:
    """`constrain` of every array in a tree.

    Args:
        tree: arrays.
        logical_axes: a tree as `tree`, with a tuple of names for each leaf.
    """
    return jax.tree.map(lambda axes, x: constrain(x, *axes), logical_axes, tree, is_leaf=is_axes)


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
    return named_sharding(axes, *active, shape=shape)


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
    with use_mesh(mesh, dataclasses.replace(rules, table=tuple(table.items()))):
        yield groups


def constrain_mixed(params: PyTree, logical_axes: PyTree) -> PyTree:
    """`constrain_tree` of what was mixed for one group, inside `use_groups`.

    Unless it is stated, the compiler may mix each group's on a part of the devices, and gather all of them after that. What is
    sharded over the groups' own mesh axes stays as it is: there a device needs the whole of one group's, a layer at a time.

    Args:
        params: arrays of one group.
        logical_axes: a tree as `params`, with a tuple of names for each leaf.
    """
    active = _active.get()
    if active is None:
        return params
    mesh, rules = active
    table = dict(rules.table)
    taken = {axis for axis in _as_tuple(table.get("group")) if mesh.shape[axis] > 1}

    def one(axes: AxisNames, x: Array) -> Array:
        own = {axis for name in axes if name is not None for axis in _as_tuple(table.get(name))}
        return x if own & taken else constrain(x, *axes)

    return jax.tree.map(one, logical_axes, params, is_leaf=is_axes)


def over_rows(function: Callable[[Array], PyTree], x: Array) -> PyTree:
    """A function of rows, applied by each device to its own.

    The compiler can't split every operation by rows: it would gather those of `jax.lax.top_k` on all devices.

    Args:
        function: of arrays with any number of rows, to arrays of as many.
        x: ``[B, ...]``.

    Returns:
        ``function(x)``; just that, without an active mesh whose ``batch`` divides the rows.
    """
    active = _active.get()
    axes = () if active is None else active_axes("batch", x.shape[0])
    if active is None or not axes:
        return function(x)
    rows = PartitionSpec(axes)
    return jax.shard_map(function, mesh=active[0], in_specs=rows, out_specs=rows, check_vma=False)(x)


@contextlib.contextmanager
def use_rules(rules: Rules | None) -> Iterator[None]:
    """Puts other rules on the active mesh; None, or no active mesh, leaves everything as it is."""
    active = _active.get()
    if active is None or rules is None:
        yield
        return
    with use_mesh(active[0], rules):
        yield


def active_rules() -> Rules | None:
    """The rules of the innermost `use_mesh`, if any."""
    active = _active.get()
    return None if active is None else active[1]


def active_pipeline() -> tuple[tuple[str, ...], int, int] | None:
    """The mesh axes of a pipeline's stages, how many stages, and how many micro-batches; None without stages."""
    active = _active.get()
    if active is None:
        return None
    mesh, rules = active
    axes = tuple(name for name in _as_tuple(dict(rules.table).get("layers")) if mesh.shape[name] > 1)
    return (axes, math.prod(mesh.shape[name] for name in axes), rules.microbatches) if axes else None


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


def active_sizes(axis: str) -> tuple[int, ...]:
    """Sizes of all mesh axes that the active rules give a logical axis; none without an active mesh.

    Raises:
        ValueError: for an unknown name.
    """
    _check_name(axis)
    active = _active.get()
    if active is None:
        return ()
    mesh, rules = active
    return tuple(mesh.shape[name] for name in _as_tuple(dict(rules.table).get(axis)))


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


def named_sharding(
    axes: Sequence[str | None], mesh: Mesh, rules: Rules, shape: Sequence[int] | None = None
) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Args:
        axes: one logical name, or None, for each dimension.
        mesh: the devices.
        rules: the table.
        shape: of the array; a dimension is then sharded over the first of its mesh axes that divide it, never padded.
    """
    spec = rules.spec(axes)
    if shape is not None:
        parts = [_dividing(mesh, _as_tuple(part), size) for part, size in zip(spec, shape, strict=True)]
        spec = PartitionSpec(*((part[0] if len(part) == 1 else part) if part else None for part in parts))
    return NamedSharding(mesh, spec)


def tree_shardings(logical_axes: PyTree, mesh: Mesh, rules: Rules, arrays: PyTree = None) -> PyTree:
    """The shardings of a tree whose leaves are tuples of logical names (or None for a replicated leaf).

    Args:
        logical_axes: the names.
        mesh: the devices.
        rules: the table.
        arrays: a tree with the same leaves, of arrays or shapes; what does not divide is then not sharded.
    """

    def one(axes: AxisNames | None, array: Any = None) -> NamedSharding:
        return named_sharding(axes or (), mesh, rules, None if array is None or axes is None else array.shape)

    trees = (logical_axes,) if arrays is None else (logical_axes, arrays)
    return jax.tree.map(one, *trees, is_leaf=lambda x: x is None or is_axes(x))


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
