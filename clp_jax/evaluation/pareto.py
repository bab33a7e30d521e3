"""Fronts: the non-dominated points and the volume they dominate. Every objective is maximised."""

import numpy as np

from clp_jax.array_types import Bool, Float


def non_dominated(points: Float[np.ndarray, "n K"]) -> Bool[np.ndarray, "n"]:
    """Which points no other dominates; without slack, equal points keep each other.

    Args:
        points: one a row. A point dominates another if it is at least as good everywhere and better somewhere.
    """
    points = np.asarray(points, np.float64)
    _check(points)
    at_least = (points[:, None] >= points[None]).all(-1)
    better = (points[:, None] > points[None]).any(-1)
    return np.asarray(~(at_least & better).any(0))


def hypervolume(points: Float[np.ndarray, "n K"], reference_point: Float[np.ndarray, "K"]) -> float:
    """The volume that the points dominate above a reference point, exactly, for any number of objectives.

    Slices along the last objective (HSO; While et al., 2006): the front of a slab is the front of the points above it.

    Args:
        points: one a row; what does not exceed the reference point everywhere adds nothing.
        reference_point: fixed before the points were known, or the volumes of two methods can't be compared.
    """
    points = np.asarray(points, np.float64)
    _check(points)
    reference_point = np.asarray(reference_point, np.float64)
    if reference_point.shape != (points.shape[1],):
        raise ValueError(f"the reference point has shape {reference_point.shape}: expected {points.shape[1]} numbers.")
    gains = points - reference_point
    return _volume(gains[(gains > 0).all(-1)])


def _volume(points: Float[np.ndarray, "n K"]) -> float:
    """The volume between the origin and positive points."""
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.unique(points, axis=0, return_index=True)[1]]
    points = points[non_dominated(points)]
    if points.shape[1] == 2:
        points = points[np.argsort(-points[:, 0])]
        heights = np.diff(points[:, 1], prepend=0.0)
        return float(np.sum(points[:, 0] * np.maximum(heights, 0.0)))
    levels = np.unique(points[:, -1])
    thickness = np.diff(levels, prepend=0.0)
    return sum(float(t) * _volume(points[points[:, -1] >= z, :-1]) for z, t in zip(levels, thickness, strict=True))


def _check(points: np.ndarray) -> None:
    if points.ndim != 2 or not np.all(np.isfinite(points)):
        raise ValueError(f"points have shape {points.shape}: expected finite numbers, points by objectives.")
