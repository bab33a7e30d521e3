"""Bring your own data: a SeqIO task from JSON lines with ``inputs`` and ``targets``, without writing Python."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clp_jax.data.text_task import TextExample, register_text_task


@dataclasses.dataclass(frozen=True)
class Jsonl:
    """A task that reads one JSON object a line; bind it in gin.

    Attributes:
        name: of the SeqIO task.
        files: the file of each split.

    Raises:
        ValueError: for a file that is missing.
    """

    name: str
    files: Mapping[str, str]

    def __post_init__(self):
        if not self.files:
            raise ValueError(
                f"JSONL task {self.name!r} has no files: expected a mapping such as {{'train': 'train.jsonl'}}."
            )
        for split, path in self.files.items():
            if not Path(path).is_file():
                raise ValueError(f"JSONL task {self.name!r}: the file {path} of split {split!r} does not exist.")

    def register(self) -> str:
        """See `clp_jax.data.text_task.TextTask`; a mistake in a file is found when its split is read."""
        register_text_task(self.name, lambda split: list(read_jsonl(self.files[split])), tuple(self.files))
        return self.name

    def describe(self) -> dict[str, Any]:
        """The name, and what the files hold."""
        digests = {split: hashlib.sha256(Path(path).read_bytes()).hexdigest() for split, path in self.files.items()}
        return {"task": self.name, "files": digests}


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
        record = json.loads(raw.decode("utf-8-sig"))  # Some editors begin a file with a byte order mark.
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}): save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}.") from None
    if not isinstance(record, dict):
        raise ValueError(f'{where} is {type(record).__name__}: expected an object with "inputs" and "targets".')
    for field in ("inputs", "targets"):
        if field not in record:
            raise ValueError(f"{where} has no {field!r}: its names are {', '.join(map(repr, record)) or 'none'}.")
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise ValueError(f"{where}: {field!r} is {record.get(field)!r}, expected a string that is not empty.")
        try:
            record[field].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: {field!r} has half a character (a surrogate) at {error.start}.") from None
    return TextExample(inputs=record["inputs"], targets=record["targets"])
