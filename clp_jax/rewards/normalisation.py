"""Rewards in units of the reference policy: fitted once on its samples, then frozen and stored with the run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import Float

FILE_NAME = "rewards.json"


@dataclasses.dataclass(frozen=True)
class RewardStatistics:
    """Mean and standard deviation of each reward on samples of the reference policy.

    Attributes:
        names: of the ``K`` objectives.
        mean: of each.
        std: of each, positive.
        count: samples they were fitted on.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int

    def __post_init__(self):
        if not len(self.names) == len(self.mean) == len(self.std):
            raise ValueError(
                f"RewardStatistics: {len(self.names)} names, {len(self.mean)} means, {len(self.std)} deviations."
            )
        for name, mean, std in zip(self.names, self.mean, self.std, strict=True):
            if not np.isfinite(mean) or not np.isfinite(std) or std <= 0:
                raise ValueError(
                    f"reward {name!r} has mean {mean} and standard deviation {std} on the reference policy's samples: a reward "
                    "that does not vary can't be standardised or traded off. Remove it, or fit on more prompts."
                )

    @classmethod
    def fit(cls, names: Sequence[str], rewards: Float[np.ndarray, "R K"]) -> "RewardStatistics":
        """Statistics of raw rewards.

        Args:
            names: of the objectives.
            rewards: of samples of the reference policy.
        """
        wide = np.asarray(rewards, np.float64)
        return cls(tuple(names), tuple(wide.mean(0).tolist()), tuple(wide.std(0).tolist()), len(wide))

    def apply(self, rewards: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R K"]:
        """``(reward - mean) / std``, float32."""
        return ((rewards - np.asarray(self.mean)) / np.asarray(self.std)).astype(np.float32)

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold; numbers come back to the bit."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RewardStatistics":
        """From what `as_json` gave.

        Raises:
            KeyError: when something is missing.
        """
        return cls(tuple(content["names"]), tuple(content["mean"]), tuple(content["std"]), int(content["count"]))

    def save(self, directory: str | Path) -> None:
        """Writes ``rewards.json``; numbers come back to the bit."""
        path = Path(directory) / FILE_NAME
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        partial.replace(path)  # There whole or not at all.

    @classmethod
    def load(cls, directory: str | Path) -> "RewardStatistics":
        """Reads ``rewards.json``.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: expected the run directory of a multi-objective run.")
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} can't be read: {error}.") from None
