"""The multi-objective reinforcement learning stage: Conditional Language Policy, and the baselines it is compared with.

Rewarded soups, one policy per weight and prompt conditioning are this stage with another conditioning or preference
sampler; nothing else differs between them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import processes
from clp_jax.array_types import Params, PRNGKeyArray, stand_in
from clp_jax.data.manifest import Manifest
from clp_jax.data.reader import DataSource, prompt_batch
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.host_rows import HostRows, place_active, row_indices
from clp_jax.models.conditioning import (
    Conditioning,
    ParameterConditioning,
    PromptConditioning,
    Unconditioned,
    check_alpha,
)
from clp_jax.models.config import T5Config
from clp_jax.models.flops import Sizes, forward_flops, prompt_flops, training_flops
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json, to_json
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice
from clp_jax.partitioning import Rules, constrain
from clp_jax.preferences import AlphaRange
from clp_jax.rewards.learned import LearnedReward
from clp_jax.rewards.normalisation import FILE_NAME as STATISTICS_FILE
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.protocol import RewardFunction
from clp_jax.rewards.stack import RewardStack, fingerprints, objective_names
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.rollouts import RolloutWorker
from clp_jax.training.estimators import AdvantageEstimator, LeaveOneOut, ValueBaseline
from clp_jax.training.experience import (
    ChunkRollout,
    Experience,
    ExperienceSource,
    PreferenceSampler,
    chunk_rows,
    reward_inputs,
)
from clp_jax.training.places import REFERENCE_DIRECTORY, as_path
from clp_jax.training.policy_loss import PolicyGradientLoss
from clp_jax.training.saved_params import save_params
from clp_jax.training.stage import DataShape, Derived, Outline, Program, StageSetup, inherited
from clp_jax.training.streamed_params import open_params
from clp_jax.training.transfer import Plan, Transfer

# To a trained policy: the value baseline, which is of all rewards together, is learned anew.
ADD_COMPONENTS = Transfer({"baseline/.*": None}, init=("baseline/.*",), grow=("policy/.*",))
_STATISTICS_KEY = 2**31  # Tells the statistics' samples from those of the steps.


@dataclasses.dataclass(frozen=True)
class ConditionalPolicy:
    """Trains one policy for every preference a sampler draws.

    Attributes:
        initial_checkpoint: run directory of the supervised policy: where every component starts, and the frozen reference.
        initial_policy: a run of this stage whose components it starts from; its rewards are the first of `rewards`, and those
            that are new get components of their own. None starts every component from the supervised policy.
        transfer: which parameters of the initial policy go where.
        data_dir: prepared prompts and reference completions.
        rewards: reward functions; ``K`` is the number of their names.
        preferences: sampler of ``K`` weights and a KL weight; drawn once for each group of prompts.
        conditioning: how the preference enters the policy.
        estimator: what returns are compared with.
        batch_size: prompts in a batch.
        num_samples: completions of each prompt.
        num_groups: preferences in a batch; 1 is the paper's.
        num_chunks: parts a batch is rolled out in, so that the host scores one while the device generates the next.
        max_length: tokens of a completion at most.
        rollout_rules: where arrays live while completions are sampled, on the same mesh; None samples where training is.
        statistics_prompts: prompts the reference answers to fix the rewards' mean and standard deviation.
    """

    initial_checkpoint: str
    data_dir: str
    rewards: Sequence[RewardFunction]
    preferences: PreferenceSampler
    conditioning: "Conditioning | WrittenPreference" = Unconditioned()
    estimator: AdvantageEstimator = ValueBaseline()
    batch_size: int = 64
    num_samples: int = 1
    num_groups: int = 1
    num_chunks: int = 2
    max_length: int = 32
    rollout_rules: Rules | None = None
    statistics_prompts: int = 512
    initial_policy: str | None = None
    transfer: Transfer = ADD_COMPONENTS

    def __post_init__(self):
        for name in ("batch_size", "num_samples", "num_groups", "num_chunks", "max_length", "statistics_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"ConditionalPolicy.{name} is {getattr(self, name)}: expected at least 1.")
        for name in ("num_groups", "num_chunks"):
            if self.batch_size % getattr(self, name):
                raise ValueError(
                    f"ConditionalPolicy: a batch of {self.batch_size} prompts does not divide into "
                    f"{name}={getattr(self, name)}."
                )
        if self.num_groups > 1 and self.num_groups % self.num_chunks:
            raise ValueError(
                f"ConditionalPolicy: num_groups={self.num_groups} must be 1 or a multiple of num_chunks={self.num_chunks}."
            )
        if isinstance(self.estimator, LeaveOneOut) and self.num_samples < 2:
            raise ValueError(
                f"ConditionalPolicy: LeaveOneOut compares samples of one prompt: num_samples is {self.num_samples}, "
                "expected >= 2."
            )

    def outline(self, data: DataShape) -> Outline:
        """See `clp_jax.training.stage.OutlinedStage`."""
        names = objective_names(self.rewards)
        _check_objectives(self, names)
        if data.model is None:
            raise ValueError("the policy is the initial checkpoint's: give its model to compile it.")
        if isinstance(self.conditioning, WrittenPreference):
            raise ValueError("preferences written into prompts need a vocabulary, and data, to be compiled.")
        policy, conditioning = Policy(data.model), self.conditioning
        sizes = self._sizes(data.inputs)
        _check_experts(policy, sizes)
        reference, axes = policy.abstract(), policy.logical_axes()
        params = {
            "policy": jax.eval_shape(conditioning.expand, reference),
            "baseline": jax.eval_shape(lambda: self._baseline(policy, 0, names)),
        }
        expanded_axes = conditioning.logical_axes(axes)
        rollout = ChunkRollout(self._worker(policy, conditioning), self.preferences, self.num_groups, self.num_chunks)
        scalar = stand_in((), jnp.int32)
        prompts = stand_in((self.batch_size // self.num_chunks, data.inputs), jnp.int32)
        arguments = (params["policy"], reference, prompts, scalar, stand_in((), jnp.uint32), scalar)
        argument_axes = (expanded_axes, axes, ("batch", None), None, None, None)
        chunk = jax.eval_shape(rollout, *arguments)
        whole = jax.tree.map(lambda x: stand_in((self.num_chunks * x.shape[0], *x.shape[1:]), x.dtype), chunk)
        rows = sizes.rows
        part = Sizes(prompts.shape[0], data.inputs, rows // self.num_chunks, self.max_length)
        return Outline(
            params=params,
            frozen={"reference": reference},
            batch=Experience(whole, stand_in((rows, len(names)), jnp.float32)),
            logical_axes={"policy": expanded_axes, "baseline": None},
            frozen_logical_axes={"reference": axes},
            loss_fn=self._loss(policy, conditioning, names),
            flops=training_flops(data.model, sizes),
            tokens_per_batch=rows * self.max_length,
            programs={
                "prefill": Program(
                    rollout.prefill,
                    arguments,
                    argument_axes,
                    flops=prompt_flops(data.model, part),
                    tokens=prompts.shape[0] * data.inputs,
                    runs=0,  # A rollout begins with it.
                ),
                # The policy samples, the reference scores.
                "rollout": Program(
                    rollout,
                    arguments,
                    argument_axes,
                    flops=2 * forward_flops(data.model, part),
                    tokens=part.rows * self.max_length,
                    trips=self.max_length,
                    runs=self.num_chunks,
                ),
            },
        )

    def setup(self, run_dir: Path, seed: int) -> StageSetup:
        """See `clp_jax.training.stage.Stage`; fixes the rewards' statistics and stores the reference the first time."""
        names = objective_names(self.rewards)
        _check_objectives(self, names)
        # A resumed run keeps the reference it began with, whatever has become of the supervised run.
        stored = as_path(run_dir / REFERENCE_DIRECTORY)
        files, description, _ = open_params(stored if stored.is_dir() else self.initial_checkpoint)
        if description.get("stage") not in ("supervised", "converted"):
            raise ValueError(
                f"{self.initial_checkpoint} is a run of stage {description.get('stage')!r}: expected a supervised or a "
                "converted policy."
            )
        alpha = getattr(self.preferences, "alpha", None)
        if alpha is not None:
            check_alpha(self.conditioning, alpha.low if isinstance(alpha, AlphaRange) else alpha)
        policy, manifest = Policy(from_json(description["model"])), Manifest.load(self.data_dir)
        _check_experts(policy, self._sizes(manifest.lengths["inputs"]))
        vocabulary = Vocabulary.load(self.data_dir)
        _check_vocabulary(self, vocabulary, description)
        conditioning = self.conditioning
        if isinstance(conditioning, WrittenPreference):
            conditioning = conditioning.tokenise(names, vocabulary, policy.config.pad_id)
        axes = policy.logical_axes()
        reference = place_active(files, axes)
        statistics = self._statistics(run_dir, policy, reference, vocabulary, seed)
        save_params(run_dir / REFERENCE_DIRECTORY, reference, description)

        def fresh(reference: Params) -> Params:
            return {"policy": conditioning.expand(reference), "baseline": self._baseline(policy, seed, names)}

        params = Derived(fresh, (reference,), (axes,))
        expanded_axes = {"policy": conditioning.logical_axes(axes), "baseline": None}
        if self.initial_policy is not None:
            plan = self._from_policy(params.abstract(), self.initial_policy, description, names)
            params = plan.derived(expanded_axes, fresh, (reference, axes))
        own = {
            "stage": "clp",
            "model": description["model"],
            "conditioning": to_json(conditioning),
            "rewards": list(names),
            "reward_fingerprints": fingerprints(self.rewards),
            "prompt_length": manifest.lengths["inputs"],
            "max_length": self.max_length,
            "vocabulary": vocabulary.fingerprint,
            "data": manifest.fingerprint,
        }
        own |= inherited(description)
        return StageSetup(
            params=params,
            frozen={"reference": reference},
            logical_axes=expanded_axes,
            frozen_logical_axes={"reference": axes},
            loss_fn=self._loss(policy, conditioning, names),
            source=self._source(policy, conditioning, vocabulary, statistics, seed),
            describe=lambda: own,
            tokens_per_batch=self.batch_size * self.num_samples * self.max_length,
            vocabulary=vocabulary,
            flops=self._flops(policy, manifest.lengths["inputs"]),
        )

    def _flops(self, policy: Policy, inputs: int) -> float:
        """Of the update and of the rollouts: the policy samples, the reference scores."""
        sizes = self._sizes(inputs)
        return training_flops(policy.config, sizes) + 2 * forward_flops(policy.config, sizes)

    def _sizes(self, inputs: int) -> Sizes:
        return Sizes(self.batch_size, inputs, self.batch_size * self.num_samples, self.max_length)

    def _baseline(self, policy: Policy, seed: int, names: tuple[str, ...]) -> Params:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return self.estimator.init(key, policy.config.embed_dim, len(names))

    def _loss(self, policy: Policy, conditioning: Conditioning, names: tuple[str, ...]) -> PolicyGradientLoss:
        return PolicyGradientLoss(
            policy=policy,
            conditioning=conditioning,
            estimator=self.estimator,
            num_samples=self.num_samples,
            rows_per_group=self.batch_size * self.num_samples // self.num_groups,
            objectives=names,
        )

    def _worker(self, policy: Policy, conditioning: Conditioning) -> RolloutWorker:
        return RolloutWorker(
            policy=policy,
            conditioning=conditioning,
            config=SamplingConfig(self.max_length),
            num_samples=self.num_samples,
            num_groups=max(1, self.num_groups // self.num_chunks),
            rules=self.rollout_rules,
        )

    def _from_policy(self, abstract: Params, path: str, description: dict[str, Any], names: tuple[str, ...]) -> Plan:
        """What is taken of the initial policy; what it did not know starts fresh."""
        stored, theirs, step = open_params(path)
        if theirs.get("stage") != "clp" or theirs["model"] != description["model"]:
            raise ValueError(f"initial_policy {path} is no run of this stage with the supervised policy's model.")
        known = tuple(theirs["rewards"])
        if names[: len(known)] != known:
            raise ValueError(
                f"initial_policy {path} was trained with the rewards {', '.join(known)}: they must come first, in that order, "
                f"but the rewards are {', '.join(names)}."
            )
        plan = self.transfer.plan(stored, abstract)
        plan.account.report(path, step)
        return plan

    def _data(self, seed: int, batch_size: int, pad_id: int, rows: Callable[[int], np.ndarray]) -> DataSource:
        return DataSource(
            self.data_dir, "train", batch_size=batch_size, converter=prompt_batch, seed=seed, pad_id=pad_id, rows=rows
        )

    def _source(
        self,
        policy: Policy,
        conditioning: Conditioning,
        vocabulary: Vocabulary,
        statistics: RewardStatistics,
        seed: int,
    ) -> ExperienceSource:
        return ExperienceSource(
            data=self._data(
                seed, self.batch_size, policy.config.pad_id, functools.partial(chunk_rows, self.num_chunks)
            ),
            worker=self._worker(policy, conditioning),
            sampler=self.preferences,
            rewards=RewardStack(self.rewards, statistics),
            vocabulary=vocabulary,
            num_groups=self.num_groups,
            num_chunks=self.num_chunks,
            seed=seed,
        )

    def _statistics(
        self, run_dir: Path, policy: Policy, reference: Params, vocabulary: Vocabulary, seed: int
    ) -> RewardStatistics:
        """The rewards' mean and deviation on the reference's samples: read where they are stored, fitted otherwise."""

        if not processes.decide("rewards", (run_dir / STATISTICS_FILE).is_file):
            fitted = self._fit(policy, reference, vocabulary, seed)
            processes.decide("statistics", lambda: fitted.save(run_dir))
        # The others may have no such file: they do not write, and may not see what process 0 writes.
        found = processes.decide("found statistics", lambda: RewardStatistics.load(run_dir).as_json())
        statistics = RewardStatistics.from_json(found)
        RewardStack(self.rewards, statistics)  # Checks the names.
        return statistics

    def _fit(self, policy: Policy, reference: Params, vocabulary: Vocabulary, seed: int) -> RewardStatistics:
        stack = RewardStack(self.rewards)
        batch_size = min(self.batch_size, self.statistics_prompts)
        data = self._data(seed + 1, batch_size, policy.config.pad_id, row_indices)
        held = HostRows.of(batch_size)
        config = SamplingConfig(self.max_length)

        @jax.jit
        def sample(params: Params, inputs: Any, key: PRNGKeyArray) -> Any:
            keys = row_keys(key, inputs.shape[0])
            return generate(CachedDecoder(policy.bind(params)), inputs, keys=keys, config=config).tokens

        gather = jax.jit(lambda rewards: constrain(rewards, None, None))
        rows = []
        for index in range(-(-self.statistics_prompts // batch_size)):
            batch = data.next()
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STATISTICS_KEY), index)
            tokens = held.fetch(sample(reference, held.place(batch.inputs), key))
            found = held.place(stack.raw(reward_inputs(vocabulary, batch.inputs, batch.targets, tokens, held)))
            rows.append(np.asarray(gather(found)))
        return RewardStatistics.fit(stack.names, np.concatenate(rows))


@dataclasses.dataclass(frozen=True)
class WrittenPreference:
    """Asks for prompt conditioning before the vocabulary is known; the stage turns it into `PromptConditioning`.

    Attributes:
        with_alpha: write the KL weight as well.
        bins: evenly spaced values in [0, 1]; weights are rounded to the nearest.
    """

    with_alpha: bool = False
    bins: int = 21

    def tokenise(self, names: Sequence[str], vocabulary: Vocabulary, pad_id: int) -> PromptConditioning:
        """The conditioning with its texts as tokens, behind what a prompt starts with."""
        plain, prompt = vocabulary.encode(names[0]), vocabulary.encode_prompt(names[0])
        start = prompt.index(plain[0]) if plain else 0
        return PromptConditioning.of(
            names, vocabulary.encode, with_alpha=self.with_alpha, bins=self.bins, pad_id=pad_id, keep_first=start
        )


def _check_objectives(stage: ConditionalPolicy, names: tuple[str, ...]) -> None:
    """All parts must be made for the rewards there are."""
    listed = ", ".join(names)
    sampled = stage.preferences(jax.random.key(0), stage.num_groups).num_objectives
    if sampled != len(names):
        raise ValueError(
            f"the preference sampler draws {sampled} weights, but the rewards are {len(names)} objectives: {listed}: "
            f"set NUM_OBJECTIVES={len(names)}, or the sampler's own setting."
        )
    how = stage.conditioning
    if isinstance(how, ParameterConditioning | PromptConditioning) and how.num_objectives != len(names):
        raise ValueError(
            f"the conditioning mixes {how.num_objectives} objectives, but the rewards are {len(names)}: {listed}."
        )


def _check_experts(policy: Policy, sizes: Sizes) -> None:
    """What samples and what is scored are one policy if experts drop no token of one that they take of the other.

    Decoding routes one token of a row at a time, scoring all of them: no token of a completion may be dropped. Prompts are read
    in chunks and in micro-batches: they may lose tokens where these depend on their own row alone.
    """
    moe = policy.config.moe
    if moe is None or moe.dense:
        return
    advice = f"a Dropless router, or an eval_capacity of at least the number of experts, {moe.num_experts}."
    decoder = moe.router_of(causal=True)

    def room_of(router: TokenChoice | ExpertChoice, rows: int, length: int) -> tuple[int, int]:
        size = router.group_size(rows, length)
        return int(router.capacities(size, moe.num_experts, training=False)[-1]), size

    if isinstance(decoder, TokenChoice):
        room, size = room_of(decoder, sizes.rows, sizes.targets)
        if room < size:
            raise ValueError(
                f"the decoder's experts have room for {room} of {size} tokens: sampling would drop none of those that "
                f"scoring drops, and the policy gradient would be of another policy. Use {advice}"
            )
    reader = moe.router if isinstance(policy.config, T5Config) else decoder
    if isinstance(reader, Dropless) or reader.group == "row":
        return
    room, size = room_of(reader, sizes.prompts, sizes.inputs)
    if room < size:
        raise ValueError(
            f"the experts that read prompts have room for {room} of {size} tokens, and with group={reader.group!r} prompts "
            "share it: samples and updates, which read them in other batches, would drop other tokens, and the policy gradient "
            f"would be of another policy. Use group='row', {advice}"
        )


def _check_vocabulary(stage: ConditionalPolicy, vocabulary: Vocabulary, description: dict[str, Any]) -> None:
    """All parts must mean the same by a token."""
    if description.get("vocabulary") != vocabulary.fingerprint:
        raise ValueError(
            f"{stage.initial_checkpoint} was trained with another vocabulary than {stage.data_dir} was prepared with: "
            "use the data of the supervised run."
        )
    for reward in stage.rewards:
        if isinstance(reward, LearnedReward) and reward.vocabulary_fingerprint != vocabulary.fingerprint:
            raise ValueError(
                f"the reward model {reward.names[0]!r} was trained with another vocabulary than {stage.data_dir}."
            )
