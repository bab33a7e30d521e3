"""What the backward pass recomputes, by name (`jax.checkpoint`)."""

from collections.abc import Callable
from typing import Any

from jax import checkpoint_policies
from jax.ad_checkpoint import checkpoint_name

from clp_jax.array_types import Array

_DEAR = "dear"


def keep(x: Array) -> Array:
    """Marks a result that takes long to compute and little memory, and is no product of matrices: that of a kernel."""
    return checkpoint_name(x, _DEAR)


def _by_kind(products: Callable[..., Any], dear: Callable[..., Any]) -> Callable[..., Any]:
    def policy(primitive: Any, *avals: Any, **parameters: Any) -> Any:
        return (dear if primitive.name == "name" else products)(primitive, *avals, **parameters)

    return policy


REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    # Products with parameters are kept, and what `keep` marks.
    "minimal": _by_kind(
        checkpoint_policies.dots_with_no_batch_dims_saveable, checkpoint_policies.save_only_these_names(_DEAR)
    ),
    "full": checkpoint_policies.nothing_saveable,
    # What "minimal" keeps, kept in the host's memory: it travels while other layers compute.
    "offload": _by_kind(
        checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
        checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_DEAR],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}
