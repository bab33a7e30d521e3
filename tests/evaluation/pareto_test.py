"""Fronts by definition, and hypervolume against inclusion-exclusion and against a grid of unit cubes."""

import inspect
import itertools

import numpy as np
import pytest

from clp_jax.evaluation.pareto import hypervolume, non_dominated


def by_inclusion_exclusion(points, reference):
    """The volume of the union of boxes: sums over all subsets of the volume of their intersection, with signs."""
    gains = np.maximum(np.asarray(points, np.float64) - reference, 0)
    subsets = (s for size in range(1, len(gains) + 1) for s in itertools.combinations(range(len(gains)), size))
    return sum((-1) ** (len(s) + 1) * gains[list(s)].min(0).prod() for s in subsets)


def by_counting(points, reference, size):
    """Unit cubes of an integer grid that some point dominates."""
    corners = np.stack(np.meshgrid(*[np.arange(low, low + size) for low in reference], indexing="ij"), -1)
    return np.any([(corners < point).all(-1) for point in points], axis=0).sum()


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_is_the_volume_of_the_union(objectives, seed):
    rng = np.random.default_rng([objectives, seed])
    points, reference = rng.normal(size=(9, objectives)), np.full(objectives, -0.5)
    np.testing.assert_allclose(
        hypervolume(points, reference), by_inclusion_exclusion(points, reference), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_on_a_grid_with_ties(objectives):
    """Integers: most coordinates are shared, whole points repeat, and some lie on or below the reference point."""
    rng = np.random.default_rng(objectives)
    points, reference = rng.integers(-1, 5, (14, objectives)), np.full(objectives, -1)
    points[1] = points[0]
    assert hypervolume(points.astype(float), reference.astype(float)) == by_counting(points, reference, 7)


def test_hypervolume_of_known_fronts():
    zero = np.zeros(2)
    assert hypervolume(np.asarray([[2.0, 3.0]]), zero) == 6
    assert hypervolume(np.asarray([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]), zero) == 6
    assert hypervolume(np.asarray([[1.0, -1.0], [0.0, 5.0]]), zero) == 0
    assert hypervolume(np.empty((0, 2)), zero) == 0
    # Concave fronts and dominated points in between.
    assert hypervolume(np.asarray([[3.0, 1.0], [1.0, 3.0], [1.0, 1.0], [0.5, 0.5]]), zero) == 5


def test_hypervolume_moves_with_the_reference_point_and_never_shrinks():
    rng = np.random.default_rng(7)
    points, reference = rng.normal(size=(6, 3)), np.full(3, -2.0)
    np.testing.assert_allclose(hypervolume(points + 5, reference + 5), hypervolume(points, reference), rtol=1e-12)
    np.testing.assert_allclose(hypervolume(points * 2, reference * 2), 8 * hypervolume(points, reference), rtol=1e-12)
    volumes = [hypervolume(points[:n], reference) for n in range(1, 7)]
    assert all(b >= a for a, b in itertools.pairwise(volumes))
    np.testing.assert_allclose(hypervolume(points[:, [2, 0, 1]], reference), volumes[-1], rtol=1e-12)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_non_dominated_by_definition(objectives):
    points = np.random.default_rng(objectives).integers(0, 4, (20, objectives)).astype(float)
    expected = [not any(all(q >= p) and any(q > p) for q in points) for p in points]
    np.testing.assert_array_equal(non_dominated(points), expected)


def test_there_is_no_slack_and_equal_points_keep_each_other():
    tiny = np.nextafter(1.0, 2)
    points = np.asarray([[1.0, 1.0], [1.0, tiny], [1.0, 1.0], [tiny, 1.0], [tiny, 1.0]])
    np.testing.assert_array_equal(non_dominated(points), [False, True, False, True, True])
    np.testing.assert_array_equal(non_dominated(np.asarray([[1.0, 1.0], [1.0, 1.0]])), [True, True])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    points = np.asarray([[0.0, bad]])
    with pytest.raises(ValueError, match=r"points have shape \(1, 2\): expected finite numbers"):
        non_dominated(points)
    with pytest.raises(ValueError, match="expected finite numbers"):
        hypervolume(points, np.zeros(2))


def test_the_reference_point_has_one_number_for_each_objective():
    with pytest.raises(ValueError, match=r"reference point has shape \(3,\): expected 2 numbers"):
        inspect.unwrap(hypervolume)(np.zeros((1, 2)), np.zeros(3))  # As users run it, without checked annotations.
