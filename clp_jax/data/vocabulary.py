"""SentencePiece without TensorFlow: the same ids as `seqio.SentencePieceVocabulary` of the same model file."""

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from clp_jax.array_types import Int

FILE_NAME = "vocabulary.model"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


class Vocabulary:
    """Text to token ids and back.

    Args:
        path: a SentencePiece model file.

    Raises:
        ValueError: when it is not one, or has other special tokens than T5's.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}): give another file.") from None
        ids = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if ids != (PAD_ID, EOS_ID, UNK_ID):
            raise ValueError(
                f"{path}: padding, end and unknown tokens are {ids}: expected T5's {PAD_ID, EOS_ID, UNK_ID}."
            )

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a model file, or the one in a prepared or run directory.

        Raises:
            FileNotFoundError: when there is none.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no vocabulary at {file}: expected a prepared data directory or a run directory.")
        return cls(file)

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file."""
        return hashlib.sha256(self._path.read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids, without an end of sequence.

        Raises:
            ValueError: for text with bytes that were not UTF-8 (surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {text[:40]!r} is not UTF-8 at character {error.start}.") from None
        return self._processor.encode(text)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text up to the first end of sequence; padding is left out."""
        return self._processor.decode(self._visible(np.asarray(tokens)))

    def decode_batch(self, tokens: Int[np.ndarray, "B T"]) -> list[str]:
        """The text of every row."""
        rows = [self._visible(row) for row in np.asarray(tokens)]
        return self._processor.decode(rows) if rows else []

    def save(self, directory: str | Path) -> Path:
        """Copies the model file into a directory."""
        target = Path(directory) / FILE_NAME
        if not target.exists() or not target.samefile(self._path):
            shutil.copyfile(self._path, target)
        return target

    def _visible(self, tokens: np.ndarray) -> list[int]:
        ends = np.flatnonzero(tokens == EOS_ID)
        tokens = tokens[: ends[0]] if ends.size else tokens
        return tokens[(tokens != PAD_ID) & (tokens < self.size)].tolist()


def train_vocabulary(texts: Sequence[str], size: int, path: Path) -> None:
    """Trains a unigram SentencePiece model with T5's special tokens, deterministically.

    Args:
        texts: at least one line of text.
        size: tokens in all.
        path: where the model file goes.

    Raises:
        ValueError: when there is no text, or too little for so many tokens.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("no text to train a vocabulary on: the training split is empty.")
    try:
        with path.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=file,
                vocab_size=size,
                model_type="unigram",
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                unk_surface=" ? ",
                max_sentence_length=100_000,
                num_threads=1,  # With more the model depends on their number.
                minloglevel=2,
            )
    except RuntimeError as error:
        # SentencePiece says how many there can be at most, or at least, at the end of a longer message.
        most, least = re.search(r"value <= (\d+)", str(error)), re.search(rf"{size} vs (\d+)", str(error))
        reason = f"at most {most[1]}" if most else f"at least {least[1]}" if least else str(error).splitlines()[-1]
        raise ValueError(
            f"no vocabulary of {size} tokens can be trained on {len(lines)} lines of text: {reason}. Set vocabulary_size "
            "(VOCAB_SIZE in the gin files), or bring other text."
        ) from None
