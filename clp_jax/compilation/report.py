"""What compiling a step tells: memory, operations, exchanges and time, as JSON and as tables."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's HBM.

    Attributes:
        arguments: parameters, optimizer state and batch.
        outputs: that are not written over arguments.
        temporaries: everything between, as it is laid out: in gaps of it nothing is.
        code: the program.
        limit: what the chip has.
        needed: all of these, which is what must be free; by the compiler's own account where it refused.
        peak: most that is in use at one moment, without gaps.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    limit: int
    needed: int
    peak: int

    @property
    def fits(self) -> bool:
        """Whether the program can be loaded."""
        return self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same mesh axes, in one step on one device.

    Attributes:
        kind: of collective.
        axes: mesh axes.
        count: executions.
        bytes: of the arrays that are gathered, reduced or exchanged.
        seconds: that the links are busy.
        exposed: seconds in which nothing else runs.
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large array.

    Attributes:
        shape: type and dimensions.
        bytes: of it.
        source: operation and line of Python.
    """

    shape: str
    bytes: float
    source: str


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One program of a stage.

    Attributes:
        name: ``update``, ``prefill``, ``rollout``.
        tokens: in one execution, over all chips.
        model_flops: over all chips, by formula.
        executed_flops: of matrix products and kernels, over all chips, recomputation included.
        compute_seconds: on the cores.
        kernel_seconds: of kernels, at their bound, part of `compute_seconds`.
        exposed_seconds: waiting for exchanges.
        copy_seconds: waiting for copies between memories.
        loop_seconds: one iteration of each loop that ends when it likes: one decoded token.
        mfu: model FLOP/s over the chips' peak.
        memory: of one device.
        exchanges: by kind and mesh axes.
        buffers: the largest.
        slowest: seconds of the slowest operations, by source.
        compile_seconds: of this machine.
        advice: what to change where it does not fit.
        runs: executions in one step of training; 0 for a part of another program.
    """

    name: str
    tokens: int
    model_flops: float
    executed_flops: float
    compute_seconds: float
    kernel_seconds: float
    exposed_seconds: float
    copy_seconds: float
    loop_seconds: tuple[float, ...]
    mfu: float
    memory: Memory
    exchanges: tuple[Exchange, ...]
    buffers: tuple[Buffer, ...]
    slowest: tuple[tuple[str, float], ...]
    compile_seconds: float
    advice: str = ""
    runs: int = 1

    @property
    def seconds(self) -> float:
        """Of one execution, estimated."""
        return self.compute_seconds + self.exposed_seconds + self.copy_seconds


@dataclasses.dataclass(frozen=True)
class Report:
    """A stage on a topology.

    Attributes:
        topology: of one slice.
        num_slices: slices.
        chips: of all slices.
        mesh: sizes of the mesh axes that are larger than 1.
        parameters: of what is trained.
        programs: of the stage.
        versions: of what compiled.
    """

    topology: str
    num_slices: int
    chips: int
    mesh: dict[str, int]
    parameters: int
    programs: tuple[ProgramReport, ...]
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether all programs do."""
        return all(program.memory.fits for program in self.programs)

    @property
    def parts(self) -> tuple[tuple[int, ProgramReport], ...]:
        """What one step of training is made of: executions of programs; of parts alone, once each."""
        found = tuple((program.runs, program) for program in self.programs if program.runs)
        return found or tuple((1, program) for program in self.programs)

    @property
    def step_seconds(self) -> float:
        """Of one step, estimated: all its programs, one after another; 0 where one could not be timed."""
        timed = all(program.seconds for _, program in self.parts)
        return sum(runs * program.seconds for runs, program in self.parts) if timed else 0.0

    @property
    def step_rate(self) -> float:
        """Tokens that are trained on, per second and chip; 0 where a program could not be timed."""
        runs, first = self.parts[0]
        return runs * first.tokens / self.step_seconds / self.chips if self.step_seconds else 0.0

    @property
    def step_mfu(self) -> float:
        """Model FLOP/s of whole steps over the chips' peak."""
        useful = sum(runs * program.mfu * program.seconds for runs, program in self.parts)
        return useful / self.step_seconds if self.step_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it, derived figures included."""
        found = dataclasses.asdict(self)
        for program, plain in zip(self.programs, found["programs"], strict=True):
            plain["seconds"] = program.seconds
            plain["tokens_per_second_per_chip"] = rate(program, self.chips)
            plain["memory"]["fits"] = program.memory.fits
        step = {"seconds": self.step_seconds, "tokens_per_second_per_chip": self.step_rate, "mfu": self.step_mfu}
        return found | {"fits": self.fits, "step": step}

    def show(self, console: Console) -> None:
        """Writes tables."""
        mesh = ", ".join(f"{name} {size}" for name, size in self.mesh.items()) or "one device"
        where = f"{self.num_slices} slices of {self.topology}" if self.num_slices > 1 else self.topology
        console.print(f"{self.parameters:,} parameters on {where}, {self.chips} chips: {mesh}")
        for program in self.programs:
            _show(console, program, self.chips)
        if len(self.parts) > 1 and self.step_seconds:
            made_of = " + ".join(f"{runs} {program.name}" if runs > 1 else program.name for runs, program in self.parts)
            console.print(
                f"one step is {made_of}: {self.step_seconds * 1e3:,.1f} ms, {100 * self.step_mfu:.1f} % of the peak, "
                f"{self.step_rate:,.0f} tokens/s/chip"
            )


def rate(program: ProgramReport, chips: int) -> float:
    """Tokens per second and chip; 0 for a program that could not be timed."""
    return program.tokens / program.seconds / chips if program.seconds else 0.0


def _show(console: Console, program: ProgramReport, chips: int) -> None:
    memory = program.memory
    table = Table(title=program.name, title_justify="left", show_header=False)
    free = memory.limit - memory.needed
    verdict = f"fits, {free / GIB:.1f} GiB free" if memory.fits else f"does not fit, {-free / GIB:.1f} GiB too much"
    table.add_row("HBM of a device", f"{memory.needed / GIB:.2f} of {memory.limit / GIB:.1f} GiB: {verdict}")
    if program.advice:
        table.add_row("", program.advice)
    for name in ("arguments", "temporaries", "outputs", "code"):
        table.add_row(f"  {name}", f"{getattr(memory, name) / GIB:.2f} GiB")
    table.add_row("  in use at the peak", f"{memory.peak / GIB:.2f} GiB")
    if program.seconds:
        share = program.executed_flops / program.model_flops if program.model_flops else 0
        table.add_row("model FLOPs", f"{program.model_flops:.3e}; executed {share:.2f} times as many")
        table.add_row("estimated time", f"{program.seconds * 1e3:,.2f} ms")
        table.add_row("  on the cores", f"{program.compute_seconds * 1e3:,.2f} ms")
        table.add_row("  of them kernels", f"{program.kernel_seconds * 1e3:,.2f} ms, at their bound")
        table.add_row("  exposed exchanges", f"{program.exposed_seconds * 1e3:,.2f} ms")
        table.add_row("  exposed copies", f"{program.copy_seconds * 1e3:,.2f} ms")
        for seconds in program.loop_seconds:
            table.add_row("  one more token", f"{seconds * 1e3:,.3f} ms")
        table.add_row("estimated MFU", f"{100 * program.mfu:.1f} %")
        table.add_row("tokens/s/chip", f"{rate(program, chips):,.0f}")
    console.print(table)
    if program.exchanges:
        _show_exchanges(console, program)
    for title, rows in (
        ("largest buffers", [(f"{b.bytes / GIB:.3f} GiB", f"{b.shape}  {b.source}") for b in program.buffers]),
        ("slowest", [(f"{seconds * 1e3:.2f} ms", source) for source, seconds in program.slowest]),
    ):
        listing = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            listing.add_row(*row)
        if rows:
            console.print(listing)


def _show_exchanges(console: Console, program: ProgramReport) -> None:
    table = Table("exchange", "mesh axes", "times", "GiB", "ms on links", "ms exposed", title_justify="left")
    for item in program.exchanges:
        figures = (item.bytes / GIB, item.seconds * 1e3, item.exposed * 1e3)
        table.add_row(item.kind, ", ".join(item.axes), f"{item.count:.0f}", *(f"{x:,.2f}" for x in figures))
    console.print(table)
