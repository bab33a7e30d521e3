"""The table of chips: what JAX calls them, and what it does not know."""

from clp_jax.compilation.chips import CHIPS, DEVICE_KINDS, peak_flops


def test_the_peak_of_a_device_is_that_of_its_chip():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12 == peak_flops("TPU v5")
    assert peak_flops("TPU v6 lite") == 918e12
    assert set(DEVICE_KINDS.values()) == set(CHIPS)


def test_nothing_is_said_of_what_is_not_in_the_table():
    assert peak_flops("cpu") is None and peak_flops("NVIDIA H200") is None
