"""Partial restore: which stored parameters go where in a new tree, by rules over paths, with an account of what was done."""

import collections
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Params, PyTree
from clp_jax.partitioning import is_axes
from clp_jax.training.checkpoint_manifest import leaves_by_path
from clp_jax.training.stage import Derived
from clp_jax.training.train_state import full_axes


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every array, by its path.

    Attributes:
        loaded: of the new tree, from the stored one.
        initialised: of the new tree, not stored.
        grown: of the new tree: the first of a longer leading axis were loaded, the others initialised.
        ignored: of the stored tree, without a place in the new one.
    """

    loaded: tuple[str, ...]
    initialised: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def report(self, source: str, step: int) -> None:
        """Says it, once for all processes."""
        if jax.process_index() == 0:
            print(f"{source}, step {step}: {self}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        """One line for each kind there is, by the first part of the paths."""
        kinds = dataclasses.asdict(self).items()
        return "; ".join(f"{kind} {_by_first_part(paths)}" for kind, paths in kinds if paths)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How stored parameters become a new tree's.

    Paths are joined with ``/``; patterns are regular expressions that match all of a path; the first that does decides.
    What has no rule goes to where it was. Nothing is left out, and nothing starts afresh, that no rule names.

    Attributes:
        moves: from patterns of stored paths to new paths, in which ``\\1`` is what the first group matched; None ignores.
        init: patterns of new paths that start afresh where nothing is stored for them: heads, adapters.
        grow: patterns of new paths whose first axis may be longer than what is stored: components that are added.
    """

    moves: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    init: Sequence[str] = ()
    grow: Sequence[str] = ()

    def __post_init__(self):
        for pattern in (*self.moves, *self.init, *self.grow):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Transfer: {pattern!r} is not a regular expression: {error}.") from error

    def plan(self, stored: Params, abstract: Params) -> "Plan":
        """Where every array goes; nothing is read or made.

        Args:
            stored: parameters, or what is read in parts (`clp_jax.host_rows.InParts`), or shapes.
            abstract: shapes and types of the new ones.

        Raises:
            ValueError: naming an array that no rule provides for, or that does not fit its place.
        """
        wanted = leaves_by_path(abstract)
        source: dict[str, tuple[str, Any]] = {}
        ignored = []
        for path, leaf in leaves_by_path(stored).items():
            target = self._target(path)
            if target is None:
                ignored.append(path)
            elif target in source:
                raise ValueError(f"both {source[target][0]!r} and {path!r} go to {target!r}: change Transfer.moves.")
            elif target not in wanted:
                raise ValueError(
                    f"parameter {path!r} of the checkpoint has no place {target!r} in this model: move it, or ignore it, "
                    "with a rule of Transfer.moves."
                )
            else:
                source[target] = (path, leaf)
        grown = [path for path in source if self._grows(path, source[path][1].shape, wanted[path].shape)]
        missing = [path for path in wanted if path not in source]
        for path in missing:
            if not _matches(self.init, path):
                raise ValueError(
                    f"parameter {path!r} is missing in the checkpoint: name it in Transfer.init to start afresh, or move "
                    "another one there."
                )
        for path, (_, leaf) in source.items():
            if path not in grown and leaf.shape != wanted[path].shape:
                raise ValueError(
                    f"parameter {path!r} has shape {leaf.shape} in the checkpoint, this model's has {wanted[path].shape}."
                )
        loaded = tuple(path for path in source if path not in grown)
        account = Account(loaded, tuple(missing), tuple(grown), tuple(ignored))
        return Plan({path: leaf for path, (_, leaf) in source.items()}, abstract, account)

    def _target(self, path: str) -> str | None:
        for pattern, target in self.moves.items():
            match = re.fullmatch(pattern, path)
            if match:
                return None if target is None else match.expand(target)
        return path

    def _grows(self, path: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        longer = len(stored) == len(wanted) > 0 and stored[1:] == wanted[1:] and stored[0] < wanted[0]
        return longer and _matches(self.grow, path)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `Transfer` does with one stored tree.

    Attributes:
        taken: what is taken of it, by new path.
        abstract: shapes and types of the new tree.
        account: of every array.
    """

    taken: Mapping[str, Any]
    abstract: Params
    account: Account

    def axes(self, logical_axes: PyTree) -> dict[str, Any]:
        """The logical axes of what is taken, of those of the new tree."""
        leaves = jax.tree.leaves(full_axes(logical_axes, self.abstract), is_leaf=is_axes)
        by_path = dict(zip(leaves_by_path(self.abstract), leaves, strict=True))
        return {path: by_path[path] for path in self.taken}

    def derived(self, logical_axes: PyTree, fresh: Callable[..., Params], *others: tuple[PyTree, PyTree]) -> Derived:
        """The new tree, to be made where it lives.

        Args:
            logical_axes: of the new tree.
            fresh: makes all new ones, of the others.
            *others: trees of arrays with their logical axes.
        """
        trees, axes = zip((self.taken, self.axes(logical_axes)), *others, strict=True)
        return Derived(lambda taken, *rest: self.fill(taken, lambda: fresh(*rest)), trees, axes)

    def fill(self, taken: Mapping[str, Any], fresh: Callable[[], Params]) -> Params:
        """The new tree; pure.

        Args:
            taken: arrays, as `taken` says.
            fresh: makes all new ones; is called only where some of them are needed.
        """
        account = self.account
        made = leaves_by_path(fresh()) if account.initialised or account.grown else {}

        def leaf_of(path: str, wanted: Any) -> Any:
            if path not in taken:
                return made[path]
            leaf = jnp.asarray(taken[path]).astype(wanted.dtype)
            return jnp.concatenate([leaf, made[path][leaf.shape[0] :]]) if path in account.grown else leaf

        structure: Any = jax.tree.structure(self.abstract)
        return structure.unflatten(leaf_of(*item) for item in leaves_by_path(self.abstract).items())


def _matches(patterns: Iterable[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _by_first_part(paths: Sequence[str]) -> str:
    counts = collections.Counter(path.split("/")[0] for path in paths)
    total = f"{len(paths)} array{'s' if len(paths) != 1 else ''}"
    return f"{total} ({', '.join(f'{name} {count}' for name, count in counts.items())})"
