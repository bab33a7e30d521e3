"""Reading and writing hold one tensor and a fifth of one at most, counted by the kernel in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from process_memory import COUNTED, GIVES_BACK

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | GIVES_BACK | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fixtures'}"}
MEBIBYTES = 192

# Two tensors, so that holding both shows. Everything is loaded before memory is counted.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from clp_jax.interop import arrays, safetensors_files, t5x_files
from process_memory import Peak

OUT, SIZE = Path(sys.argv[1]), int(sys.argv[2]) * 2**20
SPECS = {name: arrays.ArraySpec((SIZE // 4096, 1024), np.dtype("float32")) for name in ("a", "b")}

def peak(run, *arguments):
    counted = Peak()
    run(*arguments)
    return counted.read() / SIZE

def tensor(spec):
    array = np.zeros(spec.shape, spec.dtype)
    array += np.arange(spec.shape[1], dtype=spec.dtype) % 977
    array += np.arange(spec.shape[0], dtype=spec.dtype)[:, None]
    return array

def write(form, directory, specs):
    if form == "safetensors":
        opened = safetensors_files.open_writer(directory, specs)
    else:
        opened = t5x_files.open_writer(directory, 1, specs, form=form)
    with opened as writer:
        for name, spec in specs.items():
            writer.write(name, tensor(spec))

def read(form, directory):
    source = safetensors_files.read(directory) if form == "safetensors" else t5x_files.read(directory).parameters
    for array in source.values():
        array.read()

small = {"a": arrays.ArraySpec((2, 2), np.dtype("float32"))}
peaks = {}
for form in ("safetensors", "legacy", "orbax"):
    write(form, OUT / "small" / form, small)
    read(form, OUT / "small" / form)
    peaks[form] = [peak(write, form, OUT / form, SPECS), peak(read, form, OUT / form)]
print(json.dumps(peaks))
"""


@COUNTED
def test_one_tensor_at_a_time(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(MEBIBYTES)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    # Nearly all of a tensor was new memory, so the count can be believed.
    assert all(0.95 <= peak <= 1.2 for pair in peaks.values() for peak in pair), peaks
