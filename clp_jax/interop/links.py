"""Foreign tensors and the pieces of a policy's parameters that they are: both ways, one tensor at a time.

Read parameters stay in their files until a leaf, or a piece of one, is asked for; writing makes the foreign form of one piece
after another. From one foreign format to another, the tensor at hand is all that is held.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import ArrayLike, Params
from clp_jax.interop.arrays import ArraySpec, LazyArray, Source, is_float, some
from clp_jax.interop.regions import Region, shape_of
from clp_jax.interop.slots import Slot, flatten, unflatten
from clp_jax.models.config import ModelConfig
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


def opened(
    links: Sequence[Link],
    source: Source,
    abstract: Params,
    dtype: str,
    *,
    aliases: Mapping[str, str] | None = None,
    ignored: str | None = None,
    where: str,
) -> Params:
    """Parameters that are read from foreign tensors when asked for.

    Args:
        links: one for each tensor.
        source: tensors by name.
        abstract: shapes of the parameters (`clp_jax.models.policy.Policy.abstract`).
        dtype: of the parameters, ``"float32"`` or ``"bfloat16"``.
        aliases: names of further tensors that repeat another: what they repeat. They are compared, a part at a time.
        ignored: a pattern of names that hold no parameters.
        where: the file or directory, for messages.

    Returns:
        A tree of `LazyArray`; reading one, or a part, holds that and one tensor at most.

    Raises:
        ValueError: when a tensor is missing, unknown, misshapen, of integers, or is no copy of what it should repeat.
    """
    aliases = {name: target for name, target in (aliases or {}).items() if name in source}
    check(links, source, {*aliases}, ignored, where)
    for name, target in aliases.items():
        if not _repeats(source[name], source[target], jnp.dtype(dtype)):
            raise ValueError(
                f"{where}: {name!r} differs from {target!r}, which it should repeat: expected equal tensors. Where a head is "
                "not tied to the embedding, config.json says tie_word_embeddings: false."
            )
    pieces: dict[tuple[str, ...], dict[tuple[int, ...], Link]] = {}
    for each in links:
        pieces.setdefault(each.path, {})[each.index] = each
    return unflatten(
        {
            path: LazyArray(
                leaf.shape,
                jnp.dtype(dtype),
                functools.partial(_fill, pieces[path], source),
                stacked=len(next(iter(pieces[path]))),
            )
            for path, leaf in flatten(abstract)
        }
    )


def _fill(pieces: Mapping[tuple[int, ...], Link], source: Source, out: np.ndarray, region: Region) -> None:
    """Puts a region of a leaf into an array, one tensor after another; a tensor is held nowhere else."""
    depth = len(next(iter(pieces)))
    leading, inner = region[:depth], region[depth:]
    for at in np.ndindex(*shape_of(leading)):
        each = pieces[tuple(s.start + i for s, i in zip(leading, at, strict=True))]
        order = each.order or tuple(range(len(inner)))
        place, part = out[(*at, ...)].transpose(order), tuple(inner[axis] for axis in order)
        source[each.name].fill_any(place, part)


def loaded(params: Params) -> Params:
    """The same parameters as numpy arrays, read one after another."""
    return unflatten({path: leaf.read() for path, leaf in flatten(params)})


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


def check_counts(config: ModelConfig, tensors: int) -> None:
    """Checks that a policy has no more layers and experts than tensors, before anything is made for each of them.

    Args:
        config: of the policy.
        tensors: that there are, of one layer and one expert each.

    Raises:
        ValueError: naming the field, its value, and what is expected.
    """
    depths, moe = {name: getattr(config, name) for name in config.depths()}, config.moe
    for name, depth in depths.items():
        if depth > tensors:
            raise ValueError(
                f"{type(config).__name__}.{name} is {depth}: expected at most {tensors}, the tensors that there are. {HINT}"
            )
    experts = 0 if moe is None or moe.dense else moe.num_experts * sum(n // moe.every for n in depths.values())
    if experts > tensors:
        raise ValueError(f"there are {experts} experts in all layers, and {tensors} tensors: expected fewer. {HINT}")


def specs(links: Sequence[Link], dtypes: Mapping[str, str]) -> dict[str, ArraySpec]:
    """Shape and type of every foreign tensor."""
    return {each.name: ArraySpec(each.shape, jnp.dtype(dtypes[each.name])) for each in links}


def write_tensors(links: Sequence[Link], params: Params, write: Callable[[str, np.ndarray], None]) -> None:
    """Gives a policy's parameters to a writer as foreign tensors, one after another.

    Args:
        links: one for each tensor.
        params: numpy, JAX or lazy arrays.
        write: takes names and tensors, of the parameters' type and in any order of memory (`ArrayWriter.write`).
    """
    leaves = dict(flatten(params))
    for each in links:
        # Without a name of their own: a tensor that has one is held while the next is read.
        write(each.name, part_of(leaves[each.path], each.index).transpose(each.order or range(len(each.shape))))


def part_of(leaf: ArrayLike | LazyArray, index: tuple[int, ...]) -> np.ndarray:
    """What stands at an index of a leaf's leading axes; nothing else of a lazy one is read."""
    if not isinstance(leaf, LazyArray):
        return np.asarray(leaf[index])
    return leaf.read(tuple(slice(i, i + 1) for i in index)).reshape(leaf.shape[len(index) :])


def check_tree(abstract: Params, params: Params) -> None:
    """Checks that parameters are those of a model; see `clp_jax.models.policy.check_parameters`."""
    check_parameters(abstract, params)


def _repeats(tensor: LazyArray, original: LazyArray, dtype: np.dtype) -> bool:
    """Whether tensors are equal in a type; compared in blocks of rows, so that neither is held."""
    if tensor.shape != original.shape:
        return False
    starts = [(slice(i, min(i + _ROWS, tensor.shape[0])),) for i in range(0, tensor.shape[0], _ROWS)]
    parts = ((tensor.read(rows).astype(dtype), original.read(rows).astype(dtype)) for rows in starts)
    return all(np.array_equal(part, repeated) for part, repeated in parts)
