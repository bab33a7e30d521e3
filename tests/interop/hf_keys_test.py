"""Wrong values in config.json: every key that a family reads tells its own, and none is met later, as a traceback."""

import contextlib
import re

import pytest

from clp_jax.interop.hf_families import FAMILIES, family_named
from clp_jax.interop.hf_family import Family
from clp_jax.interop.hf_keys import KINDS
from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.nn.rope import Llama3Scaling, Rope
from clp_jax.nn.routing import Dropless, TokenChoice

SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
DECODER = PaLMConfig.llama(
    **SIZES,
    num_layers=4,
    window=3,
    window_pattern=(True, False),
    rope=Rope(scaling=Llama3Scaling(8.0, 1.0, 4.0, 16)),
    moe=MoEConfig(num_experts=4, router=Dropless(k=2), mlp_dim=6, shared_dim=6, shared_gate=True),
)
ENCODER_DECODER = T5Config.t5_1_1(
    **SIZES,
    num_encoder_layers=4,
    num_decoder_layers=4,
    moe=MoEConfig(num_experts=2, router=TokenChoice(fixed_capacity=4), every=2),
)
WRONG = ["x", "", 0, -3, 1.5, True, None, [], [7], ["x"], {}, {"x": 1}, float("nan"), float("inf")]

# Of these one value is known, and others are told as not supported.
REFUSED = {"router_bias", "mlp_only_layers"}


class Noting(dict):
    """A dictionary that remembers which of its keys were read."""

    def __init__(self, values):
        super().__init__(values)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def written(family: Family) -> dict:
    """Settings of a family, with values for all that it writes."""
    encoder_decoder = family.names.keys() & {"encoder/norm/scale"}
    return family.write(ENCODER_DECODER if encoder_decoder else DECODER) | {"model_type": family.model_type}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_tells_its_wrong_values(name):
    family = FAMILIES[name]
    values = Noting(written(family))
    family.config(values)
    read = values.read - REFUSED
    assert len(read) >= 14 and read <= KINDS.keys()
    count = 0
    for key in sorted(read):
        for wrong in (wrong for wrong in WRONG if not KINDS[key].holds(wrong)):
            told = rf"^config\.json: {key} is {re.escape(repr(wrong))}: expected {re.escape(KINDS[key].expected)}\.$"
            with pytest.raises(ValueError, match=told):
                family.config(values | {key: wrong})
            count += 1
    assert count >= 8 * len(read)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_value_ends_in_a_traceback(name):
    """Those that a key may have, but not with the others."""
    family = FAMILIES[name]
    values = Noting(written(family))
    family.config(values)
    for key in values.read & KINDS.keys():
        for odd in (odd for odd in [*WRONG, 1, 5, 300, 0.5] if KINDS[key].holds(odd)):
            with contextlib.suppress(ValueError):
                family.config(values | {key: odd})


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("inner", ["rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("wrong", ["x", [], True, -1, {}], ids=repr)
def test_positions_tell_theirs(key, inner, wrong):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16, inner: wrong}
    values = written(FAMILIES["llama"]) | {"rope_scaling": None, key: scaling}
    with pytest.raises(ValueError, match=rf"^config\.json: {key}\.{inner} is {re.escape(repr(wrong))}: expected a "):
        FAMILIES["llama"].config(values)


def test_kinds_of_layers_tell_their_positions():
    for given, told in (({"full_attention": 7}, "full_attention is 7"), ("x", "'x'"), ([3], r"\[3\]")):
        with pytest.raises(ValueError, match=rf"^config\.json: rope_parameters(\.| is ){told}.* an object, or null"):
            FAMILIES["gemma3_text"].config(written(FAMILIES["gemma3_text"]) | {"rope_parameters": given})


@pytest.mark.parametrize("wrong", [[], {}, 3, None, "x"], ids=repr)
def test_a_model_type_that_is_none(wrong):
    with pytest.raises(ValueError, match=rf"^config\.json: model_type is {re.escape(repr(wrong))}"):
        family_named(wrong)


def test_the_generation_tells_its_own_file():
    for key in ("eos_token_id", "decoder_start_token_id"):
        values = {k: v for k, v in written(FAMILIES["t5"]).items() if k != key}
        with pytest.raises(ValueError, match=rf"^generation_config\.json: {key} is 'x': expected a token's number"):
            FAMILIES["t5"].config(values, {key: "x"})
