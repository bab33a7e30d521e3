"""Foreign tensors and the pieces of a policy's parameters that they are: both ways, one tensor at a time.

Reading allocates the parameters once and fills them; writing makes the foreign form of one piece after another. Neither
holds more than that and the tensor at hand.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Params
from clp_jax.interop.arrays import ArraySpec, Source, is_float, some
from clp_jax.interop.slots import Slot, flatten, unflatten
from clp_jax.models.policy import check_parameters

# Rows of two tensors that are compared at a time.
_ROWS = 4096

HINT = "Is the configuration another model's?"


@dataclasses.dataclass(frozen=True)
class Link:
    """A foreign tensor and the piece of a policy's parameters that it holds.

    Attributes:
        name: of the foreign tensor.
        path: of the leaf.
        index: of the leaf's leading axes.
        order: ``foreign = piece.transpose(order)``; None where they are alike.
        shape: of the foreign tensor.
    """

    name: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    order: tuple[int, ...] | None
    shape: tuple[int, ...]


def link(slots: Iterable[Slot], names: Mapping[str, str], transposed: Sequence[str], source: str) -> list[Link]:
    """Links of a family whose tensors are one for each slot.

    Args:
        slots: of the policy.
        names: the foreign name of each slot's name, ``{layer}`` and ``{expert}`` filled in.
        transposed: ends of names of slots whose tensors are stored the other way round.
        source: of the family, for messages.

    Raises:
        ValueError: for parameters that the family has no name for.
    """
    links: list[Link] = []
    nameless: list[str] = []
    for slot in slots:
        if slot.name not in names:
            nameless.append(slot.name)
            continue
        order = None
        if len(slot.shape) > 1 and slot.name.endswith(tuple(transposed)):
            order = tuple(reversed(range(len(slot.shape))))
        shape = slot.shape if order is None else tuple(slot.shape[axis] for axis in order)
        name = names[slot.name].format(layer=slot.layer, expert=slot.expert)
        links.append(Link(name, slot.path, slot.index, order, shape))
    if nameless:
        raise ValueError(
            f"{source} has no tensors for the parameters {some(dict.fromkeys(nameless))}: choose another format."
        )
    return links


def fill(
    links: Sequence[Link],
    source: Source,
    abstract: Params,
    dtype: str,
    *,
    aliases: Mapping[str, str] | None = None,
    ignored: str | None = None,
    where: str,
) -> Params:
    """Parameters read from foreign tensors; besides them, at most one tensor is held.

    Args:
        links: one for each tensor.
        source: tensors by name.
        abstract: shapes of the parameters (`clp_jax.models.policy.Policy.abstract`).
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``.
        aliases: names of further tensors that repeat another: what they repeat. They are compared.
        ignored: a pattern of names that hold no parameters.
        where: the file or directory, for messages.

    Returns:
        A tree of numpy arrays.

    Raises:
        ValueError: when a tensor is missing, unknown, misshapen, of integers, or is no copy of what it should repeat.
    """
    aliases = {name: target for name, target in (aliases or {}).items() if name in source}
    check(links, source, {*aliases}, ignored, where)
    leaves = {path: np.empty(leaf.shape, jnp.dtype(dtype)) for path, leaf in flatten(abstract)}
    by_name = {each.name: each for each in links}
    for name in source:  # In the order of the file.
        if name in by_name:
            each = by_name[name]
            leaves[each.path][each.index] = _piece(source[name].read(), each)
    for name, target in aliases.items():
        each = by_name[target]
        if not _repeats(_piece(source[name].read(), each), leaves[each.path][each.index]):
            raise ValueError(
                f"{where}: {name!r} differs from {target!r}, which it should repeat: expected equal tensors. Where a head is "
                "not tied to the embedding, config.json says tie_word_embeddings: false."
            )
    return unflatten(leaves)


def check(links: Sequence[Link], source: Source, known: set[str], ignored: str | None, where: str) -> None:
    """Checks names, shapes and types of tensors before any is read.

    Args:
        links: the tensors that are expected.
        source: those that are there.
        known: names that are not links, and that may be there.
        ignored: a pattern of further such names.
        where: the file or directory, for messages.

    Raises:
        ValueError: naming a few of the tensors that are missing, unknown or misshapen.
    """
    expected = {each.name: each for each in links}
    missing = [name for name in expected if name not in source]
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} of {len(expected)} tensors: {some(missing)}. {HINT}")
    unknown = [name for name in source if name not in expected and name not in known]
    unknown = [name for name in unknown if ignored is None or not re.search(ignored, name)]
    if unknown:
        raise ValueError(
            f"{where} has {len(unknown)} tensors that its configuration does not tell of: {some(unknown)}. {HINT}"
        )
    for name, each in expected.items():
        if tuple(source[name].shape) != each.shape:
            raise ValueError(f"{where}: {name!r} has shape {tuple(source[name].shape)}, expected {each.shape}.")
        if not is_float(source[name].dtype):
            raise ValueError(
                f"{where}: {name!r} is of {source[name].dtype}, expected floating-point numbers: "
                "quantised checkpoints can't be read, save the original one."
            )


def specs(links: Sequence[Link], dtype: str) -> dict[str, ArraySpec]:
    """Shape and type of every foreign tensor."""
    return {each.name: ArraySpec(each.shape, jnp.dtype(dtype)) for each in links}


def tensors(links: Sequence[Link], params: Params, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Foreign tensors of a policy's parameters, one after another.

    Args:
        links: one for each tensor.
        params: numpy or JAX arrays.
        dtype: of the tensors.
    """
    leaves = dict(flatten(params))
    for each in links:
        part = np.asarray(leaves[each.path][each.index])
        part = part if each.order is None else part.transpose(each.order)
        yield each.name, np.ascontiguousarray(part.astype(jnp.dtype(dtype), copy=False))


def check_tree(abstract: Params, params: Params) -> None:
    """Checks that parameters are those of a model; see `clp_jax.models.policy.check_parameters`."""
    check_parameters(abstract, params)


def _piece(tensor: np.ndarray, each: Link) -> np.ndarray:
    if each.order is None:
        return tensor
    return tensor.transpose(np.argsort(each.order))


def _repeats(tensor: np.ndarray, piece: np.ndarray) -> bool:
    """Whether a tensor, in the type of the piece, is equal to it; compared in blocks, so that no copy is made."""
    starts = range(0, len(piece), _ROWS)
    return all(np.array_equal(tensor[i : i + _ROWS].astype(piece.dtype), piece[i : i + _ROWS]) for i in starts)
