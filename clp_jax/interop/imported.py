"""What reading a foreign checkpoint gives."""

import dataclasses
from typing import Any, TypeVar

from clp_jax.array_types import Params
from clp_jax.interop.links import loaded
from clp_jax.models.config import ModelConfig

Opened = TypeVar("Opened", bound="Imported")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """A checkpoint that was opened.

    Attributes:
        config: of the policy.
        params: lazy arrays (`clp_jax.interop.arrays.LazyArray`), or numpy arrays.
        origin: what the policy came from, plain JSON; ``format`` says whose checkpoint it was.
        left_out: names of what the checkpoint holds beyond the policy.
    """

    config: ModelConfig
    params: Params
    origin: dict[str, Any]
    left_out: tuple[str, ...] = ()

    def loaded(self: Opened) -> Opened:
        """The same with its parameters as numpy arrays, read one tensor at a time."""
        return dataclasses.replace(self, params=loaded(self.params))
