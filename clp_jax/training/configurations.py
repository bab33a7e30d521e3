"""What may differ between the configuration that a run began with and the one that it goes on with."""

import dataclasses
import re
from typing import Any

# They change how long a run lasts and what it tells, not what it computes. A parameter's name is enough.
FREE_BINDINGS = frozenset(
    {
        "num_steps",
        "run_dir",
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "keep_best",
        "watchdog_seconds",
        "profile_steps",
        "replica_check_every",
        "wandb_project",
    }
)
# They change which device computes what and in which order: the same numbers but for rounding.
LAYOUT_BINDINGS = ("train.mesh", "train.rules", "train.accumulation", "rollout_rules", "remat", "scan_unroll")
# How those are called in a model's description.
LAYOUT_FIELDS = frozenset({"remat", "scan_unroll"})

_MODULE = re.compile(r"import ([\w.]+)$")


@dataclasses.dataclass(frozen=True)
class Changes:
    """What differs between two configurations, each difference as ``name: old -> new``.

    Attributes:
        refused: another run is computed.
        layout: the same run is computed on other devices, or in another order.
    """

    refused: tuple[str, ...]
    layout: tuple[str, ...]


def changes(old_text: str, new_text: str) -> Changes:
    """What differs, without what is free.

    Args:
        old_text: lines of ``name = value``.
        new_text: the same.
    """
    old, new = bindings(old_text), bindings(new_text)
    refused, layout = [], []
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) == new.get(name):
            continue
        kinds = [_kind(name, given) for given in (old, new) if name in given]
        said = f"{name}: {brief(old.get(name), 'unset')} -> {brief(new.get(name), 'unset')}"
        if "computation" in kinds:
            refused.append(said)
        elif "layout" in kinds and not _MODULE.match(name):
            layout.append(said)
    return Changes(tuple(refused), tuple(layout))


def bindings(config_text: str) -> dict[str, str]:
    """The bindings of a configuration: ``name = value`` lines with their continuations, without comments.

    Args:
        config_text: lines as gin writes them; other lines (imports, includes) count as names without a value.
    """
    found: dict[str, str] = {}
    name = None
    for line in config_text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.match(r"([\w./@:]+)\s*=\s*(.*)$", line)
        if match:
            name, value = match[1], match[2]
            found[name] = value.rstrip("\\").strip()
        elif line[0].isspace() and name is not None:
            found[name] = f"{found[name]} {line.strip()}".rstrip("\\").strip()
        elif line[0] in ")]}" and name is not None:
            found[name] += f" {line.strip()}"
        else:
            name = None
            found[line.strip()] = ""
    return found


def first_difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Where two descriptions differ first, and the values there; None where they differ in the layout at most."""
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
            if inner is not None and key not in LAYOUT_FIELDS:
                return inner
        return None
    return where, old, new


def brief(value: str | None, missing: str = "missing") -> str:
    """A value for people."""
    if value is None:
        return missing
    return value if len(value) <= 120 else f"{value[:117]}..."


def _kind(name: str, given: dict[str, str], seen: frozenset[str] = frozenset()) -> str:
    """``"free"``, ``"layout"`` or ``"computation"``: what a binding is by its name, or by all that use what it belongs to.

    Args:
        name: of a binding, a macro, or an import.
        given: the configuration that it is in.
        seen: what is being looked at further up.
    """
    if any(f".{name}".endswith(f".{suffix}") for suffix in LAYOUT_BINDINGS):
        return "layout"
    scoped, _, parameter = name.rpartition(".")
    is_free = parameter.lower() in FREE_BINDINGS
    module = _MODULE.match(name)
    if module:
        users = [user for user, value in given.items() if f"{module[1]}." in f"{user} {value}" and user != name]
    elif scoped:
        if is_free:
            return "free"
        configurable = scoped.split("/")[-1]
        reference = re.compile(rf"@([\w.]+/)*{re.escape(configurable)}\b(?!\.)")
        users = [user for user, value in given.items() if reference.search(value)]
    else:
        used = re.compile(rf"%{re.escape(name)}\b")
        users = [user for user, value in given.items() if used.search(value)]
        if not is_free and not users:
            return "computation"
    kinds = {_kind(user, given, seen | {name}) for user in users if user not in seen}
    if "computation" in kinds or not (kinds or is_free):
        return "computation"
    return "layout" if "layout" in kinds else "free"
