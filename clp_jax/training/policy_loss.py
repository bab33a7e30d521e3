"""The loss of one policy-gradient update: experience in, a scalar to descend out."""

import dataclasses

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Metrics, Params, PRNGKeyArray
from clp_jax.models.conditioning import Conditioning
from clp_jax.models.language_model import routing_loss
from clp_jax.models.policy import Policy
from clp_jax.nn.routing_statistics import RoutingStatistics
from clp_jax.objectives.advantages import return_to_go, scalarize
from clp_jax.objectives.kl import per_token_kl
from clp_jax.objectives.policy_gradient import reinforce_loss
from clp_jax.partitioning import constrain, constrain_mixed
from clp_jax.sampling.rollouts import over_groups
from clp_jax.sampling.score import Forced, teacher_force
from clp_jax.training.estimators import AdvantageEstimator
from clp_jax.training.experience import Experience


@dataclasses.dataclass(frozen=True)
class PolicyGradientLoss:
    """REINFORCE on ``(1-α) w·r - α KL`` with per-token return to go (CLP, arXiv 2407.15762, section 4).

    Called as the learner calls every loss: ``(params, frozen, experience, key) -> (sum over rows, rows, metrics)``.

    Attributes:
        policy: the policy.
        conditioning: how the preference enters it.
        estimator: turns returns into advantages.
        num_samples: completions of each prompt.
        rows_per_group: consecutive rows that share a preference.
        objectives: the rewards' names, for the metrics.
    """

    policy: Policy
    conditioning: Conditioning
    estimator: AdvantageEstimator
    num_samples: int
    rows_per_group: int
    objectives: tuple[str, ...]

    def __call__(
        self, params: Params, frozen: Params, experience: Experience, key: PRNGKeyArray
    ) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
        """The summed loss of a batch of ``R`` rows, ``R``, and metrics.

        Args:
            params: ``{"policy": expanded parameters, "baseline": the estimator's}``.
            frozen: ``{"reference": the frozen reference's parameters}``.
            experience: the batch, or a slice of it when gradients are accumulated.
            key: unused; rollouts are scored without dropout, as they were sampled.
        """
        rollout = experience.rollout
        rows = rollout.tokens.shape[0]
        # Accumulation cuts batches into slices: of several whole groups, or each of one group.
        if rows % self.rows_per_group and self.rows_per_group % rows:
            raise ValueError(
                f"a slice of {rows} rows cuts groups of {self.rows_per_group} rows with one preference each: choose an "
                "accumulation that divides the groups, or each group."
            )
        num_groups = max(1, rows // self.rows_per_group)

        def one_group(inputs, preference, tokens, policy_params, reference) -> Forced:
            mixed = self.conditioning.mix(policy_params, reference, preference[0])
            model = self.policy.bind(constrain_mixed(mixed, self.policy.logical_axes()))
            conditioned = self.conditioning.condition_inputs(inputs, preference[:: self.num_samples])
            found = teacher_force(model, conditioned, tokens)
            # Stated before groups become rows of one batch, whose layout the compiler would else carry into the model.
            log_probs, hidden = constrain(found.log_probs, "batch", None), constrain(found.hidden, "batch", None, None)
            return dataclasses.replace(found, log_probs=log_probs, hidden=hidden)

        mapped = (rollout.inputs, rollout.preference, rollout.tokens)
        forced = over_groups(one_group, num_groups, mapped, params["policy"], frozen["reference"])
        log_probs, hidden = forced.log_probs, forced.hidden
        kl = per_token_kl(rollout.log_probs, rollout.reference_log_probs, rollout.mask)
        reward = scalarize(experience.rewards, rollout.preference.weights, rollout.preference.alpha)
        returns = return_to_go(reward, kl, rollout.preference.alpha, rollout.mask)
        advantages, baseline_loss, metrics = self.estimator(
            params["baseline"], hidden, rollout.preference, returns, rollout.mask, self.num_samples
        )
        policy_loss, policy_metrics = reinforce_loss(log_probs, advantages, rollout.mask)
        count = jnp.asarray(rows, jnp.float32)
        # Groups are as many as rows allow, each with the statistics of all layers.
        routing = [_layers_first(stack, num_groups).merged() for stack in forced.routing]
        auxiliary, routers = routing_loss(self.policy.config.moe, routing) if routing else (0.0, {})
        metrics = metrics | policy_metrics | routers | self._metrics(experience, kl, reward)
        return (policy_loss + auxiliary) * count + baseline_loss, count, metrics

    def _metrics(self, experience: Experience, kl: Array, reward: Array) -> Metrics:
        rollout = experience.rollout
        weights, alpha = rollout.preference.weights, rollout.preference.alpha
        whole = kl.sum(-1)
        named = {f"reward/{name}": experience.rewards[:, k].mean() for k, name in enumerate(self.objectives)}
        return named | {
            "reward/weighted": (experience.rewards * weights).sum(-1).mean(),
            "objective": (reward - alpha * whole).mean(),
            "kl": whole.mean(),
            "length": rollout.mask.sum(-1).mean(),
            "finished": jnp.isin(rollout.tokens, jnp.asarray(self.policy.config.eos_ids))
            .any(-1)
            .astype(jnp.float32)
            .mean(),
        }


def _layers_first(stack: RoutingStatistics, num_groups: int) -> RoutingStatistics:
    """Statistics of all layers for one group after another, as those of all groups for one layer after another."""
    return jax.tree.map(lambda leaf: leaf.reshape(num_groups, -1, *leaf.shape[1:]).swapaxes(0, 1), stack)
