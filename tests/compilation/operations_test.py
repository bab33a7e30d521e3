"""Operations of single instructions against counting by hand."""

import numpy as np
import pytest

from clp_jax.compilation.chips import CHIPS
from clp_jax.compilation.hlo import Module
from clp_jax.compilation.operations import kernel_flops, kernel_seconds, product_flops


def flops(left: str, right: str, out: str, rest: str, opcode: str = "convolution") -> float:
    text = (
        f"ENTRY %m (a: {left}, b: {right}) -> {out} {{\n  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %r = {out} {opcode}(%a, %b), {rest}\n}}\n"
    )
    module = Module.parse(text)
    return product_flops(module.instructions["r"], module)


def test_a_product_of_two_matrices():
    assert flops("bf16[64,32]{1,0}", "bf16[32,16]{1,0}", "bf16[64,16]{1,0}", "dim_labels=bf_io->bf") == 2 * 64 * 32 * 16
    rest = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert flops("f32[64,32]{1,0}", "f32[32,16]{1,0}", "f32[64,16]{1,0}", rest, "dot") == 2 * 64 * 32 * 16


def test_a_sum_over_two_dimensions():
    # The window covers the second one whole.
    out = flops(
        "bf16[64,2,32]{2,1,0}",
        "bf16[2,32,16]{2,1,0}",
        "bf16[64,16,1]{1,0,2}",
        "window={size=2}, dim_labels=b0f_0io->bf0",
    )
    assert out == 2 * 64 * 2 * 32 * 16


@pytest.mark.parametrize(
    "window",
    [
        "window={size=8 stride=7 lhs_dilate=8}",  # Of each output's window one place is no hole.
        "window={size=8 pad=7_7 lhs_dilate=9 rhs_reversal=1}",
    ],
)
def test_several_products_at_once_are_holes_but_for_one_place(window):
    left, right, out = "bf16[64,8,32]{2,1,0}", "bf16[8,32,16]{2,1,0}", "bf16[64,16,8]{2,1,0}"
    setting = dict(pair.split("=") for pair in window.removeprefix("window={").removesuffix("}").split())
    before = int(setting.get("pad", "0_0").split("_")[0])
    holes, stride = int(setting["lhs_dilate"]), int(setting.get("stride", 1))
    by_hand = sum(
        1
        for o in range(8)
        for k in range(8)
        if 0 <= o * stride + k - before <= 7 * holes and (o * stride + k - before) % holes == 0
    )
    assert flops(left, right, out, f"{window}, dim_labels=b0f_0io->bf0") == 2 * 64 * 32 * 16 * by_hand
    if "stride" in setting:
        assert by_hand == 8


def test_what_is_no_product_has_none():
    assert flops("f32[8]{0}", "f32[8]{0}", "f32[8]{0}", "x=1", "add") == 0


def test_a_kernel_runs_at_the_peak_or_at_the_memory_whichever_is_slower():
    def kernel(flops: int, moved: int):
        config = f'{{"custom_call_config":{{"cost_estimate":{{"flops":"{flops}","bytes_accessed":"{moved}"}}}}}}'
        text = (
            f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} custom-call(), backend_config={config}\n}}\n"
        )
        return Module.parse(text).instructions["r"]

    chip = CHIPS["v6e"]
    assert kernel_flops(kernel(10**12, 1)) == 1e12
    np.testing.assert_allclose(kernel_seconds(kernel(10**12, 1), chip), 1e12 / chip.peak_flops)
    np.testing.assert_allclose(kernel_seconds(kernel(1, 10**9), chip), 1e9 / chip.hbm_bandwidth)
