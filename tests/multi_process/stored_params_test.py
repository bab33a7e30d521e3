"""First parameters are read from files one array after another, and of each what the devices of a process hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from groups import ROOT, free_port
from process_memory import COUNTED, GIVES_BACK

from clp_jax.interop.arrays import LazyArray
from clp_jax.training.streamed_params import write_params

ROWS, WIDTH, COUNT = 16384, 2048, 4
ARRAY = ROWS * WIDTH * 4

# A small checkpoint loads all that is loaded once, before memory is counted.
PROGRAM = """
import json, sys
from pathlib import Path
import jax
import numpy as np
from clp_jax import processes
from clp_jax.partitioning import Rules, make_mesh, use_mesh
from clp_jax.host_rows import place_active
from clp_jax.training.streamed_params import open_params
from process_memory import Peak

address, number, *paths = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
processes.start(processes.Processes(address, 2, int(number)))
# On the first mesh a process holds parts of an array that are no neighbours.
crossed = [*jax.devices()[0::2], *jax.devices()[1::2]]
for path, devices in zip(paths, (crossed, jax.devices()), strict=True):
    with use_mesh(make_mesh(devices=devices), Rules((("embed", "data"),))):
        counted = Peak()
        stored, description, step = open_params(path)
        placed = place_active(stored, {name: ("embed", None) for name in stored})
        peak = counted.read()
        held = [shard for leaf in placed.values() for shard in leaf.addressable_shards]
        wrong = [
            shard.index[0].start
            for i, leaf in enumerate(placed.values())
            for shard in leaf.addressable_shards
            for rows in [np.arange(*shard.index[0].indices(leaf.shape[0])[:2])[:, None]]
            if not np.array_equal(np.asarray(shard.data), rows + 1000.0 * i + np.arange(leaf.shape[1]) % 97)
        ]
        starts = sorted({shard.index[0].start for shard in held})
        print(json.dumps([peak, sum(shard.data.nbytes for shard in held), wrong, step, starts]))
sys.exit(processes.leave(0))
"""


def make(directory: Path, rows: int) -> Path:
    """A checkpoint whose arrays are never whole in memory twice."""

    def fill(number):
        def part(out, region):
            out[...] = np.arange(region[0].start, region[0].stop, dtype=np.float32)[:, None] + 1000.0 * number
            out += np.arange(region[1].start, region[1].stop, dtype=np.float32) % 97

        return part

    dtype = np.dtype(np.float32)
    arrays = {f"array_{i}": LazyArray((rows, WIDTH), dtype, fill(i)) for i in range(COUNT)}
    write_params(directory, arrays, {"stage": "toy"}, step=3)
    return directory


@COUNTED
def test_a_process_holds_its_shards_and_one_of_them_besides(tmp_path):
    places = [str(make(tmp_path / "small", 8)), str(make(tmp_path / "big", ROWS))]
    address = f"127.0.0.1:{free_port()}"
    environment = (
        os.environ | GIVES_BACK | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fixtures'}", "JAX_PLATFORMS": "cpu"}
    )
    group = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(number), *places],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for number, process in enumerate(group):
        said, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
        small, (peak, held, wrong, step, starts) = map(json.loads, said.splitlines()[-2:])
        assert small[2] == wrong == [] and small[3] == step == 3 and held == COUNT * ARRAY / 2
        assert small[4] == [2 * number, 2 * number + 4] and starts == [
            ROWS // 2 * number,
            ROWS // 2 * number + ROWS // 4,
        ]
        # Its own half of all arrays, and its half of one more with what reading takes.
        assert 0.95 * held <= peak <= held + 0.75 * ARRAY, (peak / ARRAY, held / ARRAY)
