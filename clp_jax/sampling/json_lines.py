"""JSON lines in, JSON lines out: bad lines are reported by number, the rest keep their order."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import Int
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.sampling.text import bucket, prompt_tokens

# Characters of a line that messages show.
_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a file: what is to be completed or scored.

    Attributes:
        number: from 1.
        given: what the line says, to be written with the answer.
        inputs: token ids of the prompt.
        targets: token ids of the completion; None where none is asked for.
    """

    number: int
    given: dict[str, Any]
    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a line may be.

    Attributes:
        vocab_size: ids are below it.
        inputs: tokens of a prompt at most; longer texts lose their end, and a warning says so; longer lists are refused.
        targets: tokens of a completion at most; longer ones are refused: their score would be another's.
        pad_id: refused in lists of ids: it would be read as padding.
    """

    vocab_size: int
    inputs: int
    targets: int
    pad_id: int


def read_lines(source: Path, vocabulary: Vocabulary | TokenIds, limits: Limits, *, with_targets: bool) -> list[Line]:
    """Reads a file; what is wrong with a line is printed with its number, and the rest go on.

    Args:
        source: JSON lines with ``inputs``, and ``targets`` where they are wanted: text, or lists of token ids.
        vocabulary: of the policy; texts become what it reads and writes (`Vocabulary.encode_prompt`, `encode_target`),
            lists are taken as they are.
        limits: of lengths and ids.
        with_targets: whether targets are read.

    Raises:
        ValueError: when no line is good.
    """
    lines = []
    for number, raw in enumerate(source.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            lines.append(_parse(number, raw, vocabulary, limits, with_targets, source))
        except (ValueError, KeyError, TypeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else error
            print(f"warning: {source}, line {number} was skipped: {what}", file=sys.stderr)
    if not lines:
        wanted = '"inputs" and "targets"' if with_targets else '"inputs"'
        raise ValueError(f"{source} has no good line: expected one JSON object a line, with {wanted}.")
    return lines


def _parse(
    number: int, raw: bytes, vocabulary: Vocabulary | TokenIds, limits: Limits, with_targets: bool, source: Path
) -> Line:
    given = _object(raw)
    if not isinstance(given, dict):
        raise ValueError("it is not a JSON object")
    inputs, targets = given["inputs"], given["targets"] if with_targets else None
    if isinstance(inputs, str):
        tokens, was_cut = prompt_tokens(vocabulary, inputs, limits.inputs)
        if was_cut:
            print(f"warning: {source}, line {number}: the prompt was cut to {limits.inputs} tokens.", file=sys.stderr)
    else:
        tokens = _check_ids("inputs", inputs, limits.inputs, limits)
    if isinstance(targets, str):
        targets = _check_ids("targets", vocabulary.encode_target(targets), limits.targets, limits)
    elif with_targets:
        targets = _check_ids("targets", targets, limits.targets, limits)
    keep = {name: given[name] for name in ("inputs", "targets") if name in given and (with_targets or name == "inputs")}
    return Line(number, keep, tuple(tokens), None if targets is None else tuple(targets))


def _object(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start + 1}: {_shown(raw)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not JSON ({error.msg[0].lower()}{error.msg[1:]} at character {error.colno}): {_shown(raw)}"
        ) from None
    except RecursionError:
        raise ValueError(f"it is not JSON that can be read (nested too deep): {_shown(raw)}") from None


def _shown(raw: bytes) -> str:
    """The start of a line, for messages."""
    text = raw.decode("utf-8", "backslashreplace").strip()
    return repr(text[:_SHOWN] + "..." if len(text) > _SHOWN else text)


def _check_ids(name: str, ids: Any, longest: int, limits: Limits) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{name} is {json.dumps(ids)[:40]}: expected text, or a list of token ids")
    if not ids:
        raise ValueError(f"{name} is empty")
    if len(ids) > longest:
        raise ValueError(f"{name} has {len(ids)} tokens: expected at most {longest}")
    bad = [i for i in ids if not 0 <= i < limits.vocab_size or (name == "inputs" and i == limits.pad_id)]
    if bad:
        what = "padding" if bad[0] == limits.pad_id else f"outside the vocabulary of {limits.vocab_size}"
        raise ValueError(f"{name} has the token id {bad[0]}, which is {what}")
    return ids


def batches(lines: Sequence[Line], batch_size: int) -> Iterator[list[Line]]:
    """Requests of like lengths together, so that few programs serve all and little is padding.

    Order is up to who writes the answers; every line is in one batch.
    """
    by_shape: dict[tuple[int, int], list[Line]] = {}
    for line in lines:
        shape = bucket(len(line.inputs)), bucket(len(line.targets or ()))
        by_shape.setdefault(shape, []).append(line)
    for group in by_shape.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def pad_rows(rows: Sequence[Sequence[int]], batch_size: int, pad_id: int) -> Int[np.ndarray, "B S"]:
    """Rows of ids as an array of one bucketed length; a batch that is not full repeats its last row."""
    out = np.full((batch_size, bucket(max(map(len, rows)))), pad_id, np.int32)
    for number in range(batch_size):
        row = rows[min(number, len(rows) - 1)]
        out[number, : len(row)] = row
    return out


@contextlib.contextmanager
def answers(output: str | Path | None) -> Iterator["Answers"]:
    """Where answers go: a new file, complete or, when interrupted, up to the first unanswered line; or the terminal."""
    if output is None:
        yield Answers(sys.stdout)
        return
    with Path(output).open("x", encoding="utf-8") as file:
        yield Answers(file)


class Answers:
    """Writes answers into a text file in the order of their lines, each as soon as all before it are written."""

    def __init__(self, file: Any):
        self._file = file
        self._waiting: dict[int, dict[str, Any]] = {}
        self._order: list[int] = []

    def expect(self, lines: Sequence[Line]) -> None:
        """The lines to come, in order."""
        self._order = [line.number for line in lines]

    def put(self, line: Line, answer: dict[str, Any]) -> None:
        """Takes one answer."""
        self._waiting[line.number] = {"line": line.number} | line.given | answer
        while self._order and self._order[0] in self._waiting:
            self._file.write(json.dumps(self._waiting.pop(self._order.pop(0))) + "\n")
        self._file.flush()
