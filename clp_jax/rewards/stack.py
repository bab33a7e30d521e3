"""Several rewards as one vector, checked and standardised, computed beside the device's work."""

import collections
import contextvars
import hashlib
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
        """Computes the rewards in the background, on the mesh that is active here."""
        return self._pool.submit(contextvars.copy_context().run, self, inputs)


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


def fingerprints(rewards: Sequence[RewardFunction]) -> dict[str, str]:
    """`fingerprint` by the rewards' names."""
    return {"+".join(reward.names): fingerprint(reward) for reward in rewards}


def fingerprint(reward: RewardFunction) -> str:
    """What tells a reward function from another of the same name: its settings, and its code or its parameters.

    A reward may say it itself with an attribute ``fingerprint``; otherwise it is what its `repr` shows.
    """
    return hashlib.sha256(str(getattr(reward, "fingerprint", None) or repr(reward)).encode()).hexdigest()[:16]
