"""What T5X's directories don't say of a policy: assumed where one is read, and told to readers where one is written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clp_jax.interop.hf_families import canonical
from clp_jax.interop.t5x_names import infer, links
from clp_jax.models.config import MoEConfig, T5Config

# T5X takes these from gin, and the ends of completions from a task's vocabulary.
_IN_GIN = ("activation", "norm_eps", "max_distance", "dropout_rate", "eos_ids")
_MODEL = "--gin_file=models/NAME.gin --gin.convert.model=%MODEL"


def assumed(config: T5Config, stated: Mapping[str, Any]) -> str:
    """What was assumed of a policy that was read, in a line that says how to change it.

    Args:
        config: of the policy.
        stated: fields that were not assumed.
    """
    names = [name for name in _IN_GIN if name not in stated and (name != "max_distance" or config.num_buckets)]
    found = [_typed(name, getattr(config, name)) for name in names]
    if config.moe is not None and "moe" not in stated:
        moe = config.moe
        found += [
            f"router={moe.router}",
            f"decoder_router={moe.decoder_router}",
            f"balance_weight={moe.balance_weight}",
            f"z_weight={moe.z_weight}",
        ]
    example = _typed("activation", "silu" if config.gated else "gelu")
    return (
        f"assumed, as T5X's directories don't say it: {', '.join(found)}. To change it: --overrides NAME=VALUE "
        f"(as {example}), or the whole policy, its router too: {_MODEL}."
    )


def untold(config: T5Config, scan_axis: int | None) -> dict[str, Any]:
    """Fields of a policy that its T5X directory will not say, and that T5X itself takes from gin.

    Args:
        config: of the policy.
        scan_axis: of its layers in the directory; None for single ones.

    Returns:
        Those whose values are not the ones that reading assumes.

    Raises:
        ValueError: naming fields of what T5X does not compute.
    """
    shapes, axis = {each.name: each.shape for each in links(config, scan_axis)}, scan_axis or 0
    names = [*_IN_GIN, "moe"]
    # Told by a table of positions, and by dense blocks of one width.
    names += ["num_heads", "num_buckets"] if not config.num_buckets else []
    names += ["mlp_dim"] if config.moe is not None and config.moe.dense else []
    stated = {name: getattr(config, name) for name in names}
    mine, again = canonical(config), canonical(infer(shapes, stated, axis))
    lost = [f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) != getattr(again, f.name)]
    if lost:
        asked = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(
            f"T5X can't express T5Config with {asked}: keep the policy's own checkpoint, or write another format."
        )
    if not config.num_buckets:
        return stated
    default = infer(shapes, {name: value for name, value in stated.items() if name == "mlp_dim"}, axis)
    found = {name: stated[name] for name in _IN_GIN if stated[name] != getattr(default, name)}
    return found | ({"moe": config.moe} if _experts(config) != _experts(default) else {})


def told(fields: Mapping[str, Any]) -> str:
    """A line that tells readers of a directory what it does not say (`untold`)."""
    typed = [_typed(name, value) for name, value in fields.items() if _is_typed(value)]
    others = [f"{name}={value}" for name, value in fields.items() if not _is_typed(value)]
    how = [f"--overrides {','.join(typed)}"] if typed and not others else []
    how += [f"a gin file of the policy: {_MODEL}"] if others else []
    return f"T5X's directories don't say {', '.join([*typed, *others])}: read it with {' and '.join(how)}."


def _is_typed(value: Any) -> bool:
    return not isinstance(value, MoEConfig) and not (isinstance(value, tuple) and len(value) > 1)


def _typed(name: str, value: Any) -> str:
    """As `--overrides` takes it."""
    return f"{name}={value[0] if isinstance(value, tuple) and len(value) == 1 else value}"


def _experts(config: T5Config) -> MoEConfig | None:
    """The experts, in one way of saying it."""
    moe = config.moe
    if moe is None:
        return None
    decoder = None if moe.decoder_router == moe.router else moe.decoder_router
    return dataclasses.replace(moe, decoder_router=decoder, mlp_dim=moe.mlp_dim or config.mlp_dim)
