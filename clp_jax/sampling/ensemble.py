"""Policies that decode together, behind one decoder; one alone is the smallest ensemble."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from clp_jax.array_types import Params
from clp_jax.models.policy import Policy
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.slots import SlotDecoder

# Makes one decoder of those of all policies.
Combination: TypeAlias = Callable[[tuple[SlotDecoder, ...]], SlotDecoder]


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Policies that share a vocabulary, padding and ends.

    Attributes:
        policies: their shapes; prompts are the first one's.
        combine: how their predictions become one, such as a `clp_jax.sampling.decoder_mixing.ProductDecoder`; by default
            the first policy's are taken.
    """

    policies: tuple[Policy, ...]
    combine: Combination = lambda decoders: decoders[0]

    @property
    def pad_id(self) -> int:
        """Fills prompts and completions behind their end."""
        return self.policies[0].config.pad_id

    def bind(self, params: tuple[Params, ...], int8: bool = False) -> SlotDecoder:
        """The decoder.

        Args:
            params: ordinary parameters of each policy.
            int8: whether keys and values are kept in eight bits.
        """
        pairs = zip(self.policies, params, strict=True)
        return self.combine(tuple(CachedDecoder(policy.bind(own), int8) for policy, own in pairs))
