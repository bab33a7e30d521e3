"""The pins, held against what packages ask of each other: also for what is only installed elsewhere, as on TPUs and GPUs."""

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# XManager needs an older protobuf than the pins have, and so an environment of its own (docs/launching.md).
EXTRAS = ("", "tpu", "cuda", "test", "hf", "optuna", "serve", "wandb")


def pins():
    """Version by name, for this Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            assert canonicalize_name(requirement.name) not in found, line
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def asked(name, extras):
    """What an installed package asks for with some extras, and what that asks for in turn."""
    seen, waiting = set(), [(name, extra) for extra in extras]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            entries = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # What is on other machines only is asked for by something that is here.
        for requirement in map(Requirement, entries):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield name, requirement
                waiting += [(canonicalize_name(requirement.name), each) for each in ("", *requirement.extras)]


@pytest.mark.parametrize("extra", EXTRAS)
def test_no_pin_is_refused_by_another_package(extra):
    pinned = pins()
    wrong = [
        f"{name} asks for {requirement}, the constraints for {pinned[own]}"
        for name, requirement in asked("clp-jax", {"", extra})
        if (own := canonicalize_name(requirement.name)) in pinned
        and not requirement.specifier.contains(pinned[own], prereleases=True)
    ]
    assert wrong == []


def test_a_pin_that_would_be_refused_is_found(monkeypatch):
    monkeypatch.setitem(globals(), "pins", lambda: {"libtpu": "0.0.1"})
    with pytest.raises(AssertionError, match=r"jax asks for libtpu==.*, the constraints for 0\.0\.1"):
        test_no_pin_is_refused_by_another_package("tpu")


def test_everything_that_is_needed_is_pinned():
    needed = {canonicalize_name(requirement.name) for _, requirement in asked("clp-jax", {""})}
    assert needed - set(pins()) == set()
