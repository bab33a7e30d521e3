"""From a lowered program to its report: compiles it, or reads why the compiler refused."""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clp_jax.array_types import PyTree
from clp_jax.compilation.chips import Chip
from clp_jax.compilation.collectives import Layout
from clp_jax.compilation.hlo import Module, array_shapes
from clp_jax.compilation.report import Buffer, Exchange, Memory, ProgramReport
from clp_jax.compilation.timeline import Clock, Timeline
from clp_jax.compilation.topology import Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
)
_ALLOCATION = re.compile(r"Size: ([\d.]+)([KMGT]?).*?(?:Operator: op_name=\"([^\"]*)\".*?)?Shape: ([^\n]*?)\{", re.S)
_ALIVE = re.compile(r"^ +([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", re.M)
# Listed in a report.
LARGEST = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program is for.

    Attributes:
        name: of the program.
        flops: of the model, over all chips.
        tokens: over all chips.
        trips: iterations of its loops that end when they like.
        runs: executions in one step.
    """

    name: str
    flops: float
    tokens: int
    trips: int = 1
    runs: int = 1


class RefusedError(ValueError):
    """The compiler refuses a program, for another reason than memory."""


def analyse(
    lowered: jax.stages.Lowered,
    work: Work,
    topology: Topology,
    mesh: Mesh,
    options: Mapping[str, Any] | None = None,
) -> ProgramReport:
    """Compiles a program and says what it costs.

    Args:
        lowered: for the devices of the mesh.
        work: what it is for.
        topology: of the devices.
        mesh: of the devices.
        options: of the compiler.

    Raises:
        RefusedError: when the compiler refuses for another reason than memory.
    """
    start = time.perf_counter()
    try:
        compiled, text, alive = _compile(lowered, options or {})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or _refusal(str(error)) is None:
            reason = str(error).strip().partition("\n")[0]
            raise RefusedError(f"the compiler refuses the program {work.name}: {reason}") from error
        return _refused(str(error), work, topology, lowered, time.perf_counter() - start)
    took = time.perf_counter() - start
    module = Module.parse(text)
    timeline = Clock(module, topology.chip, layout_of(mesh, topology), work.trips).run()
    memory = _memory(compiled.memory_analysis(), topology.chip)
    return _report(work, topology, timeline, memory, _largest(module, alive), took)


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> tuple[jax.stages.Compiled, str, str]:
    """The executable, and what the compiler itself writes: the program, and the arrays that are alive at the peak.

    jaxlib's own text of a program will not do: it need not know all that libtpu makes.
    """
    settings: Any = jax.config
    cached = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # What comes from there is not written again.
    try:
        with tempfile.TemporaryDirectory() as directory:
            compiled = lowered.compile({"xla_dump_to": directory, "xla_dump_hlo_as_text": True, **options})
            written = [next(Path(directory).glob(f"*{name}.txt")) for name in ("after_codegen", "live-range")]
            program, alive = (path.read_text("utf-8") for path in written)
            return compiled, program, alive
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def layout_of(mesh: Mesh, topology: Topology) -> Layout:
    """Where the devices of a mesh stand."""
    devices: list[Any] = list(mesh.devices.flat)
    places = np.asarray([(getattr(d, "slice_index", None) or 0, *d.coords[: len(topology.shape)]) for d in devices])
    return Layout(mesh.axis_names, tuple(mesh.shape.values()), places, topology.shape)


def _report(
    work: Work, topology: Topology, timeline: Timeline, memory: Memory, buffers: tuple[Buffer, ...], took: float
) -> ProgramReport:
    exchanges = sorted(timeline.traffic.values(), key=lambda item: -item.seconds)
    slowest = sorted(timeline.slowest.items(), key=lambda item: -item[1])[:LARGEST]
    peak = topology.chip.peak_flops * topology.chips
    return ProgramReport(
        name=work.name,
        runs=work.runs,
        tokens=work.tokens,
        model_flops=work.flops,
        executed_flops=timeline.product_flops * topology.chips,
        compute_seconds=timeline.compute,
        kernel_seconds=timeline.kernel_seconds,
        exposed_seconds=timeline.exposed,
        copy_seconds=timeline.copies,
        loop_seconds=tuple(timeline.loops),
        mfu=work.flops / timeline.seconds / peak if timeline.seconds else 0.0,
        memory=memory,
        exchanges=tuple(Exchange(**dataclasses.asdict(item)) for item in exchanges),
        buffers=buffers,
        slowest=tuple(slowest),
        compile_seconds=took,
    )


def _memory(stats: Any, chip: Chip) -> Memory:
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = (stats.argument_size_in_bytes, outputs, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes)
    return Memory(*parts, limit=chip.hbm_bytes, needed=sum(parts), peak=stats.peak_memory_in_bytes)


def _refused(message: str, work: Work, topology: Topology, lowered: jax.stages.Lowered, took: float) -> ProgramReport:
    """What the compiler's refusal says."""
    match = _refusal(message)
    assert match is not None
    needed, limit = _size(match[1], match[2]), _size(match[3], match[4])
    arguments = _argument_bytes(lowered.in_avals, lowered.args_info)
    found = [Buffer(shape.strip(), _size(n, unit), name or "") for n, unit, name, shape in _ALLOCATION.findall(message)]
    report = _report(
        work, topology, Timeline(), Memory(arguments, 0, needed - arguments, 0, limit, needed, needed), (), took
    )
    return dataclasses.replace(report, buffers=tuple(found[:LARGEST]), mfu=0.0, advice=_advice(arguments, limit))


def _refusal(message: str) -> re.Match[str] | None:
    return next((found for pattern in _REFUSALS if (found := pattern.search(message))), None)


def _advice(arguments: int, limit: int) -> str:
    if arguments > 0.8 * limit:
        return "parameters and optimizer state alone fill it: shard them over more devices (sharding/fsdp.gin, more chips)."
    return "activations fill it: lower BATCH_SIZE, raise train.accumulation, set REMAT='full', or shard more."


def _argument_bytes(avals: PyTree, infos: PyTree) -> int:
    """Bytes of the arguments on one device."""
    total = 0
    for info in jax.tree.leaves(infos, is_leaf=lambda x: hasattr(x, "_aval")):
        aval = info._aval
        sharding = getattr(aval, "sharding", None)
        shape = sharding.shard_shape(aval.shape) if sharding is not None and sharding.mesh.shape else aval.shape
        total += math.prod(shape) * aval.dtype.itemsize
    return total


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _largest(module: Module, alive: str) -> tuple[Buffer, ...]:
    """The largest arrays at the moment when most memory is in use."""
    peak = alive.partition("(peak):\n")[2].partition("\n  Stack trace")[0]
    found = []
    for name, index, size in _ALIVE.findall(peak)[:LARGEST]:
        line = module.instructions.get(name)
        shapes = array_shapes(line.shape) if line is not None else []
        number = int(index.split(",")[-1]) if index and len(shapes) > 1 else 0
        kind, dims = shapes[number] if number < len(shapes) else ("", ())
        shape = f"{kind}[{','.join(map(str, dims))}]" if kind else name
        found.append(Buffer(shape, float(size), module.source(line) if line is not None else ""))
    return tuple(found)
