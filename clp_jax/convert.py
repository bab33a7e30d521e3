"""`clp convert`: policies from and to the checkpoints of Hugging Face and T5X.

The memory that it takes is that of the largest tensor and a fifth of it, whatever the size of the policy; the tensor is of one
layer, though a parameter of clp is that of all layers, stacked, and in the type that it is read as: what a file has in another
one is widened or rounded in blocks. More is held in these cases only: a bfloat16 tensor of T5X's file version 2 while it is
widened; all layers of a scanned tensor of T5X; the optimizer's state; all components and all layers of the parameter at hand
while they are mixed; and all layers of a parameter that training saved, up to three times where it saved them in one chunk.
"""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from clp_jax.array_types import Params
from clp_jax.data.vocabulary import DIRECTORY_NAME, FILE_NAME, Vocabulary
from clp_jax.interop import huggingface, t5x, t5x_settings
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.hf_tokenizers import tokenizer_files
from clp_jax.interop.model_card import model_card
from clp_jax.interop.object_store import is_address
from clp_jax.interop.regions import Region
from clp_jax.interop.slots import flatten, unflatten
from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning
from clp_jax.models.config import ModelConfig, PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import to_json
from clp_jax.preferences import Preference
from clp_jax.training.adafactor_slots import load_slots, save_slots
from clp_jax.training.policies import load_policy
from clp_jax.training.run_directory import CHECKPOINTS_DIRECTORY
from clp_jax.training.streamed_params import hold_arrays, open_params, write_params

FORMATS = ("hf", "t5x", "clp")
_DTYPES = {"hf": ("float32", "bfloat16", "float16"), "t5x": ("float32", "bfloat16"), "clp": ("float32", "bfloat16")}
# Options that are of use with some formats alone.
_USED_BY = {
    "step": ("t5x:",),
    "overrides": ("hf:", "t5x:"),
    "model": ("t5x:",),
    "layout": (":t5x",),
    "scanned": (":t5x",),
    "scan_axis": ("t5x:", ":t5x"),
    "max_shard_gb": (":hf",),
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A policy between two formats.

    Attributes:
        config: what it is made of.
        params: its ordinary parameters, as lazy arrays.
        origin: plain JSON that says what it came from first, and what of that we don't model.
        tokenizer: a file or a directory of its tokenizer, to be carried along; None without one.
        step: updates behind it.
        provenance: what the model card says, one line each.
        slots: Adafactor's; None where there are none or they were not asked for.
    """

    config: ModelConfig
    params: Params
    origin: dict[str, Any]
    tokenizer: Path | None
    step: int
    provenance: tuple[str, ...]
    slots: t5x.AdafactorSlots | None = None


def convert(
    source: str,
    target: str,
    *,
    weights: Sequence[float] | None = None,
    alpha: float = 0.05,
    dtype: str | None = None,
    vocabulary: str | None = None,
    step: int | None = None,
    overrides: Mapping[str, int | float | bool | str] | None = None,
    model: T5Config | PaLMConfig | None = None,
    layout: str | None = None,
    scanned: bool | None = None,
    scan_axis: int | None = None,
    optimizer: bool = False,
    max_shard_gb: float | None = None,
) -> None:
    """Converts a policy between formats; nothing is downloaded, and no pickle is ever opened.

    Formats are ``hf:DIR`` (Hugging Face: config.json and safetensors), ``t5x:DIR`` (a checkpoint_N of T5X, or the original
    T5's of Mesh TensorFlow) and ``clp:DIR`` (a run directory; written, one that `sample`, `score` and `train` take). The
    tokenizer's files travel along.

    Args:
        source: where the policy is, as FORMAT:DIR.
        target: where it goes, as FORMAT:DIR; the directory must be new.
        weights: of the rewards: a steerable policy is mixed there, and written as an ordinary one; equal by default.
        alpha: KL weight, for policies conditioned on it.
        dtype: of the written tensors, ``float32`` or ``bfloat16`` (also ``float16`` for hf); by default float32 for clp, and
            those of the checkpoint that the policy came from otherwise, tensor by tensor, where they hold its parameters
            exactly: what was trained since is not rounded unasked. From hf to t5x or back the types are kept where all tensors
            have one that both know.
        vocabulary: the tokenizer, a file or a directory, where the source has none, as T5X's have not.
        step: of a T5X directory with several checkpoints; the newest by default.
        overrides: fields of the policy's configuration, for what a checkpoint of others does not tell, as
            NAME=VALUE,NAME=VALUE; of configurations inside it by names with dots, as ``moe.router.k=2``.
        model: the policy's configuration, for a T5X directory: nothing is then assumed that shapes don't tell, such as the
            router of experts. ``--gin_file=models/NAME.gin --gin.convert.model=%MODEL`` gives one.
        layout: of a written T5X checkpoint: ``legacy`` (msgpack and zarr) or ``orbax``; by default that of the T5X checkpoint
            that the policy came from, or legacy.
        scanned: whether a T5X checkpoint is written with its layers stacked, for scalable T5; by default as it came, or where
            each layer has positions of its own.
        scan_axis: where T5X's scanned layers are stacked, read or written, 0 or 1; by default found, and written as they came,
            or 1.
        optimizer: whether Adafactor's state is carried between T5X and clp too; `train` goes on from it where the policy is
            its initial checkpoint and Adafactor its optimizer.
        max_shard_gb: of one file of safetensors, in 10^9 bytes; 5 by default.

    Raises:
        ValueError: for an unknown format, a policy that the target can't express, or a directory that exists.
    """
    (kind, place), (target_kind, target_place) = _parse("source", source), _parse("target", target)
    if target_place.exists() and (not target_place.is_dir() or any(target_place.iterdir())):
        raise ValueError(f"{target_place} exists: it was not overwritten. Give another directory.")
    given: dict[str, Any] = {
        "weights": weights,
        "dtype": dtype,
        "step": step,
        "overrides": overrides,
        "model": model,
        "layout": layout,
        "scanned": scanned,
        "scan_axis": scan_axis,
        "optimizer": optimizer,
        "max_shard_gb": max_shard_gb,
    }
    _check_options(kind, target_kind, **given)
    tokenizer = None if vocabulary is None else _given_tokenizer(Path(vocabulary).expanduser())
    readers: dict[str, Callable[[], Converted]] = {
        "hf": lambda: _read_hf(place, dtype, overrides),
        "t5x": lambda: _read_t5x(place, dtype, step, overrides, model, optimizer, scan_axis),
        "clp": lambda: _read_clp(place, weights, alpha, optimizer),
    }
    console = Console(emoji=False, markup=False, highlight=False)
    found = _with_tokenizer(readers[kind](), tokenizer)
    console.print(f"{source}: {type(found.config).__name__}, {Policy(found.config).num_params():,} parameters.")
    line = _typed(source, target, vocabulary=vocabulary, **given)
    found = dataclasses.replace(found, provenance=(*found.provenance, line))
    told: tuple[str, ...] = ()
    if target_kind == "clp":
        _write_clp(target_place, found, dtype)
    else:
        if target_kind == "hf":
            _write_hf(target_place, found, dtype, max_shard_gb)
        else:
            files = t5x.layout_of(found.config, found.origin, form=layout, scanned=scanned, scan_axis=scan_axis)
            told = _write_t5x(target_place, found, dtype, files)
        if found.tokenizer is not None:
            _carry(found.tokenizer, target_place, found.config)
    console.print("\n".join(f"{target}: {line}" for line in ("written.", *told)), soft_wrap=True)


def _check_options(kind: str, target_kind: str, **given: Any) -> None:
    """Refuses options that say nothing about two formats, or nothing at all."""
    if given["optimizer"] and "hf" in (kind, target_kind):
        raise ValueError("optimizer: Hugging Face's checkpoints hold no optimizer's state: leave it out.")
    if given["weights"] is not None and kind != "clp":
        raise ValueError("weights mix a policy that was trained to be steered: the source must be clp:RUN_DIR.")
    for name, places in _USED_BY.items():
        if given[name] is not None and not {kind + ":", ":" + target_kind} & set(places):
            raise ValueError(f"{name} says nothing about {kind} to {target_kind}: leave it out.")
    dtype, known = given["dtype"], _DTYPES[target_kind]
    if dtype is not None and dtype not in known:
        raise ValueError(f"dtype is {dtype!r}: expected one of {', '.join(known)} for {target_kind}.")
    size = given["max_shard_gb"]
    if size is not None and size <= 0:
        raise ValueError(f"max_shard_gb is {size}: expected a positive number, 5 by default.")


def _typed(source: str, target: str, **given: Any) -> str:
    """What model cards say was typed. The KL weight is told where it says anything, with the rewards' weights."""
    words = ["clp", "convert", source, target]
    for name, value in given.items():
        if value is None or (value is False and name == "optimizer") or name == "model":
            continue
        if isinstance(value, bool):
            words.append(f"--{name}={str(value).lower()}")
        elif isinstance(value, Mapping):
            words.append(f"--{name}=" + ",".join(f"{field}={setting}" for field, setting in value.items()))
        elif isinstance(value, str | int | float):
            words.append(f"--{name}={value}")
        else:
            words.append(f"--{name}=" + ",".join(str(float(each)) for each in value))
    of_gin = ", with the configuration below from gin" if given["model"] is not None else ""
    return f"`{shlex.join(words)}`{of_gin}"


def _parse(name: str, text: str) -> tuple[str, Path]:
    kind, colon, place = text.partition(":")
    if not colon or kind not in FORMATS or not place:
        raise ValueError(f"{name} is {text!r}: expected {', '.join(f'{kind}:DIR' for kind in FORMATS)}.")
    if name == "target" and is_address(place):
        raise ValueError(f"target is {text!r}: expected a directory. Write to one, and copy it to the store.")
    return kind, Path(place).expanduser()


def _read_hf(place: Path, dtype: str | None, overrides: Mapping[str, Any] | None) -> Converted:
    found = huggingface.open_checkpoint(place, dtype=_own_dtype(dtype), overrides=overrides)
    if found.left_out:
        print(f"{place}: {len(found.left_out)} tensors of other parts (images) were left out.")
    provenance = (f"From the Hugging Face checkpoint `{place.name}` ({found.origin['model_type']}).",)
    return Converted(found.config, found.params, found.origin, _tokenizer(place), 0, provenance)


def _read_t5x(
    place: Path,
    dtype: str | None,
    step: int | None,
    overrides: Mapping[str, Any] | None,
    model: ModelConfig | None,
    optimizer: bool,
    scan_axis: int | None,
) -> Converted:
    found = t5x.open_checkpoint(
        place,
        step=step,
        dtype=_own_dtype(dtype),
        overrides=overrides,
        model=model,
        scan_axis=scan_axis,
        optimizer=optimizer,
    )
    if model is None:
        print(f"{place}: {t5x_settings.assumed(found.config, overrides or {})}")
    provenance = (f"From the T5X checkpoint `{place.name}` at step {found.step}.",)
    tokenizer = _tokenizer(place)
    return Converted(found.config, found.params, found.origin, tokenizer, found.step, provenance, found.slots)


def _open_held(path: str | Path) -> tuple[Params, dict[str, Any], int]:
    params, description, step = open_params(path)
    return hold_arrays(params), description, step


def _read_clp(place: Path, weights: Sequence[float] | None, alpha: float, optimizer: bool) -> Converted:
    loaded = load_policy(place, _open_held)
    params, mixed = loaded.params, tuple[str, ...]()
    if isinstance(loaded.conditioning, PromptConditioning):
        raise ValueError(
            f"{place} reads its preference in the prompt: no ordinary checkpoint has one. Use it with clp sample, or "
            "convert a policy with conditioned parameters."
        )
    if loaded.objectives:
        preference = loaded.preference(weights, alpha)
        if isinstance(loaded.conditioning, ParameterConditioning):
            params = _mixed(loaded.conditioning, params, loaded.reference, preference)
        point = np.asarray(preference.weights)
        named = ", ".join(f"{name} {value:.4g}" for name, value in zip(loaded.objectives, point, strict=True))
        kl = f" and the KL weight {alpha:g}" if getattr(loaded.conditioning, "alpha_min", None) is not None else ""
        mixed = (f"Mixed at the reward weights {named}{kl}.",)
    elif weights is not None:
        raise ValueError(f"{place} has no rewards to weigh: leave weights out.")
    provenance = (*loaded.provenance, f"From the run `{loaded.run_dir.name}` at step {loaded.step}.", *mixed)
    slots = _read_slots(loaded.run_dir) if optimizer else None
    tokenizer = _tokenizer(loaded.run_dir)
    return Converted(loaded.policy.config, params, dict(loaded.origin), tokenizer, loaded.step, provenance, slots)


def _mixed(conditioning: ParameterConditioning, params: Params, reference: Params, preference: Preference) -> Params:
    """A steerable policy's ordinary parameters, each mixed when it is asked for."""
    chosen, frozen = dict(flatten(conditioning.selected(params))), dict(flatten(reference))
    expanded = dict(flatten(params))
    # Where only others have copies, `mix` wants one of them too.
    other = next(path for path in expanded if chosen[path])
    empty = {other: np.zeros((conditioning.num_objectives, 0), np.float32)}
    mix = jax.jit(conditioning.mix)

    def fill(path: tuple[str, ...], out: np.ndarray, region: Region) -> None:
        parts = {path: expanded[path].read((slice(None), *region) if chosen[path] else region)}
        base = {path: frozen[path].read(region) if conditioning.alpha_min is not None else np.empty(0, out.dtype)}
        if not chosen[path]:
            parts, base = parts | empty, base | {other: np.zeros(0, np.float32)}
        out[...] = dict(flatten(mix(unflatten(parts), unflatten(base), preference)))[path]

    mixed = {path: LazyArray(leaf.shape, leaf.dtype, functools.partial(fill, path)) for path, leaf in frozen.items()}
    if conditioning.alpha_min is None:
        mixed |= {path: leaf for path, leaf in expanded.items() if not chosen[path]}
    return hold_arrays(unflatten({path: mixed[path] for path in expanded}))


def _write_hf(place: Path, found: Converted, dtype: str | None, max_shard_gb: float | None) -> None:
    huggingface.write(
        place,
        found.config,
        found.params,
        origin=found.origin,
        dtype=dtype,
        max_shard_bytes=int((5.0 if max_shard_gb is None else max_shard_gb) * 1e9),
        card=model_card(found.config, found.provenance),
    )


def _write_t5x(place: Path, found: Converted, dtype: str | None, layout: t5x.Layout) -> tuple[str, ...]:
    """Writes it, and gives what a reader of the directory must be told, if anything."""
    told: tuple[str, ...] = ()
    if isinstance(found.config, T5Config):
        fields = t5x_settings.untold(found.config, layout.scan_axis)
        told = (t5x_settings.told(fields),) if fields else ()
    t5x.write(
        place,
        found.config,
        found.params,
        step=found.step,
        slots=found.slots,
        origin=found.origin,
        layout=layout,
        dtype=dtype,
        card=model_card(found.config, (*found.provenance, *told), library="t5x"),
    )
    return told


def _write_clp(place: Path, found: Converted, dtype: str | None) -> None:
    place.mkdir(parents=True, exist_ok=True)
    fingerprint = None
    if found.tokenizer is not None:
        vocabulary = Vocabulary.load(found.tokenizer)
        vocabulary.save(place)
        fingerprint = vocabulary.fingerprint
    description = {
        "stage": "converted",
        "model": to_json(found.config if dtype is None else dataclasses.replace(found.config, param_dtype=dtype)),
        "vocabulary": fingerprint,
        "origin": found.origin,
        "provenance": list(found.provenance),
    }
    if found.slots is not None:
        save_slots(place, found.slots)
    write_params(place / CHECKPOINTS_DIRECTORY / str(found.step), found.params, description, found.step, dtype)


def _read_slots(place: Path) -> t5x.AdafactorSlots:
    found = load_slots(place)
    if found is None:
        raise ValueError(f"{place} has no state of T5X's optimizer: convert it with --optimizer, or leave it out here.")
    return found


def _own_dtype(dtype: str | None) -> str:
    return dtype if dtype in ("float32", "bfloat16") else "float32"


def _given_tokenizer(path: Path) -> Path:
    """Where the tokenizer is that was asked for, checked before anything is written."""
    found = path if path.is_file() else _tokenizer(path)
    Vocabulary.load(found or path)
    return found or path


def _with_tokenizer(found: Converted, tokenizer: Path | None) -> Converted:
    """A policy with the tokenizer that was asked for, if any."""
    if tokenizer is None:
        return found
    size, most = Vocabulary.load(tokenizer).size, found.config.vocab_size
    if size > most:
        raise ValueError(
            f"vocabulary {tokenizer} has {size} tokens: expected at most the {most} of the policy. Give the one that it was "
            "trained with."
        )
    return dataclasses.replace(found, tokenizer=tokenizer)


def _carry(tokenizer: Path, place: Path, config: ModelConfig) -> None:
    for name, content in tokenizer_files(tokenizer, config).items():
        if not (place / name).exists():
            (place / name).write_bytes(content)


def _tokenizer(place: Path) -> Path | None:
    """Where a directory's tokenizer is, if it has one."""
    for candidate in (place / FILE_NAME, place / DIRECTORY_NAME, place):
        try:
            if candidate.exists():
                Vocabulary.load(candidate)
                return candidate
        except FileNotFoundError:
            continue
    return None
