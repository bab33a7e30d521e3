"""`clp experiment`: conditioning methods and baselines at one total budget, over seeds."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from clp_jax.array_types import Params
from clp_jax.evaluate import evaluate
from clp_jax.evaluation.aggregate import format_interval, markdown_table, mean_sweep, paired_difference, summarise_seeds
from clp_jax.evaluation.report import write_report
from clp_jax.evaluation.sweep import Sweep
from clp_jax.models.conditioning import Conditioning, Unconditioned
from clp_jax.preferences import AlphaRange, corners, fixed, simplex_lattice
from clp_jax.rewards.stack import objective_names
from clp_jax.train import train
from clp_jax.training.clp import ConditionalPolicy, WrittenPreference
from clp_jax.training.optimizers import OptimizerConfig
from clp_jax.training.policies import load_policy, load_soup
from clp_jax.training.run_directory import CONFIG_FILE, write_atomically


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a method.

    Attributes:
        name: of its directory.
        stage: what is trained.
        num_steps: its share of the budget.
    """

    name: str
    stage: ConditionalPolicy
    num_steps: int


@runtime_checkable
class Method(Protocol):
    """A way to get a front out of a budget of reinforcement learning steps."""

    def runs(self, stage: ConditionalPolicy, num_steps: int) -> list[Run]:
        """The runs that spend the budget together."""

    def sweeps(self, num_objectives: int) -> dict[str, dict[str, object]]:
        """Arguments of `clp_jax.evaluate.evaluate` for each front that the runs give, by name."""


@dataclasses.dataclass(frozen=True)
class Conditioned:
    """One steerable policy, trained for the whole budget.

    Attributes:
        name: of the method.
        conditioning: how the preference enters it.
    """

    name: str
    conditioning: Conditioning | WrittenPreference

    def runs(self, stage: ConditionalPolicy, num_steps: int) -> list[Run]:
        """See `Method`."""
        return [Run(self.name, dataclasses.replace(stage, conditioning=self.conditioning), num_steps)]

    def sweeps(self, num_objectives: int) -> dict[str, dict[str, object]]:
        """See `Method`."""
        return {self.name: {"method": "checkpoint"}}


@dataclasses.dataclass(frozen=True)
class Experts:
    """One ordinary policy for each reward, each with an equal share of the budget, combined afterwards.

    Attributes:
        methods: how: ``soup`` (parameters) and ``mod`` (logits); both use the same experts.
    """

    methods: Sequence[str] = ("soup", "mod")

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in ("soup", "mod")]
        if unknown or not self.methods:
            raise ValueError(
                f"Experts.methods are {', '.join(map(repr, self.methods))}: expected 'soup' or 'mod', or both."
            )

    def runs(self, stage: ConditionalPolicy, num_steps: int) -> list[Run]:
        """See `Method`."""
        count = len(objective_names(stage.rewards))
        return [_fixed_run(stage, f"expert_{i}", w, num_steps // count) for i, w in enumerate(corners(count).tolist())]

    def sweeps(self, num_objectives: int) -> dict[str, dict[str, object]]:
        """See `Method`."""
        return {method: {"method": method} for method in self.methods}


@dataclasses.dataclass(frozen=True)
class PerWeight:
    """One ordinary policy for each weight of a lattice, each with an equal share of the budget: the oracle.

    Attributes:
        resolution: steps per edge of the lattice.
    """

    resolution: int = 4

    def runs(self, stage: ConditionalPolicy, num_steps: int) -> list[Run]:
        """See `Method`."""
        rows = self._weights(len(objective_names(stage.rewards)))
        return [_fixed_run(stage, f"weight_{i}", row, num_steps // len(rows)) for i, row in enumerate(rows)]

    def sweeps(self, num_objectives: int) -> dict[str, dict[str, object]]:
        """See `Method`."""
        return {"per_weight": {"method": "per_weight", "weights": self._weights(num_objectives)}}

    def _weights(self, num_objectives: int) -> list[list[float]]:
        return simplex_lattice(num_objectives, self.resolution).tolist()


def experiment(
    *,
    output_dir: str,
    stage: ConditionalPolicy,
    optimizer: OptimizerConfig,
    methods: Sequence[Method],
    num_steps: int,
    num_seeds: int = 5,
    alpha: float = 0.05,
    num_prompts: int = 256,
    baseline: str = "soup",
    config_text: str = "",
) -> str:
    """Trains and evaluates methods at one total budget over several seeds, and compares their fronts.

    Every method spends `num_steps` batches in all: one steerable policy takes them all, ``K`` experts share them. Killed
    and started again, it goes on where it was.

    Args:
        output_dir: where all runs, ``experiment.md``, ``experiment.json`` and ``report/`` go.
        stage: what the methods have in common; its conditioning and, for experts, its preferences are replaced.
        optimizer: of every run.
        methods: to compare.
        num_steps: batches in all, for each method and seed.
        num_seeds: runs of each method.
        alpha: KL weight of every preference.
        num_prompts: of the test split.
        baseline: the front that the others' differences are taken from.
        config_text: the resolved configuration, stored in `output_dir`.

    Returns:
        The path of ``experiment.md``.

    Raises:
        ValueError: for two fronts of one name, an unknown baseline, or a budget too small to share.
    """
    if num_seeds < 1:
        raise ValueError(f"experiment: num_seeds is {num_seeds}: expected at least 1.")
    count = len(objective_names(stage.rewards))
    plan = [(method, method.runs(stage, num_steps), method.sweeps(count)) for method in methods]
    names = [name for _, _, sweeps in plan for name in sweeps]
    if len(set(names)) != len(names) or baseline not in names:
        raise ValueError(
            f"experiment: fronts {', '.join(names)}: expected different names, and {baseline!r} among them."
        )
    if any(run.num_steps < 1 for _, runs, _ in plan for run in runs):
        raise ValueError(f"experiment: {num_steps} steps are too few to share between the runs of a method.")
    root = Path(output_dir)
    fronts: dict[str, list[Sweep]] = {name: [] for name in names}
    separation: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        for _, runs, sweeps in plan:
            paths = [_train(root, run, optimizer, seed) for run in runs]
            write_atomically(root / CONFIG_FILE, config_text)  # Runs of another configuration would have refused it.
            for name, arguments in sweeps.items():
                print(f"experiment: {name}, seed {seed} of {num_seeds}", file=sys.stderr)
                fronts[name].append(_evaluate(root, name, seed, paths, stage, alpha, num_prompts, arguments))
                copies = _copies(paths, arguments)
                if copies is not None:
                    separation.setdefault(name, []).append(component_separation(*copies))
    return _write(root, fronts, separation, baseline)


def component_separation(components: Params, reference: Params) -> float:
    """How far the components are from each other, against how far they are from where they started.

    Args:
        components: leaves ``[K, ...]``, or ``[...]`` where all share one.
        reference: leaves ``[...]``.

    Returns:
        The root mean square distance between pairs of components over that of components from the reference, of all
        leaves with copies: 0 when they stayed together, √2 when they went apart at right angles, 2 when in opposite
        directions (for two).
    """
    between = moved = 0.0
    for copies, start in zip(jax.tree.leaves(components), jax.tree.leaves(reference), strict=True):
        if copies.ndim == start.ndim:
            continue
        deltas = np.asarray(copies, np.float64).reshape(copies.shape[0], -1) - np.asarray(start, np.float64).reshape(
            1, -1
        )
        k = len(deltas)
        pairs = [np.sum((deltas[i] - deltas[j]) ** 2) for i in range(k) for j in range(i)]
        between += float(np.mean(pairs))
        moved += float(np.mean(np.sum(deltas**2, axis=1)))
    return float(np.sqrt(between / moved)) if moved else 0.0


def _fixed_run(stage: ConditionalPolicy, name: str, weights: Sequence[float], num_steps: int) -> Run:
    sampler = fixed(weights, _alpha_of(stage))
    return Run(name, dataclasses.replace(stage, conditioning=Unconditioned(), preferences=sampler), num_steps)


def _alpha_of(stage: ConditionalPolicy) -> "float | AlphaRange":
    return getattr(stage.preferences, "alpha", 0.05)


def _train(root: Path, run: Run, optimizer: OptimizerConfig, seed: int) -> str:
    stage = run.stage
    path = root / run.name / f"seed_{seed}"
    # What decides the run, and nothing else: more seeds or methods leave finished runs valid.
    text = {
        "initial_checkpoint": stage.initial_checkpoint,
        "data_dir": stage.data_dir,
        "rewards": objective_names(stage.rewards),
        "conditioning": repr(stage.conditioning),
        "preferences": repr(stage.preferences),
        "estimator": repr(stage.estimator),
        "batch": [stage.batch_size, stage.num_samples, stage.num_groups, stage.num_chunks, stage.max_length],
        "statistics_prompts": stage.statistics_prompts,
        "budget": run.num_steps,  # A longer run of an earlier experiment is another run.
        "optimizer": repr(optimizer),
        "seed": seed,
    }
    config = "".join(f"{name} = {value!r}\n" for name, value in text.items())
    train(run_dir=path, stage=stage, optimizer=optimizer, num_steps=run.num_steps, seed=seed, config_text=config)
    return str(path)


def _evaluate(
    root: Path,
    name: str,
    seed: int,
    paths: Sequence[str],
    stage: ConditionalPolicy,
    alpha: float,
    num_prompts: int,
    arguments: dict[str, object],
) -> Sweep:
    (root / "fronts").mkdir(parents=True, exist_ok=True)
    return evaluate(
        checkpoint=paths,
        data_dir=stage.data_dir,
        rewards=stage.rewards,
        name=name,
        alpha=alpha,
        num_prompts=num_prompts,
        output=str(root / "fronts" / f"{name}_{seed}.json"),
        **arguments,  # type: ignore[arg-type]
    )


def _copies(paths: Sequence[str], arguments: dict[str, object]) -> tuple[Params, Params] | None:
    if arguments["method"] == "soup":
        soup = load_soup(paths)
        return soup.params, soup.reference
    if arguments["method"] != "checkpoint":
        return None
    loaded = load_policy(paths[0])
    pairs = zip(jax.tree.leaves(loaded.params), jax.tree.leaves(loaded.reference), strict=True)
    return (loaded.params, loaded.reference) if any(a.ndim > b.ndim for a, b in pairs) else None


def _finite(content: Any) -> Any:
    """JSON has no infinities: bounds that one seed does not give are null."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(root: Path, fronts: dict[str, list[Sweep]], separation: dict[str, list[float]], baseline: str) -> str:
    summaries = [summarise_seeds(sweeps) for sweeps in fronts.values()]
    differences = {
        f"{figure.replace('_', ' ')} − {baseline}'s": {
            name: format_interval(paired_difference(sweeps, fronts[baseline], figure))
            for name, sweeps in fronts.items()
            if name != baseline
        }
        for figure in ("hypervolume", "mean_value")
    }
    apart = {"separation": {name: f"{np.mean(values):.2f}" for name, values in separation.items()}}
    table = markdown_table(summaries, differences | apart)
    content = {"summaries": [dataclasses.asdict(s) for s in summaries], "separation": separation}
    (root / "experiment.json").write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
    page = root / "experiment.md"
    page.write_text(table, encoding="utf-8")
    report = write_report(
        [mean_sweep(sweeps) for sweeps in fronts.values()], [], root / "report", "95 % Student intervals over seeds"
    )
    console = Console(width=max(120, int(os.environ.get("COLUMNS", "0") or 0)))
    console.print(Markdown(table))
    console.print(f"table: {page}\nreport: {report}")
    return str(page)
