"""What T5X's directories don't say of a policy: assumed where one is read, and told to readers where one is written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from clp_jax.interop.hf_families import canonical
from clp_jax.interop.t5x_names import infer, links
from clp_jax.models.config import MoEConfig, T5Config

# T5X takes these from gin, and the ends of completions from a task's vocabulary.
_IN_GIN = ("activation", "norm_eps", "max_distance", "dropout_rate", "eos_ids")
_UNSEEN = ("router", "decoder_router", "balance_weight", "z_weight")
_MODEL = "--gin_file=models/NAME.gin --gin.convert.model=%MODEL"


def assumed(config: T5Config, stated: Mapping[str, Any]) -> str:
    """What was assumed of a policy that was read, in a line that says how to change it.

    Args:
        config: of the policy.
        stated: fields that were not assumed.
    """
    names = [name for name in _IN_GIN if name not in stated and (name != "max_distance" or config.num_buckets)]
    found = [_typed(name, getattr(config, name)) for name in names]
    example = _typed("activation", "silu" if config.gated else "gelu")
    if config.moe is not None and "moe" not in stated:
        names = [f"moe.{name}" for name in _UNSEEN if not any(given.startswith(f"moe.{name}") for given in stated)]
        found += [_typed(name, getattr(config.moe, name.removeprefix("moe."))) for name in names]
        example += ",moe.router.k=2"
    return (
        f"assumed, as T5X's directories don't say it: {', '.join(found)}. To change it: --overrides NAME=VALUE "
        f"(as {example}), or the whole policy: {_MODEL}."
    )


def untold(config: T5Config, scan_axis: int | None) -> dict[str, Any]:
    """Fields of a policy that its T5X directory will not say, and that T5X itself takes from gin.

    Args:
        config: of the policy.
        scan_axis: of its layers in the directory; None for single ones.

    Returns:
        Those whose values are not the ones that reading assumes, as overrides (`clp_jax.interop.overrides`): fields of experts
        and of their routers by names with dots.

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
    told_by_shapes: dict[str, Any] = {
        name: stated[name] for name in ("num_heads", "num_buckets", "mlp_dim") if name in stated
    }
    default = infer(shapes, told_by_shapes, axis)
    found = {name: value for name, value in stated.items() if name != "moe" and value != getattr(default, name)}
    if not config.num_buckets:
        found |= {name: stated[name] for name in ("num_heads", "num_buckets")}
    return found | _differences("moe", _experts(config), _experts(default))


def _differences(name: str, value: Any, assumed: Any) -> dict[str, Any]:
    """The overrides that make of an assumed value another one."""
    if value == assumed:
        return {}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {name: value}
    found, base = {}, {f.name: getattr(assumed, f.name, None) for f in dataclasses.fields(value)}
    if type(value) is not type(assumed):
        found[name] = type(value).__name__
        base = {f.name: f.default for f in dataclasses.fields(value)}
    for field, before in base.items():
        found |= _differences(f"{name}.{field}", getattr(value, field), before)
    return found


def told(fields: Mapping[str, Any]) -> str:
    """A line that tells readers of a directory what it does not say (`untold`)."""
    typed = [_typed(name, value) for name, value in fields.items() if _is_typed(value)]
    others = [f"{name}={value}" for name, value in fields.items() if not _is_typed(value)]
    how = [f"--overrides {','.join(typed)}"] if typed and not others else []
    how += [f"a gin file of the policy: {_MODEL}"] if others else []
    return f"T5X's directories don't say {', '.join([*typed, *others])}: read it with {' and '.join(how)}."


def _is_typed(value: Any) -> bool:
    return not (isinstance(value, tuple) and len(value) > 1)


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
