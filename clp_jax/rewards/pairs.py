"""Training pairs of reward models: true summaries against summaries of other documents and against corrupted ones.

Everything works on token ids, and is a function of the seed and the example ids alone. What happens to a row is drawn from the
ids of its batch before anything is read, so that a process reads its own rows and those that these are exchanged with.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from clp_jax.array_types import Int


def derangement(count: int, rng: np.random.Generator) -> Int[np.ndarray, "B"]:
    """A random cyclic permutation: no element stays in place; `count` at least 2."""
    if count < 2:
        raise ValueError(f"derangement of {count} elements: expected at least 2.")
    order = rng.permutation(count)
    result = np.empty(count, np.int64)
    result[order] = np.roll(order, 1)
    return result


def content(tokens: Int[np.ndarray, "T"], pad_id: int, eos_ids: Sequence[int]) -> Int[np.ndarray, "L"]:
    """The tokens before the end of sequence and the padding."""
    stop = np.flatnonzero(np.isin(tokens, (*eos_ids, pad_id)))
    return tokens[: stop[0]] if stop.size else tokens


def finish(tokens: np.ndarray, length: int, pad_id: int, eos_id: int) -> Int[np.ndarray, "T"]:
    """A row of `length`: the tokens, cut before the last if need be, an end of sequence, padding."""
    row = np.full(length, pad_id, np.int32)
    if len(tokens) > length - 1:
        tokens = np.append(tokens[: length - 2], tokens[-1])
    row[: len(tokens)] = tokens
    row[len(tokens)] = eos_id
    return row


def truncate(tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The first part, at most 70 % of the tokens."""
    return tokens[: max(1, int(len(tokens) * rng.uniform(0.1, 0.7)))]


def repeat(tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A run of the tokens several times over."""
    size = int(rng.integers(1, 1 + max(1, len(tokens) // 2)))
    start = int(rng.integers(0, len(tokens) - size + 1))
    run = tokens[start : start + size]
    times = int(rng.integers(2, 5))
    return np.concatenate([tokens[: start + size], *[run] * times, tokens[start + size :]])


def swap(tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third or more of the tokens replaced by tokens of another summary, as a wrong name would be."""
    chosen = rng.random(len(tokens)) < rng.uniform(0.34, 0.7)
    chosen[rng.integers(len(tokens))] = True
    return np.where(chosen, rng.choice(other, len(tokens)), tokens)


def shuffle(tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The tokens in another order."""
    return rng.permutation(tokens)


def ramble(tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The true summary, or its beginning, run on with tokens of another one in any order."""
    kept = tokens[: max(1, int(len(tokens) * rng.uniform(0.3, 1.0)))]
    pool = np.concatenate([tokens, other])
    return np.concatenate([kept, rng.choice(pool, int(rng.integers(3, 15)))])


def foreign(tokens: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The summary of another document."""
    return other


CORRUPTIONS = {
    "foreign": foreign,
    "swap": swap,
    "truncate": truncate,
    "repeat": repeat,
    "shuffle": shuffle,
    "ramble": ramble,
}


@dataclasses.dataclass(frozen=True)
class Draws:
    """What happens to each summary of a batch: a function of the seed and the example ids alone.

    Attributes:
        others: ``int64[B]``, the row whose summary it is exchanged or mixed with, never its own.
        kinds: ``int64[B]``, the corruption, an index into `Corrupter.kinds`.
        seeds: ``int64[B]``, of what the corruption leaves to chance.
    """

    others: Int[np.ndarray, "B"]
    kinds: Int[np.ndarray, "B"]
    seeds: Int[np.ndarray, "B"]

    def __getitem__(self, rows: Int[np.ndarray, "N"]) -> "Draws":
        """Those of some rows; `others` are still rows of the batch."""
        return Draws(self.others[rows], self.kinds[rows], self.seeds[rows])


@dataclasses.dataclass(frozen=True)
class Corrupter:
    """Makes a bad summary of a good one.

    Attributes:
        kinds: names in `CORRUPTIONS`, chosen from with equal probability.
        pad_id: fills summaries up, the vocabulary's.
        eos_ids: end summaries, the vocabulary's; the first is written.
        seed: with the examples' ids decides everything.
    """

    kinds: tuple[str, ...]
    pad_id: int
    eos_ids: tuple[int, ...]
    seed: int = 0

    def __post_init__(self):
        unknown = [kind for kind in self.kinds if kind not in CORRUPTIONS]
        if unknown or not self.kinds:
            raise ValueError(f"Corrupter.kinds has {unknown or 'nothing'}: expected some of {', '.join(CORRUPTIONS)}.")

    def draw(self, example_ids: Sequence[int] | np.ndarray) -> "Draws":
        """What happens to each summary of a batch, before any of them is read.

        Args:
            example_ids: of the whole batch; those below 0 stand for empty rows, which stay alone.
        """
        ids = np.asarray(example_ids).astype(np.int64)
        real = np.flatnonzero(ids >= 0)
        rng = np.random.default_rng([self.seed, *ids[real].tolist()])
        others, kinds, seeds = np.arange(len(ids)), np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        others[real] = real[derangement(len(real), rng)]
        kinds[real] = rng.integers(0, len(self.kinds), len(real))
        seeds[real] = rng.integers(0, 2**63, len(real))
        return Draws(others, kinds, seeds)

    def __call__(
        self, summaries: Int[np.ndarray, "B T"], others: Int[np.ndarray, "B T"], draws: "Draws"
    ) -> Int[np.ndarray, "B T"]:
        """A corrupted summary for each true one.

        Args:
            summaries: true summaries, any rows of a batch.
            others: the true summary of another document for each of them.
            draws: of these rows.

        Returns:
            Corrupted summaries; what a corruption leaves as it was is replaced by the other summary.
        """
        rows = []
        length = summaries.shape[1]
        for row, other, kind, seed in zip(summaries, others, draws.kinds, draws.seeds, strict=True):
            tokens, foreign_tokens = (content(each, self.pad_id, self.eos_ids) for each in (row, other))
            bad = self._finish(self._corrupt(tokens, foreign_tokens, int(kind), np.random.default_rng(seed)), length)
            # A short summary may survive its corruption, and a long one loses what was added to it.
            survived = np.array_equal(bad, self._finish(tokens, length))
            rows.append(self._finish(foreign_tokens, length) if survived else bad)
        return np.stack(rows).astype(np.int32)

    def _finish(self, tokens: np.ndarray, length: int) -> Int[np.ndarray, "T"]:
        return finish(tokens, length, self.pad_id, self.eos_ids[0])

    def _corrupt(self, tokens: np.ndarray, other: np.ndarray, kind: int, rng: np.random.Generator) -> np.ndarray:
        if len(tokens) < 2 or len(other) < 2:
            return other
        # The last token, a full stop more often than not, stays last: a scorer must not learn to look for it alone.
        bad = CORRUPTIONS[self.kinds[kind]](tokens[:-1], other[:-1], rng)
        return np.append(bad, tokens[-1])


def join(
    documents: Int[np.ndarray, "B S"], summaries: Int[np.ndarray, "B T"], pad_id: int
) -> tuple[Int[np.ndarray, "B U"], Int[np.ndarray, "B U"]]:
    """A scorer's input: document and summary side by side, each with its padding, ``U = S + T``.

    Args:
        documents: token ids.
        summaries: token ids.
        pad_id: of the vocabulary; ids below 0 are padding too, of policies without a token for it.

    Returns:
        Tokens, and kinds: 1 on the document, 2 on the summary, 0 on padding.
    """
    tokens = np.concatenate([documents, summaries], axis=1)
    real = (tokens >= 0) & (tokens != pad_id)
    kinds = np.where(real, np.repeat([[1, 2]], [documents.shape[1], summaries.shape[1]], axis=1), 0)
    return tokens.astype(np.int32), kinds.astype(np.int32)
