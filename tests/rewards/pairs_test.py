"""Training pairs of reward models: each corruption by its definition, and all of it a function of seed and ids."""

import collections
import functools

import numpy as np
import pytest

from clp_jax.data.vocabulary import EOS_ID, PAD_ID
from clp_jax.rewards import pairs
from clp_jax.rewards.pairs import CORRUPTIONS, Corrupter, derangement, join

LENGTH = 16

content = functools.partial(pairs.content, pad_id=PAD_ID, eos_ids=(EOS_ID,))
finish = functools.partial(pairs.finish, pad_id=PAD_ID, eos_id=EOS_ID)


def corrupter(kinds, seed=0) -> Corrupter:
    return Corrupter(kinds, PAD_ID, (EOS_ID,), seed)


def corrupt(corrupter, true, ids) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a batch, and the kind of each."""
    draws = corrupter.draw(ids)
    return corrupter(true, true[draws.others], draws), draws.kinds


def tokens(*values) -> np.ndarray:
    return np.asarray(values, np.int32)


def summaries(seed=0, rows=40, shortest=1, longest=LENGTH - 1) -> np.ndarray:
    """Rows of different tokens, each ending in its own; row `i` uses tokens from ``100·i`` on."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            finish(100 * (i + 1) + rng.permutation(50)[: rng.integers(shortest, longest + 1)], LENGTH)
            for i in range(rows)
        ]
    )


@pytest.mark.parametrize("count", [2, 3, 4, 17])
def test_a_derangement_is_one_cycle(count):
    seen = set()
    for seed in range(60):
        result = derangement(count, np.random.default_rng(seed))
        place, steps = int(result[0]), 1
        while place != 0:
            place, steps = int(result[place]), steps + 1
        assert steps == count
        seen.add(tuple(result.tolist()))
    if count <= 4:
        assert len(seen) == {2: 1, 3: 2, 4: 6}[count]


def test_one_element_cannot_move():
    with pytest.raises(ValueError, match="derangement of 1 elements: expected at least 2"):
        derangement(1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("row", "expected"),
    [((5, 6, 1, 0), (5, 6)), ((5, 6, 0, 0), (5, 6)), ((5, 6, 7, 8), (5, 6, 7, 8)), ((1, 0), ()), ((0, 0), ())],
)
def test_content_ends_before_the_end(row, expected):
    assert content(tokens(*row)).tolist() == list(expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((5, 6), (5, 6, 1, 0)),
        ((5, 6, 7), (5, 6, 7, 1)),
        ((5, 6, 7, 8), (5, 6, 8, 1)),
        (range(5, 25), (5, 6, 24, 1)),
        ((), (1, 0, 0, 0)),
    ],
)
def test_a_finished_row_has_its_last_token_and_an_end(row, expected):
    assert finish(np.asarray(list(row), np.int64), 4).tolist() == list(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 30])
def test_each_corruption_does_what_it_says(size):
    true, other = np.arange(100, 100 + size), np.arange(500, 507)
    changed = collections.Counter()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        bad = {kind: function(true, other, rng).tolist() for kind, function in CORRUPTIONS.items()}
        assert bad["foreign"] == other.tolist()
        assert bad["truncate"] == true[: len(bad["truncate"])].tolist() and 1 <= len(bad["truncate"]) <= max(
            1, 0.7 * size
        )
        assert sorted(bad["shuffle"]) == true.tolist()
        replaced = [a != b for a, b in zip(bad["swap"], true, strict=True)]
        assert any(replaced) and set(bad["swap"]) <= {*true.tolist(), *other.tolist()}
        runs = _repeated(bad["repeat"], true.tolist())
        assert runs is not None and 3 <= runs <= 5
        kept = max(1, int(0.3 * size))
        assert bad["ramble"][:kept] == true[:kept].tolist() and kept + 3 <= len(bad["ramble"]) <= size + 14
        assert set(bad["ramble"]) <= {*true.tolist(), *other.tolist()}
        changed["swap"] += sum(replaced)
    assert changed["swap"] / (100 * size) > 0.34


def _repeated(bad: list[int], true: list[int]) -> int | None:
    """How many times over a run of `true` stands in `bad`, where the rest is as it was."""
    for start in range(len(true)):
        for size in range(1, len(true) - start + 1):
            for times in range(3, 6):
                if bad == true[:start] + true[start : start + size] * times + true[start + size :]:
                    return times
    return None


@pytest.mark.parametrize("kinds", [(kind,) for kind in CORRUPTIONS] + [tuple(CORRUPTIONS)], ids="-".join)
def test_no_true_summary_survives(kinds):
    for seed in range(6):
        true = summaries(seed, longest=LENGTH - 1 if seed % 2 else 3)
        bad, kind = corrupt(corrupter(kinds, seed), true, np.arange(len(true)))
        assert bad.shape == true.shape and bad.dtype == np.int32
        assert not np.any(np.all(bad == true, axis=1))
        assert set(kind.tolist()) == set(range(len(kinds)))
        for row in bad:
            ends = np.flatnonzero(row == EOS_ID)
            assert len(ends) == 1 and np.all(row[: ends[0]] > EOS_ID) and np.all(row[ends[0] + 1 :] == PAD_ID)


def test_the_last_token_stays():
    true = summaries(1, shortest=4, longest=10)
    for kind in ("swap", "truncate", "shuffle", "repeat", "ramble"):
        bad, _ = corrupt(corrupter((kind,), 3), true, np.arange(len(true)))
        for row, original in zip(bad, true, strict=True):
            last = content(row)[-1]
            own = last // 100 == content(original)[-1] // 100
            # Unless nothing changed, and another summary took its place.
            assert last == content(original)[-1] or not own
        assert np.mean([content(a)[-1] == content(b)[-1] for a, b in zip(bad, true, strict=True)]) > 0.9


def test_kinds_say_what_happened():
    true = summaries(2, rows=60, shortest=5, longest=8)
    bad, kind = corrupt(corrupter(("foreign", "shuffle"), 0), true, np.arange(60))
    for row, original, index in zip(bad, true, kind, strict=True):
        own = set(content(row)[:-1] // 100) == set(content(original) // 100)
        assert own == (index == 1)


def test_it_is_a_function_of_the_seed_and_the_ids():
    true, ids = summaries(), np.arange(40) + 7
    kinds = tuple(CORRUPTIONS)
    first = corrupt(corrupter(kinds, 5), true, ids)
    np.random.seed(0)  # noqa: NPY002 (global state must not matter)
    for again in (corrupt(corrupter(kinds, 5), true, ids), corrupt(corrupter(kinds, 5), true.copy(), ids.tolist())):
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])
    for other in (corrupt(corrupter(kinds, 6), true, ids), corrupt(corrupter(kinds, 5), true, ids + 1)):
        assert not np.array_equal(other[0], first[0])


def test_rows_by_themselves_are_those_of_the_whole_batch():
    true, ids = summaries(rows=12), np.arange(12) + 3
    made = corrupter(tuple(CORRUPTIONS), 2)
    whole, draws = corrupt(made, true, ids)[0], made.draw(ids)
    assert sorted(draws.others) == list(range(12)) and not np.any(draws.others == np.arange(12))
    for mine in (np.arange(4), np.asarray([1, 5, 11])):
        part = draws[mine]
        np.testing.assert_array_equal(made(true[mine], true[part.others], part), whole[mine])


def test_rows_that_fill_a_batch_up_change_nothing():
    ids = np.arange(9)
    made = corrupter(tuple(CORRUPTIONS), 2)
    draws, filled = made.draw(ids), made.draw(np.append(ids, [-1, -1]))
    for name in ("others", "kinds", "seeds"):
        np.testing.assert_array_equal(getattr(filled, name)[:9], getattr(draws, name))
    assert filled.others[9:].tolist() == [9, 10]
    empty = finish(tokens(), LENGTH)[None]
    np.testing.assert_array_equal(made(empty, empty, filled[np.asarray([9])]), empty)


@pytest.mark.parametrize("kinds", [(), ("swap", "swop")])
def test_unknown_kinds_are_named(kinds):
    with pytest.raises(ValueError, match=r"Corrupter.kinds has (nothing|\['swop'\]): expected some of foreign, swap"):
        corrupter(kinds)


def test_a_joined_row_tells_document_summary_and_padding_apart():
    joined, kinds = join(tokens(5, 6, 1, 0)[None], tokens(7, 1, 0)[None], PAD_ID)
    assert joined.tolist() == [[5, 6, 1, 0, 7, 1, 0]]
    assert kinds.tolist() == [[1, 1, 1, 0, 2, 2, 0]]
    assert joined.dtype == kinds.dtype == np.int32


def test_ids_are_the_vocabularys():
    """The same summaries under other ids: padding 9, ends 7 and 8; then padding without an id."""
    ours = summaries(rows=12)
    theirs = np.where(ours == PAD_ID, 9, np.where(ours == EOS_ID, 7, ours))
    for pad_id in (9, -1):
        theirs = np.where(theirs == 9, pad_id, theirs)
        bad, kinds = corrupt(corrupter(tuple(CORRUPTIONS), 3), ours, np.arange(12))
        other, same = corrupt(Corrupter(tuple(CORRUPTIONS), pad_id, (7, 8), 3), theirs, np.arange(12))
        np.testing.assert_array_equal(kinds, same)
        np.testing.assert_array_equal(other, np.where(bad == PAD_ID, pad_id, np.where(bad == EOS_ID, 7, bad)))
    assert pairs.content(tokens(5, 0, 1, 8, 9), 9, (7, 8)).tolist() == [5, 0, 1]
    _, kinds = join(tokens(5, 0, 9)[None], tokens(1, -1)[None], 9)
    assert kinds.tolist() == [[1, 1, 0, 2, 0]]
