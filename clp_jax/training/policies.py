"""Trained policies, rebuilt from their run directories alone, as things that can be steered."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Params
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.host_rows import place_active
from clp_jax.models.conditioning import (
    Conditioning,
    ParameterConditioning,
    Unconditioned,
    check_alpha,
    stack_experts,
)
from clp_jax.models.policy import Policy, check_parameters
from clp_jax.models.serialization import from_json
from clp_jax.partitioning import active_mesh
from clp_jax.preferences import Preference, validate_weights
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.protocol import RewardFunction
from clp_jax.rewards.stack import fingerprints, objective_names
from clp_jax.sampling.steering import ConditionedPolicy, LogitMixture, PerWeight
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.places import REFERENCE_DIRECTORY, local_files
from clp_jax.training.saved_params import find_checkpoint, load_params
from clp_jax.training.streamed_params import open_params
from clp_jax.training.train_state import full_axes

# Tokens of a prompt, where no training says.
PROMPT_LENGTH = 2**16


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A trained policy.

    Attributes:
        run_dir: where it lies; of one in a store, a view of its small files.
        step: updates it was trained for.
        policy: its shape.
        params: its parameters, expanded where it is conditioned.
        reference: the frozen reference's; its own for a supervised run.
        conditioning: how a preference enters.
        objectives: names of the rewards; none for a supervised run.
        statistics: of the rewards; None for a supervised run.
        vocabulary: its own.
        max_length: tokens of a completion in training; None for a supervised run.
        prompt_length: tokens of a prompt in training.
        reward_fingerprints: of the rewards it was trained with, by name.
        origin: the checkpoint of another framework it came from, as `clp convert` keeps it; empty for none.
        provenance: what it came from, one line each.
    """

    run_dir: Path
    step: int
    policy: Policy
    params: Params
    reference: Params
    conditioning: Conditioning
    objectives: tuple[str, ...]
    statistics: RewardStatistics | None
    vocabulary: Vocabulary | TokenIds
    max_length: int | None
    prompt_length: int
    reward_fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: tuple[str, ...] = ()

    @functools.cached_property
    def served(self) -> Policy:
        """See `Policy.served`."""
        return self.policy.served()

    def steerable(self) -> ConditionedPolicy:
        """The policy, ready to generate at any preference."""
        return ConditionedPolicy(self.served, self.conditioning, self.params, self.reference)

    def preference(self, weights: Sequence[float] | None, alpha: float) -> Preference:
        """The preference that a user asks of it.

        Args:
            weights: one for each reward, summing to one; None weighs all the same.
            alpha: KL weight.

        Raises:
            ValueError: when there are no rewards to weigh, or the numbers are not a preference of this policy.
        """
        names = self.objectives
        if weights is not None and not names:
            raise ValueError(f"{self.run_dir} has no rewards to weigh: leave weights out.")
        count = max(1, len(names))
        point = np.full(count, 1 / count, np.float32) if weights is None else validate_weights(weights, count, names)
        preference = Preference.of(point, alpha)
        check_alpha(self.conditioning, alpha)
        return preference


def load_policy(
    path: str | Path, load: Callable[[str | Path], tuple[Params, dict[str, Any], int]] | None = None
) -> LoadedPolicy:
    """Rebuilds a policy from a run directory, or from one checkpoint in it.

    Args:
        path: of the directory.
        load: reads a policy's parameters, description and step; `open_params` leaves the parameters in their files. By default
            they are read onto the default device, or inside `clp_jax.partitioning.use_mesh` each device's share onto it.

    Raises:
        CheckpointError: when there is no checkpoint, or it is not one of a policy.
    """
    run_dir = local_files(find_checkpoint(path).parent.parent)
    on_mesh = load is None and active_mesh() is not None
    load = load or (open_params if on_mesh else load_params)

    def placed(params: Params, axes: Params) -> Params:
        return place_active(params, full_axes(axes, params)) if on_mesh else params

    params, description, step = load(path)
    stage = description.get("stage")
    if stage not in ("supervised", "clp", "converted"):
        raise CheckpointError(f"{path} is a run of stage {stage!r}: expected a policy (supervised, clp or converted).")
    policy = Policy(from_json(description["model"]))
    vocabulary = _vocabulary(run_dir, description, policy)
    origin, provenance = description.get("origin", {}), tuple(description.get("provenance", ()))
    if stage != "clp":
        params = placed(params, policy.logical_axes())
        return LoadedPolicy(
            run_dir=run_dir,
            step=step,
            policy=policy,
            params=params,
            reference=params,
            conditioning=Unconditioned(),
            objectives=(),
            statistics=None,
            vocabulary=vocabulary,
            max_length=None,
            prompt_length=description.get("prompt_length", PROMPT_LENGTH),
            origin=origin,
            provenance=provenance,
        )
    reference, _, _ = load(run_dir / REFERENCE_DIRECTORY)
    try:
        check_parameters(policy.abstract(), reference)
    except ValueError as error:
        raise CheckpointError(f"{run_dir / REFERENCE_DIRECTORY}: {error}") from None
    conditioning = from_json(description["conditioning"])
    return LoadedPolicy(
        run_dir=run_dir,
        step=step,
        policy=policy,
        params=placed(params["policy"], conditioning.logical_axes(policy.logical_axes())),
        reference=placed(reference, policy.logical_axes()),
        conditioning=conditioning,
        objectives=tuple(description["rewards"]),
        statistics=RewardStatistics.load(run_dir),
        vocabulary=vocabulary,
        max_length=description["max_length"],
        prompt_length=description["prompt_length"],
        reward_fingerprints=description["reward_fingerprints"],
        origin=origin,
        provenance=provenance,
    )


def _vocabulary(run_dir: Path, description: Mapping[str, Any], policy: Policy) -> Vocabulary | TokenIds:
    if description["vocabulary"] is None:
        return TokenIds(policy.config.vocab_size, policy.config.pad_id, policy.config.eos_ids)
    vocabulary = Vocabulary.load(run_dir)
    if vocabulary.fingerprint != description["vocabulary"]:
        raise CheckpointError(f"the vocabulary in {run_dir} is not the one the policy was trained with.")
    return vocabulary


def check_rewards(path: str | Path, loaded: LoadedPolicy, rewards: Sequence[RewardFunction]) -> RewardStatistics:
    """The statistics of a run, if these are its rewards.

    Args:
        path: of the run, for messages.
        loaded: the run's policy.
        rewards: in the order of the run's.

    Raises:
        ValueError: for other rewards than the run's.
    """
    names = objective_names(rewards)
    if loaded.statistics is None or names != loaded.objectives:
        raise ValueError(
            f"{path} was trained for {', '.join(loaded.objectives) or 'no rewards (it is supervised)'}; "
            f"the rewards given are {', '.join(names)}: give the run's, in its order."
        )
    for reward, given in fingerprints(rewards).items():
        if given != loaded.reward_fingerprints[reward]:
            raise ValueError(
                f"{path} was trained with another reward {reward!r} than the one given (other settings, code or "
                "reward model of the same name): give the run's."
            )
    return loaded.statistics


def load_soup(paths: Sequence[str | Path]) -> LoadedPolicy:
    """Experts trained apart, one for each objective in order, as full conditioning (rewarded soups, arXiv 2306.04488)."""
    experts = _experts(paths)
    conditioning = ParameterConditioning("full", len(experts))
    params = stack_experts([expert.params for expert in experts])
    return dataclasses.replace(experts[0], params=params, conditioning=conditioning)


def load_logit_mixture(
    paths: Sequence[str | Path], alpha_min: float | None = None
) -> tuple[LoadedPolicy, LogitMixture]:
    """Experts mixed token by token (MOD), and with the reference too where `alpha_min` is given (DeRa).

    Args:
        paths: unconditioned runs, one for each objective in order; for DeRa also a single one, of any fixed weights.
        alpha_min: the KL weight they were trained with.
    """
    experts = _experts(paths, or_one=alpha_min is not None)
    params = [expert.params for expert in experts]
    if alpha_min is not None:
        params.append(experts[0].reference)
    return experts[0], LogitMixture(experts[0].served, stack_experts(params), alpha_min)


def load_per_weight(paths: Sequence[str | Path], weights: Sequence[Sequence[float]]) -> tuple[LoadedPolicy, PerWeight]:
    """One policy for each weight: the oracle.

    Args:
        paths: runs, one for each row of `weights`.
        weights: what each was trained for.
    """
    if len(paths) != len(weights):
        raise ValueError(f"{len(paths)} runs for {len(weights)} weights: expected one for each.")
    policies = [load_policy(path) for path in paths]
    for path, policy in zip(paths, policies, strict=True):
        if not isinstance(policy.conditioning, Unconditioned):
            raise CheckpointError(f"{path} is conditioned: one policy for each weight is an ordinary one.")
        _check_comparable(paths[0], policies[0], path, policy)
    table = tuple((tuple(float(x) for x in row), policy.params) for row, policy in zip(weights, policies, strict=True))
    return policies[0], PerWeight(policies[0].served, table)


def _experts(paths: Sequence[str | Path], or_one: bool = False) -> list[LoadedPolicy]:
    experts = [load_policy(path) for path in paths]
    first = experts[0]
    for path, expert in zip(paths, experts, strict=True):
        if not isinstance(expert.conditioning, Unconditioned):
            raise CheckpointError(f"{path} is conditioned: experts are ordinary policies.")
        _check_comparable(paths[0], first, path, expert)
    if len(experts) != len(first.objectives) and not (or_one and len(experts) == 1):
        raise CheckpointError(
            f"{len(experts)} experts for {len(first.objectives)} objectives: {', '.join(first.objectives)}."
        )
    return experts


def _check_comparable(first_path: str | Path, first: LoadedPolicy, path: str | Path, other: LoadedPolicy) -> None:
    """Checks that two runs are of one model, the same rewards and one reference."""
    if other.policy.config != first.policy.config or other.objectives != first.objectives:
        raise CheckpointError(f"{path} and {first_path} are of other models or rewards: they can't be combined.")
    if other.reward_fingerprints != first.reward_fingerprints:
        raise CheckpointError(
            f"{path} and {first_path} were trained with other rewards of the same names (settings, code or reward models "
            "differ): they can't be combined."
        )
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), other.reference, first.reference)
    if not all(jax.tree.leaves(same)):
        raise CheckpointError(f"{path} and {first_path} started from other references: they can't be combined.")
