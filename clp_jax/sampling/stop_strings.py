"""Stop strings: where text ends, whatever tokens it came in. Stop sequences of tokens are part of generation itself."""

from collections.abc import Sequence

# On a command line each is taken as it is typed, commas and spaces included.
Texts = Sequence[str]


def truncate_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it; all of it where there is none.

    Args:
        text: of a completion.
        stops: strings, none of them empty.

    Raises:
        ValueError: for an empty stop string, which would be everywhere.
    """
    _check(stops)
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]


def shown_length(text: str, stops: Sequence[str]) -> int:
    """How much of a text that is still being written can be shown: what no stop string can take back any more.

    Args:
        text: so far; when it is complete, `truncate_at` says what to show.
        stops: strings, none of them empty.

    Returns:
        The characters before the first stop string, or before what may turn out to be the beginning of one.

    Raises:
        ValueError: for an empty stop string.
    """
    whole = truncate_at(text, stops)
    if len(whole) < len(text):
        return len(whole)
    ends = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return len(text) - max(ends, default=0)


def _check(stops: Sequence[str]) -> None:
    if isinstance(stops, str) or not all(stops):
        raise ValueError(f"the stop strings are {stops!r}: expected a list of strings of one character at least.")
