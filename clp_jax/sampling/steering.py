"""Anything that can be steered by a preference, behind one call compiled once for all preferences."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Int, Params, PRNGKeyArray
from clp_jax.models.conditioning import Conditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling.generate import CachedDecoder, Completions, SamplingConfig, generate, row_keys
from clp_jax.sampling.logit_mixing import MixtureDecoder


class Steerable(Protocol):
    """Generates completions at any preference."""

    decode_calls_per_token: int

    def generate(
        self,
        inputs: Int[Array, "B S"],
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
        inputs: Int[Array, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
        config: SamplingConfig,
        num_samples: int = 1,
    ) -> Completions:
        """See `Steerable`."""
        return self._run(self.params, self.reference, inputs, preference, key, config, num_samples)


@dataclasses.dataclass(frozen=True, eq=False)
class LogitMixture:
    """Policies mixed at decode time: MOD over single-objective experts.

    Attributes:
        policy: the policies' shape.
        params: their parameters, stacked ``[M, ...]``, one for each objective.
    """

    policy: Policy
    params: Params

    @property
    def decode_calls_per_token(self) -> int:
        """One for each policy."""
        return jax.tree.leaves(self.params)[0].shape[0]

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
        inputs: Int[Array, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
        config: SamplingConfig,
        num_samples: int = 1,
    ) -> Completions:
        """See `Steerable`; the weights are the coefficients."""
        return self._run(self.params, inputs, preference.weights, key, config, num_samples)


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
        inputs: Int[Array, "B S"],
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
