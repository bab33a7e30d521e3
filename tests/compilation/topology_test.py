"""Names of topologies."""

import pytest

from clp_jax.compilation.topology import Topology


def test_a_name_says_chip_and_shape():
    found = Topology.parse("v5p:4x4x8", 2)
    assert (found.chip.name, found.shape, found.chips, found.name) == ("v5p", (4, 4, 8), 256, "v5p:4x4x8")


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5p", 1, "expected a chip"),
        ("v9:2x2", 1, "expected a chip"),
        ("v5p:4x4", 1, "have 3 dimensions"),
        ("v5e:2x2", 0, "num_slices is 0"),
    ],
)
def test_anything_else_is_refused(name, slices, message):
    with pytest.raises(ValueError, match=message):
        Topology.parse(name, slices)
