"""From prompts to experience: rollouts on the device, rewards on the host, overlapped.

A batch is rolled out in chunks. All chunks are dispatched at once; while the device generates a chunk, the host scores
the one before. Every completion of a batch comes from the parameters that the batch will update: overlapping with the
next batch instead would make rollouts one update stale, and a resumed run would need the rollouts in flight.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Float, Int, Params, PRNGKeyArray
from clp_jax.data.batch import PromptBatch
from clp_jax.data.reader import DataSource
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.host_rows import HostRows, row_indices
from clp_jax.partitioning import constrain
from clp_jax.preferences import Preference
from clp_jax.rewards.protocol import RewardInputs
from clp_jax.rewards.stack import RewardStack
from clp_jax.sampling.rollouts import Rollout, RolloutWorker
from clp_jax.training.ledger import ROLLOUT, STEP, spending

PreferenceSampler = Callable[[PRNGKeyArray, int], Preference]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience:
    """A rollout and what it earned.

    Attributes:
        rollout: prompts ``[B, ...]`` and completions ``[R, ...]``.
        rewards: ``float32[R, K]``, standardised, one column for each objective.
    """

    rollout: Rollout
    rewards: Float[Array, "R K"]


def reward_inputs(
    vocabulary: Vocabulary | TokenIds,
    inputs: Int[np.ndarray, "B S"],
    references: Int[np.ndarray, "B U"],
    tokens: Int[np.ndarray, "R T"],
    rows: HostRows | None = None,
) -> RewardInputs:
    """What reward functions see of completions, ``n`` rows a prompt: texts and tokens, one row for each completion.

    Args:
        vocabulary: turns tokens into text.
        inputs: prompts.
        references: the reference completions.
        tokens: completions, prompt-major.
        rows: of the batch of prompts, those that are given; None where it is all.
    """
    repeats = tokens.shape[0] // inputs.shape[0]
    prompts = [text for text in vocabulary.decode_batch(inputs) for _ in range(repeats)]
    expected = [text for text in vocabulary.decode_batch(references) for _ in range(repeats)]
    return RewardInputs(
        prompts=prompts,
        completions=vocabulary.decode_batch(tokens),
        references=expected,
        prompt_tokens=np.repeat(inputs, repeats, axis=0),
        completion_tokens=tokens,
        rows=rows,
    )


def chunk_rows(num_chunks: int, count: int) -> np.ndarray:
    """Places of this process's rows in a batch of `count` that is rolled out in chunks, each a batch of its own."""
    size = count // num_chunks
    return np.concatenate([chunk * size + row_indices(size) for chunk in range(num_chunks)])


@dataclasses.dataclass(frozen=True)
class ChunkRollout:
    """Rolls out one chunk of a batch; pure, for use inside `jit`.

    Attributes:
        worker: for the groups of one chunk.
        sampler: draws the preferences of a batch.
        num_groups: preferences in a batch.
        num_chunks: chunks of a batch.
    """

    worker: RolloutWorker
    sampler: PreferenceSampler
    num_groups: int
    num_chunks: int

    def __call__(
        self, params: Params, reference: Params, inputs: Array, step: Array, seed: Array, chunk: Array
    ) -> Rollout:
        """The chunk's rollout.

        Args:
            params: the policy's expanded parameters.
            reference: the frozen reference's parameters.
            inputs: ``int32[B / num_chunks, S]`` prompts.
            step: with the seed, decides preferences and samples.
            seed: of the run.
            chunk: number of the chunk.
        """
        preference_key, sample_key = self._keys(step, seed)
        preference = self._preference(preference_key, chunk)
        with self._chunks_named(inputs.shape[0]):
            rollout = self.worker(params, reference, inputs, preference, jax.random.fold_in(sample_key, chunk))
        # Each process reads the tokens of its prompts: where those are, nothing must move first.
        return dataclasses.replace(rollout, tokens=constrain(rollout.tokens, "batch", None))

    def prefill(self, params: Params, reference: Params, inputs: Array, step: Array, seed: Array, chunk: Array) -> Any:
        """What comes before the chunk's first token (`RolloutWorker.prefill`)."""
        preference = self._preference(self._keys(step, seed)[0], chunk)
        with self._chunks_named(inputs.shape[0]):
            return self.worker.prefill(params, reference, inputs, preference)

    @contextlib.contextmanager
    def _chunks_named(self, prompts: int) -> Iterator[None]:
        """Says of rows that do not divide why they are so few."""
        try:
            yield
        except ValueError as error:
            if self.num_chunks == 1:
                raise
            raise ValueError(
                f"rollouts of one of num_chunks={self.num_chunks} parts of a batch, {prompts} prompts each: {error} Or sample "
                "with fewer num_chunks, or in a layout of its own (sharding/rollouts.gin)."
            ) from error

    def _keys(self, step: Array, seed: Array) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), step))

    def _preference(self, key: PRNGKeyArray, chunk: Array) -> Preference:
        preference = self.sampler(key, self.num_groups)
        if self.num_groups == 1:
            return preference
        per_chunk = self.num_groups // self.num_chunks
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=chunk * per_chunk, slice_size=per_chunk)
        return jax.tree.map(take, preference)


class ExperienceSource:
    """Yields the experience of one step after another; the position in the data is all its state.

    In a run of several processes each decodes and rewards the rows that its devices hold. Where a row is on several of
    them, all reward it: a reward must be a function of what it is given.

    Args:
        data: prompts and reference completions; reads `chunk_rows`.
        worker: rolls out one chunk.
        sampler: draws the preferences of a batch.
        rewards: the reward stack.
        vocabulary: of the policy.
        num_groups: preferences in a batch.
        num_chunks: chunks a batch is rolled out in; more overlap more of the host's work.
        seed: with the step, decides preferences and samples.
    """

    def __init__(
        self,
        *,
        data: DataSource,
        worker: RolloutWorker,
        sampler: PreferenceSampler,
        rewards: RewardStack,
        vocabulary: Vocabulary,
        num_groups: int,
        num_chunks: int,
        seed: int,
    ):
        self._data = data
        self._rewards = rewards
        self._vocabulary = vocabulary
        self._num_chunks = num_chunks
        self._seed = seed
        self._roll_out = jax.jit(ChunkRollout(worker, sampler, num_groups, num_chunks))
        self._join = jax.jit(lambda chunks: jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks))

    def next(self, state: Any, frozen: Any) -> tuple[Experience, dict[str, float]]:
        """Rolls out, scores and returns the next batch under the state's parameters."""
        batch: PromptBatch = self._data.next()
        policy = state.params["policy"]
        rows = HostRows.of(self._data.batch_size // self._num_chunks)
        inputs, targets = (np.split(np.asarray(x), self._num_chunks) for x in (batch.inputs, batch.targets))
        seed = np.uint32(self._seed)
        rollouts = [
            self._roll_out(policy, frozen["reference"], rows.place(part), state.step, seed, np.int32(c))
            for c, part in enumerate(inputs)
        ]
        with spending(STEP):
            jax.block_until_ready(state.step)  # The update before comes first on the device, and is no rollout.
        futures = []
        with spending(ROLLOUT):
            for prompts, references, rollout in zip(inputs, targets, rollouts, strict=True):
                tokens = rows.fetch(rollout.tokens)  # Waits for this chunk only; the device goes on with the next.
                seen = reward_inputs(self._vocabulary, prompts, references, tokens, rows)
                futures.append(self._rewards.submit(seen))
            rewards = [rows.place(future.result()) for future in futures]
        rollout, rewards = self._join(list(zip(rollouts, rewards, strict=True)))
        return Experience(rollout=rollout, rewards=rewards), {}

    def position(self) -> dict[str, int]:
        """The position in the data."""
        return {"examples": self._data.position}

    def restore(self, position: dict[str, int]) -> None:
        """Goes to a position that `position` gave."""
        self._data.seek(position["examples"])

    def example_ids(self, position: dict[str, int]) -> list[int]:
        """The examples of the whole batch that starts at a position."""
        return self._data.example_ids(position["examples"], self._data.batch_size).tolist()
