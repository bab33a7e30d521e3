"""JSON lines in, JSON lines out: bad lines are reported by number, the rest keep their order."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import Int
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.sampling.text import alike, bucket, prompt_tokens

# Characters of a line that messages show.
_SHOWN = 40
# Completions of a line: each is a row of Python's before the first is computed.
_MOST_SAMPLES = 2**16


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a file: what is to be completed or scored.

    Attributes:
        number: from 1.
        given: what the line says, to be written with the answer.
        inputs: token ids of the prompt.
        targets: token ids of the completion; None where none is asked for.
        seed: what the line says of it, in [0, 2**32); None where it says nothing.
        num_samples: completions that the line asks for; None where it says nothing.
        max_tokens: of a completion at most, as the line asks for; None where it says nothing.
        stop: texts and sequences of token ids that end the line's completions.
    """

    number: int
    given: dict[str, Any]
    inputs: tuple[int, ...]
    targets: tuple[int, ...] | None
    seed: int | None = None
    num_samples: int | None = None
    max_tokens: int | None = None
    stop: tuple[str | tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a line may be.

    Attributes:
        vocab_size: ids are below it.
        inputs: tokens of a prompt at most; longer lists are refused, and longer texts are cut with a warning or refused, as
            `prompt_tokens` says.
        targets: tokens of a completion at most; longer ones are refused: their score would be another's.
        pad_id: refused in prompts: it would be read as padding.
        completion: tokens that a line may ask for, at least and at most; None where all lines are completed alike, as by a
            search, and may ask for nothing of their own.
    """

    vocab_size: int
    inputs: int
    targets: int
    pad_id: int
    completion: tuple[int, int] | None = None


class Skipped:
    """Lines without an answer: each is reported when it is found, their number at the end.

    Args:
        source: whose lines they are.
    """

    def __init__(self, source: Path):
        self._source = source
        self.count = 0

    def report(self, number: int, what: object) -> None:
        """Prints what is wrong with a line."""
        self.count += 1
        print(f"warning: {self._source}, line {number} was skipped: {what}", file=sys.stderr)

    def finish(self) -> None:
        """Says how many there were.

        Raises:
            SystemExit: with 1, where there was one: what was asked for is not all there.
        """
        if self.count:
            lines = "1 line was" if self.count == 1 else f"{self.count} lines were"
            print(f"{self._source}: {lines} skipped; the others have their answers.", file=sys.stderr)
            raise SystemExit(1)


def read_lines(
    source: Path, vocabulary: Vocabulary | TokenIds, limits: Limits, skipped: Skipped, *, with_targets: bool
) -> list[Line]:
    """Reads a file; what is wrong with a line is printed with its number, and the rest go on.

    Args:
        source: JSON lines with ``inputs``, and ``targets`` where they are wanted: text, or lists of token ids.
        vocabulary: of the policy; texts become what it reads and writes (`Vocabulary.encode_prompt`, `encode_target`),
            lists are taken as they are.
        limits: of lengths and ids.
        skipped: is told of bad lines.
        with_targets: whether targets are read; where not, a line may have a ``seed``, and its own ``num_samples``,
            ``max_tokens`` and ``stop``: a text, or a list of texts and of lists of token ids.

    Raises:
        ValueError: when it is not a file, or no line is good.
    """
    if source.is_dir():
        raise ValueError(f"{source} is a directory: expected a file of JSON lines.")
    lines = []
    for number, raw in enumerate(source.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            lines.append(_parse(number, raw, vocabulary, limits, with_targets, source))
        except (ValueError, KeyError, TypeError) as error:
            skipped.report(number, f"it has no {error}" if isinstance(error, KeyError) else error)
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
    was_cut = False
    if isinstance(inputs, str):
        inputs, was_cut = prompt_tokens(vocabulary, inputs, limits.inputs)
    check_prompt(inputs, limits)
    if isinstance(targets, str):
        targets = vocabulary.encode_target(targets)
    if with_targets:
        _check_ids("targets", targets, limits.targets, "--max_tokens", limits.vocab_size)
    if was_cut:
        print(f"warning: {source}, line {number}: the prompt was cut to {limits.inputs} tokens.", file=sys.stderr)
    if with_targets:
        return Line(number, given, tuple(inputs), tuple(targets or ()))
    return Line(number, given, tuple(inputs), None, **_wishes(given, limits))


def _wishes(given: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """What a line says of how it is completed; null says nothing, as in many a tool's output."""
    seed, num_samples, max_tokens, stop = (given.get(name) for name in ("seed", "num_samples", "max_tokens", "stop"))
    _check_number("seed", seed, 0, 2**32 - 1, "in [0, 2**32)")
    if limits.completion is None:
        named = [name for name in ("num_samples", "max_tokens", "stop") if given.get(name) is not None]
        if named:
            raise ValueError(f"it has {named[0]}, but a search completes all lines alike: give flags, or leave it out")
        return {"seed": seed}
    least, most = limits.completion
    _check_number("num_samples", num_samples, 1, _MOST_SAMPLES, f"in [1, {_MOST_SAMPLES}]")
    _check_number("max_tokens", max_tokens, least, most, f"in [{least}, {most}], from --min_tokens to --max_tokens")
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop or [], list):
        raise ValueError(
            f"stop is {json.dumps(stop)[:_SHOWN]}: expected a text, or a list of texts and lists of token ids"
        )
    for end in stop or ():
        if (
            not isinstance(end, str | list)
            or not end
            or (isinstance(end, list) and not all(type(i) is int for i in end))
        ):
            raise ValueError(f"stop has {json.dumps(end)[:_SHOWN]}: expected texts and lists of token ids, none empty")
        _check_vocabulary("stop", end if isinstance(end, list) else [], limits.vocab_size)
    ends = tuple(end if isinstance(end, str) else tuple(end) for end in stop or ())
    return {"seed": seed, "num_samples": num_samples, "max_tokens": max_tokens, "stop": ends}


def _check_number(name: str, value: Any, least: int, most: int, expected: str) -> None:
    if value is not None and not (type(value) is int and least <= value <= most):
        raise ValueError(f"{name} is {json.dumps(value)[:_SHOWN]}: expected a whole number {expected}")


def _object(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start + 1}: {_shown(raw)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not JSON ({error.msg[0].lower()}{error.msg[1:]} at character {error.colno}): {_shown(raw)}"
        ) from None
    except RecursionError:
        raise ValueError(f"it is not JSON that can be read (nested too deep): {_shown(raw)}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text[:_SHOWN]}: expected finite ones")
    return value


def _shown(raw: bytes) -> str:
    """The start of a line, for messages."""
    text = raw.decode("utf-8", "backslashreplace").strip()
    return repr(text[:_SHOWN] + "..." if len(text) > _SHOWN else text)


def check_prompt(ids: Any, limits: Limits) -> None:
    """Checks the token ids of a prompt, given as such or made of a text.

    Raises:
        ValueError: when they are too many, outside the vocabulary, or padding.
    """
    _check_ids("inputs", ids, limits.inputs, "--max_prompt", limits.vocab_size)
    if limits.pad_id in ids:
        raise ValueError(f"inputs has the token id {limits.pad_id}, which is padding")


def _check_ids(name: str, ids: Any, longest: int, flag: str, vocab_size: int) -> None:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{name} is {json.dumps(ids)[:_SHOWN]}: expected text, or a list of token ids")
    if not ids:
        raise ValueError(f"{name} is empty")
    if len(ids) > longest:
        raise ValueError(f"{name} has {len(ids)} tokens: expected at most {longest}; give a greater {flag}, or cut it")
    _check_vocabulary(name, ids, vocab_size)


def _check_vocabulary(name: str, ids: Sequence[int], vocab_size: int) -> None:
    bad = [i for i in ids if not 0 <= i < vocab_size]
    if bad:
        raise ValueError(f"{name} has the token id {bad[0]}, which is outside the vocabulary of {vocab_size}")


def batches(lines: Sequence[Line], batch_size: int) -> Iterator[list[Line]]:
    """Lines of like lengths together (`alike`).

    Order is up to who writes the answers; every line is in one batch.
    """
    for part in alike([(len(line.inputs), len(line.targets or ())) for line in lines], batch_size):
        yield [lines[number] for number in part]


def pad_rows(rows: Sequence[Sequence[int]], batch_size: int, pad_id: int) -> Int[np.ndarray, "B S"]:
    """Rows of ids as an array of one bucketed length; where they are less than `batch_size`, the last is repeated."""
    out = np.full((batch_size, bucket(max(map(len, rows)))), pad_id, np.int32)
    for number in range(batch_size):
        row = rows[min(number, len(rows) - 1)]
        out[number, : len(row)] = row
    return out


@contextlib.contextmanager
def answers(output: str | Path | None, skipped: Skipped) -> Iterator["Answers"]:
    """Where answers go: a new file, complete or, when interrupted, up to the first unanswered line; or the terminal."""
    if output is None:
        yield Answers(sys.stdout, skipped)
        return
    with Path(output).open("x", encoding="utf-8") as file:
        yield Answers(file, skipped)


class Answers:
    """Writes answers into a text file in the order of their lines, each as soon as all before it are written.

    Args:
        file: that is written.
        skipped: is told of lines whose answers are no numbers.
    """

    def __init__(self, file: Any, skipped: Skipped):
        self._file, self._skipped = file, skipped
        self._waiting: dict[int, str | None] = {}
        self._order: list[int] = []

    def expect(self, lines: Sequence[Line]) -> None:
        """The lines to come, in order."""
        self._order = [line.number for line in lines]

    def put(self, line: Line, answer: dict[str, Any]) -> None:
        """Takes one answer; what the line says is written with it, up to what has the name of an answer's part."""
        number = {"line": line.number}
        try:
            self._waiting[line.number] = json.dumps(number | line.given | number | answer, allow_nan=False)
        except ValueError:
            self._skipped.report(line.number, "what was found is not finite: the policy gave NaN or infinity")
            self._waiting[line.number] = None
        while self._order and self._order[0] in self._waiting:
            written = self._waiting.pop(self._order.pop(0))
            if written is not None:
                self._file.write(written + "\n")
        self._file.flush()
