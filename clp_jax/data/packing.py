"""Packing: several short examples in one row of fixed lengths, told apart by segment ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from clp_jax.array_types import Int

Tokens = Mapping[str, np.ndarray]


def pack(examples: Iterable[Tokens], lengths: Mapping[str, int], open_rows: int = 64) -> Iterator[list[Tokens]]:
    """Groups examples into rows, first fit among a bounded number of open rows; deterministic.

    Args:
        examples: token ids by feature, none longer than its length.
        lengths: tokens of a row by feature.
        open_rows: rows considered for each example; the oldest is given out when there are more.

    Yields:
        The examples of each row, in order; every example is in exactly one row.
    """
    rows: list[tuple[list[Tokens], dict[str, int]]] = []
    for example in examples:
        fits = (row for row in rows if all(len(example[name]) <= row[1][name] for name in lengths))
        row = next(fits, None)
        if row is None:
            row = ([], dict(lengths))
            rows.append(row)
        members, free = row
        members.append(example)
        for name in lengths:
            free[name] -= len(example[name])
        if len(rows) > open_rows:
            yield rows.pop(0)[0]
    for members, _ in rows:
        yield members


def lay_out(
    parts: Sequence[np.ndarray], length: int
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
    """Tokens, segment ids and positions of one row.

    Args:
        parts: the examples' tokens, together at most `length`.
        length: of the row.

    Returns:
        ``int32[length]`` each; segments count from 1, positions from 0 within each example, padding is 0 in all three.
    """
    tokens, segments, positions = (np.zeros(length, np.int32) for _ in range(3))
    start = 0
    for number, part in enumerate(parts, start=1):
        end = start + len(part)
        tokens[start:end], segments[start:end], positions[start:end] = part, number, np.arange(len(part))
        start = end
    return tokens, segments, positions


def shift_right(
    tokens: Int[np.ndarray, "*b T"], positions: Int[np.ndarray, "*b T"], start_id: int
) -> Int[np.ndarray, "*b T"]:
    """Decoder inputs: every token one place later, the policy's `start_id` at the start of each example."""
    shifted = np.roll(tokens, 1, axis=-1)
    return np.where(positions == 0, start_id, shifted)
