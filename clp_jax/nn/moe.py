"""The mixture-of-experts feed-forward block.

Tokens are gathered into their experts' rows, multiplied expert by expert, and gathered back. Where the rules shard experts,
the rows of a router with a capacity, ``[E, C, D]`` of each group, move from the groups' devices to the experts' by an
all-to-all; the kernels stay where they are. `Dropless` can't bound what an expert gets: there all devices of the ``expert``
axis exchange their tokens, each computes its own experts' share of them, and the shares are summed on the way back. An
all-to-all with room for all tokens of one device at another brings as many bytes as that, and holds them on both sides;
`jax.lax.ragged_all_to_all` would bring the chosen ones alone, but XLA has it on no CPU, where it could be tested.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from clp_jax.array_types import Array, Bool, Float, PRNGKeyArray
from clp_jax.nn.grouped_product import grouped_product
from clp_jax.nn.linear import dropout, normal_parameter
from clp_jax.nn.mlp import ACTIVATIONS, MLP
from clp_jax.nn.routing import Dropless, ExpertChoice, Router, TokenChoice, jittered, top_k
from clp_jax.nn.routing_statistics import RoutingStatistics, routing_statistics
from clp_jax.nn.slots import Slots, collect, count_choices, distribute, join_groups
from clp_jax.partitioning import active_axes, active_mesh, constrain

DISPATCHES = ("sort", "einsum")

_Product = Callable[[Array, Array], Array]
_JITTER, _EXPERTS, _SHARED = range(3)


def check_dispatch(dispatch: str, router: Router) -> None:
    """Refuses what does not bring tokens to experts.

    Args:
        dispatch: one of `DISPATCHES`.
        router: a `Dropless` one has rows for what comes, and no capacity that a product with 0 and 1 could be as large as.

    Raises:
        ValueError: for another dispatch, or products for a `Dropless` router.
    """
    if dispatch not in DISPATCHES or (dispatch == "einsum" and isinstance(router, Dropless)):
        raise ValueError(
            f"MoE dispatch is {dispatch!r} with {type(router).__name__}: expected 'sort', or 'einsum' and a capacity."
        )


class RouterKernel(nnx.Module):
    """The router's projection to logits, in float32 whatever the type of activations.

    Attributes:
        kernel: ``[D, E]``.
    """

    def __init__(self, rngs: nnx.Rngs, embed_dim: int, num_experts: int, *, stddev: float, dtype: jnp.dtype):
        self.kernel = normal_parameter(rngs, (embed_dim, num_experts), ("embed", None), stddev, dtype)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        """The logits, ``float32``."""
        # Accelerators would round the factors of a default product.
        kernel = self.kernel[...].astype(jnp.float32)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)


class ExpertKernels(nnx.Module):
    """One projection of every expert.

    Attributes:
        kernel: ``[E, in, out]``.
    """

    def __init__(
        self, rngs: nnx.Rngs, num_experts: int, in_dim: int, out_dim: int, *, axes: tuple[str, str], dtype: jnp.dtype
    ):
        shape = (num_experts, in_dim, out_dim)
        self.kernel = normal_parameter(rngs, shape, ("expert", *axes), in_dim**-0.5, dtype)


class Experts(nnx.Module):
    """The feed-forward blocks of all experts, each as `clp_jax.nn.mlp.MLP`."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        *,
        activation: str,
        gated: bool,
        dropout_rate: float,
        dtype: jnp.dtype,
    ):
        def wi():
            return ExpertKernels(rngs, num_experts, embed_dim, mlp_dim, axes=("embed", "mlp"), dtype=dtype)

        self.mlp_dim = mlp_dim
        self.gated = gated
        self.activation = activation
        self.dropout_rate = dropout_rate
        if gated:
            self.wi_0, self.wi_1 = wi(), wi()
        else:
            self.wi = wi()
        self.wo = ExpertKernels(rngs, num_experts, mlp_dim, embed_dim, axes=("mlp", "embed"), dtype=dtype)

    def kernels(self) -> tuple[Array, ...]:
        """The kernels in, and last the one out, each ``[E, in, out]``."""
        ways_in = (self.wi_0, self.wi_1) if self.gated else (self.wi,)
        return tuple(layer.kernel[...] for layer in (*ways_in, self.wo))


class MoE(nnx.Module):
    """Experts that share the tokens, and optionally one that sees all of them (arXiv 2101.03961; Qwen2-MoE, 2407.10671).

    Args:
        rngs: for the parameters.
        embed_dim: ``D``.
        mlp_dim: ``F`` of each expert.
        num_experts: ``E``.
        router: who goes where. Whoever builds a causal stack calls its `check` first.
        activation: a key of `clp_jax.nn.mlp.ACTIVATIONS`.
        gated: whether the experts have a gate.
        dropout_rate: inside the experts, in ``[0, 1)``.
        shared_dim: ``F`` of the shared expert, 0 for none.
        shared_gate: whether the shared expert's output is multiplied by ``sigmoid(x w)``.
        router_stddev: of the router's kernel at the start.
        dispatch: ``"sort"``, or ``"einsum"`` for products with 0 and 1: the reference that tests compare with
            (`check_dispatch`).
        dtype: of the parameters.

    Attributes:
        router: ``kernel [D, E]``.
        experts: ``wi_0, wi_1, wo`` or ``wi, wo``, each a ``kernel [E, in, out]``.
        shared: the shared expert, if any.
        shared_gate: ``kernel [D, 1]``, if any.

    Raises:
        ValueError: for sizes, a router or a dispatch that can't be.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        embed_dim: int,
        mlp_dim: int,
        num_experts: int,
        *,
        router: Router,
        activation: str,
        gated: bool,
        dropout_rate: float,
        shared_dim: int = 0,
        shared_gate: bool = False,
        router_stddev: float = 0.02,
        dispatch: str = "sort",
        dtype: jnp.dtype,
    ):
        if num_experts < 1:
            raise ValueError(f"MoE num_experts is {num_experts}: expected at least 1.")
        router.check(False, num_experts)
        if shared_gate and not shared_dim:
            raise ValueError("MoE shared_gate is True with shared_dim 0: give the shared expert a size, or no gate.")
        check_dispatch(dispatch, router)
        self.routing = router
        self.num_experts = num_experts
        self.dispatch = dispatch
        self.router = RouterKernel(rngs, embed_dim, num_experts, stddev=router_stddev, dtype=dtype)
        settings: dict[str, Any] = {
            "activation": activation,
            "gated": gated,
            "dropout_rate": dropout_rate,
            "dtype": dtype,
        }
        self.experts = Experts(rngs, embed_dim, mlp_dim, num_experts, **settings)
        self.has_shared, self.has_shared_gate = shared_dim > 0, shared_gate
        if shared_dim:
            self.shared = MLP(rngs, embed_dim, shared_dim, **settings)
        if shared_gate:
            self.shared_gate = RouterKernel(rngs, embed_dim, 1, stddev=router_stddev, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T D"], RoutingStatistics]:
        """Routes every valid position, and adds up the outputs of its experts.

        Args:
            x: activations; the router computes in ``float32`` whatever their type.
            mask: which positions are valid: the others take no room, count nowhere and get 0 from the routed experts.
            key: for jitter and dropout; None means evaluation, with the capacity of evaluation.

        Returns:
            What to add to the residual (a token without an expert adds 0), in the type of `x`; and the statistics.
        """
        keys = [None if key is None else jax.random.fold_in(key, use) for use in (_JITTER, _EXPERTS, _SHARED)]
        logits = self.router(jittered(x.astype(jnp.float32), self.routing.jitter, keys[_JITTER]))
        route = _dropless if isinstance(self.routing, Dropless) else _with_capacity
        y, statistics = route(self, x, mask, logits, keys[_EXPERTS])
        if self.has_shared:
            shared = self.shared(x, keys[_SHARED])
            if self.has_shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x)).astype(x.dtype)
            y = y + shared
        return y, statistics


def _feed_forward(
    experts: Experts,
    rows: Array,
    kernels: tuple[Array, ...],
    product: _Product,
    key: PRNGKeyArray | None,
    place: Callable[[Array], Array] = lambda hidden: hidden,
) -> Array:
    """The experts' blocks, given how rows are multiplied with kernels and where the hidden layer is."""
    *ways_in, out = (kernel.astype(rows.dtype) for kernel in kernels)
    hidden = ACTIVATIONS[experts.activation](product(rows, ways_in[0]))
    if experts.gated:
        hidden = hidden * product(rows, ways_in[1])
    return product(dropout(place(hidden), experts.dropout_rate, key, salt=2), out)


def _with_capacity(
    moe: MoE, x: Array, mask: Array, logits: Array, key: PRNGKeyArray | None
) -> tuple[Array, RoutingStatistics]:
    """Routers whose experts have as many rows in one group as in the other."""
    routing = moe.routing
    assert isinstance(routing, TokenChoice | ExpertChoice)
    size = routing.group_size(*mask.shape)
    groups, valid, scores = (value.reshape(-1, size, *value.shape[2:]) for value in (x, mask, logits))
    assign = functools.partial(routing.assign, training=key is not None)
    slots = jax.vmap(assign)(jax.nn.softmax(scores, -1), valid)

    by_index = moe.dispatch == "sort" and not _is_spread(x.shape[0], x.shape[1], moe.num_experts)
    move = _moved_by_index if by_index else _moved_by_group
    # The sum over choices is in float32, like the weights.
    y = move(moe, groups, slots, key).astype(x.dtype)
    y = constrain(y.reshape(x.shape), "batch", "length", "act_embed")
    dropped = slots.dropped.sum() / jnp.maximum(slots.offered.sum(), 1).astype(jnp.float32)
    return y, routing_statistics(scores, valid, slots.chosen, slots.kept.sum(0), dropped)


def _is_spread(rows: int, length: int, num_experts: int) -> bool:
    """Whether several devices hold the tokens, or the experts."""
    sizes = {"batch": rows, "length": length, "act_expert": num_experts}
    return any(active_axes(axis, size) for axis, size in sizes.items())


def _moved_by_index(moe: MoE, groups: Float[Array, "groups tokens D"], slots: Slots, key: PRNGKeyArray | None) -> Array:
    """The experts' weighted outputs where all groups are at hand: their rows are gathered in the order of the experts."""
    joined = join_groups(slots, groups.shape[1], moe.num_experts)
    tokens = groups.reshape(-1, groups.shape[-1])
    rows = distribute(tokens, joined.source, joined.slot_of)
    flat = rows.reshape(moe.num_experts, -1, rows.shape[-1])
    flat = _feed_forward(moe.experts, flat, moe.experts.kernels(), _batched_product, key, _place_hidden)
    rows = flat.reshape(rows.shape) * joined.gates[:, None]
    return collect(rows, joined.source, joined.slot_of, jnp.zeros(len(tokens), bool))


def _moved_by_group(moe: MoE, groups: Float[Array, "groups tokens D"], slots: Slots, key: PRNGKeyArray | None) -> Array:
    """The same where devices exchange the groups' rows: each group's in one piece."""
    there, back = (_sorted if moe.dispatch == "sort" else _one_hot)(slots, groups.shape[1])
    rows = constrain(there(groups), "batch", None, "act_embed")
    rows = _to_experts(rows, moe.num_experts)
    flat = rows.reshape(moe.num_experts, -1, rows.shape[-1])
    flat = _feed_forward(moe.experts, flat, moe.experts.kernels(), _batched_product, key, _place_hidden)
    rows = _from_experts(flat.reshape(rows.shape))
    return back(rows * slots.gates[..., None])


def _to_experts(rows: Float[Array, "groups rows D"], num_experts: int) -> Float[Array, "E groups C D"]:
    """Rows where their experts are: experts before groups, so that they get the mesh axis that both may have."""
    rows = rows.reshape(len(rows), num_experts, -1, rows.shape[-1]).swapaxes(0, 1)
    return constrain(rows, "act_expert", "batch", None, "act_embed")


def _from_experts(rows: Float[Array, "E groups C D"]) -> Float[Array, "groups rows D"]:
    rows = constrain(rows, "act_expert", "batch", None, "act_embed").swapaxes(0, 1)
    return constrain(rows.reshape(len(rows), -1, rows.shape[-1]), "batch", None, "act_embed")


def _batched_product(rows: Float[Array, "E rows I"], kernels: Float[Array, "E I O"]) -> Float[Array, "E rows O"]:
    return jnp.einsum("eri,eio->ero", rows, kernels)


def _place_hidden(hidden: Float[Array, "E rows F"]) -> Float[Array, "E rows F"]:
    return constrain(hidden, "act_expert", "batch", "act_mlp")


def _sorted(slots: Slots, num_tokens: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The way from tokens to rows and back: both gather."""
    tokens = jnp.zeros(num_tokens, bool)
    return (
        lambda x: jax.vmap(distribute)(x, slots.source, slots.slot_of),
        lambda rows: jax.vmap(collect, (0, 0, 0, None))(rows, slots.source, slots.slot_of, tokens),
    )


def _one_hot(slots: Slots, num_tokens: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The same as products with 0 and 1 (GShard, arXiv 2006.16668, section 3.2)."""
    there = jax.nn.one_hot(slots.source, num_tokens, dtype=jnp.bool_)
    return (
        lambda x: jnp.einsum("grs,gsd->grd", there.astype(x.dtype), x),
        lambda rows: jnp.einsum("grs,grd->gsd", there.astype(rows.dtype), rows),
    )


def _dropless(
    moe: MoE, x: Array, mask: Array, logits: Array, key: PRNGKeyArray | None
) -> tuple[Array, RoutingStatistics]:
    """The router whose experts have as many rows as it takes."""
    routing, num_experts = moe.routing, moe.num_experts
    assert isinstance(routing, Dropless)
    scores = logits.reshape(1, -1, num_experts)
    experts, gates = top_k(jax.nn.softmax(scores[0], -1), routing.k, routing.renormalize)
    chosen = count_choices(jnp.where(mask.reshape(1, -1), experts, num_experts), num_experts)

    per_row = (routing.k, *mask.shape)
    arrays = (x, mask, experts.reshape(per_row), gates.reshape(per_row))
    mesh = active_mesh()
    batch_axes, expert_axes = active_axes("batch", len(x)), active_axes("act_expert", num_experts)
    length_axes = tuple(axis for axis in active_axes("length", x.shape[1]) if axis not in expert_axes)
    local = _Local(moe.experts, routing, num_experts, batch_axes, length_axes, expert_axes)
    y = (local if mesh is None else _on_shards(local, mesh))(*arrays, moe.experts.kernels(), key)
    statistics = routing_statistics(
        scores, mask.reshape(1, -1), chosen[None], chosen.sum(0).astype(jnp.int32), jnp.zeros(())
    )
    return y, statistics


@dataclasses.dataclass(frozen=True)
class _Local:
    """One device's part of a dropless layer: all valid tokens of its shard of the batch, or of its neighbours' too.

    Attributes:
        experts: for their settings.
        routing: the router.
        num_experts: ``E``, on all devices.
        batch_axes: mesh axes that shard the batch here.
        length_axes: mesh axes that shard positions here.
        expert_axes: mesh axes that shard the experts here.
    """

    experts: Experts
    routing: Dropless
    num_experts: int
    batch_axes: tuple[str, ...]
    length_axes: tuple[str, ...]
    expert_axes: tuple[str, ...]

    def __call__(
        self, x: Array, mask: Array, experts: Array, gates: Array, kernels: tuple[Array, ...], key: PRNGKeyArray | None
    ) -> Array:
        """The weighted sum of each token's experts."""
        shared = tuple(axis for axis in self.expert_axes if axis in self.batch_axes)
        if shared:
            x, mask = (jax.lax.all_gather(value, shared, axis=0, tiled=True) for value in (x, mask))
            experts, gates = (jax.lax.all_gather(value, shared, axis=1, tiled=True) for value in (experts, gates))
        devices = tuple(dict.fromkeys(self.batch_axes + self.length_axes + self.expert_axes))
        if key is not None and devices:
            key = jax.random.fold_in(key, jax.lax.axis_index(devices))

        num_local = len(kernels[0])
        first = jax.lax.axis_index(self.expert_axes) * num_local if self.expert_axes else 0
        experts, gates = (value.reshape(self.routing.k, -1) for value in (experts, gates))
        slots = self.routing.assign(
            experts, gates, mask.reshape(-1), self.num_experts, first_local=first, num_local=num_local
        )
        product = functools.partial(
            _grouped, owned=slots.owned, block=self.routing.block_size(mask.size, self.num_experts)
        )
        rows = distribute(x.reshape(mask.size, -1), slots.source, slots.slot_of)
        rows = _feed_forward(self.experts, rows, kernels, product, key)
        y = collect(rows * slots.gates[:, None], slots.source, slots.slot_of, mask.reshape(-1)).reshape(x.shape)

        alone = tuple(axis for axis in self.expert_axes if axis not in shared)
        if shared:
            y = jax.lax.psum_scatter(y, shared, scatter_dimension=0, tiled=True)
        if alone:
            y = jax.lax.psum(y, alone)
        return y.astype(x.dtype)


def _grouped(rows: Array, kernels: Array, *, owned: Array, block: int) -> Array:
    return grouped_product(rows, kernels, owned, block)


def _on_shards(local: _Local, mesh: Mesh) -> Callable[..., Array]:
    """`local` on every device, but for what shards the hidden layer: that stays with the compiler."""
    tokens = (local.batch_axes, local.length_axes)
    per_token, per_pair = PartitionSpec(*tokens), PartitionSpec(None, *tokens)
    # Axes that shard nothing here may shard groups of preferences, under `jax.vmap`.
    hidden = active_axes("act_mlp", local.experts.mlp_dim)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(per_token, per_token, per_pair, per_pair, PartitionSpec(local.expert_axes), PartitionSpec()),
        out_specs=per_token,
        axis_names=set(mesh.axis_names) - set(hidden),
        check_vma=False,
    )
