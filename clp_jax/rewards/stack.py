"""Several rewards as one vector, checked and standardised, computed beside the device's work."""

import collections
import difflib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from clp_jax.array_types import Float
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.rewards.protocol import RewardFunction, RewardInputs


class RewardStack:
    """The reward vector of a run.

    Args:
        functions: at least one; their names in this order are the objectives.
        statistics: standardise the rewards; None leaves them raw.

    Raises:
        ValueError: for no function, two objectives of one name, or statistics of other objectives.
    """

    def __init__(self, functions: Sequence[RewardFunction], statistics: RewardStatistics | None = None):
        self.names = objective_names(functions)
        if statistics is not None and statistics.names != self.names:
            raise ValueError(
                f"the rewards are {', '.join(self.names)}, but their statistics are of {', '.join(statistics.names)}: "
                "give the rewards of the run, in its order."
            )
        self._functions = tuple(functions)
        self._statistics = statistics
        # One thread: reward functions of users need not be safe in two, and overlap with the device is what counts.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def raw(self, inputs: RewardInputs) -> Float[np.ndarray, "R K"]:
        """Rewards as the functions give them.

        Raises:
            ValueError: naming the reward with a wrong shape or a number that is not finite.
        """
        columns = []
        for function in self._functions:
            values = np.asarray(function(inputs))
            expected = (len(inputs.completions), len(function.names))
            named = ", ".join(function.names)
            if values.shape != expected:
                raise ValueError(
                    f"reward {named} has shape {values.shape}: expected {expected}, completions by objectives."
                )
            if not np.all(np.isfinite(values)):
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                raise ValueError(
                    f"reward {named} is {values[row]} for the completion {inputs.completions[row]!r}: not finite."
                )
            columns.append(values.astype(np.float32))
        return np.concatenate(columns, axis=1)

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R K"]:
        """Standardised rewards, float32."""
        rewards = self.raw(inputs)
        return rewards if self._statistics is None else self._statistics.apply(rewards)

    def submit(self, inputs: RewardInputs) -> Future:
        """Computes the rewards in the background."""
        return self._pool.submit(self, inputs)


def objective_names(functions: Sequence[RewardFunction]) -> tuple[str, ...]:
    """The names of all objectives, in order.

    Raises:
        ValueError: for none, or a name that occurs twice.
    """
    names = tuple(name for function in functions for name in function.names)
    if not names:
        raise ValueError("no rewards: expected at least one reward function.")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two rewards are called {twice[0]!r}: give each its own name.")
    return names


def check_known(name: str, known: Sequence[str]) -> int:
    """The place of an objective among those of a run.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    if name in known:
        return list(known).index(name)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown reward {name!r}{hint}: the run has {', '.join(known)}.")
