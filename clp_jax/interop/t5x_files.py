"""T5X checkpoints in every form that T5X has written or reads: found, opened lazily, and written.

============================ =======================================================================================
form                         what
============================ =======================================================================================
``legacy``                   msgpack and zarr folders: the published models
``placeholder``              the same with Orbax's names, of 2022 and 2023; read only
``orbax``                    one OCDBT store: T5X's default now
``mesh_tensorflow``          TensorFlow bundles: the first T5 models; read only, under T5X's names
============================ =======================================================================================
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import ArrayLike
from clp_jax.interop import mesh_tensorflow, t5x_legacy, t5x_orbax
from clp_jax.interop.arrays import ArraySpec, is_float, new_directory, specs_of
from clp_jax.interop.regions import CheckpointFileError
from clp_jax.interop.t5x_state import SLOTS, STEP, TARGET, T5XCheckpoint, checkpoint_of, state_specs

FORMS = ("legacy", "orbax")
_DIRECTORY = re.compile(r"checkpoint_(\d+)")
_BUNDLE = re.compile(r".*-(\d+)\.index")
_UNFINISHED = re.compile(r"checkpoint_\d+(\.tmp-|\.orbax-checkpoint-tmp|\.partial-).*")
_MESH_TENSORFLOW = "mesh_tensorflow"
_TEXT_START = b"model_checkpoint_path"


def read(path: Path, step: int | None = None) -> T5XCheckpoint:
    """Opens a checkpoint.

    Args:
        path: of a directory ``checkpoint_STEP``, of a directory that holds some, or of a directory of TensorFlow's; or of a
            file in one, as ``model.ckpt-1000000.index``.
        step: which one; None is the newest.

    Returns:
        The checkpoint; arrays are read when asked for.

    Raises:
        FileNotFoundError: there is no checkpoint, or it lacks a file.
        CheckpointFileError: it was not finished, a file of it is damaged, or it has another step.
    """
    found = _locate(path, step)
    if found.name.endswith(mesh_tensorflow.INDEX_SUFFIX):
        checkpoint = _read_bundle(found)
    else:
        t5x_orbax.check_committed(found)
        # Orbax's first forms had both a file of msgpack and one that names the arrays; the former says where each is.
        places = [place for place in (found, found / t5x_orbax.STATE_ITEM) if (place / t5x_legacy.FILE_NAME).is_file()]
        checkpoint = t5x_legacy.read(places[0]) if places else t5x_orbax.read(found)
    if step is not None and checkpoint.step != step:
        raise CheckpointFileError(f"{found} is of step {checkpoint.step}: step {step} was asked for; leave it out.")
    return checkpoint


def _locate(path: Path, step: int | None) -> Path:
    """The directory of a checkpoint, or the index of a bundle."""
    if not path.is_dir():
        index = (
            path if path.name.endswith(mesh_tensorflow.INDEX_SUFFIX) else Path(f"{path}{mesh_tensorflow.INDEX_SUFFIX}")
        )
        if index.is_file():
            return index
        if path.name == t5x_legacy.FILE_NAME and path.is_file():
            return _locate(path.parent, step)
        raise FileNotFoundError(f"{path} does not exist: expected a directory checkpoint_STEP, or one that holds some.")
    if _UNFINISHED.fullmatch(path.name):
        raise CheckpointFileError(
            f"{path} was not finished: it has the name of a checkpoint being written; take another."
        )
    if _is_checkpoint(path):
        return path
    candidates = _numbered(path, _DIRECTORY) or _numbered(path, _BUNDLE)
    if not candidates:
        unfinished = [child.name for child in sorted(path.iterdir()) if _UNFINISHED.fullmatch(child.name)]
        raise FileNotFoundError(
            f"{path} holds no checkpoint: expected directories checkpoint_STEP or TensorFlow's files."
            + (f" {', '.join(unfinished)} was not finished." if unfinished else "")
        )
    if step is not None and step not in candidates:
        raise FileNotFoundError(f"{path} holds no step {step}: it has {', '.join(map(str, sorted(candidates)))}.")
    chosen = candidates[max(candidates) if step is None else step]
    if chosen.is_dir() and not _is_checkpoint(chosen):
        raise FileNotFoundError(f"{chosen} holds neither a file 'checkpoint' nor Orbax's: copy it again.")
    return chosen


def _is_checkpoint(directory: Path) -> bool:
    if t5x_orbax.item_of(directory) is not None or (directory / t5x_orbax.STATE_ITEM / t5x_legacy.FILE_NAME).is_file():
        return True
    file = directory / t5x_legacy.FILE_NAME
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        # TensorFlow keeps a list of its own checkpoints under the same name.
        return opened.read(len(_TEXT_START)) != _TEXT_START


def _numbered(directory: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    matches = [(pattern.fullmatch(child.name), child) for child in directory.iterdir()]
    return {int(match[1]): child for match, child in matches if match}


def _read_bundle(index: Path) -> T5XCheckpoint:
    leaves: dict[str, Any] = {}
    for name, array in mesh_tensorflow.read_bundle(index).items():
        parameter, slot = mesh_tensorflow.translated(name)
        leaves[f"{TARGET}/{parameter}" if slot is None else f"{SLOTS}/{parameter}/{slot}"] = array
    leaves[STEP] = leaves.pop(f"{TARGET}/{mesh_tensorflow.STEP_NAME}", None)
    return checkpoint_of(leaves, _MESH_TENSORFLOW, index)


class T5XWriter:
    """Takes the arrays of a checkpoint, one at a time, in any order.

    Attributes:
        directory: where the files are, before all is there.
    """

    def __init__(self, directory: Path, writer: t5x_legacy.LegacyWriter | t5x_orbax.OrbaxWriter):
        self.directory = directory
        self._writer = writer

    def write(self, name: str, array: ArrayLike) -> None:
        """Stores a parameter.

        Args:
            name: one of those given before, each once.
            array: of the shape given; floats are rounded to the dtype given.
        """
        self._writer.write(f"{TARGET}/{name}", array)

    def write_slot(self, name: str, array: ArrayLike) -> None:
        """Stores a slot of the optimizer.

        Args:
            name: one of those given before, each once.
            array: of the shape given; floats are rounded to the dtype given.
        """
        self._writer.write(f"{SLOTS}/{name}", array)


@contextlib.contextmanager
def open_writer(
    directory: Path,
    step: int,
    parameters: Mapping[str, ArraySpec],
    slots: Mapping[str, ArraySpec] | None = None,
    *,
    form: str = "legacy",
    save_dtype: np.dtype | None = None,
    chunk_bytes: int | None = None,
) -> Iterator[T5XWriter]:
    """Writes a checkpoint that T5X restores.

    Args:
        directory: that will hold ``checkpoint_STEP``, which appears whole at the end, or not at all.
        step: of training, from 0.
        parameters: by path.
        slots: of the optimizer by the parameter's path and the slot's name, as ``"encoder/.../kernel/v_row"``. Those of
            Adafactor that are not given are written as unused. None or empty writes no optimizer state.
        form: ``"legacy"`` or ``"orbax"``.
        save_dtype: that parameters, and not slots, are rounded to; None keeps the dtypes given.
        chunk_bytes: largest chunk of an array; None is the form's own.

    Yields:
        What takes the arrays.

    Raises:
        ValueError: the checkpoint exists, a setting is wrong, or an array is missing at the end.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: expected one of {', '.join(FORMS)}.")
    if step < 0:
        raise ValueError(f"step is {step}: expected 0 or more.")
    if save_dtype is not None and not is_float(save_dtype):
        raise ValueError(f"save_dtype is {save_dtype}: expected a float.")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: expected at least 1.")
    specs, unused = state_specs(parameters, slots, save_dtype)
    final = directory / f"checkpoint_{step}"
    with new_directory(final) as partial:
        writer: t5x_legacy.LegacyWriter | t5x_orbax.OrbaxWriter
        if form == "legacy":
            writer = t5x_legacy.writer(partial, step, specs, chunk_bytes or t5x_legacy.CHUNK_BYTES)
        else:
            writer = t5x_orbax.writer(partial, final, step, specs, chunk_bytes)
        yield T5XWriter(partial, writer)
        for name in unused:
            writer.write(name, np.zeros(specs[name].shape, specs[name].dtype))
        writer.finish()


def write(
    checkpoint: T5XCheckpoint,
    directory: Path,
    *,
    form: str = "legacy",
    save_dtype: np.dtype | None = None,
    chunk_bytes: int | None = None,
) -> Path:
    """Writes all of a checkpoint, one array at a time.

    Args:
        checkpoint: from anywhere.
        directory: that will hold ``checkpoint_STEP``.
        form: ``"legacy"`` or ``"orbax"``.
        save_dtype: that parameters, and not slots, are rounded to; None keeps theirs.
        chunk_bytes: largest chunk of an array; None is the form's own.

    Returns:
        The checkpoint's directory.

    Raises:
        ValueError: as `open_writer`.
    """
    parameters, slots = specs_of(checkpoint.parameters), specs_of(checkpoint.slots)
    settings: dict[str, Any] = {"form": form, "save_dtype": save_dtype, "chunk_bytes": chunk_bytes}
    with open_writer(directory, checkpoint.step, parameters, slots, **settings) as writer:
        for name, array in checkpoint.parameters.items():
            writer.write(name, array.read())
        for name, array in checkpoint.slots.items():
            writer.write_slot(name, array.read())
    return directory / f"checkpoint_{checkpoint.step}"
