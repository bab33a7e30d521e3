"""The table of slices against what Google Cloud's pages say of each."""

import pytest
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.slices import CHIPS, Slice


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "accelerator"),
    [
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x2", 4, 1, "v5litepod-4"),
        ("v5e:2x4", 8, 1, "v5litepod-8"),
        ("v5e:4x4", 16, 4, "v5litepod-16"),
        ("v5e:16x16", 256, 64, "v5litepod-256"),
        ("v5p:2x2x1", 4, 1, "v5p-8"),
        ("v5p:2x2x2", 8, 2, "v5p-16"),
        ("v5p:4x4x4", 64, 16, "v5p-128"),
        ("v5p:16x16x24", 6144, 1536, "v5p-12288"),
        ("v6e:2x4", 8, 1, "v6e-8"),
        ("v6e:4x8", 32, 8, "v6e-32"),
    ],
)
def test_numbers_of_chips_hosts_and_names(name, chips, hosts, accelerator):
    found = Slice.parse(name)
    assert (found.chips, found.hosts, found.accelerator_type, found.name) == (chips, hosts, accelerator, name)


def test_every_shape_of_the_table_is_read_and_fills_its_hosts():
    for chip in CHIPS.values():
        for shape in chip.shapes:
            found = Slice.parse(f"{chip.name}:{shape}")
            assert found.hosts * found.chips_per_host == found.chips and found.topology == shape


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:8x4x4", "v5p:4x4x6", "v5p:16x16x28", "v4:2x2x1", "v5e:4x4 ", ""]
)
def test_what_there_is_not(name):
    with pytest.raises(LaunchError, match="--topology is "):
        Slice.parse(name)


@pytest.mark.parametrize(
    ("name", "default"), [("v5p:4x8x8", True), ("v5p:4x4x16", False), ("v5p:8x8x8", True), ("v6e:4x4", True)]
)
def test_the_most_compact_shape_is_the_one_of_its_number(name, default):
    assert Slice.parse(name).is_default is default


def test_zones():
    Slice.parse("v5e:4x4").check_zone("us-west4-a")
    with pytest.raises(LaunchError, match="v5p is known to be in us-central1-a, us-east5-a, europe-west4-b"):
        Slice.parse("v5p:2x2x1").check_zone("us-west4-a")
