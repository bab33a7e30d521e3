"""What is stored with a checkpoint comes back equal; nothing else is stored, and nothing else is read."""

import dataclasses
import json

import pytest
from tiny_policies import tiny_config

from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning, Unconditioned
from clp_jax.models.heads import ScorerConfig, ValueHeadConfig
from clp_jax.models.serialization import from_json, serializable, to_json


@pytest.mark.parametrize(
    "value",
    [
        tiny_config(dropout_rate=0.1, tied_head=True),
        ScorerConfig(trunk=tiny_config()),
        ValueHeadConfig(embed_dim=8, num_features=3),
        Unconditioned(),
        ParameterConditioning("attention", 3, alpha_min=0.05),
        PromptConditioning(tables=(((3, 4), (5, 0)), ((6, 7), (8, 9))), num_objectives=2),
        (1, 2.5, "three", None, True, (tiny_config(),)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip_through_json(value):
    back = from_json(json.loads(json.dumps(to_json(value))))
    assert back == value and type(back) is type(value) and hash(back) == hash(value)


def test_the_form_is_readable():
    assert to_json(ParameterConditioning("full", 2)) == {
        "type": "ParameterConditioning",
        "subset": "full",
        "num_objectives": 2,
        "alpha_min": None,
    }


def test_a_class_that_is_not_marked_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Private:
        size: int

    with pytest.raises(TypeError, match="Private can't be stored with a checkpoint: it is not marked @serializable"):
        to_json(Private(1))


@pytest.mark.parametrize("value", [object(), {"a": 1}, {1, 2}, b"bytes", 1j, tiny_config])
def test_values_that_would_not_come_back_are_refused(value):
    with pytest.raises(TypeError, match="can't be stored with a checkpoint"):
        to_json([value])


def test_unknown_classes_and_fields_are_named():
    with pytest.raises(ValueError, match=r"unknown type 'T5Confg' \(did you mean 'T5Config'\?\)"):
        from_json({"type": "T5Confg"})
    with pytest.raises(ValueError, match="unknown type None"):
        from_json({"size": 1})
    with pytest.raises(ValueError, match="Unconditioned has the unknown fields colour, size"):
        from_json({"type": "Unconditioned", "size": 1, "colour": "red"})


def test_a_stored_value_is_validated_again():
    stored = to_json(tiny_config()) | {"num_heads": 0}
    with pytest.raises(ValueError, match=r"T5Config\.num_heads is 0"):
        from_json(stored)


def test_two_classes_of_one_name_are_refused():
    @dataclasses.dataclass(frozen=True)
    class T5Config:
        size: int

    with pytest.raises(ValueError, match="two serializable classes are called 'T5Config'"):
        serializable(T5Config)
