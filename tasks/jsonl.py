"""Bring your own data: a SeqIO task from JSON lines with ``inputs`` and ``targets``, without writing Python."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import seqio

from clp_jax.data.text_task import TextExample, register_text_task


def register(name: str, files: Mapping[str, str]) -> seqio.Task:
    """Registers a task that reads one JSON object a line.

    Args:
        name: of the SeqIO task.
        files: the file of each split; ``"train"`` is needed to train a vocabulary.

    Raises:
        ValueError: for a file that is missing, empty, not UTF-8, or has a line that is not an object with two strings.
    """
    if not files:
        raise ValueError(f"JSONL task {name!r} has no files: expected a mapping such as {{'train': 'train.jsonl'}}.")
    for split, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"JSONL task {name!r}: the file {path} of split {split!r} does not exist.")
    return register_text_task(name, lambda split: list(read_jsonl(files[split])), tuple(files))


def read_jsonl(path: str) -> Iterator[TextExample]:
    """The examples of a file, in order; blank lines are skipped.

    Raises:
        ValueError: naming the file and the line of what is wrong.
    """
    found = 0
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield _parse(raw, f"{path}, line {number}")
                found += 1
    if not found:
        raise ValueError(f'{path} holds no examples: expected one JSON object a line, with "inputs" and "targets".')


def _parse(raw: bytes, where: str) -> TextExample:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}): save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(record, dict):
        raise ValueError(f'{where} is {type(record).__name__}: expected an object with "inputs" and "targets".')
    for field in ("inputs", "targets"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise ValueError(f"{where}: {field!r} is {record.get(field)!r}, expected a string that is not empty.")
    return TextExample(inputs=record["inputs"], targets=record["targets"])
