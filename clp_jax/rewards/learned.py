"""A trained scorer as a reward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Float, Params
from clp_jax.models.policy import Policy
from clp_jax.rewards.pairs import join
from clp_jax.rewards.protocol import RewardInputs


class LearnedReward:
    """The score of a reward model, squashed so that its extremes are not worth chasing.

    The raw score of a Bradley-Terry model, and the log-odds of a classifier, are unbounded; a policy that climbs them
    leaves what the model was trained on. The reward is ``bound · tanh(score / bound)``.

    Args:
        name: of the objective.
        policy: the scorer.
        params: its parameters.
        vocabulary_fingerprint: of the vocabulary it was trained with.
        bound: the largest reward.
        document_length: tokens of a document it was trained with; longer ones are cut.
        source: the run directory it came from, so that a checkpoint can name it; None when there is none.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        params: Params,
        vocabulary_fingerprint: str,
        *,
        bound: float = 4.0,
        document_length: int | None = None,
        source: str | None = None,
    ):
        if bound <= 0:
            raise ValueError(f"LearnedReward {name!r}: bound is {bound}, expected a positive number.")
        self._name = name
        self._params = params
        self.policy = policy
        self.vocabulary_fingerprint = vocabulary_fingerprint
        self.bound = bound
        self.document_length = document_length
        self.source = source

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self._name,)

    @functools.cached_property
    def _score(self) -> Any:
        def score(params: Params, tokens: Any, kinds: Any) -> Any:
            return self.bound * jnp.tanh(self.policy.bind(params).score(tokens, kinds) / self.bound)

        return jax.jit(score)

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`; compiled once for each shape of batch."""
        documents = inputs.prompt_tokens[:, : self.document_length]
        tokens, kinds = join(documents, inputs.completion_tokens)
        return np.asarray(self._score(self._params, tokens, kinds))[:, None]
