"""T5X checkpoints of encoder-decoders, read as a policy and written from one, with Adafactor's state where it is wanted."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import Params
from clp_jax.interop import stored_types, t5x_files
from clp_jax.interop.arrays import ArraySpec
from clp_jax.interop.imported import Imported
from clp_jax.interop.links import check_tree, opened, specs, write_tensors
from clp_jax.interop.overrides import checked, nested
from clp_jax.interop.t5x_names import infer, links, scan_axis_of
from clp_jax.interop.t5x_settings import untold
from clp_jax.interop.t5x_slots import AdafactorSlots, read_slots, written_slots
from clp_jax.models.config import ModelConfig, T5Config
from clp_jax.models.policy import Policy

FORMAT = "t5x"
SCAN_AXIS = 1
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint is written.

    Attributes:
        form: ``"legacy"`` (msgpack and zarr) or ``"orbax"``.
        scan_axis: where layers are stacked (T5X's scalable T5), 0 or 1; None for single ones.
    """

    form: str = "legacy"
    scan_axis: int | None = None

    def __post_init__(self) -> None:
        if self.form not in t5x_files.FORMS:
            raise ValueError(f"layout is {self.form!r}: expected one of {', '.join(t5x_files.FORMS)}.")
        if self.scan_axis not in (None, 0, 1):
            raise ValueError(f"scan_axis is {self.scan_axis}: expected 0 or 1.")


def layout_of(
    config: ModelConfig,
    origin: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    scanned: bool | None = None,
    scan_axis: int | None = None,
) -> Layout:
    """The layout that a policy is written in: what is asked for, or that of the T5X checkpoint it came from.

    Args:
        config: of the policy; layers with a table of positions each are scanned ones.
        origin: what it came from (`Imported.origin`).
        form: as in `Layout`.
        scanned: whether layers are stacked; an axis says so too.
        scan_axis: as in `Layout`.

    Raises:
        ValueError: for a layout that there is not.
    """
    theirs = origin if origin is not None and origin.get("format") == FORMAT else {}
    if form is None:
        form = theirs["form"] if theirs.get("form") in t5x_files.FORMS else t5x_files.FORMS[0]
    if scanned is False and scan_axis is not None:
        raise ValueError(f"scan_axis is {scan_axis}, and scanned is false: leave one of them out.")
    before = theirs.get("scan_axis")
    if scanned is None:
        own = config.bias_per_layer if config.num_buckets else before is not None
        scanned = scan_axis is not None or own
    axis = next((axis for axis in (scan_axis, before) if axis is not None), SCAN_AXIS)
    return Layout(form, axis if scanned else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5XCheckpoint(Imported):
    """A T5X checkpoint that was opened: ``origin`` has ``form``, ``step``, ``scan_axis`` and the tensors' types.

    Those are ``dtype`` of most of them, and ``dtypes`` of the others by name.

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
    scan_axis: int | None = None,
    optimizer: bool = False,
) -> T5XCheckpoint:
    """Opens a checkpoint of any form, whose parameters are read when asked for.

    Args:
        path: of ``checkpoint_STEP``, or of a directory that holds some, or of a TensorFlow bundle.
        step: which one; None is the newest.
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``.
        overrides: fields of the configuration that shapes don't tell, by name (`clp_jax.interop.t5x_names.infer`).
        model: the configuration, where it is not to be inferred from shapes; those must be its.
        scan_axis: where scanned layers are stacked in T5X's tensors; None finds it (`clp_jax.interop.t5x_names.scan_axis_of`).
        optimizer: whether to read Adafactor's state too, at once.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        ValueError: when it is damaged, or not of an encoder-decoder T5.
    """
    path = Path(path)
    checkpoint = t5x_files.read(path, step)
    shapes = {name: array.shape for name, array in checkpoint.parameters.items()}
    axis = scan_axis_of(shapes, scan_axis)
    stated = {"param_dtype": dtype, **(overrides or {})}
    if model is None:
        config = infer(shapes, stated, axis or 0)
    else:
        config = dataclasses.replace(_encoder_decoder(model), **checked(T5Config, stated))
        config = _encoder_decoder(nested(config, stated))
    found, abstract = links(config, axis), Policy(config).abstract()
    params = opened(found, checkpoint.parameters, abstract, config.param_dtype, where=str(path))
    slots = read_slots(found, checkpoint.slots, Policy(config), checkpoint.step) if optimizer else None
    origin = {"format": FORMAT, "form": checkpoint.form, "step": checkpoint.step, "scan_axis": axis}
    origin |= stored_types.told({each.name: str(checkpoint.parameters[each.name].dtype) for each in found})
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
    origin: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
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
        origin: what the policy came from (`Imported.origin`): its tensors' types, and its layout.
        layout: of the files and layers; None goes by the origin (`layout_of`).
        dtype: of the parameters in the file. None takes those of the origin's tensors, where all parameters are numbers of
            these types, and otherwise the parameters': nothing is rounded unasked (`clp_jax.interop.stored_types.kept`).
        chunk_bytes: largest chunk of an array; None is the layout's own.
        card: text of ``README.md``, put beside the checkpoint; None writes none.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: when T5X has no place for the policy, or the checkpoint exists.
    """
    directory = Path(directory)
    config = _encoder_decoder(config)
    layout = layout or layout_of(config, origin)
    check_tree(Policy(config).abstract(), params)
    found = links(config, layout.scan_axis)
    untold(config, layout.scan_axis)
    kept = stored_types.kept(found, params, origin, FORMAT, _DTYPES) if dtype is None else None
    types = kept or dict.fromkeys((each.name for each in found), dtype or config.param_dtype)
    written = dict(written_slots(found, slots, Policy(config))) if slots is not None else {}
    slot_specs = {name: ArraySpec(array.shape, array.dtype) for name, array in written.items()}
    options: dict[str, Any] = {"form": layout.form, "chunk_bytes": chunk_bytes}
    with t5x_files.open_writer(directory, step, specs(found, types), slot_specs or None, **options) as writer:
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
