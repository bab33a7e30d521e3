"""Records: what is written comes back, in a layout that does not depend on the machine."""

import msgpack
import numpy as np
import pytest

from clp_jax.data.records import decode, encode


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i4"])
def test_what_is_encoded_comes_back(dtype):
    features = {
        "inputs": np.asarray([1, 0, 300], dtype),
        "targets": np.asarray([], dtype),
        "ends": np.asarray([3], dtype),
    }
    decoded = decode(encode(features))
    assert list(decoded) == list(features)
    for name, values in features.items():
        assert decoded[name].dtype == np.int32
        np.testing.assert_array_equal(decoded[name], values)


def test_the_bytes_are_a_map_of_little_endian_words():
    assert msgpack.unpackb(encode({"a": np.asarray([1, 258])})) == {"a": b"\x01\x00\x00\x00\x02\x01\x00\x00"}


def test_the_largest_ids_fit():
    extremes = np.asarray([2**31 - 1, -(2**31)])
    np.testing.assert_array_equal(decode(encode({"a": extremes}))["a"], extremes)


def test_decoded_arrays_can_be_written_to():
    decode(encode({"a": np.asarray([1])}))["a"][0] = 2
