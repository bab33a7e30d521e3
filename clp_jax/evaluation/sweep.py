"""What a sweep over preferences found, and how steerable the policy is: the content of ``results.json``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.array_types import Float
from clp_jax.evaluation.pareto import hypervolume, non_dominated
from clp_jax.evaluation.statistics import Interval, bootstrap, rank_correlation

FILE_NAME = "results.json"
VERSION = 1

# In units of the reference policy's standard deviation, below its mean: fixed before any front is known.
REFERENCE_POINT = -2.0


@dataclasses.dataclass(frozen=True)
class Samples:
    """Completions at one preference, one row a prompt.

    Attributes:
        weights: reward weights.
        rewards: ``float[n, K]``, standardised by the reference policy's statistics.
        kl: ``float[n]``, sampled KL to the reference of each completion, in nats.
        length: ``float[n]``, tokens.
        completions: texts of the first few prompts.
    """

    weights: tuple[float, ...]
    rewards: Float[np.ndarray, "n K"]
    kl: Float[np.ndarray, "n"]
    length: Float[np.ndarray, "n"]
    completions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the front.

    Attributes:
        weights: reward weights.
        rewards: by objective, standardised.
        raw_rewards: by objective, as the reward function gives them.
        kl: to the reference, in nats a completion.
        length: in tokens.
        value: of the objective ``(1-α) w·r - α KL``.
        non_dominated: whether no other point is at least as good in every reward and better in one.
    """

    weights: tuple[float, ...]
    rewards: dict[str, Interval]
    raw_rewards: dict[str, float]
    kl: Interval
    length: Interval
    value: float
    non_dominated: bool


@dataclasses.dataclass(frozen=True)
class Steerability:
    """How well a weight moves its reward.

    Attributes:
        rank_correlation: Spearman's, between ``w_k`` and reward ``k`` over the points.
        range: largest minus smallest mean reward, in standard deviations of the reference policy.
    """

    rank_correlation: float
    range: float


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt at every point.

    Attributes:
        prompt: the document.
        reference: its reference completion.
        completions: one for each point.
    """

    prompt: str
    reference: str
    completions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A method's front and its figures.

    Attributes:
        method: its name.
        objectives: names.
        alpha: KL weight.
        reference_mean: raw rewards' means under the reference policy.
        reference_std: their standard deviations.
        points: in the grid's order.
        hypervolume: above `REFERENCE_POINT` in every standardised reward.
        mean_value: of the objective, over the points.
        steerability: by objective.
        examples: a few prompts.
        num_prompts: evaluated.
        decode_calls_per_token: models called for every token.
        settings: what made it, to recognise it again.
    """

    method: str
    objectives: tuple[str, ...]
    alpha: float
    reference_mean: tuple[float, ...]
    reference_std: tuple[float, ...]
    points: tuple[Point, ...]
    hypervolume: float
    mean_value: float
    steerability: dict[str, Steerability]
    examples: tuple[Example, ...]
    num_prompts: int
    decode_calls_per_token: int = 1
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def means(self) -> Float[np.ndarray, "n K"]:
        """Mean standardised rewards, one point a row."""
        return np.asarray([[point.rewards[name].mean for name in self.objectives] for point in self.points])

    def save(self, path: str | Path) -> None:
        """Writes ``results.json``."""
        content = {"version": VERSION} | dataclasses.asdict(self)
        partial = Path(path).with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Sweep":
        """Reads what `save` wrote.

        Args:
            path: a file, or a run directory that holds ``results.json``.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is damaged, or of another version.
        """
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no results at {path}: run `clp evaluate` first.")
        try:
            return _parse(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a results file of `clp evaluate`: {error}.") from None


def summarise(
    *,
    method: str,
    objectives: Sequence[str],
    alpha: float,
    reference_mean: Sequence[float],
    reference_std: Sequence[float],
    samples: Sequence[Samples],
    prompts: Sequence[str],
    references: Sequence[str],
    decode_calls_per_token: int = 1,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Sweep:
    """The figures of a sweep.

    Args:
        method: its name.
        objectives: names of the ``K`` rewards.
        alpha: KL weight of the sweep.
        reference_mean: of the raw rewards under the reference policy.
        reference_std: of the same.
        samples: one for each preference; rows are the same prompts in all.
        prompts: the documents of the kept completions.
        references: their reference completions.
        decode_calls_per_token: models called for every token.
        seed: of the bootstrap.
        settings: what made the samples.
    """
    means = np.asarray([s.rewards.mean(0, dtype=np.float64) for s in samples])  # As the intervals' means are.
    weights = np.asarray([s.weights for s in samples])
    kept = non_dominated(means)
    points = []
    for s, mean, best in zip(samples, means, kept, strict=True):
        value = (1 - alpha) * float(np.dot(s.weights, mean)) - alpha * float(s.kl.mean(dtype=np.float64))
        points.append(
            Point(
                weights=tuple(float(x) for x in s.weights),
                rewards={n: bootstrap(s.rewards[:, k], seed=seed) for k, n in enumerate(objectives)},
                raw_rewards={
                    n: float(mean[k] * reference_std[k] + reference_mean[k]) for k, n in enumerate(objectives)
                },
                kl=bootstrap(s.kl, seed=seed),
                length=bootstrap(s.length, seed=seed),
                value=value,
                non_dominated=bool(best),
            )
        )
    steerability = {
        name: Steerability(rank_correlation(weights[:, k], means[:, k]), float(np.ptp(means[:, k])))
        for k, name in enumerate(objectives)
    }
    return Sweep(
        method=method,
        objectives=tuple(objectives),
        alpha=float(alpha),
        reference_mean=tuple(map(float, reference_mean)),
        reference_std=tuple(map(float, reference_std)),
        points=tuple(points),
        hypervolume=hypervolume(means, np.full(len(objectives), REFERENCE_POINT)),
        mean_value=float(np.mean([point.value for point in points])),
        steerability=steerability,
        examples=tuple(
            Example(prompt, reference, tuple(s.completions[i] for s in samples))
            for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
        ),
        num_prompts=len(samples[0].rewards),
        decode_calls_per_token=decode_calls_per_token,
        settings=settings or {},
    )


def _parse(content: dict[str, Any]) -> Sweep:
    version = content.pop("version", None)
    if version != VERSION:
        raise ValueError(f"version {version}, expected {VERSION}")
    points = tuple(
        Point(
            weights=tuple(p["weights"]),
            rewards={name: Interval(**value) for name, value in p["rewards"].items()},
            raw_rewards=p["raw_rewards"],
            kl=Interval(**p["kl"]),
            length=Interval(**p["length"]),
            value=p["value"],
            non_dominated=p["non_dominated"],
        )
        for p in content.pop("points")
    )
    steerability = {name: Steerability(**value) for name, value in content.pop("steerability").items()}
    examples = tuple(Example(e["prompt"], e["reference"], tuple(e["completions"])) for e in content.pop("examples"))
    lists: dict[str, Any] = {
        name: tuple(content.pop(name)) for name in ("objectives", "reference_mean", "reference_std")
    }
    return Sweep(points=points, steerability=steerability, examples=examples, **lists, **content)
