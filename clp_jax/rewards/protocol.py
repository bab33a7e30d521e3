"""What a reward is: a function from prompts and completions to ``float32[R, K]``, with names."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from clp_jax.array_types import Float, Int
from clp_jax.host_rows import HostRows


@dataclasses.dataclass(frozen=True)
class RewardInputs:
    """Completions to be rewarded, one a row.

    Attributes:
        prompts: the documents, as text.
        completions: as text, without special tokens.
        references: the reference completions, as text.
        prompt_tokens: ``int32[R, S]``, padded with 0.
        completion_tokens: ``int32[R, T]``, up to and including the end of sequence, then 0.
        rows: of the batch, those that this process holds, for rewards that are computed by all processes together; None where
            the completions are a batch of their own.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    references: Sequence[str]
    prompt_tokens: Int[np.ndarray, "R S"]
    completion_tokens: Int[np.ndarray, "R T"]
    rows: HostRows | None = None

    def __post_init__(self):
        rows = {len(self.prompts), len(self.completions), len(self.references)}
        rows |= {self.prompt_tokens.shape[0], self.completion_tokens.shape[0]}
        if len(rows) != 1:
            raise ValueError(f"RewardInputs: columns of {sorted(rows)} rows: expected one number of rows.")


@runtime_checkable
class RewardFunction(Protocol):
    """Rewards completions; higher is better.

    Attributes:
        names: of the objectives, one for each column.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' names."""

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R K"]:
        """``float32[R, len(names)]``, finite, not standardised."""
