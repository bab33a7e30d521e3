"""The files by which `AutoTokenizer` of transformers finds a policy's tokenizer in its directory."""

import json
from pathlib import Path

import sentencepiece

from clp_jax.data.vocabulary import SENTENCEPIECE_FILES, TOKENIZER_FILE
from clp_jax.interop import huggingface
from clp_jax.models.config import ModelConfig, T5Config

_SETTINGS = "tokenizer_config.json"


def tokenizer_files(tokenizer: Path, config: ModelConfig) -> dict[str, bytes]:
    """A tokenizer's files, by the names that the policy's family has for them.

    Args:
        tokenizer: one that `clp_jax.data.vocabulary.Vocabulary` reads: a SentencePiece model, a ``tokenizer.json`` of any name
            with the files beside it, or a directory of these.
        config: of the policy.
    """
    if tokenizer.is_file() and tokenizer.suffix != ".json":
        return _of_model(tokenizer, config)
    directory = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = {file.name: file.read_bytes() for file in huggingface.text_files(directory)}
    if tokenizer.is_file():
        return files | {TOKENIZER_FILE: tokenizer.read_bytes()}
    if TOKENIZER_FILE not in files:
        model = next(tokenizer / name for name in SENTENCEPIECE_FILES if (tokenizer / name).is_file())
        files.pop(model.name, None)
        files = _of_model(model, config) | files
    return files


def _of_model(model: Path, config: ModelConfig) -> dict[str, bytes]:
    """A SentencePiece model, and for decoders what says how it is read."""
    content = model.read_bytes()
    if isinstance(config, T5Config):
        return {"spiece.model": content}
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = {kind: getattr(processor, f"{kind}_id")() for kind in ("bos", "eos", "pad", "unk")}
    settings = {f"{kind}_token": processor.id_to_piece(token) for kind, token in ids.items() if token >= 0}
    if ids["bos"] < 0:  # T5's kind: texts end with an end, and do not begin with a start.
        settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
        return {"spiece.model": content, _SETTINGS: _json(settings)}
    # What tells Llama's reading from Gemma's: a space before the text.
    spaced = processor.encode("a", out_type=str)[0].startswith("▁")
    settings |= {"tokenizer_class": "LlamaTokenizer" if spaced else "GemmaTokenizer", "legacy": False}
    settings |= {"add_bos_token": True, "add_eos_token": False}
    return {"tokenizer.model": content, _SETTINGS: _json(settings)}


def _json(settings: dict[str, str | int | bool]) -> bytes:
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
