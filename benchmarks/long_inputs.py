"""Memory and time of long inputs: an encoder and a decoder-only policy, each doubling of the tokens beside the one before.

    python benchmarks/long_inputs.py --size small

Memory is what the compiled forward pass holds beside parameters, told by the compiler; only the shorter inputs are run.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from measure import SHAPES, Shape, decoder_only, mebibytes, medians, parse_arguments, peak_bytes, random_tokens, report

from clp_jax.models.config import T5Config
from clp_jax.models.language_model import in_order
from clp_jax.models.policy import Policy

LENGTHS = {"tiny": (1024, 2048, 4096, 8192), "small": (4096, 8192, 16384, 32768)}
TIMED = 2


def main() -> None:
    """Measures, and prints."""
    arguments = parse_arguments(__doc__ or "", repeats=3)
    shape, lengths = SHAPES[arguments.size], LENGTHS[arguments.size]
    rows, figures = [], {}
    for kind, policy in policies(shape).items():
        # Compiling takes shapes alone: parameters are made for what is run.
        forward = jax.jit(forward_of(policy))
        abstract = policy.abstract()
        compiled = {
            length: forward.lower(abstract, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
            for length in lengths
        }
        memory = {length: peak_bytes(program) for length, program in compiled.items()}
        params = policy.init(jax.random.key(0))
        inputs = {n: jnp.asarray(random_tokens(1, n, shape.model.vocab_size, seed=0)) for n in lengths[:TIMED]}
        programs: dict[str, Callable[[], Any]] = {
            str(n): functools.partial(run_once, compiled[n], params, x) for n, x in inputs.items()
        }
        times = {int(n): seconds for n, seconds in medians(programs, arguments.repeats, arguments.clock).items()}
        rows += table(kind, memory, times)
        figures[kind] = {"bytes": memory, "seconds": times}
    title = f"{arguments.size}: forward, one row, width {shape.model.embed_dim}, {jax.default_backend()}"
    report(title, rows, figures, arguments.json)


def policies(shape: Shape) -> dict[str, Policy]:
    """The two kinds, each four layers deep."""
    encoder = dataclasses.replace(shape.model, num_encoder_layers=4)
    return {"encoder": Policy(encoder), "decoder-only": Policy(decoder_only(shape.model))}


def forward_of(policy: Policy) -> Callable[[Any, Any], Any]:
    """The states of one unpacked row, before any head."""

    def forward(params: Any, inputs: Any) -> Any:
        model = policy.bind(params)
        stack = model.encoder if isinstance(policy.config, T5Config) else model.decoder
        return stack(model.embed(inputs), in_order(jnp.ones_like(inputs)), unpacked=True).states

    return forward


def run_once(program: Callable[[Any, Any], Any], params: Any, inputs: Any) -> None:
    """Runs to the end."""
    jax.block_until_ready(program(params, inputs))


def table(kind: str, memory: dict[int, int | None], times: dict[int, float]) -> list[tuple[str, str]]:
    """A line for each length, with what it is times the length before."""
    rows, before = [], None
    for length, count in memory.items():
        told = [mebibytes(count)]
        if before is not None and count is not None and memory[before]:
            told.append(f"x {count / memory[before]:.2f}")
        if length in times:
            told.append(f"{times[length]:8.2f} s")
            if before in times:
                told.append(f"x {times[length] / times[before]:.2f}")
        rows.append((f"{kind}, {length:,} tokens", "   ".join(told)))
        before = length
    return rows


if __name__ == "__main__":
    main()
