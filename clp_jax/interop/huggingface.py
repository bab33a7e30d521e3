"""Hugging Face checkpoints: a directory with ``config.json`` and safetensors, read as a policy and written from one."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.array_types import Params
from clp_jax.interop import safetensors_files, stored_types
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.hf_decoders import GEMMA3
from clp_jax.interop.hf_families import config_json, family_for, family_named, same
from clp_jax.interop.imported import Imported
from clp_jax.interop.links import check_counts, check_tree, opened, specs, write_tensors
from clp_jax.interop.overrides import checked, nested
from clp_jax.models.config import ModelConfig
from clp_jax.models.policy import Policy

FORMAT = "huggingface"
CONFIG = "config.json"
GENERATION = "generation_config.json"

# Carried as they are.
TEXT_FILES = (
    "spiece.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceCheckpoint(Imported):
    """A Hugging Face checkpoint that was opened.

    Its ``origin`` has ``model_type``, ``config`` and ``generation_config``, the tensors' types: ``dtype`` of most of them, and
    ``dtypes`` of the others by name, and ``copies``: names of tensors that repeat the embedding.

    Attributes:
        text_files: of the tokenizer, to be carried along.
    """

    text_files: tuple[Path, ...]


def open_checkpoint(
    directory: Path | str, *, dtype: str = "float32", overrides: Mapping[str, Any] | None = None
) -> HuggingFaceCheckpoint:
    """Opens a checkpoint, whose parameters are read when asked for.

    Args:
        directory: with ``config.json`` and ``model.safetensors``, or several with an index.
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``.
        overrides: fields of the configuration, by name: how and not what it computes.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for a model, a setting or a tensor that is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        safetensors_files.refuse_pickle(directory)
    values, generation = _read_json(directory / CONFIG), {}
    if (directory / GENERATION).is_file():
        generation = _read_json(directory / GENERATION)
    source: Mapping[str, LazyArray] = safetensors_files.read(directory)
    left_out: list[str] = []
    text = values
    if values.get("model_type") == "gemma3" and isinstance(values.get("text_config"), dict):
        outer = {key: value for key, value in values.items() if key in ("dtype", "torch_dtype", "tie_word_embeddings")}
        text = (
            outer | {"architectures": [GEMMA3.architecture]} | values["text_config"] | {"model_type": GEMMA3.model_type}
        )
        source, left_out = _text_part(source)
    family = family_named(text.get("model_type"))
    family.settings(text, tensors=source.keys()).check_counts()
    config = family.config(text, generation, source.keys())
    config = dataclasses.replace(config, **checked(type(config), {"param_dtype": dtype, **(overrides or {})}))
    config = nested(config, overrides)
    check_counts(config, len(source))
    links = family.links(config)
    params = opened(
        links,
        source,
        Policy(config).abstract(),
        config.param_dtype,
        aliases=family.aliases(config),
        ignored=family.ignored,
        where=str(directory),
    )
    origin = {"format": FORMAT, "model_type": family.model_type, "config": dict(text)}
    copies = [name for name in family.aliases(config) if name in source]
    origin |= stored_types.told({name: str(source[name].dtype) for name in (*(each.name for each in links), *copies)})
    if copies:
        origin["copies"] = copies
    if generation:
        origin["generation_config"] = generation
    found = text_files(directory)
    return HuggingFaceCheckpoint(
        config=config, params=params, origin=origin, left_out=tuple(left_out), text_files=found
    )


def write(
    directory: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    origin: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
    dtype: str | None = None,
    max_shard_bytes: int = safetensors_files.MAX_SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Writes a checkpoint that transformers loads, one tensor at a time.

    Args:
        directory: new; appears whole at the end.
        config: of the policy.
        params: numpy, JAX or lazy arrays.
        origin: what the policy came from (`Imported.origin`): its tensors' types, and where it was Hugging Face its family, and
            settings we don't model.
        files: copied as they are, such as `HuggingFaceCheckpoint.text_files`.
        dtype: of the tensors, ``"float32"``, ``"bfloat16"`` or ``"float16"``. None takes those of the
            origin's tensors, where all parameters are numbers of these types, and otherwise the parameters': nothing is rounded
            unasked (`clp_jax.interop.stored_types.kept`).
        max_shard_bytes: of one file.
        card: text of ``README.md`` (`clp_jax.interop.model_card`); None writes none.

    Raises:
        ValueError: when no family can express the policy, the parameters are another's, or the directory exists.
    """
    theirs = origin if origin is not None and origin.get("format") == FORMAT else None
    family = family_for(config, None if theirs is None else theirs["model_type"])
    check_tree(Policy(config).abstract(), params)
    values = None if theirs is None else theirs["config"]
    generation = {} if theirs is None else theirs.get("generation_config", {})
    found = config_json(family, config, values, generation)
    copies = family.needed_copies(config) if theirs is None else theirs.get("copies", ())
    links = family.links(config) + family.repeated(config, copies)
    kept = stored_types.kept(links, params, origin, FORMAT, _DTYPES) if dtype is None else None
    types = kept or dict.fromkeys((each.name for each in links), dtype or config.param_dtype)
    if kept is None or theirs is None:
        (chosen,) = set(types.values())
        if chosen not in _DTYPES:
            raise ValueError(f"dtype is {chosen!r}: expected one of {', '.join(_DTYPES)}.")
        found["dtype" if "dtype" in found else "torch_dtype"] = chosen
    described = specs(links, types)
    with safetensors_files.open_writer(Path(directory), described, max_shard_bytes=max_shard_bytes) as writer:
        write_tensors(links, params, writer.write)
        _write_json(writer.directory / CONFIG, found)
        if generation:
            _write_json(writer.directory / GENERATION, generation)
        for file in files:
            (writer.directory / file.name).write_bytes(file.read_bytes())
        if card is not None:
            (writer.directory / "README.md").write_text(card, "utf-8")


def text_files(directory: Path) -> tuple[Path, ...]:
    """Files of a directory that are carried along with a policy (`TEXT_FILES`)."""
    return tuple(path for pattern in TEXT_FILES for path in sorted(directory.glob(pattern)) if path.is_file())


def is_unchanged(config: ModelConfig, origin: Mapping[str, Any]) -> bool:
    """Whether a policy computes what the checkpoint did that it came from."""
    family = family_named(origin["model_type"])
    generation = origin.get("generation_config", {})
    return same(family.config(origin["config"], generation, family.tensors_of(config)), config)


def _text_part(source: Mapping[str, LazyArray]) -> tuple[dict[str, LazyArray], list[str]]:
    """The tensors of Gemma 3's language model under the names they have alone, and the names of the others."""
    # Written by different versions.
    prefixes = {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
    prefixes |= {r"^language_model\.lm_head\.": "lm_head.", r"^lm_head\.": "lm_head."}
    found, left_out = {}, []
    for name, array in source.items():
        pattern = next((pattern for pattern in prefixes if re.match(pattern, name)), None)
        if pattern is None:
            left_out.append(name)
        else:
            found[re.sub(pattern, prefixes[pattern], name)] = array
    return found, left_out


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: expected a directory that transformers' save_pretrained wrote."
        )
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}. Get it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: expected an object.")
    return found


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
