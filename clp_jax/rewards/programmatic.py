"""Rewards that are computed from the texts alone, and a wrapper for a function of the user's."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Sequence

import numpy as np

from clp_jax.array_types import Float
from clp_jax.models.serialization import serializable
from clp_jax.rewards.protocol import RewardInputs

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, as the rouge-score package counts them without a stemmer."""
    return _WORD.findall(text.lower())


def _column(values: Sequence[float]) -> Float[np.ndarray, "R 1"]:
    return np.asarray(values, np.float32)[:, None]


@serializable
@dataclasses.dataclass(frozen=True)
class RougeL:
    """ROUGE-L F-measure against the reference completion, in ``[0, 1]`` (Lin, 2004), by the rouge-score package.

    Attributes:
        name: of the objective.
    """

    name: str = "rouge_l"

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self.name,)

    @functools.cached_property
    def _scorer(self):
        from rouge_score import rouge_scorer

        return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`."""
        pairs = zip(inputs.references, inputs.completions, strict=True)
        return _column([self._scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])


@serializable
@dataclasses.dataclass(frozen=True)
class Brevity:
    """``1 - min(words, limit)/limit`` for a completion of at least one word: 1 is as short as can be, 0 is the limit.

    A completion without a word says nothing and gets 0, as the longest does.

    Attributes:
        limit: in words, at least 2.
        name: of the objective.
    """

    limit: int = 20
    name: str = "brevity"

    def __post_init__(self):
        if self.limit < 2:
            raise ValueError(f"Brevity.limit is {self.limit}: expected at least 2 words.")

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self.name,)

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`."""
        counts = np.asarray([len(words(text)) for text in inputs.completions])
        return _column(np.where(counts > 0, 1 - np.minimum(counts, self.limit) / self.limit, 0.0).tolist())


@serializable
@dataclasses.dataclass(frozen=True)
class ExtractiveCoverage:
    """The share of a completion's words that belong to fragments of the document, in ``[0, 1]``.

    Coverage of Grusky et al. (2018, arXiv 1804.11283, equation 2): the fragments are the longest shared runs, found
    greedily from left to right. 0 for a completion without a word.

    Attributes:
        name: of the objective.
    """

    name: str = "coverage"

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self.name,)

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`."""
        pairs = zip(inputs.prompts, inputs.completions, strict=True)
        return _column([coverage(words(document), words(text)) for document, text in pairs])


def extractive_fragments(document: Sequence[str], summary: Sequence[str]) -> list[Sequence[str]]:
    """The shared runs of words, longest first at each place, from left to right (Grusky et al., 2018, figure 2)."""
    starts: dict[str, list[int]] = {}
    for j, word in enumerate(document):
        starts.setdefault(word, []).append(j)
    fragments = []
    i = 0
    while i < len(summary):
        longest = 0
        for j in starts.get(summary[i], ()):
            length = 1
            while (
                i + length < len(summary) and j + length < len(document) and summary[i + length] == document[j + length]
            ):
                length += 1
            longest = max(longest, length)
        if longest:
            fragments.append(summary[i : i + longest])
        i += max(longest, 1)
    return fragments


def coverage(document: Sequence[str], summary: Sequence[str]) -> float:
    """The share of the summary's words inside `extractive_fragments`; 0 for an empty summary."""
    if not summary:
        return 0.0
    return sum(len(fragment) for fragment in extractive_fragments(document, summary)) / len(summary)


@dataclasses.dataclass(frozen=True)
class FunctionReward:
    """A reward that is a Python function of the user's.

    Attributes:
        name: of the objective.
        function: ``(prompts, completions, references) -> one number for each completion``, all lists of text.
    """

    name: str
    function: Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]

    def __post_init__(self):
        if not callable(self.function):
            raise ValueError(f"FunctionReward {self.name!r}: function is {self.function!r}, expected a function.")
        try:
            inspect.signature(self.function).bind([], [], [])
        except TypeError:
            name = getattr(self.function, "__name__", "the function")
            raise ValueError(
                f"FunctionReward {self.name!r}: {name}{inspect.signature(self.function)} does not take what it is called "
                "with: expected (prompts, completions, references)."
            ) from None
        except ValueError:  # Some functions in C do not tell.
            pass

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self.name,)

    @property
    def fingerprint(self) -> str:
        """The name and the function's source, where it can be read."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"{self.name}\n{source}"

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`.

        Raises:
            ValueError: when the function does not give one number for each completion.
            Exception: whatever the function raises, with a note that names the reward.
        """
        try:
            values = self.function(list(inputs.prompts), list(inputs.completions), list(inputs.references))
        except Exception as error:
            error.add_note(f"This was raised by the function of the reward {self.name!r}.")
            raise
        try:
            array = np.asarray(values, np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"reward {self.name!r}: its function gave {values!r:.100}: expected numbers.") from None
        if array.shape != (len(inputs.completions),):
            raise ValueError(
                f"reward {self.name!r}: its function gave {type(values).__name__} of shape {array.shape} for "
                f"{len(inputs.completions)} completions: expected one number for each."
            )
        return array[:, None]
