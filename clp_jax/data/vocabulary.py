"""Text to token ids and back: SentencePiece models and Hugging Face's tokenizers, without TensorFlow.

A SentencePiece model has the same ids as `seqio.SentencePieceVocabulary` of the same file, a tokenizer of Hugging Face the
same as their `AutoTokenizer` of the same directory.
"""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from clp_jax.array_types import Int
from clp_jax.data.special_tokens import Settings, SpecialTokens

# In a prepared or run directory: a SentencePiece model alone, or a directory with all of Hugging Face's files.
FILE_NAME = "vocabulary.model"
DIRECTORY_NAME = "tokenizer"
# T5's, and those of every vocabulary that is trained here.
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model")
# What belongs to a tokenizer in a directory of Hugging Face's; the model's two files say where texts end.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    *SENTENCEPIECE_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)


class Vocabulary:
    """Text to token ids and back: what every kind of vocabulary does.

    ``Vocabulary(path)`` is a `SentencePieceVocabulary` or a `HuggingFaceVocabulary`, as the files are:

    - a file: ``*.json`` is a tokenizer of Hugging Face's, any other a SentencePiece model that speaks for itself;
    - a directory: its ``vocabulary.model``, or else the ``tokenizer.json``, ``spiece.model`` or ``tokenizer.model`` in its
      ``tokenizer/`` or in itself, with the JSON files beside.

    Args:
        path: a file, a prepared or run directory, or a directory of Hugging Face's.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when the files are not what they should be, or do not belong together.
    """

    _file: Path
    # Where the files beside are; None for a file that speaks for itself.
    _directory: Path | None
    _special: SpecialTokens
    _size: int
    # What is put around a prompt.
    _before: tuple[int, ...]
    _after: tuple[int, ...]

    def __new__(cls, path: str | Path) -> "Vocabulary":
        """Chooses the kind."""
        if cls is Vocabulary:
            cls = HuggingFaceVocabulary if _locate(Path(path))[0].suffix == ".json" else SentencePieceVocabulary
        return super().__new__(cls)

    def __init__(self, path: str | Path):
        self._file, self._directory = _locate(Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads a file, or the vocabulary in a prepared, run or Hugging Face directory.

        Raises:
            FileNotFoundError: when there is none.
        """
        return cls(path)

    @property
    def size(self) -> int:
        """The number of tokens: ids are below it."""
        return self._size

    @property
    def pad_id(self) -> int:
        """Padding; -1 where no token is for padding alone."""
        return self._special.pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, at least one; the first is written after targets."""
        return self._special.eos_ids

    @property
    def bos_id(self) -> int | None:
        """The start of a text, where there is one; `encode_prompt` writes it where the tokenizer does."""
        return self._special.bos_id

    @property
    def unk_id(self) -> int | None:
        """What unknown text becomes, where there is such a token."""
        return self._special.unk_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids; that of the file for a SentencePiece model that speaks for itself."""
        digest = hashlib.sha256(self._file.read_bytes()).hexdigest()
        if self._directory is None:
            return digest
        special = [self.pad_id, self.eos_ids, self.bos_id, self.unk_id]
        content = [digest, self.size, special, self._before, self._after, Settings.read(self._directory).added_tokens]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids, without a start or an end.

        Hugging Face's tokenizers read special tokens that are written out in the text as such, SentencePiece models don't.

        Raises:
            ValueError: for text with bytes that were not UTF-8 (surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {text[:40]!r} is not UTF-8 at character {error.start}.") from None
        return self._ids(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids as a policy reads them.

        Encoder-decoders read the text and its end. Decoders read a start, where the tokenizer writes one, and the text.
        """
        return [*self._before, *self.encode(text), *self._after]

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """What `encode_prompt` writes after the text: an end for encoder-decoders, nothing for decoders."""
        return self._after

    def encode_target(self, text: str) -> list[int]:
        """Token ids as a policy is to write them: the text and its end."""
        return [*self.encode(text), self.eos_ids[0]]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text up to the first end; padding and special tokens are left out."""
        return self._texts([self._visible(np.asarray(tokens))])[0]

    def decode_batch(self, tokens: Int[np.ndarray, "B T"]) -> list[str]:
        """The text of every row."""
        rows = [self._visible(row) for row in np.asarray(tokens)]
        return self._texts(rows) if rows else []

    def save(self, directory: str | Path) -> Path:
        """Copies the vocabulary's files into a directory, bit for bit, where `load` finds them.

        Returns:
            ``vocabulary.model`` for a SentencePiece model that speaks for itself, or else the directory ``tokenizer`` with all
            files of the tokenizer.

        Raises:
            ValueError: when there is a vocabulary of the other form.
        """
        directory = Path(directory)
        target, other = directory / FILE_NAME, directory / DIRECTORY_NAME
        if self._directory is not None:
            target, other = other, target
        if other.exists():
            raise ValueError(f"{other} is another vocabulary than {self._file}: choose another directory.")
        if self._directory is None:
            _copy(self._file, target)
            return target
        target.mkdir(exist_ok=True)
        if not target.samefile(self._directory):
            for name in TOKENIZER_FILES:
                (target / name).unlink(missing_ok=True)  # Of an earlier one: files must belong together.
                is_own = name == TOKENIZER_FILE and self._file.suffix == ".json"
                source = self._file if is_own else self._directory / name
                if source.is_file():
                    _copy(source, target / name)
        return target

    def _ids(self, text: str) -> list[int]:
        raise NotImplementedError

    def _texts(self, rows: list[list[int]]) -> list[str]:
        raise NotImplementedError

    def _visible(self, tokens: np.ndarray) -> list[int]:
        tokens = tokens.astype(np.int64)
        ends = np.flatnonzero(np.isin(tokens, self.eos_ids))
        tokens = tokens[: ends[0]] if ends.size else tokens
        hidden = [self.pad_id] if self.bos_id is None else [self.pad_id, self.bos_id]
        return tokens[(tokens >= 0) & (tokens < self.size) & ~np.isin(tokens, hidden)].tolist()

    def _check_sizes(self, model_size: int | None, tokens: int) -> None:
        """The model must have a row for each of the tokenizer's `tokens`."""
        if model_size is not None and model_size < tokens:
            raise ValueError(
                f"{self._file} has {tokens} tokens, config.json beside it says vocab_size is {model_size}: expected at least "
                f"{tokens}. Bring files that belong together."
            )


class TokenIds:
    """What stands for the vocabulary of a policy that came without one: ids go in and out as they are.

    Args:
        size: tokens of the policy.
        pad_id: padding.
        eos_ids: tokens that end a text.
    """

    def __init__(self, size: int, pad_id: int, eos_ids: tuple[int, ...]):
        self.size, self.pad_id, self.eos_ids = size, pad_id, eos_ids

    def encode(self, text: str) -> list[int]:
        """Refuses text.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "this policy has no tokenizer: give lists of token ids, or convert it again with --vocabulary=FILE_OR_DIR"
        )

    encode_prompt = encode_target = encode
    prompt_end: tuple[int, ...] = ()

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The ids, separated by spaces."""
        return " ".join(str(token) for token in tokens)

    def decode_batch(self, tokens: Int[np.ndarray, "B T"]) -> list[str]:
        """Those of every row."""
        return [self.decode(row) for row in tokens]


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model, with any special tokens.

    A model without a start of text is read as T5's: prompts end with an end. One with a start is read as a decoder's:
    prompts begin with it. ``config.json`` and ``tokenizer_config.json`` of a Hugging Face directory may say otherwise.

    Ids and texts are SentencePiece's own, with which the models were trained. Hugging Face's tokenizers of such a file alone
    may differ: those of transformers 5 leave out the space before a text of Mistral's and Mixtral's, and before texts of
    Llama's that begin with one. Of a run of bytes that is not UTF-8, they replace every byte, SentencePiece the wrong ones.

    Args:
        path: a model file, or a directory with one.

    Raises:
        ValueError: when it is not one, or no token ends a text.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(self._file))
        except RuntimeError as error:
            raise ValueError(f"{self._file} is not a SentencePiece model ({error}): give another file.") from None
        processor = self._processor
        self._size = processor.vocab_size()
        pad, eos, bos, unk = (
            None if i < 0 else i
            for i in (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id())
        )
        if self._directory is None:
            if eos is None:
                raise ValueError(f"{self._file} has no token that ends a text: expected one trained with eos_id.")
            self._special = SpecialTokens(-1 if pad is None else pad, (eos,), bos, unk)
            has_encoder, starts = bos is None, True
        else:
            settings = Settings.read(self._directory)
            self._check_sizes(settings.vocab_size, self._size)
            self._special = settings.special(self._piece_id, {"pad": pad, "eos": eos, "bos": bos, "unk": unk})
            self._special.check(self._size, self._directory)
            declared = settings.encoder_decoder
            # A decoder may have been trained with T5's tokenizer, which ends prompts.
            is_t5s = settings.tokenizer.get("tokenizer_class") in ("T5Tokenizer", "T5TokenizerFast")
            has_encoder = self.bos_id is None if declared is None or is_t5s else declared
            starts = settings.tokenizer.get("add_bos_token") is not False
        self._before = () if has_encoder or self.bos_id is None or not starts else (self.bos_id,)
        self._after = self.eos_ids[:1] if has_encoder else ()

    def _piece_id(self, text: str) -> int | None:
        found = self._processor.piece_to_id(text)
        return found if self._processor.id_to_piece(found) == text else None

    def _ids(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return self._processor.decode(rows)


class HuggingFaceVocabulary(Vocabulary):
    """A ``tokenizer.json`` of Hugging Face's, with the JSON files beside it.

    Its own template says what is around a prompt; an end after it is kept for encoder-decoders only, as ``config.json`` says
    (without one: for tokenizers that write an end and no start). Decoding does not clean up spaces.

    Args:
        path: the file, or a directory with one.

    Raises:
        ValueError: when it is not one, does not fit the files beside it, or no token ends a text.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._directory = directory = self._directory or self._file.parent
        settings = Settings.read(directory)
        self._tokenizer = _read_tokenizer(self._file)
        self._check_sizes(settings.vocab_size, _count(self._tokenizer, with_added_tokens=False))
        _add_tokens(self._tokenizer, settings)
        self._special = settings.special(self._tokenizer.token_to_id, {})
        # Texts may have tokens beyond the model's where they were added for other inputs than text.
        tokens = _count(self._tokenizer, with_added_tokens=True)
        self._size = min(tokens, settings.vocab_size or tokens)
        self._special.check(self._size, directory)
        self._before, after = self._template()
        ends = bool(after) and after[-1] in self.eos_ids
        has_encoder = settings.encoder_decoder
        if has_encoder is None:
            has_encoder = ends and self.bos_id not in self._before
        self._after = () if not has_encoder else after if ends else (*after, self.eos_ids[0])

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts before and after a text."""
        encoding = self._tokenizer.encode("a")
        marks = encoding.special_tokens_mask
        if 0 not in marks:  # The letter has no token.
            starts = [i for i in encoding.ids if i not in self.eos_ids]
            return tuple(starts), tuple(encoding.ids[len(starts) :])
        first, last = marks.index(0), len(marks) - marks[::-1].index(0)
        return tuple(encoding.ids[:first]), tuple(encoding.ids[last:])

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.size:
            token = self._tokenizer.id_to_token(max(ids))
            raise ValueError(
                f"text {text[:40]!r} has {token!r}, token {max(ids)}: expected ids below the {self.size} of the model."
            )
        return ids

    def _texts(self, rows: list[list[int]]) -> list[str]:
        # One by one: the package's threads do not survive a fork.
        return [self._tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The file that decides the kind, and the directory of the files beside it."""
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}: expected a prepared data directory or a run directory.")
        return path, path.parent if path.suffix == ".json" else None
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME, None
    directory = path / DIRECTORY_NAME if (path / DIRECTORY_NAME).is_dir() else path
    for name in (TOKENIZER_FILE, *SENTENCEPIECE_FILES):
        if (directory / name).is_file():
            return directory / name, directory
    raise FileNotFoundError(
        f"no vocabulary at {path / FILE_NAME}: expected a prepared data directory or a run directory, or one of Hugging "
        f"Face's with {TOKENIZER_FILE}, spiece.model or tokenizer.model."
    )


def _copy(source: Path, target: Path) -> None:
    if not target.exists() or not target.samefile(source):
        shutil.copyfile(source, target)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        # Some parts are looked at when they are used.
        tokenizer.decode(tokenizer.encode("a").ids)
    except BaseException as error:  # The package raises nothing narrower, and panics are no `Exception`.
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(
            f"{path} is not a tokenizer of Hugging Face's ({error}): expected {TOKENIZER_FILE} as save_pretrained writes it."
        ) from None
    # Left over from the training of a model: texts are cut and padded by who knows the lengths.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count(tokenizer: tokenizers.Tokenizer, with_added_tokens: bool) -> int:
    """One more than the largest id: ids may have holes."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=with_added_tokens).values(), default=-1)


def _add_tokens(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    """Makes added and special tokens of what the JSON files call so, as Hugging Face's own classes do."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for number, entry in settings.added_tokens.items():
        given = {flag: bool(entry[flag]) for flag in flags if flag in entry}
        tokenizer.add_tokens([tokenizers.AddedToken(entry["content"], **given)])
        found = tokenizer.token_to_id(entry["content"])
        if found != number:
            raise ValueError(
                f"{settings.directory}: {entry['content']!r} is token {number} in tokenizer_config.json and {found} in "
                f"{TOKENIZER_FILE}: bring files that belong together."
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    names = [settings.token(kind) for kind in ("pad", "eos", "bos", "unk")]
    for name in names:
        if name is not None and name not in known and tokenizer.token_to_id(name) is not None:
            tokenizer.add_special_tokens([name])


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
