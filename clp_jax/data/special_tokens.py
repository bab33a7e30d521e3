"""Which tokens are padding, ends and starts: read from the JSON files that Hugging Face keeps beside a tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["pad", "eos", "bos", "unk"]


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning of their own.

    Attributes:
        pad_id: of padding; -1 where no token is for padding alone.
        eos_ids: ends of a text, at least one; the first is written after targets.
        bos_id: start of a text, or None.
        unk_id: what unknown text becomes, or None.
    """

    pad_id: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    unk_id: int | None

    def __post_init__(self):
        # Padding must be told from every token that a text can have.
        if self.pad_id in (*self.eos_ids, self.bos_id, self.unk_id):
            object.__setattr__(self, "pad_id", -1)

    def check(self, size: int, where: Path) -> None:
        """Raises a ValueError for ids that a vocabulary of `size` tokens does not have.

        Args:
            size: number of tokens.
            where: the file or directory that is blamed.
        """
        named = {"padding": self.pad_id, "start": self.bos_id, "unknown": self.unk_id}
        ids = [("end", i) for i in self.eos_ids] + [(name, i) for name, i in named.items() if i is not None]
        for name, token in ids:
            if not (0 <= token < size or (name, token) == ("padding", -1)):
                raise ValueError(
                    f"{where}: the {name} token is {token}, the vocabulary has {size} tokens: expected an id below "
                    f"{size}. Bring files that belong together."
                )


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the JSON files beside a tokenizer say; a file that is absent says nothing.

    Attributes:
        directory: where they are.
        tokenizer: ``tokenizer_config.json``, with what an older ``special_tokens_map.json`` adds.
        model: ``config.json``; the part about text where it is of a model of several kinds.
        generation: ``generation_config.json``.
    """

    directory: Path
    tokenizer: Mapping[str, Any]
    model: Mapping[str, Any]
    generation: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Settings":
        """Reads the files of a directory.

        Raises:
            ValueError: when one is not a JSON object.
        """
        tokenizer = _read(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in tokenizer:
            # Newer files say everything themselves, and an old map may have been left beside them.
            tokenizer |= _read(directory / "special_tokens_map.json")
        model = _read(directory / "config.json")
        text = model.get("text_config")
        if isinstance(text, dict):
            model = text | {name: value for name, value in model.items() if value is not None}
        return cls(directory, tokenizer, model, _read(directory / "generation_config.json"))

    @property
    def encoder_decoder(self) -> bool | None:
        """Whether the model has an encoder; None where there is no ``config.json``."""
        return bool(self.model.get("is_encoder_decoder")) if self.model else None

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the model, which may be more than the tokenizer's.

        Raises:
            ValueError: when it is not a positive number.
        """
        value = self.model.get("vocab_size")
        if value is not None and (not _is_id(value) or value < 1):
            raise ValueError(f"{self.directory / 'config.json'}: vocab_size is {value!r}: expected a positive number.")
        return value

    @property
    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens that ``tokenizer_config.json`` adds or describes, by id: text and flags.

        Raises:
            ValueError: when an entry is not of that form.
        """
        found = {}
        entries = self.tokenizer.get("added_tokens_decoder") or {}
        for number, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
            if not (number.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
                raise ValueError(
                    f"{self.directory / 'tokenizer_config.json'}: added_tokens_decoder has {number!r}: {entry!r}: "
                    "expected an id and an object with `content`."
                )
            found[int(number)] = entry
        return dict(sorted(found.items()))

    def token(self, kind: Kind) -> str | None:
        """The text of a special token, where a file of the tokenizer names one.

        Raises:
            ValueError: when it is neither a text nor an object with one.
        """
        value = self.tokenizer.get(f"{kind}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"{self.directory / 'tokenizer_config.json'}: {kind}_token is {value!r}: expected the token's text."
            )
        return text

    def special(self, token_id: Callable[[str], int | None], own: Mapping[Kind, int | None]) -> SpecialTokens:
        """The special tokens.

        The tokenizer's files decide, then the tokenizer itself, then the model's files. Ends of ``generation_config.json``
        (of ``config.json`` where that has none) are ends too, after the tokenizer's own.

        Args:
            token_id: the id of a token's text, or None.
            own: what the tokenizer itself says.

        Raises:
            ValueError: when a token that is named is not in the vocabulary, or there is no end.
        """

        def find(kind: Kind) -> int | None:
            if f"{kind}_token" in self.tokenizer:
                text = self.token(kind)
                found = None if text is None else token_id(text)
                if text is not None and found is None:
                    raise ValueError(
                        f"{self.directory}: {kind}_token is {text!r}, which is not in the vocabulary: expected the text "
                        "of one of its tokens."
                    )
                return found
            if own.get(kind) is not None:
                return own[kind]
            return next(iter(self._ids(self.model, kind) or self._ids(self.generation, kind)), None)

        named = find("eos")
        ends = (() if named is None else (named,)) + (self._ids(self.generation, "eos") or self._ids(self.model, "eos"))
        if not ends:
            raise ValueError(
                f"{self.directory}: no token ends a text: expected eos_token in tokenizer_config.json, or eos_token_id in "
                "config.json."
            )
        pad = find("pad")
        return SpecialTokens(-1 if pad is None else pad, tuple(dict.fromkeys(ends)), find("bos"), find("unk"))

    def _ids(self, settings: Mapping[str, Any], kind: Kind) -> tuple[int, ...]:
        value = settings.get(f"{kind}_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_id(i) for i in ids):
            raise ValueError(
                f"{self.directory}: {kind}_token_id is {value!r}: expected a token id, or a list of token ids."
            )
        return tuple(i for i in ids if i != -1)  # Older files write -1 for none.


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): bring the file again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object.")
    return content
