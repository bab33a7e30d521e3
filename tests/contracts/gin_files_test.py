"""Every gin file that comes with clp_jax: it resolves, to what its golden file says, and its header tells the truth.

After a change that is meant, `CLP_UPDATE_GOLDEN=1 pytest tests/contracts/gin_files_test.py` writes the golden files anew.
"""

import importlib
import os
from pathlib import Path

import pytest

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

FILES = sorted(path.relative_to(shipped_files()).as_posix() for path in shipped_files().rglob("*.gin"))
GOLDEN = Path(__file__).parent / "golden"
# What the sizes of a family share says nothing without one of them.
FAMILIES = [name for name in FILES if name.startswith("models/family_")]
COMPLETE = [name for name in FILES if name not in FAMILIES]

TINY = ("models/t5_1_1_tiny.gin", "algorithms/adamw.gin")
RUN = ("RUN_DIR='run'", "DATA_DIR='data'")
RL = ("runs/train.gin", "examples/pydoc_rl.gin", "conditioning/full.gin")
SFT = (*TINY, "runs/supervised.gin")
EXAMPLE = ("RUN_DIR='run'",)

# How each file is used: the command, the files given with it in order (itself where there is no other), and bindings.
USES = {
    "algorithms/adafactor.gin": ("train", (*SFT, "algorithms/adafactor.gin"), RUN),
    "algorithms/adafactor_pretraining.gin": ("train", (*SFT, "algorithms/adafactor_pretraining.gin"), RUN),
    "algorithms/adamw.gin": ("train", SFT, RUN),
    "algorithms/alpha_range.gin": ("train", (*RL, "algorithms/alpha_range.gin"), EXAMPLE),
    "algorithms/clp.gin": ("train", RL, EXAMPLE),
    "algorithms/dirichlet.gin": ("train", RL, EXAMPLE),
    "algorithms/fixed.gin": ("train", (*RL, "algorithms/fixed.gin"), (*EXAMPLE, "WEIGHTS=(0.3, 0.7)")),
    "algorithms/leave_one_out.gin": ("train", (*RL, "algorithms/leave_one_out.gin"), EXAMPLE),
    "algorithms/value_baseline.gin": ("train", RL, EXAMPLE),
    "algorithms/linear_decay.gin": ("train", (*SFT, "algorithms/linear_decay.gin"), RUN),
    "conditioning/kl.gin": ("train", (*RL, "conditioning/kl.gin"), EXAMPLE),
    "examples/pydoc_evaluate.gin": ("evaluate", (), ()),
    "examples/pydoc_experiment.gin": ("experiment", (), ()),
    "examples/pydoc_expert.gin": ("train", (), (*EXAMPLE, "WEIGHTS=(1.0, 0.0)")),
    "examples/pydoc_paths.gin": ("train", ("examples/pydoc_sft.gin",), ()),
    "examples/pydoc_prepare.gin": ("prepare", (), ()),
    "examples/pydoc_rl.gin": ("train", RL, EXAMPLE),
    "runs/clp.gin": (
        "train",
        ("algorithms/adamw.gin", "runs/clp.gin", "rewards/rouge_brevity.gin", "conditioning/full.gin"),
        (*RUN, "SFT_DIR='sft'"),
    ),
    "runs/evaluate.gin": ("evaluate", ("runs/evaluate.gin", "rewards/coverage_brevity.gin"), RUN),
    "runs/prepare.gin": ("prepare", ("examples/pydoc_prepare.gin",), ()),
    "runs/prepare_jsonl.gin": (
        "prepare",
        (),
        ("DATA_DIR='data'", "TRAIN_FILE='a.jsonl'", "VALIDATION_FILE='b.jsonl'", "TEST_FILE='c.jsonl'"),
    ),
    "runs/prepare_registered.gin": ("prepare", (), ("DATA_DIR='d'", "TASK_NAME='t'", "TASK_MODULES=['my_tasks']")),
    "runs/reward_model.gin": (
        "train",
        (*TINY, "runs/reward_model.gin"),
        (*RUN, "REWARD_NAME='r'", "REWARD_LOSS='entailment'", "CORRUPTIONS=['swap']"),
    ),
    "algorithms/freeze.gin": ("train", (*SFT, "models/moe_tiny.gin", "algorithms/freeze.gin"), RUN),
    "runs/supervised.gin": ("train", SFT, RUN),
    "runs/train.gin": ("train", SFT, RUN),
    "sharding/rollouts.gin": ("train", (*RL, "sharding/fsdp.gin", "sharding/rollouts.gin"), EXAMPLE),
}


def use(name: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The command, files and bindings that show a file at work."""
    if name in USES:
        command, files, given = USES[name]
        return command, files or (name,), given
    folder = name.split("/")[0]
    if folder == "models":
        return "train", ("algorithms/adamw.gin", "runs/supervised.gin", name), RUN
    if folder == "sharding":
        return "train", ("examples/pydoc_sft.gin", name), ()
    if folder == "scale":
        return "train", (name,), (*RUN, "SFT_DIR='sft'") if "clp" in name else RUN
    if folder == "conditioning":
        return "train", (*RL, name), EXAMPLE
    if folder == "rewards":
        given = (*EXAMPLE, "PREFERENCE_DIR='p'") if "preference" in name else EXAMPLE
        given = (*given, "FAITHFULNESS_DIR='f'") if "faithfulness" in name else given
        return "train", (*RL, name), given
    return "train", (name,), ()


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
