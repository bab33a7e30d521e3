"""Which values fit which annotations."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Optional

import pytest
import toy_entry

from clp_jax.gin_utils.annotations import UNKNOWN, Produced, mismatch, parameters

MODEL, LENGTH = Produced(toy_entry.Model), Produced(toy_entry.Length)


def make_model() -> toy_entry.Model:
    raise AssertionError("nothing is called")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (3, float),
        (3.5, float),
        (True, bool),
        ("x", str),
        ("x", str | os.PathLike),
        (None, int | None),
        ("fast", Literal["fast", "exact"]),
        ([1, 2], Sequence[float]),
        ((1, 2), Sequence[int]),
        (("a",), tuple[str, ...]),
        ({"a": 1}, Mapping[str, int]),
        ("x", str | Sequence[str]),
        (MODEL, toy_entry.Model),
        (MODEL, Optional[toy_entry.Model]),  # noqa: UP045
        ([LENGTH, LENGTH], Sequence[toy_entry.Reward]),
        (Produced(make_model), toy_entry.Model),
        (Produced(toy_entry.Model.small), toy_entry.Model),
        (toy_entry.shout, Callable[[str], str]),
        (UNKNOWN, int),
        ([UNKNOWN], Sequence[int]),
        ("anything", Any),
        (2.0, "NameThatIsNotDefined"),
        ((1, "x"), tuple[int, str]),
        ([], Sequence[int]),
    ],
)
def test_fits(value, hint):
    assert mismatch(value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3", int, "int"),
        (3.0, int, "int"),
        (True, int, "int"),
        (False, float | None, "float | None"),
        (3, str, "str"),
        (None, int, "int"),
        ("slow", Literal["fast", "exact"], "'fast' | 'exact'"),
        ("ab", Sequence[str], "Sequence[str]"),
        ([1, "b"], Sequence[int], "Sequence[int]"),
        (3, Sequence[int], "Sequence[int]"),
        ({"a": "b"}, Mapping[str, int], "Mapping[str, int]"),
        (MODEL, toy_entry.Reward, "Reward"),
        (MODEL, int, "int"),
        ([MODEL], Sequence[toy_entry.Reward], "Sequence[Reward]"),
        (LENGTH, Sequence[toy_entry.Reward], "Sequence[Reward]"),
        (toy_entry.Model, toy_entry.Model, "Model"),
        (3, Callable[[str], str], "a function"),
        (Produced(make_model), toy_entry.Length, "Length"),
        ([1, True], list[int], "list[int]"),
        ((1, "x"), tuple[int, int], "tuple[int, int]"),
    ],
)
def test_does_not_fit(value, hint, expected):
    assert mismatch(value, hint) == expected


def test_parameters_of_functions_classes_and_presets():
    toy = parameters(toy_entry.toy)
    assert toy.required == ("run_dir", "model")
    assert toy.defaults["num_steps"] == 10
    assert toy.hints["rewards"] == Sequence[toy_entry.Reward]
    assert not toy.open
    assert parameters(toy_entry.Model).required == ("size",)
    preset = parameters(toy_entry.Model.small)
    assert (set(preset.hints), preset.required, preset.open) == ({"size", "rate", "kind"}, (), False)
    assert parameters(lambda **anything: anything).open
    assert parameters(dict).open
