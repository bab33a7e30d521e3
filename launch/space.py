"""What a sweep tries: a space is a list of trials, a trial binds names of gin to values, and combinators make the lists.

A value that is text is what would be typed after ``--gin.NAME=``, so ``@conditioning.full()`` and ``%ALPHA`` mean what they
mean there; any other value is written as gin writes it.
"""

import builtins
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Space: TypeAlias = list[dict[str, Any]]

_NAME = re.compile(r"(\w+/)*\w+(\.\w+)*")
# More digits make no other model, and tables that nobody reads.
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Range:
    """Where the values of one name come from.

    Attributes:
        kind: ``uniform``, ``log_uniform``, ``integers`` or ``choice``.
        low: the least value.
        high: the largest, included.
        values: of a choice.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()

    def at(self, place: float) -> Any:
        """The value at a place in [0, 1), so that evenly spread places give evenly spread values."""
        if self.kind == "choice":
            return self.values[int(place * len(self.values))]
        if self.kind == "integers":
            return int(self.low) + int(place * (self.high - self.low + 1))
        if self.kind == "log_uniform":
            return rounded(self.low * (self.high / self.low) ** place)
        return rounded(self.low + (self.high - self.low) * place)


def rounded(value: float) -> float:
    """A sampled value, to six digits."""
    return float(f"{value:.{_DIGITS}g}")


def uniform(low: float, high: float) -> Range:
    """Numbers, each as likely as any other."""
    return Range("uniform", *_ends("uniform", low, high))


def log_uniform(low: float, high: float) -> Range:
    """Positive numbers, each order of magnitude as likely as any other."""
    low, high = _ends("log_uniform", low, high)
    if low <= 0:
        raise ValueError(f"log_uniform({low:g}, {high:g}): expected positive numbers.")
    return Range("log_uniform", low, high)


def integers(low: float, high: float) -> Range:
    """Whole numbers, `high` included."""
    ends = _ends("integers", low, high)
    if any(end != int(end) for end in ends):
        raise ValueError(f"integers({low}, {high}): expected whole numbers.")
    return Range("integers", *ends)


def choice(values: Sequence[Any]) -> Range:
    """One of some values."""
    return Range("choice", values=tuple(_values("choice", values)))


def grid(values: Mapping[str, Any]) -> Space:
    """Every combination of the values of each name, given as lists; the last name changes fastest."""
    if not values:
        raise ValueError("grid: it is empty: expected names and lists of values.")
    lists = [_values(f"grid: {check_name(name)}", given) for name, given in values.items()]
    return [dict(builtins.zip(values, row, strict=True)) for row in itertools.product(*lists)]


def product(*spaces: Space) -> Space:
    """Every trial of each space with every trial of the others."""
    return [_joined("product", row) for row in itertools.product(*_filled("product", spaces))]


def zip(*spaces: Space) -> Space:  # noqa: A001 - it is the builtin's meaning
    """The first trials of all spaces together, the second ones, and so on."""
    lengths = sorted({len(space) for space in _filled("zip", spaces)})
    if len(lengths) > 1:
        raise ValueError(f"zip: spaces of {' and '.join(map(str, lengths))} trials: expected the same number.")
    return [_joined("zip", row) for row in builtins.zip(*spaces, strict=True)]


def random(ranges: Mapping[str, Range], count: int, seed: int = 0) -> Space:
    """Independent samples.

    Args:
        ranges: by name.
        count: of different trials.
        seed: decides them; in [0, 2**32).

    Raises:
        ValueError: when there are not as many different trials, or the seed is none.
    """
    import numpy as np

    check_seed("random", seed)
    generator = np.random.default_rng(seed)
    return _sampled("random", ranges, count, lambda number: generator.random((number, len(ranges))))


def sobol(ranges: Mapping[str, Range], count: int, seed: int = 0) -> Space:
    """Samples that cover the ranges evenly: a scrambled Sobol' sequence (Owen, 1998, `scipy.stats.qmc`).

    Args:
        ranges: by name.
        count: of different trials; powers of two cover best.
        seed: of the scrambling; in [0, 2**32).

    Raises:
        ValueError: when there are not as many different trials, or the seed is none.
    """
    from scipy.stats import qmc

    check_seed("sobol", seed)

    def places(number: int) -> Any:
        # The sequence from its start each time: its first points are the same.
        return qmc.Sobol(len(ranges), scramble=True, rng=seed).random_base2(math.ceil(math.log2(number)))

    return _sampled("sobol", ranges, count, places)


def check_name(name: Any) -> str:
    """The name of a macro or of an argument, as in ``--gin.NAME=VALUE``.

    Raises:
        ValueError: when it is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of gin: expected a macro or FUNCTION.ARGUMENT, without --gin.")
    return name


def check_value(value: Any, where: str) -> Any:
    """A value that gin can be given.

    Raises:
        ValueError: for a number that is not finite, empty text, or an object.
    """
    if isinstance(value, list | tuple):
        for item in value:
            check_value(item, where)
    elif isinstance(value, dict):
        for item in itertools.chain(value, value.values()):
            check_value(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {value}: expected a finite number.")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{where}: {value!r}: expected a number, text, a list or a dictionary.")
    elif isinstance(value, str) and not value.strip():
        raise ValueError(f"{where}: empty text; write '\"\"' for the empty string.")
    return value


def check_seed(where: str, seed: Any) -> int:
    """The seed of a sampler.

    Raises:
        ValueError: for anything but a whole number in [0, 2**32).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{where}: seed is {seed!r}: expected a whole number in [0, 2**32).")
    return seed


def check_ranges(where: str, ranges: Mapping[str, Range]) -> None:
    """Refuses what is no ranges by name.

    Raises:
        ValueError: when there are none, or one is something else.
    """
    if not ranges:
        raise ValueError(f"{where}: no ranges: expected names and ranges such as uniform(0, 1).")
    for name, given in ranges.items():
        if not isinstance(given, Range):
            raise ValueError(f"{where}: {name} is {given!r}: expected a range such as uniform(0, 1).")
        check_name(name)


def _values(where: str, given: Any) -> list[Any]:
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ValueError(f"{where} is {given!r}: expected a list of values.")
    values = [check_value(value, where) for value in given]
    if not values:
        raise ValueError(f"{where} has no values: expected at least one.")
    return values


def _ends(kind: str, low: float, high: float) -> tuple[float, float]:
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not -math.inf < low < high < math.inf:
        raise ValueError(f"{kind}({low}, {high}): expected two finite numbers, the lower one first.")
    return float(low), float(high)


def _filled(kind: str, spaces: Sequence[Space]) -> Sequence[Space]:
    if not spaces or not all(spaces):
        raise ValueError(f"{kind}: {'a space is empty' if spaces else 'no spaces'}: expected trials in each.")
    return spaces


def _joined(kind: str, row: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for trial in row:
        for name, value in trial.items():
            if name in joined:
                raise ValueError(f"{kind}: two of its spaces set {name}: leave one out.")
            joined[name] = value
    return joined


def _sampled(kind: str, ranges: Mapping[str, Range], count: int, places: Callable[[int], Any]) -> Space:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{kind}: count is {count!r}: expected a whole number of at least 1.")
    check_ranges(kind, ranges)
    # Ranges of few values repeat themselves: more are drawn than wanted.
    for factor in (1, 16, 256):
        trials = list(itertools.islice(_distinct(ranges, places(count * factor)), count))
        if len(trials) == count:
            return trials
    raise ValueError(f"{kind}: there are no {count} different trials in these ranges, only {len(trials)}.")


def _distinct(ranges: Mapping[str, Range], places: Any) -> Iterator[dict[str, Any]]:
    seen = set()
    for row in places:
        trial = {name: r.at(float(place)) for (name, r), place in builtins.zip(ranges.items(), row, strict=True)}
        if repr(trial) not in seen:
            seen.add(repr(trial))
            yield trial
