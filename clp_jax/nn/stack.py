"""Layers stacked on a leading axis and run with `lax.scan`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from clp_jax.nn.remat import REMAT_POLICIES

# Up to this many layers, a loop costs more to run, and even to compile, than its body repeated.
SHALLOW = 4


def stacked(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`num_layers` modules as one, every parameter with a leading ``layers`` axis.

    Args:
        make: makes one layer.
        num_layers: at least 1.
        rngs: each layer gets its own keys.
    """
    keys = jax.random.split(rngs.params(), num_layers)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    values = jax.vmap(lambda key: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(params=key)))[1]))(keys)

    state = nnx.map_state(lambda path, v: v.replace(_at(values, path)), abstract)
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(logical_axes=("layers", *variable.get_metadata("logical_axes")))
    return nnx.merge(graph, state)


def scan_layers(
    layers: Any,
    body: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    per_layer: Any = None,
    *,
    remat: str = "none",
    unroll: int | None = None,
    size: int = 1,
) -> tuple[Any, Any]:
    """Runs stacked layers one after another.

    Args:
        layers: what `stacked` made.
        body: ``(layer, carry, slice of per_layer) -> (carry, output)``.
        carry: what the first layer gets.
        per_layer: a tree whose leaves lead with the layers.
        remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
        unroll: layers in one iteration of the loop; None unrolls shallow stacks (`SHALLOW`) altogether.
        size: where what is stacked are several layers each: how many.

    Returns:
        The last carry, and the outputs stacked.
    """
    graph, state = nnx.split(layers)

    def step(carry, xs):
        state, inputs = xs
        return body(nnx.merge(graph, state), carry, inputs)

    unroll = _unroll(layers, unroll, size)
    policy = REMAT_POLICIES[remat]
    if policy is not None:
        # Without a loop between them, XLA would see that the backward pass computes what it has, and keep it instead.
        step = jax.checkpoint(step, policy=policy, prevent_cse=unroll >= depth(layers))
    return jax.lax.scan(step, carry, (state, per_layer), unroll=unroll)


def is_loose(layers: Any, unroll: int | None = None, size: int = 1) -> bool:
    """Whether a loop over tokens runs the layers of a stack one by one (`cut`): where `unroll` covers all of them.

    Layers cut out of a stack inside a loop are copied each time, since the loop holds the stack.
    """
    return _unroll(layers, unroll, size) >= depth(layers)


def cut(layers: Any) -> tuple[Any, ...]:
    """The layers of a stack, each by itself."""
    graph, state = nnx.split(layers)
    return tuple(nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(depth(layers)))


def depth(layers: Any) -> int:
    """How many layers are stacked."""
    return jax.tree.leaves(nnx.state(layers))[0].shape[0]


def _unroll(layers: Any, unroll: int | None, size: int) -> int:
    if unroll is not None:
        return unroll
    return depth(layers) if depth(layers) * size <= SHALLOW else 1


def _at(tree: dict, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree
