"""The Pallas kernels, run as ordinary programs: what the reference gives, forward and backward."""

import functools

import pytest
from attention_cases import CASES, assert_close, differentiated, inputs

from clp_jax.nn.attention_pallas import pallas_attention
from clp_jax.nn.attention_reference import reference_attention

INTERPRETED = functools.partial(pallas_attention, query_block=128, key_block=128, interpret=True)


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference_forward_and_backward(name):
    case = CASES[name]
    arrays, at = inputs(case)
    found = differentiated(INTERPRETED, case)(arrays, *at)
    assert_close(found, differentiated(reference_attention, case)(arrays, *at), 3e-6)
