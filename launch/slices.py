"""TPU slices: their names on Google Cloud, their shapes, hosts and zones.

Sources, of Google Cloud's documentation: A tpu/docs/v5e, v5p and v6e (accelerator types, topologies, machines, runtimes);
B tpu/docs/types-zones (zones, without those for single tenants); C kubernetes-engine/docs/concepts/plan-tpus (node labels).
Zones change: `--any_zone` accepts one that is not here.
"""

import dataclasses
import itertools
import math
import re

from clp_jax.launch.errors import LaunchError

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs.

    Attributes:
        name: as `clp compile` has it.
        accelerator: what a queued resource asks for: this and a number.
        units_per_chip: of that number: it counts cores or chips.
        runtime: version of the TPU VM's software.
        node_label: of GKE nodes, ``cloud.google.com/gke-tpu-accelerator``.
        shapes: slices that there are; those of three dimensions go on, in steps of 4.
        largest: chips along each dimension, where slices have three.
        zones: that have it.
    """

    name: str
    accelerator: str
    units_per_chip: int
    runtime: str
    node_label: str
    shapes: tuple[str, ...]
    largest: tuple[int, int, int] | None
    zones: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            accelerator="v5litepod",
            units_per_chip=1,
            runtime="v2-alpha-tpuv5-lite",
            node_label="tpu-v5-lite-podslice",
            shapes=_FLAT,
            largest=None,
            zones=("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a", "europe-west4-b"),
        ),
        Chip(
            name="v5p",
            accelerator="v5p",
            units_per_chip=2,
            runtime="v2-alpha-tpuv5",
            node_label="tpu-v5p-slice",
            shapes=("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
            largest=(16, 16, 24),
            zones=("us-central1-a", "us-east5-a", "europe-west4-b"),
        ),
        Chip(
            name="v6e",
            accelerator="v6e",
            units_per_chip=1,
            runtime="v2-alpha-tpuv6e",
            node_label="tpu-v6e-slice",
            shapes=_FLAT,
            largest=None,
            zones=("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a", "asia-northeast1-b"),
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of TPUs.

    Attributes:
        chip: what it is made of.
        shape: chips along each dimension.
    """

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Slice":
        """Reads ``"v5p:4x4x4"``: a generation, and chips along each dimension.

        Raises:
            LaunchError: for another form, an unknown generation, or a shape that it does not come in.
        """
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in CHIPS:
            raise LaunchError(
                f"--topology is {name!r}: expected a chip ({', '.join(CHIPS)}) and its numbers along each dimension, as in "
                "v5e:4x4 or v5p:4x4x4."
            )
        chip, shape = CHIPS[match[1]], tuple(int(size) for size in match[2].split("x"))
        if match[2] not in chip.shapes and not _is_large(chip, shape):
            more = "" if chip.largest is None else ", and multiples of 4 in rising order up to 16x16x24"
            raise LaunchError(f"--topology is {name!r}: {chip.name} comes as {', '.join(chip.shapes)}{more}.")
        return cls(chip, shape)

    @property
    def name(self) -> str:
        """What `parse` reads, and `clp compile --topology`."""
        return f"{self.chip.name}:{self.topology}"

    @property
    def topology(self) -> str:
        """The shape as Google Cloud writes it."""
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """Of each machine: 4, but for small slices in one."""
        return self.chips if self.chips in (1, 8) and self.chip.largest is None else 4

    @property
    def hosts(self) -> int:
        """How many machines."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """What a queued resource asks for; `gcloud` takes no topology of these chips."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.units_per_chip}"

    @property
    def is_default(self) -> bool:
        """Whether its number of chips gives this shape: the most compact one."""
        if self.chip.largest is None or self.topology in self.chip.shapes:
            return True
        sizes = [range(4, most + 1, 4) for most in self.chip.largest]
        shapes = [s for s in itertools.product(*sizes) if math.prod(s) == self.chips and list(s) == sorted(s)]
        return self.shape == min(shapes, key=lambda s: (max(s), s[1]))

    def check_zone(self, zone: str) -> None:
        """Raises `LaunchError` for a zone that is not known to have it."""
        if zone not in self.chip.zones:
            raise LaunchError(
                f"--zone is {zone!r}: {self.chip.name} is known to be in {', '.join(self.chip.zones)}; --any_zone takes yours "
                "all the same."
            )


def _is_large(chip: Chip, shape: tuple[int, ...]) -> bool:
    if chip.largest is None or len(shape) != 3:
        return False
    fits = all(size <= most for size, most in zip(shape, chip.largest, strict=True))
    return fits and all(size % 4 == 0 for size in shape) and list(shape) == sorted(shape)
