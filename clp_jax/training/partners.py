"""Other trained policies that decode together with one: mixed token by token, or as an amateur to contrast with."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from clp_jax.array_types import Params
from clp_jax.models.conditioning import PromptConditioning, Unconditioned
from clp_jax.preferences import Preference
from clp_jax.sampling.decoder_mixing import ContrastiveDecoder, ProductDecoder
from clp_jax.sampling.ensemble import Combination, Ensemble
from clp_jax.sampling.steering import ConditionedPolicy
from clp_jax.training.policies import LoadedPolicy, load_policy


@dataclasses.dataclass(frozen=True)
class Partners:
    """Who decodes along, as a user asks for it; nobody by default.

    Attributes:
        mix: run directories and their shares, as ``DIR=0.3,DIR=0.2``: every token has the weighted sum of the policies'
            log-probabilities (MOD, DeRa), `checkpoint` the share that is missing to 1. Negative shares lead away from a policy.
        amateur: run directory of a weaker policy: contrastive decoding takes what `checkpoint` likes better than it does.
        plausibility: with an amateur: tokens at least this fraction as probable as the most probable one are compared, in
            (0, 1]; 0.1 by default.
        amateur_strength: what the amateur's log-probabilities are multiplied with before they are taken off; 1 by default.
        amateur_temperature: the amateur's logits are divided by it; 1 by default.
    """

    mix: Mapping[str, float] | None = None
    amateur: str | None = None
    plausibility: float | None = None
    amateur_strength: float | None = None
    amateur_temperature: float | None = None

    def __post_init__(self):
        settings = {name: getattr(self, name) for name in ("plausibility", "amateur_strength", "amateur_temperature")}
        given = [name for name, value in settings.items() if value is not None]
        if self.mix and self.amateur is not None:
            raise ValueError("mix and amateur were given: expected one of them.")
        if given and self.amateur is None:
            raise ValueError(f"{given[0]} does nothing without an amateur: leave it out.")
        if not 0 < (1 if self.plausibility is None else self.plausibility) <= 1:
            raise ValueError(f"plausibility is {self.plausibility}: expected a number in (0, 1].")
        if not (self.amateur_strength or 0) >= 0:
            raise ValueError(f"amateur_strength is {self.amateur_strength}: expected 0 or more.")
        if not (1 if self.amateur_temperature is None else self.amateur_temperature) > 0:
            raise ValueError(f"amateur_temperature is {self.amateur_temperature}: expected a positive number.")
        if not all(math.isfinite(share) for share in (self.mix or {}).values()):
            raise ValueError(f"mix is {self.mix}: expected numbers.")

    def load(self, loaded: LoadedPolicy) -> "LoadedEnsemble":
        """Joins a policy.

        Raises:
            CheckpointError: where a directory has no policy.
            ValueError: for policies that can't decode together.
        """
        paths = [*(self.mix or {}), *([] if self.amateur is None else [self.amateur])]
        members = (loaded, *(load_policy(path) for path in paths))
        for path, member in zip(paths, members[1:], strict=True):
            _check_partner(loaded, path, member)
        return LoadedEnsemble(members, Ensemble(tuple(member.served for member in members), self._combination()))

    def _combination(self) -> Combination:
        if self.mix:
            shares = list(self.mix.values())
            return lambda decoders: ProductDecoder(decoders, jnp.asarray([1 - sum(shares), *shares], jnp.float32))
        if self.amateur is None:
            return lambda decoders: decoders[0]
        return lambda decoders: ContrastiveDecoder(
            decoders[0],
            decoders[1],
            plausibility=0.1 if self.plausibility is None else self.plausibility,
            strength=1.0 if self.amateur_strength is None else self.amateur_strength,
            amateur_temperature=self.amateur_temperature or 1.0,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedEnsemble:
    """Trained policies that decode together.

    Attributes:
        members: the policies, the one that is asked first.
        shape: of all.
    """

    members: tuple[LoadedPolicy, ...]
    shape: Ensemble

    @functools.cached_property
    def _steerables(self) -> tuple[ConditionedPolicy, ...]:
        return tuple(member.steerable() for member in self.members)

    def at(self, preference: Preference) -> tuple[Params, ...]:
        """The ordinary parameters of each at one preference (no leading dimensions)."""
        return tuple(steerable.at(preference) for steerable in self._steerables)


def _check_partner(loaded: LoadedPolicy, path: str, partner: LoadedPolicy) -> None:
    def alike(policy: LoadedPolicy) -> Sequence[object]:
        config = policy.policy.config
        own = getattr(policy.vocabulary, "fingerprint", None)
        return own, config.vocab_size, config.pad_id, tuple(config.eos_ids)

    if alike(loaded) != alike(partner):
        raise ValueError(
            f"{path} has another vocabulary than {loaded.run_dir}: policies that decode together share one."
        )
    steered_alike = (loaded.conditioning, loaded.objectives) == (partner.conditioning, partner.objectives)
    is_plain = isinstance(partner.conditioning, Unconditioned)
    if not steered_alike and (not is_plain or isinstance(loaded.conditioning, PromptConditioning)):
        raise ValueError(
            f"{path} is steered otherwise than {loaded.run_dir}: expected a policy of the same conditioning and rewards, "
            "or one that is not steered, whose prompts are the same."
        )
