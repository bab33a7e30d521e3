"""Layers in stages on devices of their own, micro-batches passing through them (GPipe, arXiv 1811.06965).

At step ``t`` stage ``s`` has micro-batch ``t - s``: all stages work at once, each on its own rows, and hand them on. ``M``
micro-batches take ``M + S - 1`` steps through ``S`` stages, and in ``S - 1`` of them each stage has nothing to do: the share
``(S - 1) / (M + S - 1)`` of the time is lost. The backward pass is the transpose, from the last stage to the first.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clp_jax.array_types import Array, Int, Shaped
from clp_jax.nn.stack import depth
from clp_jax.partitioning import active_sizes, constrain

# (layers, states, per layer, per row, number of the micro-batch) -> (states, outputs by row, outputs without rows), the
# outputs and `per layer` leading with layers.
RunStage = Callable[[Any, Array, Any, Any, Array], tuple[Array, Any, Any]]


def run_pipeline(
    layers: Any,
    run: RunStage,
    x: Shaped[Array, "R T D"],
    per_layer: Any,
    per_row: Any,
    *,
    rows: int,
    axes: tuple[str, ...],
    num_stages: int,
    microbatches: int,
) -> tuple[Shaped[Array, "R T D"], Any, Any]:
    """Runs stacked layers as a pipeline.

    Args:
        layers: what `clp_jax.nn.stack.stacked` made.
        run: runs some consecutive layers on one micro-batch.
        x: states.
        per_layer: a tree whose leaves lead with layers and rows.
        per_row: a tree whose leaves lead with rows, or with 1.
        rows: that all leaves lead with a multiple of; micro-batches take every `microbatches`-th.
        axes: mesh axes of the stages.
        num_stages: ``S``.
        microbatches: ``M``.

    Returns:
        The states, the outputs by row of all layers ``[L, R, ...]``, and those without rows of all micro-batches
        ``[L, M, ...]``.

    Raises:
        ValueError: where the layers do not divide into the stages, the rows into micro-batches, or those among devices.
    """
    if depth(layers) % num_stages:
        raise ValueError(
            f"a pipeline of {num_stages} stages for {depth(layers)} periods of layers: expected stages that divide them. "
            "Change the stages (STAGES) or the model's layers."
        )
    if rows % microbatches:
        raise ValueError(
            f"a pipeline of {microbatches} micro-batches for {rows} rows: expected micro-batches that divide them. "
            "Change the micro-batches (MICROBATCHES) or the batch size."
        )
    shards = math.prod(active_sizes("batch"))
    if rows // microbatches % shards:
        raise ValueError(
            f"micro-batches of {rows // microbatches} rows for {shards} devices that share each: expected a multiple. "
            "Use fewer micro-batches (MICROBATCHES) or a larger batch."
        )
    graph, state = nnx.split(layers)
    state, per_layer = jax.tree.map(lambda p: p.reshape(num_stages, -1, *p.shape[1:]), (state, per_layer))
    per_layer = jax.tree.map(lambda p: _split(p, rows, microbatches, axis=2), per_layer)
    per_row = jax.tree.map(lambda p: _split(p, rows, microbatches, axis=0), per_row)
    states = constrain(_split(x, rows, microbatches, axis=0), None, "batch", "length", "act_embed")

    def one_stage(state: Any, x: Array, per_layer: Any, number: Int[Array, ""]) -> tuple[Array, Any, Any]:
        def take(axis: int, tree: Any) -> Any:
            return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, number, axis, keepdims=False), tree)

        return run(nnx.merge(graph, state), x, take(1, per_layer), take(0, per_row), number)

    all_stages = jax.vmap(one_stage, spmd_axis_name=axes)
    stages = jnp.arange(num_stages)

    def hand_on(done: Array, step: Array) -> Array:
        coming = states[jnp.minimum(step, microbatches - 1)]
        first = (stages == 0).reshape(-1, *[1] * coming.ndim)
        return constrain(
            jnp.where(first, coming[None], jnp.roll(done, 1, axis=0)), "layers", "batch", "length", "act_embed"
        )

    def step(waiting: Array, number: Array) -> tuple[Array, Any]:
        # What a stage without work makes of the nearest micro-batch is left out below.
        numbers = jnp.clip(number - stages, 0, microbatches - 1)
        outputs = all_stages(state, waiting, per_layer, numbers)
        return hand_on(outputs[0], number + 1), outputs

    start = hand_on(jnp.zeros((num_stages, *states.shape[1:]), x.dtype), jnp.zeros((), jnp.int32))
    _, outputs = jax.lax.scan(step, start, jnp.arange(microbatches + num_stages - 1))

    def own(leaf: Shaped[Array, "steps stages *rest"]) -> Shaped[Array, "stages batches *rest"]:
        """Of each stage the steps at which it had work."""
        cut = jax.vmap(lambda mine, stage: jax.lax.dynamic_slice_in_dim(mine, stage, microbatches), in_axes=(1, 0))
        return cut(leaf, stages)

    last = outputs[0][num_stages - 1 :, num_stages - 1]
    by_row = jax.tree.map(lambda p: _joined_layers(own(p)), outputs[1])
    others = jax.tree.map(lambda p: own(p).swapaxes(1, 2).reshape(-1, microbatches, *p.shape[3:]), outputs[2])
    return constrain(_join(last, rows, axis=0), "batch", "length", "act_embed"), by_row, others


def _split(x: Array, rows: int, microbatches: int, axis: int) -> Array:
    """Rows ``[k·rows]`` as ``[M, k·rows / M]``: every M-th, so that devices keep theirs."""
    if x.shape[axis] == 1 < rows:
        shape = (*x.shape[:axis], microbatches, *x.shape[axis:])
        return jnp.broadcast_to(jnp.expand_dims(x, axis), shape)
    each = x.shape[axis] // rows
    x = x.reshape(*x.shape[:axis], rows // microbatches, microbatches, each, *x.shape[axis + 1 :])
    x = jnp.moveaxis(x, axis + 1, axis)
    return x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])


def _join(x: Array, rows: int, axis: int) -> Array:
    """Undoes `_split`."""
    microbatches, some = x.shape[axis : axis + 2]
    each = some * microbatches // rows
    x = x.reshape(*x.shape[: axis + 1], rows // microbatches, each, *x.shape[axis + 2 :])
    x = jnp.moveaxis(x, axis, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])


def _joined_layers(x: Shaped[Array, "stages M layers b *rest"]) -> Shaped[Array, "L R *rest"]:
    x = jnp.moveaxis(x, 1, 2)
    x = x.reshape(-1, *x.shape[2:])
    return _join(x, x.shape[1] * x.shape[2], axis=1)
