"""Floating-point operations of single instructions of HLO."""

import re
from collections.abc import Sequence

import numpy as np

from clp_jax.compilation.chips import Chip
from clp_jax.compilation.hlo import Instruction, Module, array_shapes

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def product_flops(line: Instruction, module: Module) -> float:
    """Of a matrix product, which compilers for TPUs write as a convolution; 0 for anything else.

    Products of several matrices at once are convolutions over a dimension of their number, most of whose window lies
    outside or on holes: only what is multiplied counts.
    """
    if line.opcode not in ("convolution", "dot"):
        return 0.0
    left, right = (array_shapes(module.instructions[name].shape)[0][1] for name in line.operands[:2])
    out = array_shapes(line.shape)[0][1]
    if line.opcode == "dot":
        found = _CONTRACTING.search(line.attributes)
        contracted = [left[int(d)] for d in found[1].split(",") if d] if found else []
        return 2.0 * float(np.prod(out, dtype=float)) * float(np.prod(contracted, dtype=float))
    labels = _LABELS.search(line.attributes)
    if labels is None:
        return 0.0
    of_left, of_right, of_out = (
        dict(zip(text, dims, strict=True)) for text, dims in zip(labels.groups(), (left, right, out), strict=True)
    )
    window = _window(line)
    total = 2.0 * of_out["b"] * of_out["f"] * of_right["i"]
    for number, name in enumerate(sorted(name for name in of_out if name.isdigit())):
        setting = {key: values[number] for key, values in window.items()}
        total *= _multiplied(of_left[name], of_right[name], of_out[name], setting)
    return total


def kernel_flops(line: Instruction) -> float:
    """Of a kernel that says what it does; 0 otherwise."""
    return float(_estimate(line).get("flops", 0))


def kernel_seconds(line: Instruction, chip: Chip) -> float:
    """A kernel that says what it does, at the chip's peak or its memory's bandwidth; 0 otherwise."""
    found = _estimate(line)
    return max(
        float(found.get("flops", 0)) / chip.peak_flops, float(found.get("bytes_accessed", 0)) / chip.hbm_bandwidth
    )


def _estimate(line: Instruction) -> dict:
    kernel = line.config.get("custom_call_config", {})
    return kernel.get("cost_estimate", {}) if isinstance(kernel, dict) else {}


def _window(line: Instruction) -> dict[str, list[str]]:
    """The settings of a window, each a value for every dimension."""
    found = _WINDOW.search(line.attributes)
    pairs = [setting.split("=") for setting in found[1].split()] if found else []
    return {key: value.split("x") for key, value in pairs}


def _multiplied(left: int, right: int, out: int, setting: dict[str, str]) -> int:
    """Pairs of an output and a place of the window that fall on an input, along one dimension."""
    stride, holes, spread = (int(setting.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(setting.get("pad", "0_0").split("_")[0])
    outputs: Sequence[int] | np.ndarray = np.arange(out)[:, None] * stride
    reached = outputs + np.arange(right)[None] * spread - before
    return int(((reached >= 0) & (reached <= (left - 1) * holes) & (reached % holes == 0)).sum())
