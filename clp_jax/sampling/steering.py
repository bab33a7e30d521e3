"""Anything that can be steered by a preference, behind one call compiled once for all preferences."""

import dataclasses
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, ArrayLike, Float, Int, Params, PRNGKeyArray
from clp_jax.models.conditioning import Conditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference, kl_mixing_weight
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import Completions, SamplingConfig, generate, row_keys
from clp_jax.sampling.logit_mixing import MixtureDecoder


@runtime_checkable
class Steerable(Protocol):
    """Generates completions at any preference."""

    @property
    def decode_calls_per_token(self) -> int:
        """Models called for every token."""

    def generate(
        self,
        inputs: Int[ArrayLike, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
        config: SamplingConfig,
        num_samples: int = 1,
    ) -> Completions:
        """Completions at one preference (no leading dimensions)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ConditionedPolicy:
    """A policy trained with conditioning; with full conditioning over experts trained apart, rewarded soups.

    Attributes:
        policy: its shape.
        conditioning: how the preference enters.
        params: its expanded parameters.
        reference: the frozen reference's parameters.
    """

    policy: Policy
    conditioning: Conditioning
    params: Params
    reference: Params
    decode_calls_per_token: int = 1

    @functools.cached_property
    def _mix(self):
        return jax.jit(self.conditioning.mix)

    def at(self, preference: Preference) -> Params:
        """The ordinary parameters at one preference (no leading dimensions), mixed once for many calls."""
        return self._mix(self.params, self.reference, preference)

    @functools.cached_property
    def _run(self):
        @functools.partial(jax.jit, static_argnames=("config", "num_samples"))
        def run(params, reference, inputs, preference, key, config, num_samples):
            model = self.policy.bind(self.conditioning.mix(params, reference, preference))
            rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (inputs.shape[0], *x.shape)), preference)
            inputs = self.conditioning.condition_inputs(inputs, rows)
            keys = row_keys(key, inputs.shape[0] * num_samples)
            return generate(CachedDecoder(model), inputs, keys=keys, config=config, num_samples=num_samples)

        return run

    def generate(
        self,
        inputs: Int[ArrayLike, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
        config: SamplingConfig,
        num_samples: int = 1,
    ) -> Completions:
        """See `Steerable`."""
        return self._run(self.params, self.reference, inputs, preference, key, config, num_samples)


@dataclasses.dataclass(frozen=True, eq=False)
class LogitMixture:
    """Policies mixed at decode time: MOD (arXiv 2406.18853) and decode-time realignment, DeRa (arXiv 2402.02992).

    Attributes:
        policy: the policies' shape.
        params: their parameters, stacked ``[M, ...]``: one expert for each objective, or one policy for all; where
            `alpha_min` is given, the reference comes last.
        alpha_min: the KL weight the experts were trained with. With it the mixture is realigned to the preference's own:
            experts weigh ``λ(α)`` together, the reference ``1-λ(α)``.
    """

    policy: Policy
    params: Params
    alpha_min: float | None = None

    @property
    def decode_calls_per_token(self) -> int:
        """One for each policy."""
        return jax.tree.leaves(self.params)[0].shape[0]

    def coefficients(self, preference: Preference) -> Float[Array, "M"]:
        """The policies' weights in the mixture, at one preference.

        Raises:
            ValueError: when there is neither one expert for each objective nor one for all.
        """
        num_experts = self.decode_calls_per_token - (self.alpha_min is not None)
        if num_experts not in (1, preference.num_objectives):
            raise ValueError(
                f"{num_experts} experts for {preference.num_objectives} objectives: expected one for each, or one for all."
            )
        experts = jnp.ones((1,)) if num_experts == 1 else preference.weights
        if self.alpha_min is None:
            return experts
        trained = kl_mixing_weight(preference.alpha, self.alpha_min)
        return jnp.concatenate([trained * experts, 1 - trained[None]])

    @functools.cached_property
    def _run(self):
        @functools.partial(jax.jit, static_argnames=("config", "num_samples"))
        def run(params, inputs, coefficients, key, config, num_samples):
            decoder = MixtureDecoder(self.policy, params, coefficients)
            keys = row_keys(key, inputs.shape[0] * num_samples)
            return generate(decoder, inputs, keys=keys, config=config, num_samples=num_samples)

        return run

    def generate(
        self,
        inputs: Int[ArrayLike, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
        config: SamplingConfig,
        num_samples: int = 1,
    ) -> Completions:
        """See `Steerable`."""
        return self._run(self.params, inputs, self.coefficients(preference), key, config, num_samples)


@dataclasses.dataclass(frozen=True, eq=False)
class PerWeight:
    """One policy for each of a few weights: the oracle that one steerable policy is compared with.

    Attributes:
        policy: the policies' shape.
        table: pairs of weights and parameters.
    """

    policy: Policy
    table: tuple[tuple[tuple[float, ...], Params], ...]
    decode_calls_per_token: int = 1

    @functools.cached_property
    def _run(self):
        @functools.partial(jax.jit, static_argnames=("config", "num_samples"))
        def run(params, inputs, key, config, num_samples):
            keys = row_keys(key, inputs.shape[0] * num_samples)
            decoder = CachedDecoder(self.policy.bind(params))
            return generate(decoder, inputs, keys=keys, config=config, num_samples=num_samples)

        return run

    def generate(
        self,
        inputs: Int[ArrayLike, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
        config: SamplingConfig,
        num_samples: int = 1,
    ) -> Completions:
        """See `Steerable`.

        Raises:
            ValueError: for weights without a policy.
        """
        return self._run(self._at(preference), inputs, key, config, num_samples)

    def _at(self, preference: Preference) -> Any:
        for weights, params in self.table:
            if jnp.allclose(jnp.asarray(weights), preference.weights, atol=1e-6):
                return params
        known = "; ".join(",".join(f"{x:g}" for x in weights) for weights, _ in self.table)
        asked = ",".join(f"{float(x):g}" for x in preference.weights)
        raise ValueError(f"no policy was trained at weights {asked}. There are policies at: {known}.")
