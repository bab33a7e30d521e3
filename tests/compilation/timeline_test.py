"""A schedule run by hand: loops, and exchanges beside the work and in its way."""

import numpy as np
import pytest

from clp_jax.compilation.chips import CHIPS
from clp_jax.compilation.collectives import Layout
from clp_jax.compilation.hlo import Module
from clp_jax.compilation.timeline import Clock

CHIP = CHIPS["v5p"]
LAYOUT = Layout(("fsdp",), (4,), np.asarray([(0, i, 0, 0) for i in range(4)]), (4, 1, 1))
SHAPE = "bf16[4096,1024]{1,0}"
PART = "bf16[1024,1024]{1,0}"
# A ring of four: three quarters of 8 MiB over two links of 90 GB/s.
GATHER = 3 / 4 * 2**23 / (2 * 90e9)


def work(name: str, seconds: float, operand: str = "p") -> str:
    config = f'{{"window_config":{{"estimated_cycles":"{round(seconds * CHIP.clock)}"}}}}'
    return f"  %{name} = f32[8]{{0}} fusion(%{operand}), kind=kLoop, calls=%f, backend_config={config}\n"


def gather(name: str, form: str = "", operand: str = "p") -> str:
    shape = f"({PART}, {SHAPE})" if form == "-start" else SHAPE
    groups = "" if form == "-done" else ", replica_groups=[1,4]<=[4], dimensions={0}"
    return f"  %{name} = {shape} all-gather{form}(%{operand}){groups}\n"


def run(body: str, trips: int = 1, more: str = "", layout: Layout = LAYOUT):
    text = f"%f (a: f32[8]) -> f32[8] {{\n  ROOT %a = f32[8]{{0}} parameter(0)\n}}\n\n{more}"
    text += f"ENTRY %m (p: {PART}) -> f32[8] {{\n  %p = {PART} parameter(0)\n{body}}}\n"
    return Clock(Module.parse(text), CHIP, layout, trips).run()


def close(found: float, expected: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # Cycles are whole numbers.


def test_what_runs_one_after_another_adds_up():
    found = run(work("a", 1e-3) + work("b", 2e-3))
    close(found.compute, 3e-3)
    close(found.seconds, 3e-3)


def test_an_exchange_that_nothing_runs_beside_is_exposed():
    found = run(work("a", 1e-3) + gather("g"))
    close(found.exposed, GATHER)
    close(found.seconds, 1e-3 + GATHER)
    traffic = found.traffic["all-gather", ("fsdp",)]
    assert (traffic.count, traffic.bytes) == (1, 2**23)


@pytest.mark.parametrize("beside", [1e-3, GATHER / 4])
def test_an_exchange_beside_the_work_is_exposed_where_it_lasts_longer(beside):
    found = run(gather("s", "-start") + work("a", beside) + gather("d", "-done", "s"))
    close(found.seconds, max(GATHER, beside))
    close(found.traffic["all-gather", ("fsdp",)].seconds, GATHER)
    np.testing.assert_allclose(found.exposed, max(0.0, GATHER - beside), rtol=1e-4, atol=1e-12)


def test_two_exchanges_share_the_links():
    both = gather("s", "-start") + gather("t", "-start")
    found = run(both + gather("d", "-done", "s") + gather("e", "-done", "t"))
    close(found.seconds, 2 * GATHER)


LOOP = (
    "%body (c: f32[8]) -> f32[8] {\n  %p2 = f32[8]{0} parameter(0)\n" + work("inner", 1e-3, "p2") + "}\n\n"
    "%cond (d: f32[8]) -> pred[] {\n  ROOT %q = pred[]{:T(512)} parameter(0)\n}\n\n"
)


def test_a_loop_takes_its_iterations():
    known = '  %w = f32[8]{0} while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
    found = run(known, trips=7, more=LOOP)
    close(found.compute, 5e-3)
    assert found.loops == []


def test_a_loop_without_a_known_end_takes_what_it_is_given():
    found = run("  %w = f32[8]{0} while(%p), condition=%cond, body=%body\n", trips=7, more=LOOP)
    close(found.compute, 7e-3)
    close(found.loops[0], 1e-3)


def test_what_waits_for_memory_takes_the_memory_of_the_chip():
    # A copy that the compiler thinks takes longer than the chip's bandwidth says.
    moved = 2 * 2**23
    cycles = round(moved / CHIP.modelled_bandwidth * CHIP.clock)
    config = f'{{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    copy = f"  %q = {SHAPE} broadcast()\n  %c = {SHAPE} copy(%q), backend_config={config}\n"
    found = run(copy)
    close(found.slowest["c"], moved / CHIP.hbm_bandwidth)


def test_what_reads_a_part_of_its_operands_takes_what_the_compiler_says():
    stack = "bf16[32,4096,1024]{2,1,0}"
    config = f'{{"window_config":{{"estimated_cycles":"{round(1e-5 * CHIP.clock)}"}}}}'
    found = run(
        f"  %q = {stack} broadcast()\n  %c = {SHAPE} fusion(%q), kind=kLoop, calls=%f, backend_config={config}\n"
    )
    close(found.slowest["c"], 1e-5)


def test_an_exchange_on_the_sparse_cores_begins_when_it_gets_its_operands():
    more = (
        f"%called (x: {PART}) -> {SHAPE} {{\n  %x = {PART} parameter(0)\n"
        f"  ROOT %g = {SHAPE} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={{0}}\n}}\n\n"
        f"%async (y: {PART}) -> {SHAPE} {{\n  %y = {PART} parameter(0)\n"
        f'  ROOT %cc = {SHAPE} custom-call(%y), custom_call_target="x", called_computations={{%called}}\n}}\n\n'
    )
    begin = f"  %s = ((), ()) async-start(), calls=%async\n{work('early', 1e-3)}  %u = ((), ()) async-update(%s, %p)\n"
    found = run(f"{begin}{work('late', 1e-5)}  %d = {SHAPE} async-done(%u)\n", more=more)
    close(found.seconds, 1e-3 + GATHER)
    close(found.traffic["all-gather", ("fsdp",)].exposed, GATHER - 1e-5)


def test_a_fusion_that_scatters_a_reduction_counts_as_one():
    more = (
        f"%rs (x: {SHAPE}) -> {PART} {{\n  %x = {SHAPE} parameter(0)\n"
        f"  %all = {SHAPE} all-reduce(%x), replica_groups=[1,4]<=[4]\n  ROOT %cut = {PART} dynamic-slice(%all)\n}}\n\n"
    )
    found = run(f"  %b = {SHAPE} broadcast()\n  %r = {PART} fusion(%b), kind=kCustom, calls=%rs\n", more=more)
    assert list(found.traffic) == [("reduce-scatter", ("fsdp",))]
    close(found.exposed, GATHER)


def half(kind: str, name: str) -> str:
    """A send or a receive of 8 MiB between two slices."""
    told = '_xla_host_transfer_rendezvous="x_0",_xla_megascale_transfer_type="ALL_REDUCE"'
    operands = "%p, %t" if kind == "send" else "%t"
    done = f"  %{name} = token[] {kind}-done(%{name[0]})\n"
    return (
        done
        if len(name) > 1
        else (f"  %{name} = ({SHAPE}, u32[]{{:S(2)}}, token[]) {kind}({operands}), frontend_attributes={{{told}}}\n")
    )


@pytest.mark.parametrize("beside", [0.4e-3, 2e-3])
def test_what_hosts_take_to_another_slice_goes_beside_the_work_and_the_links(beside):
    layout = Layout(("slice", "fsdp"), (2, 4), np.asarray([(s, i, 0, 0) for s in (0, 1) for i in range(4)]), (4, 1, 1))
    body = "  %t = token[] after-all()\n" + half("send", "s") + half("recv", "r") + work("a", beside) + gather("g")
    body += half("send", "sd") + half("recv", "rd")
    found = run(body, layout=layout)
    network = 2 * 2**23 / 2 / 6.25e9
    close(found.seconds, max(network, beside + GATHER))
    traffic = found.traffic["all-reduce", ("slice",)]
    assert (traffic.count, traffic.bytes) == (1, 2**23)
    close(traffic.seconds, network)
    np.testing.assert_allclose(traffic.exposed, max(0.0, network - beside - GATHER), rtol=1e-6, atol=1e-12)
