"""Share of a chip's peak that libtpu estimates for one product, by what it may take of a core's memory.

python benchmarks/products.py v5p:2x2x1 16384x4096x16384 16384 32768 49152 65536
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clp_jax.compilation.analysis import Work, analyse
from clp_jax.compilation.topology import Topology


def main() -> None:
    """A line for each limit, in KiB."""
    topology, sizes, *limits = sys.argv[1:]
    where = Topology.parse(topology)
    mesh = Mesh(np.array(where.devices()[:1]), ("one",))
    rows, inner, columns = (int(size) for size in sizes.split("x"))
    here = NamedSharding(mesh, PartitionSpec())
    left, right = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in ((rows, inner), (inner, columns))
    )
    flops = 2.0 * rows * inner * columns
    for limit in limits:
        options = {"xla_tpu_scoped_vmem_limit_kib": limit}
        found = analyse(jax.jit(jnp.matmul).lower(left, right), Work("product", flops, 1), where, mesh, options)
        print(
            f"{topology} {sizes} {limit} KiB: {100 * flops / where.chip.peak_flops / found.seconds:.1f} % of the peak"
        )


if __name__ == "__main__":
    main()
