"""T5X's names of a policy's parameters, for layers by themselves and for scanned ones, and what a policy is by them.

A stack that is scanned is one layer's names, with the layers along an axis. Where there are experts it is those of a block of
layers, ``subblock_0`` and so on, whose last one has them, with the blocks along the axis: flaxformer's ``MoeEncoderScanBlock``
and ``MoeDecoderScanBlock`` (of one layer where every layer has experts, or none), with ``moe/runs/scan.gin``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from clp_jax.interop.links import Link, link
from clp_jax.interop.overrides import checked, nested
from clp_jax.interop.slots import Slot, slots
from clp_jax.models.config import MoEConfig, T5Config
from clp_jax.nn.routing import TokenChoice

_HEAD = "decoder/logits_dense/kernel"
_TOP = {
    "token_embedder/embedding": "token_embedder/embedding",
    "logits_head/kernel": _HEAD,
    "encoder/norm/scale": "encoder/encoder_norm/scale",
    "decoder/norm/scale": "decoder/decoder_norm/scale",
}
_SHARED_BIAS = "relpos_bias/rel_embedding"
_OF_LAYERS = re.compile(r"(?P<stack>encoder|decoder)/(?P=stack)/(subblock_(?P<place>\d+)/)?(?P<rest>.+)")
_NORMS = {
    "encoder": {"self_attention": "pre_attention_layer_norm"},
    "decoder": {
        "self_attention": "pre_self_attention_layer_norm",
        "cross_attention": "pre_cross_attention_layer_norm",
    },
}
_BLOCKS = {
    "encoder": {"self_attention": "attention"},
    "decoder": {"self_attention": "self_attention", "cross_attention": "encoder_decoder_attention"},
}


def names(*, scanned: bool, in_blocks: bool = False) -> dict[str, str]:
    """T5X's name of each slot's name (`clp_jax.interop.slots.Slot.name`).

    Args:
        scanned: whether layers are stacked; the others have ``{layer}`` in their names.
        in_blocks: whether blocks of layers are, of which every layer has ``{place}`` in its names.
    """
    found = dict(_TOP)
    for stack, blocks in _BLOCKS.items():
        layer = f"{stack}/{stack}" if scanned else f"{stack}/layers_{{layer}}"
        layer += "/subblock_{place}" if scanned and in_blocks else ""
        found[f"{stack}/relpos_bias/embedding"] = f"{layer if scanned else stack}/{_SHARED_BIAS}"
        for ours, theirs in blocks.items():
            found[f"{stack}/{ours}_norm/scale"] = f"{layer}/{_NORMS[stack][ours]}/scale"
            for part in ("query", "key", "value", "out"):
                found[f"{stack}/{ours}/{part}/kernel"] = f"{layer}/{theirs}/{part}/kernel"
        found[f"{stack}/mlp_norm/scale"] = f"{layer}/pre_mlp_layer_norm/scale"
        found[f"{stack}/extra_mlp_norm/scale"] = f"{layer}/pre_extra_mlp_layer_norm/scale"
        found[f"{stack}/mlp/router/kernel"] = f"{layer}/mlp/router/router_weights/w/kernel"
        for part in ("wi", "wi_0", "wi_1", "wo"):
            found[f"{stack}/mlp/{part}/kernel"] = f"{layer}/mlp/{part}/kernel"
            found[f"{stack}/extra_mlp/{part}/kernel"] = f"{layer}/extra_mlp/{part}/kernel"
            found[f"{stack}/mlp/experts/{part}/kernel"] = f"{layer}/mlp/expert/{part}/kernel"
    return found


def links(config: T5Config, scan_axis: int | None) -> list[Link]:
    """The tensors of a policy's parameters.

    Args:
        config: of the policy.
        scan_axis: of the layers in scanned tensors; None for tensors of single layers.

    Raises:
        ValueError: when T5X's layout has no place for the policy.
    """
    pieces = slots(config, split_experts=False)
    if config.bias_per_layer != (scan_axis is not None) and config.num_buckets:
        raise ValueError(
            f"T5Config.bias_per_layer is {config.bias_per_layer}: T5X's scanned layers have a table of positions each, and "
            f"others share one; such a policy is written {'with' if config.bias_per_layer else 'without'} --scanned."
        )
    if scan_axis is None:
        return link(pieces, names(scanned=False), (), "T5X")
    in_blocks = config.moe is not None and not config.moe.dense
    if in_blocks:
        _check_blocks(config)
    elif any(_place(slot) is not None for slot in pieces):
        raise ValueError("T5X's scanned layers without experts are all of one kind: write it without --scanned.")
    table = names(scanned=True, in_blocks=in_blocks)
    return [_scanned(slot, pieces, table, scan_axis) for slot in pieces if not any(slot.index)]


def _check_blocks(config: T5Config) -> None:
    every = config.moe.every if config.moe is not None else 1
    for name in config.depths():
        depth = getattr(config, name)
        if depth > every and depth % every:
            raise ValueError(
                f"T5Config.{name} is {depth}, with experts in one of {every} layers: T5X scans whole blocks of {every}; "
                "write it without --scanned."
            )


def _place(slot: Slot) -> int | None:
    """Of a layer within a block of several."""
    within = slot.layer is not None and slot.path[2].startswith("layer_")
    return int(slot.path[2].removeprefix("layer_")) if within else None


def _scanned(slot: Slot, pieces: Sequence[Slot], table: Mapping[str, str], axis: int) -> Link:
    """Of the first layer's slot, the link of the whole leaf."""
    if slot.name not in table:
        raise ValueError(f"T5X has no tensors for the parameters {slot.name}: choose another format.")
    name = table[slot.name].format(place=_place(slot) or 0)
    if slot.layer is None:
        return Link(name, slot.path, (), None, slot.shape)
    depth = sum(other.path == slot.path for other in pieces)
    axis = min(axis, len(slot.shape))
    order = (*range(1, axis + 1), 0, *range(axis + 1, len(slot.shape) + 1))
    shape = (*slot.shape[:axis], depth, *slot.shape[axis:])
    return Link(name, slot.path, (), order, shape)


def scan_axis_of(shapes: Mapping[str, tuple[int, ...]], stated: int | None) -> int | None:
    """Where a checkpoint has its layers.

    Args:
        shapes: of the tensors, by T5X's names.
        stated: where they are; None finds it by the width of the model, and takes 1 where both axes have it.

    Returns:
        0 or 1; None where layers are single.

    Raises:
        ValueError: when they are not there.
    """
    if not is_scanned(shapes):
        if stated is not None:
            raise ValueError(f"scan_axis is {stated}: the checkpoint's layers are not scanned, leave it out.")
        return None
    name = "encoder/encoder/pre_mlp_layer_norm/scale"
    name = name if name in shapes else "encoder/encoder/subblock_0/pre_mlp_layer_norm/scale"
    shape, width = _get(shapes, name), _get(shapes, "token_embedder/embedding")[-1]
    fits = [axis for axis in (1, 0) if len(shape) == 2 and shape[1 - axis] == width]
    axis = stated if stated is not None else next(iter(fits), None)
    if axis not in fits:
        hint = f"--scan_axis={fits[0]}" if fits else "is the checkpoint whole?"
        raise ValueError(
            f"{name!r} has shape {shape}: expected layers along axis {1 if axis is None else axis}, and the model's width "
            f"{width} along the other; {hint}"
        )
    return axis


def is_scanned(found: Iterable[str]) -> bool:
    """Whether the names are those of scanned layers."""
    return any(name.startswith("encoder/encoder/") for name in found)


def infer(shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any], scan_axis: int) -> T5Config:
    """What the policy of a checkpoint is; what shapes don't tell is as in T5 1.1 (1.0 without a gate), or overridden.

    Args:
        shapes: of the tensors, by T5X's names.
        overrides: fields of the configuration (`clp_jax.interop.overrides`).
        scan_axis: of the layers, in scanned tensors.

    Raises:
        ValueError: when the tensors are not those of an encoder-decoder T5, or don't tell the number of heads.
    """
    scanned = is_scanned(shapes)
    layered = _by_layer(shapes, scan_axis) if scanned else shapes
    query = "attention/query/kernel"
    query_shape = _get(layered, f"encoder/layers_0/{query}")
    gated = any(re.search(r"mlp/(expert/)?wi_0/kernel$", name) for name in shapes)
    vocab_size, embed_dim = _get(shapes, "token_embedder/embedding")
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "mlp_dim": _width(layered),
        "num_encoder_layers": _depth(layered, "encoder"),
        "num_decoder_layers": _depth(layered, "decoder"),
        "gated": gated,
        "activation": "gelu" if gated else "relu",
        "tied_head": _HEAD not in shapes,
        "bias_per_layer": scanned,
    }
    table = layered.get(f"encoder/{'layers_0/' if scanned else ''}{_SHARED_BIAS}")
    found |= {"num_buckets": 0} if table is None else {"num_heads": table[-2], "num_buckets": table[-1]}
    depths = {name: found[name] for name in ("num_encoder_layers", "num_decoder_layers")}
    found |= checked(T5Config, overrides)
    for name, depth in depths.items():
        # Something is made for each of them, however many are asked for.
        if found[name] > depth:
            raise ValueError(f"overrides: {name} is {found[name]}: expected at most {depth}, as the checkpoint has.")
    if "num_heads" not in found:
        raise ValueError(f"the checkpoint has no {_SHARED_BIAS!r}, which tells the heads: override num_heads.")
    if found["num_heads"] < 1:
        raise ValueError(f"overrides: num_heads is {found['num_heads']}: expected at least 1.")
    if query_shape[-1] % found["num_heads"]:
        raise ValueError(
            f"{query!r} has {query_shape[-1]} columns: expected a multiple of num_heads={found['num_heads']}."
        )
    found.setdefault("head_dim", query_shape[-1] // found["num_heads"])
    if "moe" not in found:
        found["moe"] = _experts(layered, found)
    return cast(T5Config, nested(T5Config(**found), overrides))


def _get(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"the checkpoint has no {name!r}: expected the parameters of an encoder-decoder T5.")
    return shapes[name]


def _by_layer(shapes: Mapping[str, tuple[int, ...]], axis: int) -> dict[str, tuple[int, ...]]:
    """Scanned tensors as those of single layers."""
    of_layers = {name: match for name in shapes if (match := _OF_LAYERS.match(name))}
    widths: dict[str, int] = {}
    for match in of_layers.values():
        widths[match["stack"]] = max(widths.get(match["stack"], 1), int(match["place"] or 0) + 1)
    found = {name: shape for name, shape in shapes.items() if name not in of_layers}
    for name, match in of_layers.items():
        stack, shape = match["stack"], shapes[name]
        at = min(axis, len(shape) - 1)
        for block in range(shape[at]):
            layer = block * widths[stack] + int(match["place"] or 0)
            found[f"{stack}/layers_{layer}/{match['rest']}"] = (*shape[:at], *shape[at + 1 :])
    return found


def _depth(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"{stack}/layers_(\d+)/", name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"the checkpoint has the layers {sorted(numbers)} of the {stack}: expected all from 0 on.")
    return len(numbers)


def _width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of the dense blocks where there are some, or of the experts."""
    for pattern in (r"/(extra_)?mlp/wo/kernel$", r"/mlp/expert/wo/kernel$"):
        for name, shape in shapes.items():
            if re.search(pattern, name):
                return shape[-2]
    raise ValueError("the checkpoint has no 'mlp/wo/kernel': expected the parameters of an encoder-decoder T5.")


def _experts(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]) -> MoEConfig | None:
    kernels = {name: shape for name, shape in shapes.items() if name.endswith("/mlp/expert/wo/kernel")}
    if not kernels:
        return None
    shape = next(iter(kernels.values()))
    sparse = {
        stack: sorted(int(match[1]) for name in kernels if (match := re.match(rf"{stack}/layers_(\d+)/", name)))
        for stack in ("encoder", "decoder")
    }
    every = min((layers[0] for layers in sparse.values() if layers), default=0) + 1
    for stack, layers in sparse.items():
        if layers != list(range(every - 1, found[f"num_{stack}_layers"], every)):
            raise ValueError(f"layers {layers} of the {stack} have experts: expected every n-th one, the n-th first.")
    return MoEConfig(
        num_experts=shape[-3],
        router=TokenChoice(k=1, min_capacity=4),
        every=every,
        mlp_dim=None if shape[-2] == found["mlp_dim"] else shape[-2],
        extra_mlp=any("/extra_mlp/" in name for name in shapes),
        z_weight=1e-3,
    )
