"""The multi-objective reinforcement learning stage: Conditional Language Policy, and the baselines it is compared with.

Rewarded soups, one policy per weight and prompt conditioning are this stage with another conditioning or preference
sampler; nothing else differs between them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clp_jax.array_types import Params
from clp_jax.data.batch import PromptBatch
from clp_jax.data.reader import DataSource
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.models.conditioning import Conditioning, PromptConditioning, Unconditioned
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json, to_json
from clp_jax.preferences import Preference
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.protocol import RewardFunction
from clp_jax.rewards.stack import RewardStack
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.rollouts import RolloutWorker
from clp_jax.training.checkpoints import load_params, save_params
from clp_jax.training.estimators import AdvantageEstimator, ValueBaseline
from clp_jax.training.experience import ExperienceSource, PreferenceSampler, reward_inputs
from clp_jax.training.policy_loss import PolicyGradientLoss
from clp_jax.training.stage import StageSetup

STATISTICS_FILE = "rewards.json"
REFERENCE_DIRECTORY = "reference"


@dataclasses.dataclass(frozen=True)
class ConditionalPolicy:
    """Trains one policy for every preference a sampler draws.

    Attributes:
        initial_checkpoint: run directory of the supervised policy: where every component starts, and the frozen reference.
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
        statistics_prompts: prompts the reference answers to fix the rewards' mean and standard deviation.
    """

    initial_checkpoint: str
    data_dir: str
    rewards: Sequence[RewardFunction]
    preferences: PreferenceSampler
    conditioning: Conditioning = Unconditioned()
    estimator: AdvantageEstimator = ValueBaseline()
    batch_size: int = 64
    num_samples: int = 1
    num_groups: int = 1
    num_chunks: int = 2
    max_length: int = 32
    statistics_prompts: int = 512

    def __post_init__(self):
        for name in ("batch_size", "num_samples", "num_groups", "num_chunks", "max_length", "statistics_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"ConditionalPolicy.{name} is {getattr(self, name)}: expected at least 1.")
        if self.batch_size % (self.num_groups * self.num_chunks // min(self.num_groups, self.num_chunks)):
            raise ValueError(
                f"ConditionalPolicy: batch_size={self.batch_size} must divide into num_groups={self.num_groups} and "
                f"num_chunks={self.num_chunks}."
            )
        if self.num_groups > 1 and self.num_groups % self.num_chunks:
            raise ValueError(
                f"ConditionalPolicy: num_groups={self.num_groups} must be 1 or a multiple of num_chunks={self.num_chunks}."
            )

    def setup(self, run_dir: Path, seed: int) -> StageSetup:
        """Loads the reference, fixes the rewards' statistics, and makes the parameters, the loss and the source."""
        reference, description, _ = load_params(self.initial_checkpoint)
        policy = Policy(from_json(description["model"]))
        vocabulary = Vocabulary.load(self.data_dir)
        names = tuple(name for reward in self.rewards for name in reward.names)
        num_objectives = len(names)
        sampled = self.preferences(jax.random.key(0), self.num_groups).num_objectives
        if sampled != num_objectives:
            raise ValueError(
                f"the preference sampler draws {sampled} weights, but the rewards have {num_objectives} objectives: "
                f"{', '.join(names)}."
            )
        statistics = self._statistics(run_dir, policy, reference, vocabulary, seed)
        save_params(run_dir / REFERENCE_DIRECTORY, reference, description)
        baseline_key = jax.random.fold_in(jax.random.key(seed), 1)
        params = {
            "policy": self.conditioning.expand(reference),
            "baseline": self.estimator.init(baseline_key, policy.config.embed_dim, num_objectives),
        }
        return StageSetup(
            params=params,
            frozen={"reference": reference},
            logical_axes={"policy": self.conditioning.logical_axes(policy.logical_axes()), "baseline": None},
            loss_fn=PolicyGradientLoss(
                policy=policy,
                conditioning=self.conditioning,
                estimator=self.estimator,
                num_samples=self.num_samples,
                rows_per_group=self.batch_size * self.num_samples // self.num_groups,
                objectives=names,
            ),
            source=self._source(policy, reference, vocabulary, RewardStack(self.rewards, statistics), seed),
            describe=lambda: {
                "stage": "clp",
                "model": description["model"],
                "conditioning": to_json(self.conditioning),
                "rewards": list(names),
                "max_length": self.max_length,
            },
            tokens_per_batch=self.batch_size * self.num_samples * self.max_length,
        )
