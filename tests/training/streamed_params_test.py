"""Parameters that are written and read part by part: no more than a part is asked for, and all is what it was."""

import dataclasses
import hashlib

import numpy as np
import pytest

from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.regions import shape_of
from clp_jax.training.checkpoint_manifest import Manifest
from clp_jax.training.places import as_path
from clp_jax.training.saved_params import load_params
from clp_jax.training.streamed_params import hold_arrays, open_params, write_params

# Of an array of 6 MiB whose parts have 2, one of 6 whose parts' parts have 1, and a small one.
SHAPES = {"layers": (3, 512, 1024), "experts": (2, 3, 512, 512), "scale": (3, 8)}
STACKED = {"layers": 1, "experts": 2, "scale": 1}
PARTS = {"layers": (1, 512, 1024), "experts": (1, 1, 512, 512), "scale": (3, 8)}


def values(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


def watched(leaf: LazyArray, asked: list) -> LazyArray:
    """The same; what is asked for is noted."""

    def fill(out, region):
        asked.append(shape_of(region))
        leaf.fill(out, region)

    return dataclasses.replace(leaf, fill=fill)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that was written of lazy arrays, and the shapes that were asked for of each."""
    asked: dict[str, list] = {name: [] for name in SHAPES}

    def lazy(name: str) -> LazyArray:
        array = values(name)

        def fill(out, region):
            out[...] = array[region]

        return watched(LazyArray(array.shape, array.dtype, fill, STACKED[name]), asked[name])

    path = tmp_path_factory.mktemp("streamed") / "3"
    write_params(path, {name: lazy(name) for name in SHAPES}, {"stage": "toy"}, 3)
    return path, asked


def test_stacked_arrays_are_read_by_their_parts(saved):
    _, asked = saved
    assert asked == {name: [part] * (np.prod(SHAPES[name]) // np.prod(part)) for name, part in PARTS.items()}


def test_they_are_what_they_were(saved):
    path, _ = saved
    lazy, description, step = open_params(path)
    whole, *_ = load_params(path)
    assert (description, step) == ({"stage": "toy"}, 3)
    for name in SHAPES:
        np.testing.assert_array_equal(whole[name], values(name))
        np.testing.assert_array_equal(lazy[name].read(), values(name))
    assert {name: lazy[name].stacked for name in SHAPES} == {"layers": 1, "experts": 2, "scale": 0}


def test_every_part_has_its_digest(saved):
    path, _ = saved
    found = Manifest.read(as_path(path)).arrays["params"]["layers"].shards
    layers = {f"{i}:{i + 1},0:512,0:1024": hashlib.sha256(values("layers")[i].tobytes()) for i in range(3)}
    assert found == {place: digest.hexdigest() for place, digest in layers.items()}


def test_of_parts_that_are_stored_by_themselves_no_more_is_held(saved):
    path, _ = saved
    asked: dict[str, list] = {name: [] for name in SHAPES}
    opened = open_params(path)[0]
    held = hold_arrays({name: watched(leaf, asked[name]) for name, leaf in opened.items()})
    one = slice(1, 2)
    for name, region in {"layers": (one,), "experts": (one, slice(2, 3)), "scale": (one,)}.items():
        np.testing.assert_array_equal(held[name].read(region), values(name)[region])
    # Pieces of a part, which is read once; then another.
    for columns in (slice(0, 100), slice(100, 1024)):
        np.testing.assert_array_equal(
            held["layers"].read((one, slice(0, 512), columns)), values("layers")[1:2, :, columns]
        )
    np.testing.assert_array_equal(held["layers"].read((slice(0, 1), slice(3, 4))), values("layers")[:1, 3:4])
    # The experts of a layer that are read together are not parts: all of the layer is.
    np.testing.assert_array_equal(held["experts"].read((one, slice(0, 2), slice(0, 9))), values("experts")[1:2, :2, :9])
    assert asked == {
        "layers": [(1, 512, 1024)] * 3,
        "experts": [(1, 1, 512, 512), (1, 3, 512, 512)],
        "scale": [(3, 8)],
    }
