"""What the benchmarks share: shapes, alternating timings, and Hugging Face's torch models of the same shapes."""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clp_jax import allocator
from clp_jax.models.config import PaLMConfig, T5Config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
        model: the policy's sizes.
        batch_size: rows of a training batch.
        inputs: tokens of a prompt.
        targets: tokens of a completion.
    """

    model: T5Config
    batch_size: int
    inputs: int
    targets: int


def _t5(width: int, mlp: int, heads: int, head_dim: int, layers: int) -> T5Config:
    sizes = {"embed_dim": width, "mlp_dim": mlp, "num_heads": heads, "head_dim": head_dim}
    return T5Config.t5_1_1(vocab_size=2048, num_encoder_layers=layers, num_decoder_layers=layers, **sizes)


SHAPES = {
    "tiny": Shape(_t5(128, 256, 4, 32, 2), batch_size=64, inputs=64, targets=24),  # The quickstart's.
    "small": Shape(_t5(512, 1024, 8, 64, 4), batch_size=16, inputs=128, targets=32),
    "base": Shape(_t5(768, 2048, 12, 64, 12), batch_size=64, inputs=512, targets=128),  # For a GPU.
}


def decoder_only(config: T5Config) -> PaLMConfig:
    """A Llama-like policy of the same widths, four layers deep."""
    return PaLMConfig.llama(
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        mlp_dim=config.mlp_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_layers=4,
    )


def parse_arguments(
    description: str, repeats: int = 9, *, rows: bool = False, shares: bool = False
) -> argparse.Namespace:
    """The command line of a benchmark.

    Args:
        description: what it measures.
        repeats: by default.
        rows: whether it takes another number of rows than the size says.
        shares: whether the devices of a CPU may share its rows out.
    """
    parser = argparse.ArgumentParser(description=description)
    if rows:
        parser.add_argument("--rows", type=int, help="of a batch (default: as the size has it)")
    if shares:
        cores = len(os.sched_getaffinity(0))
        parser.add_argument(
            "--devices",
            type=int,
            default=cores,
            help=f"that JAX makes of a CPU, to share the rows out (default: one for each core, {cores})",
        )
    parser.add_argument("--size", choices=SHAPES, default="small", help="model and batch (default: small)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help=f"timings of each program; the median counts (default: {repeats})",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="of torch on a CPU; JAX takes all cores. Where JAX computes on a GPU, torch does too",
    )
    parser.add_argument(
        "--processor",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        dest="clock",
        help="count processor time: of a shared machine, under `taskset -c 0` with --threads 1",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    allocator.begin_again()  # As `clp` does.
    if shares:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    return arguments


def medians(
    programs: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each program, taken in turn so that a busy moment of the machine hits all of them."""
    for program in programs.values():
        program()
        program()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = clock()
            program()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def num_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def peak_bytes(compiled: Any) -> int | None:
    """What a compiled program holds beyond its arguments, where the backend tells."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def random_tokens(rows: int, length: int, vocab_size: int, seed: int) -> np.ndarray:
    """Token ids without padding or an end."""
    return np.random.default_rng(seed).integers(2, vocab_size, (rows, length)).astype(np.int32)


def torch_t5(config: T5Config, threads: int) -> Any:
    """Hugging Face's T5 of the same shape, random and in training mode; None without torch or transformers."""
    transformers = _transformers(threads)
    if transformers is None:
        return None
    same = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.embed_dim,
        d_ff=config.mlp_dim,
        num_heads=config.num_heads,
        d_kv=config.head_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(same).to(torch_device())


def torch_llama(config: PaLMConfig, threads: int) -> Any:
    """Hugging Face's Llama of the same shape, random and in training mode; None without torch or transformers."""
    transformers = _transformers(threads)
    if transformers is None:
        return None
    same = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        num_hidden_layers=config.num_layers,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(same).to(torch_device())


def torch_device() -> str:
    """Where torch computes: on a GPU where JAX does."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def finished(program: Callable[[], Any]) -> Callable[[], Any]:
    """The program of torch, with the wait for what it started."""
    import torch

    def run() -> None:
        program()
        if torch_device() == "cuda":
            torch.cuda.synchronize()

    return run


def _transformers(threads: int) -> Any:
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(threads)
    if torch_device() == "cuda":
        if not torch.cuda.is_available():
            return None
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as XLA multiplies by default.
    transformers.logging.set_verbosity_error()
    return transformers


def report(title: str, rows: Sequence[tuple[str, str]], figures: Mapping[str, Any], path: str | None) -> None:
    """Prints rows, and writes figures as JSON where a path is given."""
    print(title)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    if path:
        with open(path, "w") as file:
            json.dump(dict(figures), file, indent=2)


def mebibytes(count: int | None) -> str:
    """A number of bytes to read."""
    return "not told by this backend" if count is None else f"{count / 2**20:.1f} MiB"
