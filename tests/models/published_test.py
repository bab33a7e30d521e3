"""Every published size: gin builds it, and it has as many parameters as were published; `docs/models.md` says what the code counts.

`docs/models_counts.csv` holds what was published. After a change that is meant,
`CLP_UPDATE_GOLDEN=1 pytest tests/models/published_test.py` writes the table of the document anew.
"""

import csv
import dataclasses
import functools
import math
import os
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import jax
import pytest

from clp_jax import train
from clp_jax.gin_utils.configuration import configure
from clp_jax.gin_utils.files import Macro, SearchPath, all_files, bindings, read_file, shipped_files
from clp_jax.interop.hf_families import differences, family_named, same
from clp_jax.models.config import ModelConfig, T5Config
from clp_jax.models.policy import Policy

DOCS = Path(__file__).parents[2] / "docs"
with (DOCS / "models_counts.csv").open(encoding="utf-8", newline="") as rows:
    PUBLISHED = {row["gin_file"]: row for row in csv.DictReader(rows)}
NAMES = sorted(path.stem for path in (shipped_files() / "models").glob("*.gin") if not path.stem.startswith("family_"))
SIZES = [name for name in NAMES if not name.endswith("_tiny")]
# One of each kind of routing; the other sizes take their twin from the same lines.
TWINS = [
    "moe_tiny",
    "switch_base_8",
    "switch_c_2048",
    "st_moe_base",
    "gshard_base",
    "ec_small",
    "mixtral_8x7b",
    "qwen3_30b_a3b",
]

UNITS = {"M": 10**6, "B": 10**9, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@functools.cache
def config_of(name: str, *given: str) -> ModelConfig:
    """What `clp train` gets from a file."""
    files = ("algorithms/adamw.gin", "runs/supervised.gin", f"models/{name}.gin")
    given = ("RUN_DIR='run'", "DATA_DIR='data'", *given)
    return configure(train.train, gin_files=files, gin_bindings=given).build()["stage"].model


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        every: all of them.
        active: those that a token meets.
        routing: of the active ones, those that a dense model has no use for.
    """

    every: int
    active: Fraction
    routing: int


@functools.cache
def counts_of(config: ModelConfig) -> Counts:
    """Counts, without making any parameter."""
    every, active, routing = 0, Fraction(0), 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(Policy(config).abstract()):
        names, size = [key.key for key in path], math.prod(leaf.shape)
        every += size
        active += size * share(config, names[0]) if "experts" in names else size
        routing += size * any(name in ("router", "extra_mlp_norm") for name in names)
    return Counts(every, active, routing)


def share(config: ModelConfig, stack: str) -> Fraction:
    """Of a sparse layer's experts, how many a token meets, on average at most."""
    return Fraction(config.moe.router_of(stack == "decoder").experts_per_token) / config.moe.num_experts


def says(text: str, count: int | Fraction) -> bool:
    """Whether a figure such as ``62.50B`` or ``220M`` is a count, rounded or cut; zeros before the point say nothing."""
    digits, unit = re.fullmatch(r"([\d.]+) ?(\w+)", text).groups()
    value = Decimal(digits)
    last = value.as_tuple().exponent
    if last == 0:
        last = len(digits) - len(digits.rstrip("0"))
    return abs(Fraction(value) * UNITS[unit] - count) < Fraction(10) ** last * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("62.50B", 62.49e9, 62.51e9), ("220M", 210e6, 230e6), ("1571B", 1570e9, 1572e9), ("1.00 billion", 99e7, 101e7)],
)
def test_figures_are_read_to_their_last_digit(text, low, high):
    assert says(text, int(low) + 1) and says(text, int(high) - 1)
    assert not says(text, int(low)) and not says(text, int(high))


def test_every_size_is_in_the_table_and_every_row_is_a_size():
    assert len(PUBLISHED) > 70
    assert sorted(PUBLISHED) == sorted(SIZES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    row, counts = PUBLISHED[name], counts_of(config_of(name))
    assert counts.every == int(row["parameters"])
    # A figure that does not follow from the published sizes is marked, and must really be another.
    assert not row["stated"] or says(row["stated"], counts.every) == (row["note"] != "differs")
    assert not row["stated_active"] or says(row["stated_active"], counts.active)
    summary = read_file(f"models/{name}.gin", SearchPath()).header.summary
    (figure,) = re.findall(r"([\d.]+ (?:million|billion|trillion)) parameters", summary)
    assert says(figure, counts.every)


@pytest.mark.parametrize("name", NAMES)
def test_what_has_experts_has_a_dense_twin(name):
    file = read_file(f"models/{name}.gin", SearchPath())
    said = {macro for member in all_files([file]) for macro in member.header.overridden}
    bound = [binding.value for binding, _ in bindings([file]) if binding.argument == "dense"]
    has_experts = config_of(name).moe is not None
    assert bound == [Macro("DENSE_TWIN")] * has_experts
    assert ("DENSE_TWIN" in said) == has_experts


@pytest.mark.parametrize("name", TWINS)
def test_the_dense_twin_costs_as_much(name):
    counts, twin = counts_of(config_of(name)), counts_of(config_of(name, "DENSE_TWIN=True"))
    assert twin.routing == 0
    assert twin.every == twin.active == counts.active - counts.routing
    assert counts.routing > 0


@pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if row["model_type"]])
def test_hugging_face_can_express_what_it_has(name):
    model_type = PUBLISHED[name]["model_type"]
    given = ("EXPERT_CAPACITY=64",) if model_type == "switch_transformers" else ()
    assert differences(family_named(model_type), config_of(name, *given)) == []


@pytest.mark.parametrize(
    ("name", "cls", "changes"),
    [
        ("gemma_7b", "GemmaConfig", {}),
        ("gemma2_2b", "Gemma2Config", {}),
        # The class says 1e-6, the model's own file 1e-5.
        ("mistral_7b_v0_1", "MistralConfig", {"rms_norm_eps": 1e-5}),
        ("mixtral_8x7b", "MixtralConfig", {}),
        ("t5_1_0_small", "T5Config", {}),
    ],
)
def test_sizes_are_those_that_transformers_has_as_defaults(name, cls, changes):
    transformers = pytest.importorskip("transformers", reason="the reference needs the extra `hf` (transformers)")
    theirs = getattr(transformers, cls)(**changes).to_dict()
    family = family_named(theirs["model_type"])
    assert family.model_type == PUBLISHED[name]["model_type"]
    assert same(family.config(theirs), config_of(name))


def short(count: Fraction) -> str:
    """A count to about three digits."""
    return f"{float(count / 10**9):.1f}B" if count >= 10**9 else f"{float(count / 10**6):.0f}M"


def table() -> str:
    """The table of the document."""
    lines = [
        "| model | `models/*.gin` | layers | D | F | heads × size | key/value heads | experts | V | parameters | active | stated |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in PUBLISHED.items():
        config, counts = config_of(name), counts_of(config_of(name))
        moe, both = config.moe, isinstance(config, T5Config)
        layers = f"{config.num_encoder_layers} + {config.num_decoder_layers}" if both else config.num_layers
        experts = "" if moe is None else f"{moe.num_experts} × {moe.mlp_dim or config.mlp_dim}, 1 layer in {moe.every}"
        cells = (
            row["model"],
            name,
            layers,
            config.embed_dim,
            config.mlp_dim,
            f"{config.num_heads} × {config.head_dim}",
            config.kv_heads,
            experts,
            config.vocab_size,
            f"{counts.every:,}",
            "" if moe is None else short(counts.active),
            row["stated"] + (" [1]" if row["note"] else ""),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "".join(f"{line}\n" for line in lines)


def test_the_document_says_what_the_code_counts():
    document = DOCS / "models.md"
    text = document.read_text("utf-8")
    before, found, after = re.fullmatch(r"(.*<!-- sizes -->\n)(.*)(<!-- end of sizes -->.*)", text, re.DOTALL).groups()
    if os.environ.get("CLP_UPDATE_GOLDEN"):
        found = table()
        document.write_text(before + found + after, "utf-8")
    assert found == table()
