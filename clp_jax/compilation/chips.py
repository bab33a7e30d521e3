"""TPU chips: what one can do, and how its links go.

Sources: A is Google Cloud's system architecture pages (cloud.google.com/tpu/docs/v5e, v5p, v6e), B is "How to scale your
model" (jax-ml.github.io/scaling-book/tpus, tables of chips), whose link rates are measured, 10 % below the nominal ones of A.
Clocks follow from the peak: bfloat16 peak / (2 x multipliers of all matrix units).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
        name: as topologies name it.
        peak_flops: bfloat16 floating-point operations per second.
        hbm_bytes: memory.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second of one link to a neighbour, in one direction.
        dcn_bandwidth: bytes per second that leave a chip over the data-centre network.
        clock: cycles per second.
        torus_rank: dimensions of the torus; a chip has two links along each.
        wraps: chips along a dimension from which on the dimension is a ring; shorter ones are lines.
        modelled_bandwidth: bytes per second that libtpu's estimates of copies come to: below what the memory has. Measured
            on the estimate of ``x + 1`` for a gigabyte (libtpu 0.0.52).
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    clock: float
    torus_rank: int
    wraps: int
    modelled_bandwidth: float


GIB = 2**30
# What JAX calls the devices of a chip; on v5p one device is one chip.
DEVICE_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}

CHIPS = {
    chip.name: chip
    for chip in (
        # A: 197 TFLOP/s, 16 GB, 819 GB/s, 2D torus, 6.4 Tbit/s of DCN for 256 chips. B: 45 GB/s. 4 units of 128x128.
        Chip("v5e", 197e12, 16 * GIB, 0.819e12, 45e9, 3.125e9, 1.5e9, 2, 16, 0.664e12),
        # A: 459 TFLOP/s, 95 GB, 2765 GB/s, 3D torus, 50 Gbit/s of DCN a chip. B: 90 GB/s. 2 cores x 4 units of 128x128.
        Chip("v5p", 459e12, 95 * GIB, 2.765e12, 90e9, 6.25e9, 1.75e9, 3, 4, 1.997e12),
        # A: 918 TFLOP/s, 32 GB, 1640 GB/s, 2D torus, 25.6 Tbit/s of DCN for 256 chips. B: 90 GB/s. 4 units of 256x256.
        Chip("v6e", 918e12, 32 * GIB, 1.64e12, 90e9, 12.5e9, 1.75e9, 2, 16, 1.325e12),
    )
}


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations per second of a device, by what JAX calls its kind; None for what is not in the table."""
    name = DEVICE_KINDS.get(device_kind)
    return None if name is None else CHIPS[name].peak_flops
