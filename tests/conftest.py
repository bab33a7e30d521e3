"""Every test runs with checked shapes, refused rank promotion, and warnings as errors.

Tests under `multi_device/` need a process of their own, with eight virtual devices; `pytest tests/multi_device` makes one,
and any other command line leaves them out.
"""

import gc
import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # Before JAX is imported; exact tests are exact on one platform.
# Programs run for milliseconds and take seconds to compile: LLVM's optimisations are what can be saved.
# Virtual devices share few threads: with collectives in an order of each device's own (jax 0.12), they wait for ever.
_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Many tests compile the same small programs.
_programs = tempfile.TemporaryDirectory(prefix="clp_jax_programs_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

from jaxtyping import install_import_hook

install_import_hook("clp_jax", "shape_checker.check")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

TESTS = Path(__file__).parent
OWN_PROCESS = {TESTS / "multi_device": 8, TESTS / "multi_process": 1}


def _own_process(config: pytest.Config) -> Path | None:
    """The folder with a process of its own that all of the command line's paths are in."""
    paths = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    for folder in OWN_PROCESS:
        if paths and all(path.is_relative_to(folder) for path in paths):
            return folder
    return None


def pytest_configure(config: pytest.Config) -> None:
    folder = _own_process(config)
    if folder is not None:
        jax.config.update("jax_num_cpu_devices", OWN_PROCESS[folder])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path in OWN_PROCESS and collection_path != _own_process(config) else None


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_module():
    """A process may map some 65,000 pieces of memory, and thousands of compiled programs are several each."""
    yield
    jax.clear_caches()
    gc.collect()
