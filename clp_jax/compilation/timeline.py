"""How long a program takes on one device: the compiler's schedule, run with its own estimates and the links' rates.

Instructions run one after another. What starts and is waited for later, exchanges and copies, runs beside them on a channel
of its own kind: the links inside a slice, the network between slices, the memory.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from clp_jax.compilation.chips import Chip
from clp_jax.compilation.collectives import Collective, Layout, between_slices, collective, kind_of, rendezvous
from clp_jax.compilation.hlo import Instruction, Module
from clp_jax.compilation.operations import kernel_flops, kernel_seconds, product_flops

# These take no time: names, views, and what is known while compiling.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
)
_PRODUCTS = ("convolution", "dot")
# The compiler counts on less of the memory's bandwidth than a chip has. What moves at least this share of what it counts on
# waits for the memory alone.
_BOUND_BY_MEMORY = 0.8


@dataclasses.dataclass
class Traffic:
    """All exchanges of one kind along the same mesh axes.

    Attributes:
        kind: of collective.
        axes: mesh axes.
        count: executions in a step.
        bytes: in a step, on each device.
        seconds: that the links are busy.
        exposed: seconds in which nothing else runs.
    """

    kind: str
    axes: tuple[str, ...]
    count: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0


@dataclasses.dataclass
class Timeline:
    """Where the time of a step goes, in seconds.

    Attributes:
        compute: instructions that run on the cores.
        exposed: waiting for exchanges.
        copies: waiting for copies between memories.
        product_flops: floating-point operations of all matrix products that run, recomputation included.
        kernel_seconds: of kernels that the compiler does not see into, part of `compute`.
        loops: seconds of one iteration of each loop whose end the compiler does not know.
        traffic: exchanges by kind and axes.
        slowest: seconds by source, for what takes longest.
    """

    compute: float = 0.0
    exposed: float = 0.0
    copies: float = 0.0
    product_flops: float = 0.0
    kernel_seconds: float = 0.0
    loops: list[float] = dataclasses.field(default_factory=list)
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = dataclasses.field(default_factory=dict)
    slowest: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.exposed + self.copies


class Clock:
    """Runs a module's schedule.

    Args:
        module: the program.
        chip: what runs it.
        layout: of the devices.
        trips: iterations of loops that end when they like.
    """

    def __init__(self, module: Module, chip: Chip, layout: Layout, trips: int = 1):
        self._module, self._chip, self._layout, self._trips = module, chip, layout, trips
        self.timeline = Timeline()

    def run(self) -> Timeline:
        """The whole program."""
        self._run(self._module.entry, 1.0)
        return self.timeline

    def _run(self, computation: str, times: float) -> float:
        """Runs a computation `times` times, and returns the seconds of one."""
        now = 0.0
        free: dict[str, float] = defaultdict(float)
        ends: dict[str, tuple[float, Collective | None]] = {}
        waiting: dict[str, Instruction] = {}
        halves: dict[str, Instruction] = {}
        for line in self._module.computations.get(computation, ()):
            if line.opcode in _FREE:
                continue
            if line.opcode == "while":
                now += self._loop(line, times)
            elif line.opcode == "conditional":
                now += max((self._run(name, times) for name in line.branches), default=0.0)
            elif line.opcode == "call":
                now += self._run(line.called("to_apply") or "", times)
            elif line.opcode.endswith("-done"):
                now += self._wait(line, ends, now, times)
            elif line.opcode in ("async-start", "async-update"):
                start = waiting.pop(line.operands[0], None) if line.opcode == "async-update" else line
                if start is None:  # It is on its way.
                    ends[line.name] = ends.get(line.operands[0], (now, None))
                elif line.operands:
                    ends[line.name] = self._begin(line, start, now, free, times)
                else:  # It is made ready, and gets its operands from an update.
                    waiting[line.name] = start
            elif (met := rendezvous(line)) is not None:
                if (other := halves.pop(met, None)) is None:
                    halves[met] = line
                else:
                    ends[line.name] = ends[other.name] = self._leave_slice(line, other, now, free, times)
            elif (exchange := self._exchange(line)) is not None:
                channel = "network" if exchange.dcn else "links"
                free[channel] = max(now, free[channel]) + exchange.seconds
                self._count(exchange, times)
                if line.opcode.endswith("-start"):
                    ends[line.name] = (free[channel], exchange)
                else:
                    self._expose(exchange, free[channel] - now, times)
                    now = free[channel]
            elif line.opcode.endswith("-start"):
                free["memory"] = max(now, free["memory"]) + line.bytes / 2 / self._chip.hbm_bandwidth
                ends[line.name] = (free["memory"], None)
            else:
                now += self._compute(line, times)
        return now

    def _loop(self, line: Instruction, times: float) -> float:
        known = self._module.trips(line)
        trips = self._trips if known is None else known
        one = self._run(line.called("body") or "", times * trips)
        if known is None:
            self.timeline.loops.append(one)
        return one * trips

    def _begin(
        self, line: Instruction, start: Instruction, now: float, free: dict[str, float], times: float
    ) -> tuple[float, Collective | None]:
        """Sends off what runs beside the cores, on the sparse cores for instance; returns when it ends."""
        exchange = self._exchange(start)
        if exchange is None:
            free["memory"] = max(now, free["memory"]) + 2 * self._module.operand_bytes(line) / self._chip.hbm_bandwidth
            return free["memory"], None
        channel = "network" if exchange.dcn else "links"
        free[channel] = max(now, free[channel]) + exchange.seconds
        self._count(exchange, times)
        return free[channel], exchange

    def _leave_slice(
        self, line: Instruction, other: Instruction, now: float, free: dict[str, float], times: float
    ) -> tuple[float, Collective]:
        """Sends off what hosts take to other slices; returns when it has come."""
        send, recv = (line, other) if line.opcode == "send" else (other, line)
        exchange = between_slices(send, recv, self._layout, self._chip)
        free["network"] = max(now, free["network"]) + exchange.seconds
        self._count(exchange, times)
        return free["network"], exchange

    def _wait(self, line: Instruction, ends: dict, now: float, times: float) -> float:
        end, exchange = next((ends[name] for name in line.operands if name in ends), (now, None))
        ends[line.name] = (end, exchange)
        waited = max(0.0, end - now)
        if exchange is None:
            self.timeline.copies += waited * times
        else:
            self._expose(exchange, waited, times)
        return waited

    def _exchange(self, line: Instruction) -> Collective | None:
        """The exchange that an instruction is, starts, or wraps."""
        if kind_of(line.opcode):
            return collective(line, self._module.operand_bytes(line), self._layout, self._chip)
        if line.opcode not in ("fusion", "async-start"):
            return None
        everything = list(self._inside(line))
        inside = [inner for inner in everything if kind_of(inner.opcode)]
        if not inside or any(inner.opcode in _PRODUCTS for inner in everything):
            return None
        found = collective(inside[0], self._module.operand_bytes(inside[0]), self._layout, self._chip)
        scatters = found.kind == "all-reduce" and line.bytes < 0.75 * found.bytes
        return dataclasses.replace(found, kind="reduce-scatter", seconds=found.seconds / 2) if scatters else found

    def _compute(self, line: Instruction, times: float) -> float:
        seconds = self._seconds(line)
        self.timeline.compute += seconds * times
        self.timeline.slowest[self._module.source(line) or line.name] += seconds * times
        if line.opcode == "fusion":
            flops = sum(product_flops(inner, self._module) for inner in self._inside(line))
            self.timeline.product_flops += flops * times
        elif line.opcode in _PRODUCTS:
            self.timeline.product_flops += product_flops(line, self._module) * times
        elif line.opcode == "custom-call":
            self.timeline.product_flops += kernel_flops(line) * times
            self.timeline.kernel_seconds += seconds * times
        return seconds

    def _seconds(self, line: Instruction) -> float:
        chip = self._chip
        moved = self._module.operand_bytes(line) + line.bytes
        bound = moved / chip.hbm_bandwidth
        if line.cycles is None:
            if line.opcode == "custom-call":
                return max(kernel_seconds(line, chip), 0.0)
            return 0.0 if line.opcode == "custom-call" or line.bytes < 2**20 else bound
        seconds = line.cycles / chip.clock
        multiplies = line.opcode in _PRODUCTS or any(inner.opcode in _PRODUCTS for inner in self._inside(line))
        # What reads a part of its operands seems to move more than the memory can: the compiler knows better.
        waits = _BOUND_BY_MEMORY * chip.modelled_bandwidth < moved / seconds <= chip.hbm_bandwidth
        return bound if waits and not multiplies else seconds

    def _inside(self, line: Instruction) -> Iterator[Instruction]:
        """What a fusion or an asynchronous start runs, and what is called in it."""
        for inner in self._module.inside(line):
            yield inner
            if inner.opcode in ("fusion", "call", "custom-call"):
                yield from self._inside(inner)

    def _count(self, exchange: Collective, times: float) -> None:
        found = self._traffic(exchange)
        found.count += times
        found.bytes += exchange.bytes * times
        found.seconds += exchange.seconds * times

    def _expose(self, exchange: Collective, seconds: float, times: float) -> None:
        self.timeline.exposed += seconds * times
        self._traffic(exchange).exposed += seconds * times

    def _traffic(self, exchange: Collective) -> Traffic:
        key = (exchange.kind, exchange.axes)
        return self.timeline.traffic.setdefault(key, Traffic(*key))
