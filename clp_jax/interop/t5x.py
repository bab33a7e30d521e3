"""T5X checkpoints of encoder-decoders, read as a policy and written from one, with Adafactor's state where it is wanted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import Params
from clp_jax.interop import t5x_files
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.imported import Imported
from clp_jax.interop.links import check_tree, opened, specs, write_tensors
from clp_jax.interop.overrides import checked
from clp_jax.interop.t5x_names import infer, is_scanned, links
from clp_jax.interop.t5x_settings import untold
from clp_jax.interop.t5x_slots import AdafactorSlots, read_slots, written_slots
from clp_jax.models.config import ModelConfig, T5Config
from clp_jax.models.policy import Policy

SCAN_AXIS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5XCheckpoint(Imported):
    """A T5X checkpoint that was opened: ``origin`` has ``form``, ``step`` and ``scan_axis``, too.

    Attributes:
        step: of training.
        slots: the optimizer's; None where they were not asked for.
    """

    config: T5Config
    step: int
    slots: AdafactorSlots | None = None


def open_checkpoint(
    path: Path | str,
    *,
    step: int | None = None,
    dtype: str = "float32",
    overrides: Mapping[str, Any] | None = None,
    model: ModelConfig | None = None,
    scan_axis: int = SCAN_AXIS,
    optimizer: bool = False,
) -> T5XCheckpoint:
    """Opens a checkpoint of any form, whose parameters are read when asked for.

    Args:
        path: of ``checkpoint_STEP``, or of a directory that holds some, or of a TensorFlow bundle.
        step: which one; None is the newest.
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``.
        overrides: fields of the configuration that shapes don't tell, by name (`clp_jax.interop.t5x_names.infer`).
        model: the configuration, where it is not to be inferred from shapes; those must be its.
        scan_axis: where scanned layers are stacked in T5X's tensors.
        optimizer: whether to read Adafactor's state too, at once.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        ValueError: when it is damaged, or not of an encoder-decoder T5.
    """
    path = Path(path)
    checkpoint = t5x_files.read(path, step)
    axis = scan_axis if is_scanned(checkpoint.parameters) else None
    shapes = {name: array.shape for name, array in checkpoint.parameters.items()}
    stated = {"param_dtype": dtype, **(overrides or {})}
    if model is None:
        config = infer(shapes, stated, scan_axis)
    else:
        config = dataclasses.replace(_encoder_decoder(model), **checked(T5Config, stated))
    found, abstract = links(config, axis), Policy(config).abstract()
    params = opened(found, checkpoint.parameters, abstract, config.param_dtype, where=str(path))
    slots = read_slots(found, checkpoint.slots, Policy(config), checkpoint.step) if optimizer else None
    origin = {"format": "t5x", "form": checkpoint.form, "step": checkpoint.step, "scan_axis": axis}
    return T5XCheckpoint(
        config=config,
        params=params,
        origin=origin,
        left_out=tuple(checkpoint.mutables),
        step=checkpoint.step,
        slots=slots,
    )


def write(
    directory: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    step: int,
    slots: AdafactorSlots | None = None,
    scanned: bool = False,
    scan_axis: int = SCAN_AXIS,
    layout: str = "legacy",
    dtype: str | None = None,
    chunk_bytes: int | None = None,
    card: str | None = None,
) -> Path:
    """Writes a checkpoint that T5X restores, one tensor at a time.

    Args:
        directory: that will hold ``checkpoint_STEP``.
        config: of the policy.
        params: numpy, JAX or lazy arrays.
        step: of training.
        slots: of Adafactor, with ``slots.count`` equal to the step; None writes no optimizer state. They are factored or not as
            they come; T5X factors kernels of experts and of scanned layers whatever their size, and others from 128 on.
        scanned: whether layers are stacked (T5X's scalable T5) or single.
        scan_axis: where they are stacked.
        layout: ``"legacy"`` (msgpack and zarr) or ``"orbax"``.
        dtype: of the parameters in the file; None keeps theirs.
        chunk_bytes: largest chunk of an array; None is the layout's own.
        card: text of ``README.md``, put beside the checkpoint; None writes none.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: when T5X has no place for the policy, or the checkpoint exists.
    """
    directory = Path(directory)
    config = _encoder_decoder(config)
    if layout not in t5x_files.FORMS:
        raise ValueError(f"layout is {layout!r}: expected one of {', '.join(t5x_files.FORMS)}.")
    check_tree(Policy(config).abstract(), params)
    axis = scan_axis if scanned else None
    found = links(config, axis)
    untold(config, axis)
    stored = dtype or config.param_dtype
    written = dict(written_slots(found, slots, Policy(config))) if slots is not None else {}
    slot_specs = {name: ArraySpec(array.shape, array.dtype) for name, array in written.items()}
    options: dict[str, Any] = {"form": layout, "chunk_bytes": chunk_bytes}
    with t5x_files.open_writer(directory, step, specs(found, stored), slot_specs or None, **options) as writer:
        write_tensors(found, params, writer.write)
        for name, array in written.items():
            writer.write_slot(name, np.ascontiguousarray(array))
    if card is not None:
        (directory / "README.md").write_text(card, "utf-8")
    return directory / f"checkpoint_{step}"


def _encoder_decoder(config: ModelConfig) -> T5Config:
    if not isinstance(config, T5Config):
        raise ValueError(f"T5X checkpoints hold encoder-decoders, not {type(config).__name__}: take another format.")
    return config
