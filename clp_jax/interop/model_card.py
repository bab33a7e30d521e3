"""``README.md`` beside an exported policy: what it is, where it came from, and what was done with it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from clp_jax.models.config import ModelConfig
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """What a card tells.

    Attributes:
        name: of the policy.
        source: the run, checkpoint or directory that was exported.
        form: of what was written, such as ``"Hugging Face, model_type t5"``.
        dtype: of the tensors.
        step: of training; None where there was none.
        weights: of the rewards that a steerable policy was fixed at, by name; None for other policies.
        alpha: the KL weight that it was fixed at; None for other policies.
        origin: the checkpoint that training started from; None where it was fresh.
        left_out: what the policy's source holds and this does not.
        command: that wrote it; None where it was called from Python.
    """

    name: str
    source: str
    form: str
    dtype: str
    step: int | None = None
    weights: Mapping[str, float] | None = None
    alpha: float | None = None
    origin: str | None = None
    left_out: Sequence[str] = ()
    command: str | None = None


def render(card: Card, config: ModelConfig) -> str:
    """The card as Markdown, with the metadata that hubs read in front.

    Args:
        card: what it tells.
        config: of the policy.
    """
    rows: dict[str, Any] = {
        "source": f"`{card.source}`",
        "training step": card.step,
        "started from": None if card.origin is None else f"`{card.origin}`",
        "format": card.form,
        "type of the tensors": card.dtype,
        "parameters": f"{Policy(config).num_params():,}",
    }
    if card.weights is not None:
        rows["reward weights"] = ", ".join(f"{name} {weight:g}" for name, weight in card.weights.items())
    if card.alpha is not None:
        rows["KL weight α"] = f"{card.alpha:g}"
    lines = [
        "---",
        "library_name: transformers" if card.form.startswith("Hugging Face") else "library_name: clp_jax",
        "tags:",
        "- clp_jax",
        "---",
        "",
        f"# {card.name}",
        "",
        _summary(card),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items() if value is not None),
    ]
    if card.left_out:
        lines += ["", f"Left out: {_few(card.left_out)}."]
    if card.command is not None:
        lines += ["", "Written by", "", "```", card.command, "```"]
    lines += ["", "The policy's own configuration:", "", "```json", _settings(config), "```"]
    return "\n".join(lines) + "\n"


def _summary(card: Card) -> str:
    if card.weights is None and card.alpha is None:
        return "A policy exported by clp_jax."
    return "One trade-off of a steerable policy, exported by clp_jax: its components mixed at the weights below."


def _settings(config: ModelConfig) -> str:
    """Fields that are not the defaults."""
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.default is dataclasses.MISSING or getattr(config, field.name) != field.default
    }
    plain = {name: to_json(value) for name, value in changed.items()}
    return json.dumps({"type": type(config).__name__} | plain, indent=2)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
