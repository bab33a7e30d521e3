"""Exchanges: groups in every form the compiler writes, the mesh axes they span, and closed forms of their time."""

import numpy as np
import pytest

from clp_jax.compilation.chips import CHIPS
from clp_jax.compilation.collectives import (
    Layout,
    between_slices,
    collective,
    kind_of,
    pairs,
    rendezvous,
    replica_groups,
)
from clp_jax.compilation.hlo import Module

V5P, V5E = CHIPS["v5p"], CHIPS["v5e"]
GB = 1e9


def line(kind: str, groups: str, shape: str = "bf16[1024,1024]{1,0}", source: str = "bf16[1024,1024]{1,0}"):
    text = f"ENTRY %m (p: {source}) -> {shape} {{\n  %p = {source} parameter(0)\n  ROOT %r = {shape} {kind}(%p), {groups}\n}}\n"
    module = Module.parse(text)
    return module.instructions["r"], module.operand_bytes(module.instructions["r"])


def torus(*sizes: int, axes: tuple[str, ...], dims: tuple[int, ...], slices: int = 1) -> Layout:
    """A mesh whose devices lie in the order of their coordinates."""
    places = [(s, *np.unravel_index(i, sizes)) for s in range(slices) for i in range(int(np.prod(sizes)))]
    return Layout(axes, dims, np.asarray(places), sizes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, y", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, y", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("channel_id=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_replica_groups(text, expected):
    assert replica_groups(line("all-gather", text)[0], 8) == expected


def test_pairs_of_a_permutation():
    found, _ = line("collective-permute", "source_target_pairs={{0,1},{1,0}}")
    assert pairs(found) == [[0, 1], [1, 0]]


def test_kinds():
    assert (
        kind_of("all-gather-start") == "all-gather" and kind_of("fusion") is None and kind_of("all-gather-done") is None
    )


def test_a_group_spans_the_axes_along_which_it_differs():
    layout = torus(4, 2, axes=("data", "fsdp"), dims=(4, 2))
    assert layout.spanned([0, 1]) == ("fsdp",)
    assert layout.spanned([0, 2, 4, 6]) == ("data",)
    assert layout.spanned(range(8)) == ("data", "fsdp")


@pytest.mark.parametrize(("size", "links"), [(4, 2), (2, 1)])
def test_a_gather_takes_what_the_ring_or_the_line_lets_through(size, links):
    layout = torus(size, 1, 1, axes=("fsdp",), dims=(size,))
    shape = f"bf16[{1024 * size},1024]{{1,0}}"
    found, read = line("all-gather", f"replica_groups=[1,{size}]<=[{size}]", shape)
    result = collective(found, read, layout, V5P)
    whole = 2 * 1024 * 1024 * size
    assert result.bytes == whole and result.axes == ("fsdp",) and not result.dcn
    np.testing.assert_allclose(result.seconds, whole * (size - 1) / size / (links * 90 * GB), rtol=1e-12)


def test_a_reduction_to_all_is_a_scatter_and_a_gather_over_all_dimensions():
    layout = torus(4, 4, 4, axes=("fsdp",), dims=(64,))
    found, read = line("all-reduce", "replica_groups=[1,64]<=[64]")
    result = collective(found, read, layout, V5P)
    np.testing.assert_allclose(result.seconds, 2 * 2**21 * 63 / 64 / (6 * 90 * GB), rtol=1e-12)


def test_a_start_gives_its_operands_too():
    layout = torus(4, 1, 1, axes=("fsdp",), dims=(4,))
    shape = "(bf16[1024,1024]{1,0}, bf16[4096,1024]{1,0})"
    found, read = line("all-gather-start", "replica_groups=[1,4]<=[4]", shape)
    assert collective(found, read, layout, V5P).bytes == 2 * 4096 * 1024


def test_an_exchange_of_all_with_all_crosses_the_middle():
    ring, mesh = torus(16, 1, axes=("expert",), dims=(16,)), torus(8, 1, axes=("expert",), dims=(8,))
    found, read = line("all-to-all", "replica_groups=[1,16]<=[16]")
    # 16 devices send half of 2 MiB to the other half, over two places in both directions each.
    np.testing.assert_allclose(collective(found, read, ring, V5E).seconds, 2**21 * 16 / 8 / (45 * GB), rtol=1e-12)
    found, read = line("all-to-all", "replica_groups=[1,8]<=[8]")
    np.testing.assert_allclose(collective(found, read, mesh, V5E).seconds, 2**21 * 8 / 4 / (45 * GB), rtol=1e-12)


def test_a_permutation_takes_its_longest_way():
    layout = torus(4, 1, 1, axes=("sequence",), dims=(4,))
    near, read = line("collective-permute", "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}")
    far, _ = line("collective-permute", "source_target_pairs={{0,2},{2,0}}")
    np.testing.assert_allclose(collective(near, read, layout, V5P).seconds, 2**21 / (90 * GB), rtol=1e-12)
    np.testing.assert_allclose(collective(far, read, layout, V5P).seconds, 2 * 2**21 / (90 * GB), rtol=1e-12)
    assert collective(near, read, layout, V5P).axes == ("sequence",)


def test_between_slices_every_device_sends_its_share():
    layout = torus(4, 1, 1, axes=("slice", "fsdp"), dims=(2, 4), slices=2)
    across, read = line("all-reduce", "replica_groups={{0,4},{1,5},{2,6},{3,7}}")
    result = collective(across, read, layout, V5P)
    assert result.dcn and result.axes == ("slice",)
    np.testing.assert_allclose(result.seconds, 2 * 2**21 / 2 / 6.25e9, rtol=1e-12)
    both, read = line("all-reduce", "replica_groups=[1,8]<=[8]")
    inside = 2 * 2**21 * 3 / 4 / (2 * 90 * GB)
    np.testing.assert_allclose(
        collective(both, read, layout, V5P).seconds, inside + 2 * 2**21 / 2 / 4 / 6.25e9, rtol=1e-12
    )


def halves(kind: str, sent: str, received: str):
    """A send and a receive that hosts take to other slices."""
    told = f'frontend_attributes={{_xla_host_transfer_rendezvous="x_0",_xla_megascale_transfer_type="{kind}"}}'
    text = (
        f"ENTRY %m (p: {sent}) -> token[] {{\n  %p = {sent} parameter(0)\n  %t = token[] after-all()\n"
        f"  %s = ({sent}, u32[]{{:S(2)}}, token[]) send(%p, %t), is_host_transfer=true, {told}\n"
        f"  ROOT %r = ({received}, u32[]{{:S(2)}}, token[]) recv(%t), is_host_transfer=true, {told}\n}}\n"
    )
    found = Module.parse(text).instructions
    return found["s"], found["r"]


@pytest.mark.parametrize(
    ("told", "kind", "sent", "received", "leaving"),
    [
        ("ALL_REDUCE", "all-reduce", 8, 8, 2 * 8 * 3 / 4),
        ("ALL_GATHER", "all-gather", 2, 8, 8 * 3 / 4),
        ("REDUCE_SCATTER", "reduce-scatter", 8, 2, 8 * 3 / 4),
        ("ALL_TO_ALL", "all-to-all", 8, 8, 8 * 3 / 4),
        ("ONE_TO_ONE", "collective-permute", 8, 8, 8),
    ],
)
def test_hosts_take_to_other_slices_what_leaves_a_device(told, kind, sent, received, leaving):
    layout = torus(2, 2, 1, axes=("slice", "fsdp"), dims=(4, 4), slices=4)
    send, recv = halves(told, f"f32[{2**18 * sent}]{{0}}", f"f32[{2**18 * received}]{{0}}")
    assert rendezvous(send) == rendezvous(recv) == "x_0"
    found = between_slices(send, recv, layout, V5P)
    assert (found.kind, found.axes, found.dcn, found.bytes) == (kind, ("slice",), True, 8 * 2**20)
    np.testing.assert_allclose(found.seconds, leaving * 2**20 / 6.25e9, rtol=1e-12)


def test_other_transfers_of_hosts_are_none_between_slices():
    text = "ENTRY %m () -> token[] {\n  %t = token[] after-all()\n  ROOT %r = (f32[8]{0}, token[]) recv(%t), is_host_transfer=true\n}\n"
    assert rendezvous(Module.parse(text).instructions["r"]) is None
    send, recv = halves("BROADCAST", "f32[8]{0}", "f32[8]{0}")
    with pytest.raises(ValueError, match="s takes BROADCAST to other slices: expected ALL_REDUCE, ALL_GATHER"):
        between_slices(send, recv, torus(1, 1, 1, axes=("slice",), dims=(2,), slices=2), V5P)


def test_one_device_exchanges_nothing():
    found, read = line("all-reduce", "replica_groups={{0},{1}}")
    assert collective(found, read, torus(2, 1, 1, axes=("data",), dims=(2,)), V5P).seconds == 0
