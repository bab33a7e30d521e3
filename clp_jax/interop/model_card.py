"""``README.md`` beside an exported policy: what it is, where it came from, and what was done with it."""

import dataclasses
import json
from collections.abc import Sequence

from clp_jax.models.config import ModelConfig
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import to_json


def model_card(config: ModelConfig, provenance: Sequence[str], *, library: str = "transformers") -> str:
    """The card as Markdown, with the metadata that hubs read in front.

    Args:
        config: of the policy.
        provenance: a sentence for each thing that made it, first to last: its source, the training step, the reward
            weights it was mixed at, the command that wrote it.
        library: that loads it.

    Raises:
        ValueError: when nothing is known of where the policy came from.
    """
    if not provenance:
        raise ValueError("provenance is empty: expected a sentence at least of where the policy came from.")
    kind = f"{type(config).__name__} of {Policy(config).num_params():,} parameters"
    lines = [
        "---",
        f"library_name: {library}",
        "tags:",
        "- clp_jax",
        "---",
        "",
        f"A policy exported by clp_jax: {kind}.",
        "",
        "## Where it comes from",
        "",
        *(f"{number}. {line}" for number, line in enumerate(provenance, start=1)),
        "",
        "## What it is made of",
        "",
        "```json",
        _settings(config),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _settings(config: ModelConfig) -> str:
    """Fields that are not the defaults."""
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    changed = {name: to_json(value) for name, (value, default) in values.items() if value != default}
    return json.dumps({"type": type(config).__name__} | changed, indent=2)
