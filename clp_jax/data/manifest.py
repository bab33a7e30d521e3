"""What a prepared data set is: written last, checked before anything is read."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records.

    Attributes:
        name: within the directory.
        records: rows in it.
        size: bytes.
        sha256: of the file.
    """

    name: str
    records: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        examples: before packing.
        records: rows; as many as examples unless packed.
        shards: the files.
        statistics: by feature: mean, percentiles and maximum of the tokens before truncation, and the share truncated.
    """

    examples: int
    records: int
    shards: tuple[Shard, ...]
    statistics: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    Attributes:
        task: the SeqIO task or mixture.
        lengths: tokens of a row by feature.
        packed: whether rows hold several examples.
        vocabulary_size: tokens of the vocabulary.
        vocabulary_fingerprint: SHA-256 of its file.
        request: what was asked for, to recognise the same request again.
        fingerprint: of task, features, vocabulary and every token.
        splits: by name.
    """

    task: str
    lengths: dict[str, int]
    packed: bool
    vocabulary_size: int
    vocabulary_fingerprint: str
    request: dict[str, Any]
    fingerprint: str
    splits: dict[str, Split]

    def save(self, directory: Path) -> None:
        """Writes the manifest."""
        content = {"version": VERSION} | dataclasses.asdict(self)
        (directory / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Reads the manifest of a prepared directory.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged or of another version.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} is not a prepared data set (no {FILE_NAME}): run `clp prepare` first."
            )
        try:
            content = json.loads(path.read_text())
            version = content.pop("version")
            splits = {
                name: Split(**(split | {"shards": tuple(Shard(**shard) for shard in split["shards"])}))
                for name, split in content.pop("splits").items()
            }
            if version != VERSION:
                raise ValueError(f"version {version}, expected {VERSION}")
            return cls(splits=splits, **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} can't be read ({error}): prepare the data again into another directory."
            ) from None

    def verify(self, directory: str | Path, split: str, contents: bool = False) -> None:
        """Checks that the files of a split are there and whole.

        Args:
            directory: of the prepared data.
            split: its name.
            contents: hash every byte as well, instead of comparing sizes only.

        Raises:
            ValueError: naming the split or the file that is wrong.
        """
        if split not in self.splits:
            raise ValueError(f"{directory} has no split {split!r}: it has {', '.join(self.splits)}.")
        for shard in self.splits[split].shards:
            path = Path(directory) / shard.name
            if not path.is_file():
                raise ValueError(f"shard {path} is missing: prepare the data again.")
            size = path.stat().st_size
            if size != shard.size:
                raise ValueError(f"shard {path} has {size} bytes, {shard.size} were written: prepare the data again.")
            if contents and file_digest(path) != shard.sha256:
                raise ValueError(f"shard {path} has other contents than were written: prepare the data again.")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
