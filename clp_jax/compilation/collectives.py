"""What devices tell each other: which mesh axes a collective spans, the bytes it moves, and how long its links need.

What leaves a slice libtpu leaves to the hosts (``xla_megascale_runtime``): in place of a collective there are a ``send`` and a
``recv``, whose attributes say what is made of it on the way.

Rings of ``n`` devices (arXiv 2206.03382, section 3.1): a gather or a scatter moves ``(n-1)/n`` of the whole array past every
device, a reduction to all is a scatter and a gather, and what goes from each to each passes a quarter of the ring on average.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from clp_jax.compilation.chips import Chip
from clp_jax.compilation.hlo import Instruction, array_shapes, balanced, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

# What the hosts do, and what that is called otherwise.
_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')

_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(\[?([\d,<=\[\]T()]*?)\]?\))? ?\{([^}]*)\}")
_SIZED = re.compile(r"'([^']+)'=(\d+)")
_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the devices of a mesh stand.

    Attributes:
        axes: names of the mesh axes.
        sizes: of the axes.
        places: for each device, in the order of the mesh: its slice, then its coordinates in the torus.
        torus: chips along each dimension of a slice.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    places: np.ndarray
    torus: tuple[int, ...]

    def spanned(self, group: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ."""
        indices = np.stack(np.unravel_index(np.asarray(group), self.sizes))
        return tuple(axis for axis, row in zip(self.axes, indices, strict=True) if len(set(row.tolist())) > 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
        kind: one of `KINDS`.
        bytes: of the whole array, on one device: gathered, reduced, before it is scattered, or exchanged.
        axes: the mesh axes it spans.
        seconds: that its links need.
        dcn: whether it leaves a slice.
    """

    kind: str
    bytes: float
    axes: tuple[str, ...]
    seconds: float
    dcn: bool


def kind_of(opcode: str) -> str | None:
    """The kind of collective that an opcode is or starts, if it does."""
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def collective(instruction: Instruction, operand_bytes: float, layout: Layout, chip: Chip) -> Collective:
    """Reads an instruction whose opcode `kind_of` knows.

    Args:
        instruction: of HLO.
        operand_bytes: of what it reads.
        layout: of the devices.
        chip: what they are.
    """
    kind = kind_of(instruction.opcode)
    assert kind is not None
    if kind == "all-gather":
        # A start gives its operands as well.
        parts = array_shapes(instruction.shape)
        size = instruction.bytes - (operand_bytes if instruction.opcode.endswith("-start") and len(parts) > 1 else 0)
    else:
        size = operand_bytes
    groups = pairs(instruction) if kind == "collective-permute" else replica_groups(instruction, len(layout.places))
    if kind == "collective-permute":
        moved = [pair for pair in groups if pair[0] != pair[1]]
        axes = tuple(dict.fromkeys(axis for pair in moved for axis in layout.spanned(pair)))
        seconds, dcn = _permute_seconds(size, moved, layout, chip)
        return Collective(kind, size, axes, seconds, dcn)
    group = max(groups, key=len)
    seconds, dcn = _seconds(kind, size, group, layout, chip)
    return Collective(kind, size, layout.spanned(group), seconds, dcn)


def rendezvous(instruction: Instruction) -> str | None:
    """The name that a send and its receive share, where hosts take them to other slices."""
    if instruction.opcode not in ("send", "recv") or _TRANSFER.search(instruction.attributes) is None:
        return None
    name = _RENDEZVOUS.search(instruction.attributes)
    return None if name is None else name[1]


def between_slices(send: Instruction, recv: Instruction, layout: Layout, chip: Chip) -> Collective:
    """Reads a send and a receive of one `rendezvous`: each device exchanges with those in its place in other slices.

    Raises:
        ValueError: for a kind of exchange that is not known here.
    """
    match = _TRANSFER.search(send.attributes)
    kind = _BETWEEN_SLICES.get(match[1]) if match else None
    if kind is None:
        raise ValueError(
            f"{send.name} takes {match and match[1]} to other slices: expected {', '.join(_BETWEEN_SLICES)}."
        )
    sent, received = (array_bytes(line.shape) for line in (send, recv))
    size = received if kind == "all-gather" else sent
    group = [i for i, place in enumerate(layout.places) if (place[1:] == layout.places[0][1:]).all()]
    seconds = (
        size / chip.dcn_bandwidth if kind == "collective-permute" else _seconds(kind, size, group, layout, chip)[0]
    )
    return Collective(kind, size, layout.spanned(group), seconds, True)


def array_bytes(shape: str) -> float:
    """Bytes of the first array in the text of a shape."""
    kind, dims = array_shapes(shape)[0]
    return shape_bytes(f"{kind}[{','.join(map(str, dims))}]")


def replica_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Groups of devices, by their place in the mesh; all in one where the text gives none."""
    if match := _IOTA.search(instruction.attributes):
        groups, dims = ([int(n) for n in text.split(",")] for text in match.groups()[:2])
        order = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            order = order.transpose([int(n) for n in match[3].split(",")])
        return order.reshape(groups[0], -1).tolist()
    if match := _MESH.search(instruction.attributes):
        return _mesh_groups({name: int(size) for name, size in _SIZED.findall(match[1])}, match[3])
    return _listed(instruction, "replica_groups=") or [list(range(devices))]


def _mesh_groups(sizes: dict[str, int], spanned: str) -> list[list[int]]:
    """Groups along axes of a mesh of the compiler's own, or along a part of an axis: ``'axis':(before)size``."""
    dims: list[int] = []
    chosen: list[bool] = []
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _PART.findall(spanned)}
    for name, whole in sizes.items():
        before, size = parts.get(name, (whole, 1))
        dims += [before, size, whole // before // size]
        chosen += [False, name in parts, False]
    order = np.arange(math.prod(dims)).reshape(dims)
    last = [i for i, mine in enumerate(chosen) if mine]
    order = order.transpose([i for i, mine in enumerate(chosen) if not mine] + last)
    return order.reshape(-1, math.prod(dims[i] for i in last)).tolist()


def pairs(instruction: Instruction) -> list[list[int]]:
    """Sources and targets of a permutation."""
    return _listed(instruction, "source_target_pairs=")


def _listed(instruction: Instruction, label: str) -> list[list[int]]:
    text = balanced(instruction.attributes, label)
    if text is None:
        return []
    return [[int(n) for n in group.split(",") if n.strip()] for group in re.findall(r"\{([\d,\s]+)\}", text)]


def _seconds(kind: str, size: float, group: Sequence[int], layout: Layout, chip: Chip) -> tuple[float, bool]:
    """Time on the links, and whether the data-centre network is among them."""
    count = len(group)
    if count < 2:
        return 0.0, False
    places = layout.places[np.asarray(group)]
    slices = len(set(places[:, 0].tolist()))
    local = count // slices
    # A gather and a scatter for a reduction to all.
    times = 2 if kind == "all-reduce" else 1
    # The devices of a slice in the group share what comes through the network.
    outside = times * size * (slices - 1) / slices / local / chip.dcn_bandwidth
    if local < 2:
        return outside, slices > 1
    one = places[places[:, 0] == places[0, 0]][:, 1:]
    extents = one.max(axis=0) - one.min(axis=0) + 1
    spans = [i for i, extent in enumerate(extents) if extent > 1]
    rings = [layout.torus[i] == extents[i] and layout.torus[i] >= chip.wraps for i in spans]
    if math.prod(extents.tolist()) != local:
        spans, rings = spans[:1], [False]  # Scattered devices: as bad as one line.
    if kind == "all-to-all":
        # Half of a line crosses its middle; a ring has two middles and two ways.
        ways = [extents[i] / (8 if ring else 4) for i, ring in zip(spans, rings, strict=True)]
        inside = size * max(ways) / chip.link_bandwidth
    else:
        # Over several slices each device first gathers, or reduces, what its own slice has.
        links = sum(2 if ring else 1 for ring in rings)
        inside = times * size * (local - 1) / local / (links * chip.link_bandwidth)
    return inside + outside, slices > 1


def _permute_seconds(size: float, moved: Sequence[Sequence[int]], layout: Layout, chip: Chip) -> tuple[float, bool]:
    """Time of the longest way, each step a link; both directions of a ring serve one way."""
    if not moved:
        return 0.0, False
    places = layout.places[np.asarray(moved)]
    steps = np.abs(places[:, 0, 1:] - places[:, 1, 1:])
    torus = np.asarray(layout.torus)
    around = np.where(torus >= chip.wraps, np.minimum(steps, torus - steps), steps)
    outside = bool((places[:, 0, 0] != places[:, 1, 0]).any())
    if outside:
        return size / chip.dcn_bandwidth, True
    return size * max(1, int(around.sum(axis=1).max())) / chip.link_bandwidth, False
