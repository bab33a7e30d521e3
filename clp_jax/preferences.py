"""What a user asks of a steerable policy: reward weights and a KL weight, and the distributions they are drawn from.

The objective of a preference ``(w, α)`` is ``(1-α)·E[w·r] - α·KL(π‖π_ref)`` (CLP, arXiv 2407.15762); dividing by
``1-α`` gives the usual form with KL coefficient ``β = α/(1-α)``.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, ArrayLike, Float, PRNGKeyArray

_SUM_TOLERANCE = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preference:
    """Reward weights and KL weight, one pair per leading index.

    Attributes:
        weights: ``float32[..., K]``, points of the simplex.
        alpha: ``float32[...]``, KL weight in ``[0, 1)`` (1 only with KL conditioning: it means the reference itself).
    """

    weights: Float[Array, "... K"]
    alpha: Float[Array, "..."]

    @property
    def num_objectives(self) -> int:
        """The number of objectives, ``K``."""
        return self.weights.shape[-1]

    def __getitem__(self, index) -> "Preference":
        """The preference at `index` of the leading dimensions."""
        return Preference(weights=self.weights[index], alpha=self.alpha[index])

    @classmethod
    def of(cls, weights: Sequence[float] | np.ndarray, alpha: float) -> "Preference":
        """One checked preference, without leading dimensions.

        Args:
            weights: ``K`` non-negative numbers that sum to one.
            alpha: KL weight in ``[0, 1]``.

        Raises:
            ValueError: when either is outside its range.
        """
        checked = validate_weights(weights)
        return cls(weights=jnp.asarray(checked), alpha=jnp.asarray(_validate_alpha(alpha), jnp.float32))


@dataclasses.dataclass(frozen=True)
class AlphaRange:
    """KL weights drawn uniformly from ``[low, high]``."""

    low: float
    high: float

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"AlphaRange(low={self.low}, high={self.high}): expected 0 <= low <= high <= 1.")

    def __call__(self, key: PRNGKeyArray, num: int) -> Float[Array, "num"]:
        """Draws `num` KL weights."""
        return jax.random.uniform(key, (num,), minval=self.low, maxval=self.high)


def _draw_alpha(alpha: AlphaRange | float, key: PRNGKeyArray, num: int) -> Float[Array, "num"]:
    if isinstance(alpha, AlphaRange):
        return alpha(key, num)
    return jnp.full((num,), alpha, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Dirichlet:
    """Weights from a symmetric Dirichlet distribution.

    Attributes:
        num_objectives: ``K``, at least 1.
        concentration: 1 is uniform on the simplex; smaller values favour the corners and separate the components more.
        alpha: a fixed KL weight, or the range it is drawn from.
    """

    num_objectives: int
    concentration: float = 1.0
    alpha: AlphaRange | float = 0.01

    def __post_init__(self):
        _check_count("Dirichlet", self.num_objectives)
        if not self.concentration > 0:
            raise ValueError(f"Dirichlet.concentration is {self.concentration}: expected a positive number.")
        _check_alpha(self.alpha)

    def __call__(self, key: PRNGKeyArray, num: int) -> Preference:
        """Draws `num` preferences; weights ``float32[num, K]``."""
        weights_key, alpha_key = jax.random.split(key)
        concentration = jnp.full((self.num_objectives,), self.concentration, jnp.float32)
        weights = jax.random.dirichlet(weights_key, concentration, (num,))
        return Preference(weights=weights, alpha=_draw_alpha(self.alpha, alpha_key, num))


@dataclasses.dataclass(frozen=True)
class Table:
    """Weights drawn uniformly from a finite table: a grid, a lattice or the corners.

    Attributes:
        weights: the table, ``n`` rows of ``K`` weights.
        alpha: a fixed KL weight, or the range it is drawn from.
        in_order: take the rows in turn, from the first, instead of at random: every row appears equally often in each
            draw, whose size must then be a multiple of ``n``.
    """

    weights: Sequence[Sequence[float]]
    alpha: AlphaRange | float = 0.01
    in_order: bool = False

    def __post_init__(self):
        rows = tuple(tuple(float(x) for x in validate_weights(row)) for row in self.weights)
        if not rows or len({len(row) for row in rows}) != 1:
            raise ValueError(
                f"Table.weights has rows of {sorted({len(r) for r in rows})} weights: expected one length."
            )
        object.__setattr__(self, "weights", rows)
        _check_alpha(self.alpha)

    @property
    def num_objectives(self) -> int:
        """The number of objectives, ``K``."""
        return len(self.weights[0])

    def __call__(self, key: PRNGKeyArray, num: int) -> Preference:
        """Draws `num` preferences; weights ``float32[num, K]``."""
        rows_key, alpha_key = jax.random.split(key)
        table = jnp.asarray(self.weights, jnp.float32)
        if self.in_order:
            if num % table.shape[0]:
                raise ValueError(
                    f"Table.in_order draws all {table.shape[0]} rows in turn: {num} draws are not a multiple of that. "
                    f"Use {table.shape[0]} preference groups per batch, or in_order=False."
                )
            rows = jnp.arange(num) % table.shape[0]
        else:
            rows = jax.random.randint(rows_key, (num,), 0, table.shape[0])
        return Preference(weights=table[rows], alpha=_draw_alpha(self.alpha, alpha_key, num))


def fixed(weights: Sequence[float], alpha: AlphaRange | float = 0.01) -> Table:
    """A sampler that always gives `weights`: finetuning for one trade-off.

    Args:
        weights: ``K`` non-negative numbers that sum to one.
        alpha: a fixed KL weight, or the range it is drawn from.
    """
    return Table(weights=(tuple(weights),), alpha=alpha)


def corner_sampler(num_objectives: int, alpha: AlphaRange | float = 0.01, in_order: bool = True) -> Table:
    """A sampler of the single-objective weights ``e_1 .. e_K``: training the experts only.

    Args:
        num_objectives: ``K``, at least 1.
        alpha: a fixed KL weight, or the range it is drawn from.
        in_order: take the corners in turn.
    """
    rows = tuple(tuple(row) for row in corners(num_objectives).tolist())
    return Table(weights=rows, alpha=alpha, in_order=in_order)


def corners(num_objectives: int) -> Float[np.ndarray, "K K"]:
    """The corners of the simplex, ``e_1 .. e_K``, as rows."""
    _check_count("corners", num_objectives)
    return np.eye(num_objectives, dtype=np.float32)


def simplex_grid(num_points: int = 11) -> Float[np.ndarray, "n 2"]:
    """Evenly spaced weights of two objectives, from ``(0, 1)`` to ``(1, 0)``.

    Args:
        num_points: at least 2.
    """
    if num_points < 2:
        raise ValueError(f"simplex_grid: num_points is {num_points}, expected at least 2.")
    return simplex_lattice(2, num_points - 1)


def simplex_lattice(num_objectives: int, resolution: int) -> Float[np.ndarray, "n K"]:
    """All weights that are multiples of ``1/resolution``, in lexicographic order.

    Args:
        num_objectives: ``K``, at least 1.
        resolution: steps per edge, at least 1; gives ``C(resolution + K - 1, K - 1)`` points.
    """
    _check_count("simplex_lattice", num_objectives)
    if resolution < 1:
        raise ValueError(f"simplex_lattice: resolution is {resolution}, expected at least 1.")
    points = []
    for bars in itertools.combinations(range(resolution + num_objectives - 1), num_objectives - 1):
        edges = (-1, *bars, resolution + num_objectives - 1)
        points.append([right - left - 1 for left, right in itertools.pairwise(edges)])
    return (np.asarray(points, np.float64) / resolution).astype(np.float32)


def validate_weights(
    weights: Sequence[float] | np.ndarray, num_objectives: int | None = None, names: Sequence[str] = ()
) -> Float[np.ndarray, "K"]:
    """Checks reward weights that come from a user.

    Args:
        weights: the numbers as given.
        num_objectives: the ``K`` they must have; any when None.
        names: the objectives' names, for the message.

    Returns:
        ``float32[K]``, non-negative, summing to one.

    Raises:
        ValueError: a wrong number of weights, a negative, infinite or NaN weight, or a sum other than one.
    """
    array = np.asarray(weights, np.float64)
    listed = ",".join(f"{x:g}" for x in array.ravel())
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"weights have shape {array.shape}: expected one row of weights, one per objective.")
    if num_objectives is not None and array.size != num_objectives:
        named = f" ({', '.join(names)})" if names else ""
        raise ValueError(
            f"weights {listed} are {array.size} numbers: expected {num_objectives}, one per objective{named}."
        )
    if not np.all(np.isfinite(array)):
        raise ValueError(f"weights {listed} are not all finite: expected numbers in [0, 1] that sum to 1.")
    if np.any(array < 0):
        raise ValueError(f"weights {listed} contain a negative number: expected numbers in [0, 1] that sum to 1.")
    if abs(array.sum() - 1) > _SUM_TOLERANCE:
        suggestion = "" if array.sum() == 0 else f" (did you mean {','.join(f'{x:.4g}' for x in array / array.sum())}?)"
        raise ValueError(f"weights {listed} sum to {array.sum():g}: expected 1{suggestion}.")
    return array.astype(np.float32)


def kl_beta(alpha: Float[ArrayLike, "..."] | float) -> Float[Array, "..."]:
    """The usual KL coefficient, ``β = α/(1-α)``, of a KL weight in ``[0, 1)``."""
    alpha = jnp.asarray(alpha)
    return alpha / (1 - alpha)


def kl_mixing_weight(alpha: Float[ArrayLike, "..."] | float, alpha_min: float) -> Float[Array, "..."]:
    """The weight ``λ(α) = β_min/β`` of the trained components against the reference (CLP, KL conditioning).

    It makes logit mixing exact: ``log π*_{α,w} = (1-λ) log π_ref + λ Σ_i w_i log π*_{α_min,e_i} + const``.

    Args:
        alpha: KL weights in ``[alpha_min, 1]``.
        alpha_min: the smallest KL weight the components are trained for, in ``(0, 1)``.

    Returns:
        ``λ`` in ``[0, 1]``: 1 at `alpha_min`, exactly 0 at 1.

    Raises:
        ValueError: when `alpha_min` is not in ``(0, 1)``.
    """
    if not 0 < alpha_min < 1:
        raise ValueError(
            f"alpha_min is {alpha_min}: KL conditioning needs a number in (0, 1), for β_min = α/(1-α) > 0."
        )
    alpha = jnp.asarray(alpha, jnp.float32)
    return (1 - alpha) / alpha * (alpha_min / (1 - alpha_min))


def _validate_alpha(alpha: float) -> float:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: expected a KL weight in [0, 1].")
    return float(alpha)


def _check_alpha(alpha: AlphaRange | float) -> None:
    if not isinstance(alpha, AlphaRange):
        _validate_alpha(alpha)


def _check_count(what: str, num_objectives: int) -> None:
    if num_objectives < 1:
        raise ValueError(f"{what}: num_objectives is {num_objectives}, expected at least 1.")
