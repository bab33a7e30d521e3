"""What digests cost: CPU seconds of a checkpoint saved in the background and restored, in all and for SHA-256 alone.

python benchmarks/checkpoints.py --megabytes 256
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from clp_jax.training.checkpoint_manifest import Manifest
from clp_jax.training.checkpoint_steps import as_path
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.guards import Guards
from clp_jax.training.train_state import TrainState

ARRAYS = 8


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of all threads of this process."""
    before = time.process_time()
    call()
    return time.process_time() - before


def main() -> None:
    """Prints three lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256, help="of parameters, normally distributed")
    size = parser.parse_args().megabytes * 10**6 // 4 // ARRAYS
    params = {f"array_{i}": jax.random.normal(jax.random.key(i), (size,)) for i in range(ARRAYS)}
    state = TrainState(jnp.int32(1), params, {}, None, jnp.zeros(2, jnp.uint32), Guards().init())
    block = b"0" * 10**8
    rate = len(block) / cpu_seconds(lambda: hashlib.sha256(block).digest()) / 1e9
    print(f"SHA-256: {rate:.2f} GB per CPU second")
    with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
        for step in (1, 2):  # The first loads libraries.
            checkpoints.save(step, state, {}, {}, {})
            spent = cpu_seconds(lambda: checkpoints.__exit__(None, None, None))
        place = as_path(directory) / "2"
        manifest = Manifest.read(place)
        files = cpu_seconds(lambda: manifest.verify_files(place))
        arrays = cpu_seconds(lambda: manifest.verify_arrays("params", params))
        whole = cpu_seconds(lambda: jax.block_until_ready(checkpoints.restore(state)[0].params))
        print(f"save, in the background: {spent:.2f} CPU s, of which digests {files + arrays:.2f}")
        print(f"restore: {whole:.2f} CPU s, of which digests {files + arrays:.2f}")


if __name__ == "__main__":
    main()
