"""Packing: every token once and in order, segments and positions that tell the examples apart, first fit."""

import numpy as np
import pytest

from clp_jax.data.packing import lay_out, pack, shift_right

LENGTHS = {"inputs": 12, "targets": 7}


def examples(seed: int, count: int = 80) -> list[dict[str, np.ndarray]]:
    """Examples of random lengths, up to a whole row; every token is different."""
    rng = np.random.default_rng(seed)
    found, token = [], 1
    for _ in range(count):
        example = {}
        for name, length in LENGTHS.items():
            size = int(rng.integers(1, length + 1))
            example[name] = np.arange(token, token + size, dtype=np.int32)
            token += size
        found.append(example)
    return found


def lengths_only(*sizes: int) -> list[dict[str, np.ndarray]]:
    return [{"inputs": np.full(size, number)} for number, size in enumerate(sizes)]


def numbers(rows: list) -> list[list[int]]:
    return [[int(example["inputs"][0]) for example in row] for row in rows]


@pytest.mark.parametrize("open_rows", [1, 3, 64])
@pytest.mark.parametrize("seed", range(8))
def test_every_example_is_in_one_row_and_rows_hold_what_they_can(seed, open_rows):
    given = examples(seed)
    rows = list(pack(given, LENGTHS, open_rows))
    for row in rows:
        assert row
        assert all(sum(len(example[name]) for example in row) <= length for name, length in LENGTHS.items())
        firsts = [int(example["inputs"][0]) for example in row]
        assert firsts == sorted(firsts)
    assert sorted(numbers(rows)) == sorted(numbers(list(pack(iter(given), LENGTHS, open_rows))))
    for name in LENGTHS:
        tokens = np.concatenate([example[name] for row in rows for example in row])
        np.testing.assert_array_equal(np.sort(tokens), np.concatenate([example[name] for example in given]))


@pytest.mark.parametrize("seed", range(8))
def test_an_example_goes_to_the_first_row_that_has_room(seed):
    given = examples(seed)
    place = {int(e["inputs"][0]): r for r, row in enumerate(pack(given, LENGTHS, len(given))) for e in row}
    taken = np.zeros((len(given), 2), int)
    for example in given:
        sizes = np.asarray([len(example[name]) for name in LENGTHS])
        fits = np.all(taken + sizes <= list(LENGTHS.values()), axis=1)
        row = place[int(example["inputs"][0])]
        assert row == np.flatnonzero(fits)[0]
        taken[row] += sizes


def test_rows_by_hand():
    given = lengths_only(3, 3, 1, 2, 1)
    assert numbers(list(pack(given, {"inputs": 4}))) == [[0, 2], [1, 4], [3]]
    # With one open row the oldest is given out as soon as a second is needed.
    assert numbers(list(pack(given, {"inputs": 4}, open_rows=1))) == [[0], [1, 2], [3, 4]]
    assert numbers(list(pack(lengths_only(4, 4, 4), {"inputs": 4}))) == [[0], [1], [2]]
    assert list(pack([], {"inputs": 4})) == []


def test_a_row_is_full_when_any_feature_is():
    given = [{"inputs": np.ones(1), "targets": np.ones(3)}, {"inputs": np.ones(1), "targets": np.ones(3)}]
    assert [len(row) for row in pack(given, {"inputs": 10, "targets": 5})] == [1, 1]
    assert [len(row) for row in pack(given, {"inputs": 10, "targets": 6})] == [2]


@pytest.mark.parametrize("seed", range(5))
def test_a_row_laid_out_can_be_taken_apart_again(seed):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(2, 100, rng.integers(1, 6)) for _ in range(rng.integers(0, 6))]
    used = sum(map(len, parts))
    tokens, segments, positions = lay_out(parts, used + 4)
    assert tokens.dtype == segments.dtype == positions.dtype == np.int32
    for number, part in enumerate(parts, start=1):
        np.testing.assert_array_equal(tokens[segments == number], part)
        np.testing.assert_array_equal(positions[segments == number], np.arange(len(part)))
    assert segments.max() == len(parts) and np.all(np.diff(segments[:used]) >= 0)
    for column in (tokens, segments, positions):
        np.testing.assert_array_equal(column[used:], 0)


def test_a_full_row_has_no_padding():
    tokens, segments, positions = lay_out([np.asarray([5, 6]), np.asarray([7])], 3)
    assert (tokens.tolist(), segments.tolist(), positions.tolist()) == ([5, 6, 7], [1, 1, 2], [0, 1, 0])


def test_shift_right_starts_each_example_anew():
    tokens, _, positions = lay_out([np.asarray([5, 6, 1]), np.asarray([7, 1])], 7)
    assert shift_right(tokens, positions, 3).tolist() == [3, 5, 6, 3, 7, 3, 3]
    whole, _, places = lay_out([np.asarray([5, 6, 1])], 3)
    assert shift_right(whole, places, 0).tolist() == [0, 5, 6]
    both = shift_right(np.stack([whole, whole[::-1]]), np.stack([places, places]), 0)
    assert both.tolist() == [[0, 5, 6], [0, 1, 6]]
