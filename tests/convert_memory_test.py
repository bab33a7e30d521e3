"""`clp convert` holds one array and a fifth of it, counted by the kernel in a process of its own for each direction."""

import filecmp
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clp_jax.interop import huggingface
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.slots import flatten, unflatten
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy

ROOT = Path(__file__).parents[1]
LAYERS = dict(num_encoder_layers=3, num_decoder_layers=3)
# 264 MiB in 70 tensors; the embedding has 192 MiB. Of freed memory, the allocator may keep some tens.
BIG = T5Config(vocab_size=98_304, embed_dim=512, mlp_dim=1024, num_heads=8, head_dim=64, tied_head=True, **LAYERS)
SMALL = T5Config(vocab_size=64, embed_dim=8, mlp_dim=16, num_heads=2, head_dim=4, tied_head=True, **LAYERS)
LARGEST = 98_304 * 512 * 4

# The small policy loads all that is loaded once, before memory is counted.
PROGRAM = """
import sys
from pathlib import Path
from clp_jax.convert import convert

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

(source, small), (target, small_target) = (word.split(",") for word in sys.argv[1:])
convert(small, small_target)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
convert(source, target)
print("peak", resident("VmHWM") - before)
"""


def make(directory: Path, config: T5Config) -> None:
    """A checkpoint of numbers that compress well."""

    def fill(out, region):
        out[...] = np.arange(region[-1].start, region[-1].stop, dtype=np.float32) % 97 - 48

    leaves = {path: LazyArray(leaf.shape, leaf.dtype, fill) for path, leaf in flatten(Policy(config).abstract())}
    huggingface.write(directory, config, unflatten(leaves))


def peak_of(source: str, target: str, home: Path) -> int:
    places = [",".join(f"{kind}:{size}_{name}" for size in ("big", "small")) for kind, name in (source, target)]
    command = [sys.executable, "-c", PROGRAM, *places]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak")[-1])


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel does not count the peak of a process"
)
def test_memory_is_that_of_the_largest_array(tmp_path):
    make(tmp_path / "big_first", BIG)
    make(tmp_path / "small_first", SMALL)
    ways = [
        (("hf", "first"), ("clp", "run")),
        (("clp", "run"), ("hf", "back")),
        (("clp", "run"), ("t5x", "legacy")),
        (("t5x", "legacy"), ("clp", "again")),
    ]
    peaks = {f"{source[0]} to {target[0]}": peak_of(source, target, tmp_path) / LARGEST for source, target in ways}
    # Some array was new memory, so the count can be believed.
    assert all(0.95 <= peak <= 1.2 for peak in peaks.values()), peaks
    first, back = (tmp_path / f"big_{name}" / "model.safetensors" for name in ("first", "back"))
    assert filecmp.cmp(first, back, shallow=False)
