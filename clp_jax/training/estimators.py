"""Advantage estimators of the policy gradient: what a completion's return is compared with."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Metrics, Params, PRNGKeyArray
from clp_jax.models.heads import ValueHeadConfig
from clp_jax.models.policy import Policy
from clp_jax.objectives.advantages import leave_one_out
from clp_jax.objectives.masking import masked_mean
from clp_jax.objectives.policy_gradient import value_loss
from clp_jax.preferences import Preference


@runtime_checkable
class AdvantageEstimator(Protocol):
    """Compares returns with a baseline that may have parameters and a loss of its own."""

    def init(self, key: PRNGKeyArray, embed_dim: int, num_objectives: int) -> Params:
        """The baseline's own parameters, an empty tree where it has none."""

    def __call__(
        self,
        params: Params,
        hidden: Float[Array, "R T D"],
        preference: Preference,
        returns: Float[Array, "R T"],
        mask: Float[Array, "R T"],
        num_samples: int,
    ) -> tuple[Float[Array, "R T"], Float[Array, ""], Metrics]:
        """Advantages (no gradient flows through them), the baseline's loss summed over rows, and metrics."""


@dataclasses.dataclass(frozen=True)
class ValueBaseline:
    """A learned value ``V(x, y_<s, w, α)``, regressed on the return to go.

    It reads the policy's own decoder states (no gradient flows back into the policy) and the preference.

    Attributes:
        hidden_dim: width of its hidden layer.
        output_scale: its output is multiplied by this. A baseline starts from nothing and must follow the policy, which
            moves little: with Adam or Adafactor, whose steps do not depend on the gradient's size, the factor acts as
            a learning rate that many times the policy's.
        centred: subtract from each row what the value missed on average on the batch's other rows of the same preference.
            Preferences change from batch to batch and returns with them; the value follows late, and what it misses is
            the same for all rows. The other rows do not depend on the row's own tokens, so nothing is biased.
    """

    hidden_dim: int = 128
    output_scale: float = 10.0
    centred: bool = True

    def __post_init__(self):
        if self.hidden_dim < 1 or self.output_scale <= 0:
            raise ValueError(
                f"ValueBaseline(hidden_dim={self.hidden_dim}, output_scale={self.output_scale}): expected positive numbers."
            )

    def init(self, key: PRNGKeyArray, embed_dim: int, num_objectives: int) -> Params:
        """The value head's parameters."""
        return self._head(embed_dim, num_objectives).init(key)

    def __call__(
        self,
        params: Params,
        hidden: Float[Array, "R T D"],
        preference: Preference,
        returns: Float[Array, "R T"],
        mask: Float[Array, "R T"],
        num_samples: int,
    ) -> tuple[Float[Array, "R T"], Float[Array, ""], Metrics]:
        """See `AdvantageEstimator`."""
        features = jnp.concatenate([preference.weights, preference.alpha[:, None]], axis=-1)
        head = self._head(hidden.shape[-1], preference.num_objectives).bind(params)
        values = head(jax.lax.stop_gradient(hidden), features) * self.output_scale
        error = value_loss(values, returns, mask)
        variance = masked_mean(jnp.square(returns - masked_mean(returns, mask)), mask)
        explained = 1 - masked_mean(jnp.square(returns - values), mask) / jnp.maximum(variance, 1e-8)
        missed = jax.lax.stop_gradient(returns - values)
        if self.centred:
            missed = missed - others_mean(masked_mean(missed, mask, axis=-1), preference)[:, None]
        metrics = {"value_loss": error, "value_explained_variance": explained}
        return missed * mask, error * hidden.shape[0], metrics

    def _head(self, embed_dim: int, num_objectives: int) -> Policy:
        features = num_objectives + 1  # The weights and the KL weight.
        return Policy(ValueHeadConfig(embed_dim=embed_dim, num_features=features, hidden_dim=self.hidden_dim))


def others_mean(values: Float[Array, "R"], preference: Preference) -> Float[Array, "R"]:
    """The mean over the other rows of the same preference; 0 for a row that is alone with its own.

    Args:
        values: one number a row.
        preference: of each row.
    """
    asked = jnp.concatenate([preference.weights, preference.alpha[:, None]], axis=-1)
    same = jnp.all(asked[:, None] == asked[None, :], axis=-1) & ~jnp.eye(len(values), dtype=bool)
    return masked_mean(jnp.broadcast_to(values[None, :], same.shape), same.astype(jnp.float32), axis=-1)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """The mean return of the prompt's other completions; needs several samples of each prompt."""

    def init(self, key: PRNGKeyArray, embed_dim: int, num_objectives: int) -> Params:
        """No parameters."""
        return {}

    def __call__(
        self,
        params: Params,
        hidden: Float[Array, "R T D"],
        preference: Preference,
        returns: Float[Array, "R T"],
        mask: Float[Array, "R T"],
        num_samples: int,
    ) -> tuple[Float[Array, "R T"], Float[Array, ""], Metrics]:
        """See `AdvantageEstimator`; the baseline is the mean whole-sequence return of the other samples."""
        if num_samples < 2:
            raise ValueError(
                f"LeaveOneOut compares samples of one prompt: num_samples is {num_samples}, expected >= 2."
            )
        whole = returns[:, 0].reshape(-1, num_samples)
        baseline = (whole - leave_one_out(whole)).reshape(-1, 1)
        advantages = jax.lax.stop_gradient(returns - baseline) * mask
        return advantages, jnp.zeros(()), {}
