"""Slices of TPUs by name, and their devices, on a machine that has none."""

import dataclasses
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from clp_jax.compilation import libtpu
from clp_jax.compilation.chips import CHIPS, Chip

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class StandIn:
    """What a mesh needs of a device, where there is no compiler that has it.

    Attributes:
        id: its number.
        platform: of none.
        process_index: of its host.
    """

    id: int
    platform: str = "none"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices that a program runs on.

    Attributes:
        chip: what they are made of.
        shape: chips along each dimension of one slice.
        num_slices: slices, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @classmethod
    def parse(cls, name: str, num_slices: int = 1) -> "Topology":
        """Reads ``"v5p:4x4x4"``: the chip, and chips along each dimension of a slice.

        Raises:
            ValueError: for another form, an unknown chip, or a wrong number of dimensions.
        """
        match = _NAME.fullmatch(name)
        if match is None or match[1] not in CHIPS:
            raise ValueError(
                f"topology is {name!r}: expected a chip ({', '.join(CHIPS)}) and its numbers along each dimension, as in "
                "v5e:16x16 or v5p:4x4x8."
            )
        chip, shape = CHIPS[match[1]], tuple(int(size) for size in match[2].split("x"))
        if len(shape) != chip.torus_rank:
            raise ValueError(f"topology is {name!r}: slices of {chip.name} have {chip.torus_rank} dimensions.")
        if num_slices < 1:
            raise ValueError(f"num_slices is {num_slices}: expected at least 1.")
        return cls(chip, shape, num_slices)

    @property
    def name(self) -> str:
        """What `parse` reads."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.num_slices

    def stand_ins(self) -> list[StandIn]:
        """As many as there are devices: whether a mesh divides them needs no compiler."""
        return [StandIn(number) for number in range(self.chips)]

    def devices(self) -> list[jax.Device]:
        """Devices to compile for; they hold no arrays and run nothing. On v5p one is both cores of a chip.

        Raises:
            ValueError: where libtpu is not installed, or does not know the topology.
        """
        if not has_compiler():
            raise ValueError("compiling for TPUs needs libtpu's compiler: pip install 'clp-jax[aot]'.")
        libtpu.settle()
        slices = {"num_slices": self.num_slices} if self.num_slices > 1 else {}
        try:
            return list(topologies.get_topology_desc(self.name, "tpu", **slices).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"libtpu does not know the topology {self.name}: {str(error).splitlines()[0]}") from error


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None
