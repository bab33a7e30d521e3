"""Rollouts: a batch of prompts, completions sampled at given preferences, and their log-probabilities."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int, Params, PRNGKeyArray
from clp_jax.models.conditioning import Conditioning
from clp_jax.models.policy import Policy
from clp_jax.partitioning import Rules, active_rules, constrain, constrain_mixed, constrain_tree, use_groups, use_rules
from clp_jax.preferences import Preference
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import Completions, SamplingConfig, generate, row_keys
from clp_jax.sampling.score import score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Prompts and completions; ``n`` rows a prompt, prompt-major, ``R = B·n`` rows in all.

    Attributes:
        inputs: ``int32[B, S]`` prompts, padded with 0, without what conditioning adds to them.
        tokens: ``int32[R, T]`` completions, up to and including the end of sequence, then 0.
        mask: ``float32[R, T]`` 1 on the completion, 0 on the padding.
        log_probs: ``float32[R, T]`` of the policy that sampled them, at temperature 1.
        reference_log_probs: ``float32[R, T]`` of the frozen reference.
        preference: one for each row: weights ``float32[R, K]``, alpha ``float32[R]``.
    """

    inputs: Int[Array, "B S"]
    tokens: Int[Array, "R T"]
    mask: Float[Array, "R T"]
    log_probs: Float[Array, "R T"]
    reference_log_probs: Float[Array, "R T"]
    preference: Preference


def over_groups(function: Callable[..., Any], num_groups: int, mapped: tuple[Any, ...], *shared: Any) -> Any:
    """Calls ``function(*one_group, *shared)`` for every group of rows.

    Args:
        function: works on one group: rows ``[rows / num_groups, ...]``.
        num_groups: divides the leading dimension of every leaf of `mapped`.
        mapped: trees whose leaves lead with rows, group by group; a one-preference-per-group tree leads with groups.
        *shared: trees that all groups share.

    Returns:
        What `function` returns, rows of all groups again in one leading dimension.
    """
    if num_groups == 1:  # A vmap of size one would turn every matrix product into a batched one.
        return function(*mapped, *shared)
    grouped = jax.tree.map(lambda x: x.reshape(num_groups, x.shape[0] // num_groups, *x.shape[1:]), mapped)
    structures: list[Any] = []

    def leaves_of(rows: tuple[Any, ...]) -> list[Array]:
        # Leaves, because what `function` returns is not valid with a dimension of groups: its arrays have one too many.
        leaves, structure = jax.tree.flatten(function(*rows, *shared))
        structures.append(structure)
        return leaves

    with use_groups(num_groups) as axes:
        grouped = jax.tree.map(lambda x: constrain(x, "group", *[None] * (x.ndim - 1)), grouped)
        leaves = jax.vmap(leaves_of, spmd_axis_name=axes or None)(grouped)
    return structures[0].unflatten([x.reshape(-1, *x.shape[2:]) for x in leaves])


@dataclasses.dataclass(frozen=True)
class RolloutWorker:
    """Samples completions of a steerable policy and scores them under the reference; pure, for use inside `jit`.

    Attributes:
        policy: the policy.
        conditioning: how the preference enters it.
        config: maximum length and strategy; temperature 1 samples the policy itself.
        num_samples: completions of each prompt, ``n``.
        num_groups: preferences in a batch; each is mixed once and serves ``B / num_groups`` prompts.
        rules: where arrays live in the meantime, on the mesh of training; None leaves parameters where they are. The reference
            scores by them, too. A loop over tokens reads every parameter for each token: gathered before it, or split so that
            each device reads its own part, they do not travel for each of them.
    """

    policy: Policy
    conditioning: Conditioning
    config: SamplingConfig
    num_samples: int = 1
    num_groups: int = 1
    rules: Rules | None = None

    def __post_init__(self):
        if self.num_samples < 1 or self.num_groups < 1:
            raise ValueError(
                f"RolloutWorker: num_samples={self.num_samples}, num_groups={self.num_groups}: expected at least 1."
            )

    def __call__(
        self,
        params: Params,
        reference: Params,
        inputs: Int[Array, "B S"],
        preference: Preference,
        key: PRNGKeyArray,
    ) -> Rollout:
        """Rolls out one batch.

        Args:
            params: the policy's expanded parameters.
            reference: the frozen reference's parameters.
            inputs: ``int32[B, S]`` prompts.
            preference: one for each group, leading dimension ``[num_groups]``.
            key: decides the samples; row ``i`` sees ``fold_in(key, i)``.

        Raises:
            ValueError: when the batch does not divide into the groups.
        """
        per_prompt = self._per_prompt(inputs, preference)
        keys = row_keys(key, inputs.shape[0] * self.num_samples)

        home = active_rules()

        def one_group(inputs, preference, keys, params, reference) -> Completions:
            decoder, inputs = self._decoder(params, reference, inputs, preference, home)
            return generate(decoder, inputs, keys=keys, config=self.config, num_samples=self.num_samples)

        with use_rules(self.rules):
            out = over_groups(one_group, self.num_groups, (inputs, per_prompt, keys), params, reference)
            reference_log_probs = score(self.policy.bind(reference), inputs, out.tokens)
        return Rollout(
            inputs=inputs,
            tokens=out.tokens,
            mask=out.mask,
            log_probs=out.log_probs,
            reference_log_probs=reference_log_probs,
            preference=jax.tree.map(lambda x: jnp.repeat(x, self.num_samples, axis=0), per_prompt),
        )

    def prefill(self, params: Params, reference: Params, inputs: Int[Array, "B S"], preference: Preference) -> Any:
        """What a rollout does before its first token: mixes the policy, reads the prompts and fills the cache.

        Args:
            params: as for a rollout.
            reference: likewise.
            inputs: likewise.
            preference: likewise.

        Returns:
            The first tokens and the decoder's state, for each group.
        """

        home = active_rules()

        def one_group(inputs, preference, params, reference) -> Any:
            decoder, inputs = self._decoder(params, reference, inputs, preference, home)
            return decoder.start(inputs, self.config.max_length, self.num_samples)

        mapped = (inputs, self._per_prompt(inputs, preference))
        with use_rules(self.rules):
            return over_groups(one_group, self.num_groups, mapped, params, reference)

    def _decoder(
        self, params: Params, reference: Params, inputs: Array, preference: Preference, home: Rules | None
    ) -> Any:
        """The policy at a group's preference, and the prompts as it reads them; `home` is where its parameters are."""
        mixed = self.conditioning.mix(params, reference, preference[0])
        if self.rules is None:
            mixed = constrain_mixed(mixed, self.policy.logical_axes())
        else:
            axes = self.policy.logical_axes()
            with use_rules(home):  # Mixed first: the components stay at home, and one policy travels.
                mixed = constrain_tree(mixed, axes)
            mixed = constrain_tree(mixed, axes)
        return CachedDecoder(self.policy.bind(mixed)), self.conditioning.condition_inputs(inputs, preference)

    def _per_prompt(self, inputs: Array, preference: Preference) -> Preference:
        batch = inputs.shape[0]
        if batch % self.num_groups:
            raise ValueError(f"a batch of {batch} prompts does not divide into {self.num_groups} preference groups.")
        return jax.tree.map(lambda x: jnp.repeat(x, batch // self.num_groups, axis=0), preference)
