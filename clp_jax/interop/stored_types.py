"""Types that tensors are stored in: told by what a policy came from, and kept where they hold its parameters exactly."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import ArrayLike, Params
from clp_jax.interop.arrays import LazyArray
from clp_jax.interop.links import Link, part_of
from clp_jax.interop.slots import flatten

# Numbers that are rounded and compared at a time.
_NUMBERS = 1 << 18


def told(dtypes: Mapping[str, str]) -> dict[str, Any]:
    """What an origin says of its tensors' types.

    Args:
        dtypes: of each tensor.

    Returns:
        ``dtype`` of most of them, and ``dtypes`` of the others by name.
    """
    most = max(dict.fromkeys(dtypes.values()), key=list(dtypes.values()).count)
    return {"dtype": most, "dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != most}}


def kept(
    links: Sequence[Link], params: Params, origin: Mapping[str, Any] | None, kind: str, known: Collection[str]
) -> dict[str, str] | None:
    """Types that tensors are written in so that nothing is rounded and the origin's are kept.

    In the origin's own format these are each tensor's; in another, whose tensors have other names, the one type that all of
    the origin's had.

    Args:
        links: one for each tensor that is written.
        params: numpy, JAX or lazy arrays.
        origin: what the policy came from; None where that is not known.
        kind: the origin's ``format`` whose tensors have the names of the links.
        known: types that can be written.

    Returns:
        The type of each tensor; None where the origin does not say, as those of early versions don't, where they are not known,
        or where some would round a parameter.
    """
    if origin is None or "dtype" not in origin:
        return None
    if origin.get("format") == kind:
        dtypes = {each.name: origin["dtypes"].get(each.name, origin["dtype"]) for each in links}
    elif not origin["dtypes"]:
        dtypes = {each.name: origin["dtype"] for each in links}
    else:
        return None
    return dtypes if set(dtypes.values()) <= set(known) and holds(links, params, dtypes) else None


def holds(links: Sequence[Link], params: Params, dtypes: Mapping[str, str]) -> bool:
    """Whether foreign tensors of these types hold a policy's parameters without rounding any; one piece is read at a time.

    Args:
        links: one for each tensor.
        params: numpy, JAX or lazy arrays.
        dtypes: of each tensor.
    """
    leaves = dict(flatten(params))
    return all(_fits(leaves[each.path], each.index, jnp.dtype(dtypes[each.name])) for each in links)


def _fits(leaf: ArrayLike | LazyArray, index: tuple[int, ...], dtype: np.dtype) -> bool:
    have = np.dtype(leaf.dtype)
    if have == dtype or (dtype.itemsize > have.itemsize):
        return True
    flat = part_of(leaf, index).reshape(-1)
    blocks = (flat[start : start + _NUMBERS] for start in range(0, flat.size, _NUMBERS))
    with np.errstate(over="ignore"):
        return all(
            np.array_equal(block.astype(np.float32), block.astype(dtype).astype(np.float32), equal_nan=True)
            for block in blocks
        )
