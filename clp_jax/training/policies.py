"""Trained policies, rebuilt from their run directories alone, as things that can be steered."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Params
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.models.conditioning import Conditioning, ParameterConditioning, Unconditioned, stack_experts
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json
from clp_jax.preferences import kl_mixing_weight
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.sampling.steering import ConditionedPolicy, LogitMixture, PerWeight, Steerable
from clp_jax.training.checkpoints import CheckpointError, find_checkpoint, load_params
from clp_jax.training.clp import REFERENCE_DIRECTORY


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A trained policy.

    Attributes:
        run_dir: where it came from.
        policy: its shape.
        params: its parameters, expanded where it is conditioned.
        reference: the frozen reference's; its own for a supervised run.
        conditioning: how a preference enters.
        objectives: names of the rewards; none for a supervised run.
        statistics: of the rewards; None for a supervised run.
        vocabulary: its own.
        max_length: tokens of a completion in training; None for a supervised run.
    """

    run_dir: Path
    policy: Policy
    params: Params
    reference: Params
    conditioning: Conditioning
    objectives: tuple[str, ...]
    statistics: RewardStatistics | None
    vocabulary: Vocabulary
    max_length: int | None

    def steerable(self) -> ConditionedPolicy:
        """The policy, ready to generate at any preference."""
        return ConditionedPolicy(self.policy, self.conditioning, self.params, self.reference)


def load_policy(path: str | Path) -> LoadedPolicy:
    """Rebuilds a policy from a run directory, or from one checkpoint in it.

    Raises:
        CheckpointError: when there is no checkpoint, or it is not one of a policy.
    """
    checkpoint = find_checkpoint(path)
    run_dir = checkpoint.parent.parent
    params, description, _ = load_params(checkpoint)
    stage = description.get("stage")
    if stage not in ("supervised", "clp"):
        raise CheckpointError(f"{path} is a run of stage {stage!r}: expected a policy (supervised or clp).")
    policy = Policy(from_json(description["model"]))
    vocabulary = Vocabulary.load(run_dir)
    if vocabulary.fingerprint != description["vocabulary"]:
        raise CheckpointError(f"the vocabulary in {run_dir} is not the one the policy was trained with.")
    if stage == "supervised":
        return LoadedPolicy(run_dir, policy, params, params, Unconditioned(), (), None, vocabulary, None)
    reference, _, _ = load_params(run_dir / REFERENCE_DIRECTORY, expected=policy.abstract())
    return LoadedPolicy(
        run_dir=run_dir,
        policy=policy,
        params=params["policy"],
        reference=reference,
        conditioning=from_json(description["conditioning"]),
        objectives=tuple(description["rewards"]),
        statistics=RewardStatistics.load(run_dir),
        vocabulary=vocabulary,
        max_length=description["max_length"],
    )


def load_soup(paths: Sequence[str | Path]) -> LoadedPolicy:
    """Experts trained apart, one for each objective in order, as full conditioning (rewarded soups, arXiv 2306.04488)."""
    experts = _experts(paths)
    conditioning = ParameterConditioning("full", len(experts))
    params = stack_experts([expert.params for expert in experts])
    return dataclasses.replace(experts[0], params=params, conditioning=conditioning)


def load_logit_mixture(paths: Sequence[str | Path]) -> tuple[LoadedPolicy, LogitMixture]:
    """The same experts mixed token by token (MOD, arXiv 2406.18853)."""
    experts = _experts(paths)
    return experts[0], LogitMixture(experts[0].policy, stack_experts([expert.params for expert in experts]))


def load_realigned(path: str | Path, alpha_min: float, alpha: float) -> tuple[LoadedPolicy, Steerable]:
    """A tuned policy and its reference mixed token by token for another KL weight (DeRa, arXiv 2402.02992).

    Args:
        path: of an unconditioned run trained at `alpha_min`.
        alpha_min: its KL weight.
        alpha: the wanted one; the tuned policy's weight is ``λ(α)``.
    """
    tuned = load_policy(path)
    if not isinstance(tuned.conditioning, Unconditioned):
        raise CheckpointError(f"{path} is conditioned: realignment mixes the reference with an ordinary policy.")
    trained = kl_mixing_weight(alpha, alpha_min)
    coefficients = jnp.stack([1 - trained, trained])
    return tuned, Realigned(LogitMixture(tuned.policy, stack_experts([tuned.reference, tuned.params])), coefficients)


@dataclasses.dataclass(frozen=True, eq=False)
class Realigned:
    """A logit mixture whose coefficients do not depend on the weights.

    Attributes:
        mixture: of the reference and the tuned policy.
        coefficients: of the two.
    """

    mixture: LogitMixture
    coefficients: Any
    decode_calls_per_token: int = 2

    def generate(self, inputs: Any, preference: Any, key: Any, config: Any, num_samples: int = 1) -> Any:
        """See `clp_jax.sampling.steering.Steerable`."""
        fixed = dataclasses.replace(preference, weights=self.coefficients)
        return self.mixture.generate(inputs, fixed, key, config, num_samples)


def load_per_weight(paths: Sequence[str | Path], weights: Sequence[Sequence[float]]) -> tuple[LoadedPolicy, PerWeight]:
    """One policy for each weight: the oracle.

    Args:
        paths: runs, one for each row of `weights`.
        weights: what each was trained for.
    """
    if len(paths) != len(weights):
        raise ValueError(f"{len(paths)} runs for {len(weights)} weights: expected one for each.")
    policies = [load_policy(path) for path in paths]
    table = tuple(
        (tuple(float(x) for x in row), policy.params) for row, policy in zip(weights, policies, strict=True)
    )
    return policies[0], PerWeight(policies[0].policy, table)


def _experts(paths: Sequence[str | Path]) -> list[LoadedPolicy]:
    experts = [load_policy(path) for path in paths]
    first = experts[0]
    for path, expert in zip(paths, experts, strict=True):
        if not isinstance(expert.conditioning, Unconditioned):
            raise CheckpointError(f"{path} is conditioned: experts are ordinary policies.")
        if expert.policy.config != first.policy.config or expert.objectives != first.objectives:
            raise CheckpointError(f"{path} and {paths[0]} are of other models or rewards: they can't be mixed.")
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), expert.reference, first.reference)
        if not all(jax.tree.leaves(same)):
            raise CheckpointError(f"{path} and {paths[0]} started from other references: they can't be mixed.")
    if len(experts) != len(first.objectives):
        raise CheckpointError(f"{len(experts)} experts for {len(first.objectives)} objectives: {', '.join(first.objectives)}.")
    return experts
