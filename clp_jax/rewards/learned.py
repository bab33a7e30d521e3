"""A trained scorer as a reward."""

import functools
import hashlib
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
    ):
        if bound <= 0:
            raise ValueError(f"LearnedReward {name!r}: bound is {bound}, expected a positive number.")
        self._name = name
        self._params = params
        self.policy = policy
        self.vocabulary_fingerprint = vocabulary_fingerprint
        self.bound = bound
        self.document_length = document_length

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self._name,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells it from other models of its name."""
        digest = hashlib.sha256(f"{self._name} {self.bound} {self.document_length}".encode())
        for leaf in jax.tree.leaves(self._params):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _score(self) -> Any:
        def score(params: Params, tokens: Any, kinds: Any) -> Any:
            return self.bound * jnp.tanh(self.policy.bind(params).score(tokens, kinds) / self.bound)

        return jax.jit(score)

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`; compiled once for each shape of batch."""
        documents = inputs.prompt_tokens[:, : self.document_length]
        tokens, kinds = join(documents, inputs.completion_tokens, self.policy.config.trunk.pad_id)
        return np.asarray(self._score(self._params, tokens, kinds))[:, None]
