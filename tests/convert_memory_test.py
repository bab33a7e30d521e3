"""`clp convert` holds one tensor and a fifth of it, counted by the kernel in a process of its own for each direction."""

import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from process_memory import COUNTED, GIVES_BACK

from clp_jax.array_types import Params
from clp_jax.interop import huggingface
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.slots import flatten, unflatten
from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import to_json
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.training.streamed_params import write_params

ROOT = Path(__file__).parents[1]
LAYERS = dict(num_encoder_layers=3, num_decoder_layers=1)
# 600 MiB, nearly all in nine tensors of 64 MiB: those of the encoder's layers are two parameters of three each. Beside them some ten are used.
BIG = T5Config.t5_1_0(vocab_size=8192, embed_dim=2048, mlp_dim=8192, num_heads=1, head_dim=64, **LAYERS)
SMALL = T5Config.t5_1_0(vocab_size=64, embed_dim=8, mlp_dim=16, num_heads=2, head_dim=4, **LAYERS)
LARGEST = 2048 * 8192 * 4
# 90 MiB in parameters of at most 5 MiB each.
EQUAL = T5Config(
    vocab_size=64,
    embed_dim=512,
    mlp_dim=512,
    num_heads=8,
    head_dim=64,
    num_encoder_layers=5,
    num_decoder_layers=5,
)

# The small policy loads all that is loaded once, before memory is counted.
PROGRAM = """
import sys
from clp_jax.convert import convert
from process_memory import Peak

(source, small), (target, small_target) = (word.split(",") for word in sys.argv[1:3])
options = dict(word.split("=") for word in sys.argv[3:])
convert(small, small_target, **options)
peak = Peak()
convert(source, target, **options)
print("peak", peak.read())
"""


def numbers(config: T5Config, *copies: int) -> Params:
    """Parameters that compress well, of a policy of that many copies of each."""

    def fill(out, region):
        out[...] = np.arange(region[-1].start, region[-1].stop, dtype=np.float32) % 97 - 48

    leaves = flatten(Policy(config).abstract())
    return unflatten({path: LazyArray((*copies, *leaf.shape), leaf.dtype, fill) for path, leaf in leaves})


def make(directory: Path, config: T5Config, dtype: str | None = None) -> None:
    huggingface.write(directory, config, numbers(config), dtype=dtype)


def make_steerable(directory: Path, config: T5Config) -> None:
    """What training leaves of a policy that is a mixture of two, and of the reference."""
    description = {
        "stage": "clp",
        "model": to_json(config),
        "conditioning": to_json(ParameterConditioning("full", 2, alpha_min=0.01)),
        "rewards": ["a", "b"],
        "reward_fingerprints": {},
        "prompt_length": 8,
        "max_length": 8,
        "vocabulary": None,
    }
    write_params(directory / "checkpoints" / "1", {"policy": numbers(config, 2)}, description, 1)
    write_params(directory / "reference", numbers(config), description, 0)
    RewardStatistics(("a", "b"), (0.0, 0.0), (1.0, 1.0), 4).save(directory)


def peak_of(source: tuple[str, str], target: tuple[str, str], home: Path, *options: str) -> int:
    places = [",".join(f"{kind}:{size}_{name}" for size in ("big", "small")) for kind, name in (source, target)]
    command = [sys.executable, "-c", PROGRAM, *places, *options]
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fixtures'}",
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        **GIVES_BACK,
    }
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak")[-1])


@COUNTED
def test_a_steerable_policy_is_mixed_one_array_at_a_time(tmp_path):
    """Both components and the reference have 270 MiB, of which no array has more than 10, read at three times its size."""
    make_steerable(tmp_path / "big_run", EQUAL)
    make_steerable(tmp_path / "small_run", SMALL)
    whole = 4 * Policy(EQUAL).num_params()
    peak = peak_of(("clp", "run"), ("hf", "mixed"), tmp_path)
    assert 3 * whole > 250 * 2**20
    assert peak < 2 / 3 * whole, (peak, whole)


@COUNTED
def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """Of one layer, though a parameter is those of all; and of its own type, though the file has another."""
    make(tmp_path / "big_first", BIG)
    make(tmp_path / "small_first", SMALL)
    make(tmp_path / "big_half", BIG, "bfloat16")
    make(tmp_path / "small_half", SMALL, "bfloat16")
    ways = [
        (("hf", "first"), ("clp", "run")),
        (("clp", "run"), ("hf", "back")),
        (("clp", "run"), ("t5x", "legacy")),
        (("t5x", "legacy"), ("clp", "again")),
        (("clp", "run"), ("t5x", "orbax"), "layout=orbax"),
        (("t5x", "orbax"), ("clp", "from_orbax")),
        (("hf", "half"), ("clp", "widened")),
        # In the type of what it came from, which is looked for first.
        (("clp", "widened"), ("t5x", "short"), "layout=orbax"),
        (("clp", "widened"), ("t5x", "short_legacy")),
        (("t5x", "short_legacy"), ("clp", "widened_again")),
    ]
    peaks = {}
    for source, target, *options in ways:
        peaks[f"{source} to {target}"] = peak_of(source, target, tmp_path, *options) / LARGEST
        if target[1].endswith("again") or target[1] == "from_orbax":
            shutil.rmtree(tmp_path / f"big_{target[1]}")
    # Some array was new memory, so the count can be believed.
    assert all(0.95 <= peak <= 1.2 for peak in peaks.values()), peaks
    first, back = (tmp_path / f"big_{name}" / "model.safetensors" for name in ("first", "back"))
    assert filecmp.cmp(first, back, shallow=False)
