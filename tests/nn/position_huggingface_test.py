"""Buckets of distances against those of Hugging Face's T5; torch and transformers come with the extra `hf`."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
pytest.importorskip("transformers", reason="the parity reference needs the extra `hf` (transformers)")

from clp_jax.nn.position import relative_position_bucket


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12)])
def test_buckets(bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-400, 401, dtype=np.int32)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    ours = relative_position_bucket(
        jnp.asarray(distances), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(ours, expected.numpy())
