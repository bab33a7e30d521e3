"""Every gin file that comes with clp_jax: it resolves, to what its golden file says, and its header tells the truth.

After a change that is meant, `CLP_UPDATE_GOLDEN=1 pytest tests/contracts/gin_files_test.py` writes the golden files anew.
"""

import importlib
import os
from pathlib import Path

import pytest
from gin_uses import COMPLETE, FAMILIES, FILES, TINY, USES, use

from clp_jax.gin_utils.configuration import configure
from clp_jax.gin_utils.files import (
    ConfigError,
    Macro,
    SearchPath,
    all_files,
    bindings,
    leaves,
    read_file,
    shipped_files,
)
from clp_jax.main import COMMANDS

GOLDEN = Path(__file__).parent / "golden"


def resolve(name: str) -> str:
    command, files, given = use(name)
    module, function = COMMANDS[command].rsplit(".", 1)
    entry = getattr(importlib.import_module(module), function)
    return configure(entry, gin_files=files, gin_bindings=given).text


def test_there_are_files():
    assert len(FILES) > 30
    assert set(USES) <= set(FILES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_sizes(name):
    assert any(f"include '{name}'" in (shipped_files() / size).read_text() for size in COMPLETE)


@pytest.mark.parametrize("name", COMPLETE)
def test_resolves_to_its_golden_file(name):
    text = resolve(name)
    golden = GOLDEN / name.replace("/", "_")
    if os.environ.get("CLP_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", FILES)
def test_its_header_tells_the_truth(name):
    file = read_file(name, SearchPath())
    assert len(file.header.summary) > 10
    found = list(bindings([file]))
    set_here = {binding.macro: binding.value for binding, _ in found if binding.macro}
    used = {item.name for binding, _ in found for item in leaves(binding.value) if isinstance(item, Macro)}
    known = set(set_here) | used
    for macro in (*file.header.required, *file.header.overridden):
        assert macro in known, f"{name} says {macro}, which it does not have"
    for macro, value in set_here.items():
        if value == Macro("gin.REQUIRED"):
            headers = [member.header.required for member in all_files([file])]
            assert any(macro in required for required in headers), f"{name} requires {macro} and does not say so"


# One model stands for all of them: what they require is required by the run.
ASKING = [name for name in COMPLETE if use(name)[2] and (not name.startswith("models/") or name in TINY)]


@pytest.mark.parametrize("name", ASKING)
def test_a_required_macro_that_is_left_out_is_named(name):
    command, files, given = use(name)
    module, function = COMMANDS[command].rsplit(".", 1)
    entry = getattr(importlib.import_module(module), function)
    for left_out in given:
        rest = [binding for binding in given if binding != left_out]
        macro = left_out.split("=")[0]
        if macro.endswith("_DIR") and "examples/pydoc_rl.gin" in files and macro != "RUN_DIR":
            continue  # The example's paths give it a value.
        with pytest.raises(ConfigError, match=f"--gin.{macro}=VALUE"):
            configure(entry, gin_files=files, gin_bindings=rest)


def test_golden_files_have_their_gin_files():
    assert {path.name for path in GOLDEN.iterdir()} == {name.replace("/", "_") for name in COMPLETE}
