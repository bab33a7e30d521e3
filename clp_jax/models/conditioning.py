"""How a preference enters a policy: as mixing coefficients of parameter copies, or as text in the prompt.

Conditioning gives the parameters that a path predicate selects a leading ``component`` axis ``[M, ...]`` and leaves the
rest shared; `mix` contracts the axis and returns an ordinary parameter tree (CLP, arXiv 2407.15762):

    θ(w) = { θ_shared, Σ_m w_m θ_S^(m) }

With KL conditioning the frozen reference is one more component, weighted ``1-λ(α)``, of every parameter.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Float, Int, Params
from clp_jax.models.serialization import serializable
from clp_jax.partitioning import is_axes
from clp_jax.preferences import Preference, kl_mixing_weight

Path: TypeAlias = tuple[str, ...]

_ATTENTION_PROJECTIONS = frozenset({"query", "key", "value", "out"})


@runtime_checkable
class Conditioning(Protocol):
    """Turns the parameters of a policy into those of a steerable one, and a preference into ordinary parameters."""

    def expand(self, params: Params) -> Params:
        """The trainable parameters that all start as `params`."""

    def mix(self, params: Params, reference: Params, preference: Preference) -> Params:
        """The ordinary parameters at one preference (no leading dimensions); differentiable in `params`."""

    def condition_inputs(self, tokens: Int[Array, "B S"], preference: Preference) -> Int[Array, "B S2"]:
        """The prompts with what the preference, one per row, adds to them."""

    def logical_axes(self, axes: Params) -> Params:
        """The logical axes of the trainable parameters, given those of the ordinary ones."""


def all_parameters(path: Path) -> bool:
    """Selects every parameter: full conditioning."""
    return True


def attention_parameters(path: Path) -> bool:
    """Selects the query, key, value and output projections of every attention block."""
    return any("attention" in name for name in path) and any(name in _ATTENTION_PROJECTIONS for name in path)


def logits_parameters(path: Path) -> bool:
    """Selects the last linear layer of an untied policy."""
    return path[0] == "logits_head"


PREDICATES: dict[str, Callable[[Path], bool]] = {
    "full": all_parameters,
    "attention": attention_parameters,
    "logits": logits_parameters,
}


@serializable
@dataclasses.dataclass(frozen=True)
class Unconditioned:
    """An ordinary policy: the preference only weighs its rewards."""

    def expand(self, params: Params) -> Params:
        """The parameters as they are."""
        return params

    def mix(self, params: Params, reference: Params, preference: Preference) -> Params:
        """The parameters as they are."""
        return params

    def condition_inputs(self, tokens: Int[Array, "B S"], preference: Preference) -> Int[Array, "B S2"]:
        """The prompts as they are."""
        return tokens

    def logical_axes(self, axes: Params) -> Params:
        """The axes as they are."""
        return axes


@serializable
@dataclasses.dataclass(frozen=True)
class ParameterConditioning:
    """Conditioning by mixing ``K`` copies of some of the parameters (full-, attention- and logits-CLP).

    Attributes:
        subset: which parameters have copies: ``"full"``, ``"attention"`` or ``"logits"`` (`PREDICATES`).
        num_objectives: ``K``, the number of copies.
        alpha_min: None leaves the KL weight to the objective alone. A number in ``(0, 1)`` conditions on it too: the
            frozen reference is mixed in with weight ``1-λ(α)``, in every parameter, so that ``α = 1`` gives the
            reference exactly; `alpha_min` is the smallest KL weight the policy is trained for.
    """

    subset: str
    num_objectives: int
    alpha_min: float | None = None

    def __post_init__(self):
        if self.subset not in PREDICATES:
            raise ValueError(
                f"ParameterConditioning.subset is {self.subset!r}: expected one of {', '.join(PREDICATES)}."
            )
        if self.num_objectives < 1:
            raise ValueError(f"ParameterConditioning.num_objectives is {self.num_objectives}: expected at least 1.")
        if self.alpha_min is not None and not 0 < self.alpha_min < 1:
            raise ValueError(f"ParameterConditioning.alpha_min is {self.alpha_min}: expected a number in (0, 1).")

    def selected(self, params: Params) -> Params:
        """A tree of bools: which parameters have copies.

        Raises:
            ValueError: when the subset selects nothing, as ``"logits"`` does in a policy with a tied head.
        """
        predicate = PREDICATES[self.subset]
        chosen = map_with_names(lambda path, _: predicate(path), params)
        if not any(jax.tree.leaves(chosen)):
            hint = (
                " A tied head has no last linear layer of its own: use tied_head=False."
                if self.subset == "logits"
                else ""
            )
            raise ValueError(f"conditioning {self.subset!r} selects no parameter of this policy.{hint}")
        return chosen

    def expand(self, params: Params) -> Params:
        """`params` with ``K`` equal copies of the selected leaves, stacked on a new leading axis."""

        def stack(chosen: bool, leaf: Array) -> Array:
            return jnp.broadcast_to(leaf[None], (self.num_objectives, *leaf.shape)) if chosen else leaf

        return jax.tree.map(stack, self.selected(params), params)

    def mix(self, params: Params, reference: Params, preference: Preference) -> Params:
        """The ordinary parameters at one preference.

        Args:
            params: the expanded parameters.
            reference: the frozen reference, an ordinary tree; only read with KL conditioning.
            preference: weights ``float[K]``, alpha ``float[]``.

        Returns:
            A tree shaped as the reference. At the corner ``e_i`` it is component ``i`` to the bit. Gradients reach
            component ``i`` multiplied by its coefficient.
        """
        if preference.weights.shape != (self.num_objectives,):
            raise ValueError(
                f"mix: weights of shape {preference.weights.shape} for a policy of {self.num_objectives} objectives: "
                "expected one preference; map over several with jax.vmap."
            )
        selected = self.selected(params)
        if self.alpha_min is None:
            return jax.tree.map(lambda chosen, x: contract(x, preference.weights) if chosen else x, selected, params)
        trained = kl_mixing_weight(preference.alpha, self.alpha_min)

        def with_reference(chosen: bool, x: Array, frozen: Array) -> Array:
            x = contract(x, preference.weights * trained) if chosen else x * trained
            return (x + jax.lax.stop_gradient(frozen) * (1 - trained)).astype(frozen.dtype)

        return jax.tree.map(with_reference, selected, params, reference)

    def condition_inputs(self, tokens: Int[Array, "B S"], preference: Preference) -> Int[Array, "B S2"]:
        """The prompts as they are."""
        return tokens

    def logical_axes(self, axes: Params) -> Params:
        """The axes with ``component`` in front of those of the selected leaves."""
        predicate = PREDICATES[self.subset]
        return map_with_names(
            lambda path, leaf: ("component", *leaf) if predicate(path) else leaf, axes, is_leaf=is_axes
        )


@serializable
@dataclasses.dataclass(frozen=True)
class PromptConditioning:
    """The baseline without parameter conditioning: the preference is written as text before the prompt.

    The text of each number is tokenised beforehand, one row for each of ``bins`` evenly spaced values in [0, 1], so that
    a preference becomes tokens inside a jitted program. `of` builds the tables.

    Attributes:
        tables: one table for each objective, and a last one for the KL weight where it is written too; a table has one
            row of token ids for each value, all of one length, padded with `pad_id`.
        num_objectives: ``K``.
        pad_id: of the policy.
        keep_first: tokens of a prompt that stay in front of the written preference: a start of text.
    """

    tables: tuple[tuple[tuple[int, ...], ...], ...]
    num_objectives: int
    pad_id: int = 0
    keep_first: int = 0

    def __post_init__(self):
        tables = tuple(tuple(tuple(row) for row in table) for table in self.tables)  # A JSON list becomes a tuple.
        object.__setattr__(self, "tables", tables)
        if len(tables) not in (self.num_objectives, self.num_objectives + 1):
            raise ValueError(f"PromptConditioning has {len(tables)} tables for {self.num_objectives} objectives.")

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        encode: Callable[[str], list[int]],
        with_alpha: bool = False,
        bins: int = 21,
        pad_id: int = 0,
        keep_first: int = 0,
    ) -> "PromptConditioning":
        """Tokenises ``"<name> <value>"`` for every objective and value.

        Args:
            names: the objectives' names.
            encode: text to token ids, without an end-of-sequence token.
            with_alpha: write the KL weight as well.
            bins: evenly spaced values in [0, 1]; weights are rounded to the nearest.
            pad_id: of the policy.
            keep_first: tokens of a prompt that stay in front.
        """
        written = [*names, "kl"] if with_alpha else list(names)
        tables = []
        for name in written:
            rows = [encode(f"{name} {value:.2f}") for value in np.linspace(0, 1, bins)]
            width = max(len(row) for row in rows)
            tables.append(tuple((*row, *[pad_id] * (width - len(row))) for row in rows))
        return cls(tuple(tables), len(names), pad_id, keep_first)

    def expand(self, params: Params) -> Params:
        """The parameters as they are."""
        return params

    def mix(self, params: Params, reference: Params, preference: Preference) -> Params:
        """The parameters as they are."""
        return params

    def condition_inputs(self, tokens: Int[Array, "B S"], preference: Preference) -> Int[Array, "B S2"]:
        """The prompts behind the written preference, all padding at the end."""
        values = [preference.weights[:, k] for k in range(self.num_objectives)]
        if len(self.tables) > self.num_objectives:
            values.append(preference.alpha)
        parts = []
        for table, value in zip(self.tables, values, strict=True):
            rows = jnp.asarray(table, tokens.dtype)
            parts.append(rows[jnp.round(value * (rows.shape[0] - 1)).astype(jnp.int32)])
        joined = jnp.concatenate([tokens[:, : self.keep_first], *parts, tokens[:, self.keep_first :]], axis=1)
        order = jnp.argsort(joined == self.pad_id, axis=1, stable=True)
        return jnp.take_along_axis(joined, order, axis=1)

    def logical_axes(self, axes: Params) -> Params:
        """The axes as they are."""
        return axes


def contract(leaf: Float[Array, "M ..."], coefficients: Float[Array, "M"]) -> Float[Array, "..."]:
    """``Σ_m c_m leaf[m]`` in float32, as products and sums: a matrix product would round to bfloat16 on a TPU.

    Args:
        leaf: the components.
        coefficients: one number for each.

    Returns:
        The mixture, in the leaf's type.
    """
    # Term by term: XLA's sum over a leading axis takes a CPU twenty times as long.
    terms = zip(jax.lax.split(leaf, [1] * leaf.shape[0]), coefficients, strict=True)
    return sum(c * x[0].astype(jnp.float32) for x, c in terms).astype(leaf.dtype)


def map_with_names(function: Callable[[Path, Any], Any], tree: Params, is_leaf: Callable[[Any], bool] | None = None):
    """Maps ``function(path, leaf)`` over a tree of nested dictionaries, the path being the keys' names."""

    def call(path, leaf):
        return function(tuple(str(getattr(key, "key", key)) for key in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree, is_leaf=is_leaf)


def stack_experts(experts: Sequence[Params]) -> Params:
    """Makes full-conditioned parameters of ``K`` experts trained apart: rewarded soups (arXiv 2306.04488).

    Args:
        experts: parameter trees of one shape, the k-th trained for objective k alone.
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)


def check_alpha(conditioning: object, alpha: float) -> None:
    """Checks a KL weight that a user asks of a policy.

    Raises:
        ValueError: when the policy is conditioned on the KL weight and was trained for larger ones only.
    """
    smallest = conditioning.alpha_min if isinstance(conditioning, ParameterConditioning) else None
    if smallest is not None and alpha < smallest:
        raise ValueError(
            f"alpha is {alpha:g}: this policy is conditioned on KL weights from alpha_min={smallest:g} to 1; below, its "
            "components would be extrapolated."
        )
