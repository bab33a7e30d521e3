"""Mixing the predictions of several policies token by token: MOD (arXiv 2406.18853) and DeRa (arXiv 2402.02992).

    logits = Σ_m c_m log π_m

MOD mixes single-objective policies with the reward weights; DeRa mixes a reference and a tuned policy with
``(1-λ, λ)``. Both call ``M`` models for every token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, Params
from clp_jax.models.policy import Policy
from clp_jax.sampling.decoder import CachedDecoder


@dataclasses.dataclass(frozen=True)
class MixtureDecoder:
    """Decodes with ``M`` policies of one shape at once.

    Attributes:
        policy: their shape.
        params: their parameters, stacked: every leaf ``[M, ...]``.
        coefficients: ``float[M]``; a coefficient of exactly 0 takes its policy out, ``-inf`` logits included.
        weights: the policies' `loop_weights`; made here, before any loop.
    """

    policy: Policy
    params: Params
    coefficients: Float[Array, "M"]
    weights: Any = None

    def __post_init__(self):
        if self.weights is None:
            object.__setattr__(self, "weights", jax.vmap(lambda p: self.policy.bind(p).loop_weights())(self.params))

    @property
    def pad_id(self) -> int:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self.policy.config.pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self.policy.config.eos_ids

    def start(self, inputs: Int[Array, "B S"], max_length: int, num_samples: int) -> tuple[Int[Array, "R"], Any]:
        """One cache for each policy."""
        first, state = jax.vmap(lambda p: CachedDecoder(self.policy.bind(p)).start(inputs, max_length, num_samples))(
            self.params
        )
        return first[0], state

    def step(self, tokens: Int[Array, "R"], state: Any) -> tuple[Float[Array, "R V"], Any]:
        """The mixed logits, not normalised."""

        def one(params, weights, state):
            logits, state = CachedDecoder(self.policy.bind(params), weights=weights).step(tokens, state)
            return jax.nn.log_softmax(logits, axis=-1), state

        log_probs, state = jax.vmap(one)(self.params, self.weights, state)
        return mix_log_probs(log_probs, self.coefficients), state

    def select(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """See `clp_jax.sampling.decoder.Decoder`."""

        def one(params, weights, state):
            return CachedDecoder(self.policy.bind(params), weights=weights).select(state, rows)

        return jax.vmap(one)(self.params, self.weights, state)


def mix_log_probs(log_probs: Float[Array, "M *batch V"], coefficients: Float[Array, "M"]) -> Float[Array, "*batch V"]:
    """``Σ_m c_m log π_m``, terms with ``c_m = 0`` left out."""
    c = coefficients.reshape(-1, *[1] * (log_probs.ndim - 1))
    return jnp.sum(jnp.where(c == 0, 0.0, c * log_probs), axis=0)
