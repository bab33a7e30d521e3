"""`clp evaluate`: a sweep over reward weights on held-out prompts."""

import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from clp_jax.data.reader import DataSource, prompt_batch
from clp_jax.evaluation.sweep import FILE_NAME, Samples, Sweep, summarise
from clp_jax.evaluation.tables import print_table
from clp_jax.models.conditioning import check_alpha
from clp_jax.preferences import Preference, simplex_lattice, validate_weights
from clp_jax.rewards.protocol import RewardFunction
from clp_jax.rewards.stack import RewardStack, fingerprints
from clp_jax.sampling.devices import Devices
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.score import score
from clp_jax.sampling.steering import Steerable
from clp_jax.training.experience import reward_inputs
from clp_jax.training.places import put_back
from clp_jax.training.policies import (
    LoadedPolicy,
    check_rewards,
    load_logit_mixture,
    load_per_weight,
    load_policy,
    load_soup,
)
from clp_jax.training.progress import Progress
from clp_jax.training.run_directory import make_writable
from clp_jax.training.saved_params import find_intact

METHODS = ("checkpoint", "soup", "mod", "dera", "per_weight")

_EXAMPLES = 8


def evaluate(
    *,
    checkpoint: str | Sequence[str],
    data_dir: str,
    rewards: Sequence[RewardFunction],
    method: str = "checkpoint",
    name: str | None = None,
    alpha: float = 0.05,
    alpha_min: float | None = None,
    resolution: int | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    split: str = "test",
    num_prompts: int = 256,
    batch_size: int = 64,
    max_length: int | None = None,
    seed: int = 0,
    output: str | None = None,
    devices: Devices = Devices(),
) -> Sweep:
    """Sweeps reward weights on held-out prompts and writes ``results.json``.

    Every weight sees the same prompts and the same random numbers, so that differences are the weight's. A sweep that was
    written before with the same settings is not run again; one with other settings is kept under another name.

    Args:
        checkpoint: a run directory; several for the methods that need them.
        data_dir: prepared prompts and reference completions.
        rewards: the reward functions of the run.
        method: ``checkpoint`` (a policy as it was trained), ``soup`` (parameters of experts, one for each objective in
            order, mixed), ``mod`` (their logits mixed), ``dera`` (their logits and the reference's, or those of one
            expert and the reference, realigned to `alpha`), ``per_weight`` (one policy for each of `weights`).
        name: of the method in tables and plots; by default the run directory's.
        alpha: KL weight of the preference, and of the reported value.
        alpha_min: KL weight the experts of ``dera`` were trained with.
        resolution: steps per edge of the weights' lattice; by default 10 for two rewards (11 points), 4 for more.
        weights: a grid to use instead of the lattice.
        split: of the data.
        num_prompts: at most.
        batch_size: prompts at a time.
        max_length: tokens of a completion; by default that of training.
        seed: of the samples.
        output: file to write; by default ``results.json`` in the (first) run directory.
        devices: which of them generate.

    Returns:
        The sweep.

    Raises:
        ValueError: for rewards other than the run's, an unknown method, or weights that are not on the simplex.
    """
    given = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint)
    _check_settings(method, alpha, num_prompts, batch_size, seed)
    paths = [str(find_intact(path)) for path in given]  # Training may go on meanwhile.
    with devices.use(min(batch_size, num_prompts)):
        loaded, steerable = _load(method, paths, alpha_min, weights)
        statistics = check_rewards(paths[0], loaded, rewards)
        check_alpha(loaded.conditioning, alpha)
        names = loaded.objectives
        if resolution is None:
            resolution = 10 if len(names) == 2 else 4
        grid = simplex_lattice(len(names), resolution) if weights is None else weights
        preferences = [Preference.of(validate_weights(row, len(names), names), alpha) for row in grid]
        data = _data(data_dir, split, min(batch_size, num_prompts), loaded)
        config = SamplingConfig(max_length or loaded.max_length or data.manifest.lengths["targets"])
        settings = {
            "checkpoints": paths,
            "name": name,
            "rewards": fingerprints(rewards),
            "data": data.manifest.fingerprint,
            "method": method,
            "alpha": [alpha, alpha_min],
            "weights": [[float(x) for x in p.weights] for p in preferences],
            "prompts": [split, num_prompts, batch_size],
            "max_length": config.max_length,
            "seed": seed,
        }
        target = Path(output) if output else loaded.run_dir / FILE_NAME
        make_writable(target.parent)  # Before the sweep, which would be lost.
        sweep = _earlier(target, settings)
        if sweep is None:
            worker = _Worker(loaded, steerable, RewardStack(rewards, statistics), data, num_prompts, config, seed)
            sweep = summarise(
                method=name or (loaded.run_dir.name if method == "checkpoint" else method),
                objectives=names,
                alpha=alpha,
                reference_mean=statistics.mean,
                reference_std=statistics.std,
                samples=worker.at_all(preferences),
                prompts=worker.prompts[:_EXAMPLES],
                references=worker.references[:_EXAMPLES],
                decode_calls_per_token=steerable.decode_calls_per_token,
                seed=seed,
                settings=settings,
            )
            _keep(sweep, target)
    print_table(sweep, Console())
    print(f"results: {target}", file=sys.stderr)
    return sweep


def _data(directory: str, split: str, batch_size: int, loaded: LoadedPolicy) -> DataSource:
    pad_id = loaded.policy.config.pad_id
    return DataSource(directory, split, batch_size=batch_size, converter=prompt_batch, pad_id=pad_id)


def _check_settings(method: str, alpha: float, num_prompts: int, batch_size: int, seed: int) -> None:
    if num_prompts < 1 or batch_size < 1:
        raise ValueError(f"evaluate: num_prompts={num_prompts}, batch_size={batch_size}: expected at least 1.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"evaluate: seed is {seed}: expected a whole number in [0, 2**32).")
    if method == "dera" and not 0 < alpha <= 1:
        raise ValueError(f"evaluate: alpha is {alpha}: method dera expects a KL weight in (0, 1].")


def _load(
    method: str, paths: Sequence[str], alpha_min: float | None, weights: Sequence[Sequence[float]] | None
) -> tuple[LoadedPolicy, Steerable]:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}.")
    if method == "soup":
        loaded = load_soup(paths)
        return loaded, loaded.steerable()
    if method == "mod":
        return load_logit_mixture(paths)
    if method == "dera":
        if alpha_min is None:
            raise ValueError("method dera needs alpha_min, the KL weight the experts were trained with.")
        return load_logit_mixture(paths, alpha_min)
    if method == "per_weight":
        if weights is None:
            raise ValueError("method per_weight needs weights, one row for each checkpoint.")
        return load_per_weight(paths, weights)
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} checkpoints: a policy is one; soup, mod, dera and per_weight take several.")
    loaded = load_policy(paths[0])
    return loaded, loaded.steerable()


def _keep(sweep: Sweep, target: Path) -> None:
    sweep.save(target)
    put_back(target)


def _earlier(target: Path, settings: dict[str, Any]) -> Sweep | None:
    """The sweep in `target`, if these settings made it; a sweep of other settings is moved out of the way."""
    if not target.is_file():
        return None
    with contextlib.suppress(ValueError):  # A damaged file is kept, and made again.
        sweep = Sweep.load(target)
        if sweep.settings == settings:
            print(f"{target} was made with these settings: nothing to do.", file=sys.stderr)
            return sweep
    number = next(n for n in itertools.count(1) if not target.with_stem(f"{target.stem}-{n}").exists())
    kept = target.rename(target.with_stem(f"{target.stem}-{number}"))
    print(f"the earlier results, of other settings, are kept as {kept}.", file=sys.stderr)
    return None


class _Worker:
    """Generates and scores the same prompts at one preference after another, with programs compiled once."""

    def __init__(
        self,
        loaded: LoadedPolicy,
        steerable: Steerable,
        rewards: RewardStack,
        data: DataSource,
        num_prompts: int,
        config: SamplingConfig,
        seed: int,
    ):
        self._loaded = loaded
        self._steerable = steerable
        self._rewards = rewards
        self._batches = list(data.epoch_batches(num_prompts))
        self._config = config
        self._key = jax.random.key(seed)
        self._score = jax.jit(lambda params, inputs, tokens: score(loaded.served.bind(params), inputs, tokens))
        decode = loaded.vocabulary.decode_batch
        self.prompts = [t for b in self._batches for t in decode(b.inputs[b.example_ids >= 0])]
        self.tokens_per_preference = len(self._batches) * data.batch_size * config.max_length
        self.references = [t for b in self._batches for t in decode(b.targets[b.example_ids >= 0])]

    def at_all(self, preferences: Sequence[Preference]) -> list[Samples]:
        """Completions at each preference, with progress."""
        samples = []
        with Progress("evaluating", len(preferences), 0, self.tokens_per_preference, unit="weights") as progress:
            for done, preference in enumerate(preferences, start=1):
                samples.append(self._at(preference))
                progress.update(done, f"KL {samples[-1].kl.mean():.2f}")
        return samples

    def _at(self, preference: Preference) -> Samples:
        """Completions at one preference."""
        rewards, kls, lengths = [], [], []
        texts: list[str] = []
        for number, batch in enumerate(self._batches):
            key = jax.random.fold_in(self._key, number)
            out = self._steerable.generate(batch.inputs, preference, key, self._config)
            reference = self._score(self._loaded.reference, batch.inputs, out.tokens)
            real = batch.example_ids >= 0  # Reward functions do not see what fills a last batch up.
            tokens = np.asarray(out.tokens)[real]
            inputs = reward_inputs(self._loaded.vocabulary, batch.inputs[real], batch.targets[real], tokens)
            rewards.append(self._rewards(inputs))
            kls.append(np.asarray((out.log_probs - reference).sum(-1))[real])
            lengths.append(np.asarray(out.mask.sum(-1))[real])
            texts += inputs.completions
        return Samples(
            weights=tuple(float(x) for x in preference.weights),
            rewards=np.concatenate(rewards),
            kl=np.concatenate(kls),
            length=np.concatenate(lengths),
            completions=tuple(texts[:_EXAMPLES]),
        )
