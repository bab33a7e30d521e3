"""Completions in the rewards of a run: what each is worth, and which is worth most at given weights."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from clp_jax.array_types import Float
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.rewards.protocol import RewardFunction, RewardInputs
from clp_jax.rewards.stack import RewardStack
from clp_jax.sampling.json_lines import pad_rows
from clp_jax.sampling.text import Completion
from clp_jax.training.policies import LoadedPolicy, check_rewards


class RunRewards:
    """The rewards that a policy was trained for.

    Args:
        loaded: the policy.
        rewards: the reward functions of its run.

    Raises:
        ValueError: for other rewards than the run's.
    """

    def __init__(self, loaded: LoadedPolicy, rewards: Sequence[RewardFunction]):
        self._vocabulary: Vocabulary | TokenIds = loaded.vocabulary
        self._stack = RewardStack(rewards, check_rewards(loaded.run_dir, loaded, rewards))

    def of(self, prompt: Sequence[int], reference: str, completions: Sequence[Completion]) -> list[Completion]:
        """The completions of a prompt with their rewards.

        Args:
            prompt: token ids.
            reference: completion that rewards may compare with; empty where there is none.
            completions: of the prompt.
        """
        count = len(completions)
        rewards = self._stack(
            RewardInputs(
                prompts=[self._vocabulary.decode(np.asarray(prompt, np.int32))] * count,
                completions=[completion.text for completion in completions],
                references=[reference] * count,
                prompt_tokens=pad_rows([prompt], count, 0),
                completion_tokens=pad_rows([completion.tokens for completion in completions], count, 0),
            )
        )
        pairs = zip(completions, rewards.tolist(), strict=True)
        return [dataclasses.replace(completion, rewards=tuple(row)) for completion, row in pairs]


def most_rewarded(completions: Sequence[Completion], weights: Float[np.ndarray, "K"]) -> Completion:
    """The first of the completions whose weighted sum of rewards is the highest.

    Args:
        completions: with their rewards.
        weights: a point of the simplex.
    """
    return max(completions, key=lambda completion: float(np.dot(weights, np.asarray(completion.rewards))))
