"""Stages that train the learned rewards: a Bradley-Terry preference model and a faithfulness classifier.

Both read a document and a summary with a T5 encoder; their data are made from prepared summaries (`clp_jax.rewards.pairs`).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax import processes
from clp_jax.array_types import Array, ArrayLike, Float, Int, Metrics, Params, PRNGKeyArray, stand_in
from clp_jax.data.reader import DataSource, prompt_batch
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.host_rows import HostRows
from clp_jax.models.config import T5Config
from clp_jax.models.flops import BACKWARD, encoder_flops
from clp_jax.models.heads import ScorerConfig
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json, to_json
from clp_jax.objectives.preference_losses import binary_cross_entropy, bradley_terry
from clp_jax.partitioning import constrain
from clp_jax.rewards.learned import LearnedReward
from clp_jax.rewards.pairs import Corrupter, join
from clp_jax.training.run_directory import write_atomically
from clp_jax.training.stage import DataShape, Derived, Evaluation, Outline, StageSetup
from clp_jax.training.streamed_params import open_params
from clp_jax.training.train_state import TrainState
from clp_jax.training.transfer import Transfer

ACCURACY_FILE = "accuracy.json"
# Of a policy, to score with: its decoder is left behind, the head is new.
ENCODER_ALONE = Transfer(
    {r"(token_embedder|encoder)/.*": r"\g<0>", r".*": None}, init=(r"(?!(token_embedder|encoder)/).*",)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """A true and a bad summary of each document, joined with it for the scorer.

    Attributes:
        good_tokens: ``int32[B, U]``.
        good_kinds: ``int32[B, U]``, 1 document, 2 summary, 0 padding.
        bad_tokens: ``int32[B, U]``.
        bad_kinds: ``int32[B, U]``.
    """

    good_tokens: Int[ArrayLike, "B U"]
    good_kinds: Int[ArrayLike, "B U"]
    bad_tokens: Int[ArrayLike, "B U"]
    bad_kinds: Int[ArrayLike, "B U"]


PairLoss = Callable[[Float[Array, "B"], Float[Array, "B"]], tuple[Float[Array, "B"], Float[Array, "B"]]]


def preference_loss(good: Float[Array, "B"], bad: Float[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Bradley-Terry: loss, and whether the true summary wins."""
    return bradley_terry(good, bad), (good > bad).astype(jnp.float32)


def entailment_loss(good: Float[Array, "B"], bad: Float[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Classification of the true summary as 1 and the bad one as 0: loss, and the share classified right."""
    loss = binary_cross_entropy(good, jnp.ones_like(good)) + binary_cross_entropy(bad, jnp.zeros_like(bad))
    return loss / 2, ((good > 0).astype(jnp.float32) + (bad <= 0).astype(jnp.float32)) / 2


LOSSES: dict[str, PairLoss] = {"preference": preference_loss, "entailment": entailment_loss}


@dataclasses.dataclass(frozen=True)
class PairwiseLoss:
    """The loss of pairs, as the learner calls every loss.

    Attributes:
        policy: the scorer.
        compare: one of `LOSSES`.
    """

    policy: Policy
    compare: PairLoss

    def __call__(
        self, params: Params, frozen: Any, batch: ScoredPairs, key: PRNGKeyArray
    ) -> tuple[Array, Array, Metrics]:
        """Summed loss, number of pairs, and the share that is right."""
        losses, right = self.compare(*_scores(self.policy, params, batch, key))
        count = jnp.asarray(losses.shape[0], jnp.float32)
        return losses.sum(), count, {"accuracy": right.mean()}


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """Trains a scorer on true against bad summaries, and measures it on the validation split.

    Attributes:
        name: of the objective it will be.
        data_dir: prepared documents and summaries.
        trunk: the encoder's sizes; its vocabulary must hold the data's.
        loss: ``"preference"`` (Bradley-Terry) or ``"entailment"`` (classification).
        corruptions: what bad summaries are, names in `clp_jax.rewards.pairs.CORRUPTIONS`.
        initial_checkpoint: a supervised run whose encoder it starts from; None starts from scratch.
        transfer: which of its parameters go where.
        batch_size: pairs in a batch.
        evaluation_pairs: of the validation split.
    """

    name: str
    data_dir: str
    trunk: T5Config
    loss: str
    corruptions: Sequence[str]
    initial_checkpoint: str | None = None
    transfer: Transfer = ENCODER_ALONE
    batch_size: int = 64
    evaluation_pairs: int = 512

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"RewardModel.loss is {self.loss!r}: expected one of {', '.join(LOSSES)}.")
        self._corrupter(self.trunk.pad_id, self.trunk.eos_ids, 0)
        if self.batch_size < 2:
            raise ValueError(
                f"RewardModel.batch_size is {self.batch_size}: expected at least 2, to exchange summaries."
            )

    def outline(self, data: DataShape) -> Outline:
        """See `clp_jax.training.stage.OutlinedStage`."""
        policy = Policy(ScorerConfig(trunk=self.trunk))
        rows, length = self.batch_size, data.inputs + data.targets
        tokens = stand_in((rows, length), jnp.int32)
        return Outline(
            params=policy.abstract(),
            loss_fn=PairwiseLoss(policy, LOSSES[self.loss]),
            batch=ScoredPairs(tokens, tokens, tokens, tokens),
            flops=(1 + BACKWARD) * encoder_flops(self.trunk, 2 * rows, length),
            tokens_per_batch=2 * rows * length,
            logical_axes=policy.logical_axes(),
        )

    def setup(self, run_dir: Path, seed: int) -> StageSetup:
        """See `clp_jax.training.stage.Stage`."""
        vocabulary = Vocabulary.load(self.data_dir)
        if self.trunk.vocab_size < vocabulary.size:
            raise ValueError(f"RewardModel.trunk has {self.trunk.vocab_size} tokens, the vocabulary {vocabulary.size}.")
        if self.trunk.pad_id != vocabulary.pad_id:
            raise ValueError(
                f"RewardModel.trunk is padded with {self.trunk.pad_id}, the vocabulary of {self.data_dir} with "
                f"{vocabulary.pad_id}: set pad_id (PAD_ID)."
            )
        policy = Policy(ScorerConfig(trunk=self.trunk))
        data = self._data("train", seed)
        corrupter = self._corrupter(vocabulary.pad_id, vocabulary.eos_ids, seed)

        served = policy.served()

        @jax.jit
        def measure(params: Params, pairs: ScoredPairs) -> Array:
            # Whole in every process, which all measure the same.
            return constrain(LOSSES[self.loss](*_scores(served, params, pairs, None))[1], None)

        def evaluate(params: Params) -> Evaluation:
            result = yield from self._evaluate(measure, params, dataclasses.replace(corrupter, seed=seed + 1))
            if processes.is_main():
                write_atomically(run_dir / ACCURACY_FILE, json.dumps(result, indent=2) + "\n")
            return result

        length = sum(data.manifest.lengths.values())
        description = {
            "stage": f"reward_{self.loss}",
            "name": self.name,
            "model": to_json(policy.config),
            "document_length": data.manifest.lengths["inputs"],
            "vocabulary": vocabulary.fingerprint,
            "data": data.manifest.fingerprint,
        }
        return StageSetup(
            params=self._initial(policy, seed),
            loss_fn=PairwiseLoss(policy, LOSSES[self.loss]),
            source=PairSource(data, corrupter),
            describe=lambda: description,
            tokens_per_batch=2 * self.batch_size * length,
            logical_axes=policy.logical_axes(),
            evaluate=evaluate,
            vocabulary=vocabulary,
            flops=(1 + BACKWARD) * encoder_flops(self.trunk, 2 * self.batch_size, length),
        )

    def _data(self, split: str, seed: int = 0) -> DataSource:
        return DataSource(self.data_dir, split, batch_size=self.batch_size, converter=prompt_batch, seed=seed)

    def _initial(self, policy: Policy, seed: int) -> Callable[[], Params] | Derived:
        def fresh() -> Params:
            return policy.init(jax.random.key(seed))

        if self.initial_checkpoint is None:
            return fresh
        stored, _, step = open_params(self.initial_checkpoint)
        plan = self.transfer.plan(stored, policy.abstract())
        plan.account.report(self.initial_checkpoint, step)
        return plan.derived(policy.logical_axes(), fresh)

    def _corrupter(self, pad_id: int, eos_ids: tuple[int, ...], seed: int) -> Corrupter:
        return Corrupter(tuple(self.corruptions), pad_id, eos_ids, seed)

    def _evaluate(self, measure: Callable[..., Any], params: Params, corrupter: Corrupter) -> Evaluation:
        data = self._data("validation")
        right: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        total = min(data.size, self.evaluation_pairs)
        for start in range(0, total, self.batch_size):
            ids = np.arange(start, start + self.batch_size)
            real = ids < total
            if real.sum() < 2:
                break  # There is nothing to exchange summaries with.
            yield
            pairs, kind = read_pairs(data, np.where(real, ids, -1), corrupter)
            right.append(np.asarray(measure(params, pairs))[real])
            kinds.append(kind[real])
        if not right:
            raise ValueError(f"the validation split of {self.data_dir} has fewer than 2 examples: nothing to pair.")
        accuracy, kind = np.concatenate(right), np.concatenate(kinds)
        found = [(i, name) for i, name in enumerate(self.corruptions) if (kind == i).any()]
        by_kind = {f"accuracy_{name}": float(accuracy[kind == i].mean()) for i, name in found}
        return {"accuracy": float(accuracy.mean())} | by_kind


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Documents with true and bad summaries; the position in the data is all its state.

    Attributes:
        data: prepared documents and summaries.
        corrupter: makes the bad ones.
    """

    data: DataSource
    corrupter: Corrupter

    def next(self, state: TrainState, frozen: Any) -> tuple[ScoredPairs, dict[str, float]]:
        """The next batch."""
        ids = self.data.example_ids(self.data.position, self.data.batch_size)
        self.data.seek(self.data.position + self.data.batch_size)
        return read_pairs(self.data, ids, self.corrupter)[0], {}

    def position(self) -> dict[str, int]:
        """The position in the data."""
        return {"examples": self.data.position}

    def restore(self, position: dict[str, int]) -> None:
        """Goes to a position that `position` gave."""
        self.data.seek(position["examples"])

    def example_ids(self, position: dict[str, int]) -> list[int]:
        """The examples of the whole batch that starts at a position."""
        return self.data.example_ids(position["examples"], self.data.batch_size).tolist()


def read_pairs(
    data: DataSource, example_ids: Int[np.ndarray, "B"], corrupter: Corrupter
) -> tuple[ScoredPairs, Int[np.ndarray, "B"]]:
    """Pairs for the scorer, and the kind of each corruption.

    A process reads the rows that it holds, and those whose summaries these are exchanged with.

    Args:
        data: where the examples are.
        example_ids: of the whole batch, -1 for rows that fill it up.
        corrupter: makes the bad summaries.
    """
    draws, rows = corrupter.draw(example_ids), HostRows.of(len(example_ids))
    mine = rows.indices
    read, places = np.unique(np.concatenate([mine, draws.others[mine]]), return_inverse=True)
    batch = data.read(example_ids[read])
    own, others = np.split(places, 2)
    documents, summaries = np.asarray(batch.inputs)[own], np.asarray(batch.targets)
    bad = corrupter(summaries[own], summaries[others], draws[mine])
    good = join(documents, summaries[own], corrupter.pad_id)
    return rows.place(ScoredPairs(*good, *join(documents, bad, corrupter.pad_id))), draws.kinds


def load_learned_reward(checkpoint: str, *, name: str | None = None, bound: float = 4.0) -> LearnedReward:
    """A trained reward model as a reward.

    Args:
        checkpoint: its run directory.
        name: of the objective; by default the one it was trained as.
        bound: the largest reward, see `LearnedReward`.

    Raises:
        ValueError: when the checkpoint is not a reward model.
    """
    params, description, _ = open_params(checkpoint)
    if not str(description["stage"]).startswith("reward_"):
        raise ValueError(f"{checkpoint} is a run of stage {description['stage']!r}: expected a reward model.")
    return LearnedReward(
        name or description["name"],
        Policy(from_json(description["model"])).served(),
        params,
        description["vocabulary"],
        bound=bound,
        document_length=description["document_length"],
    )


def _scores(policy: Policy, params: Params, pairs: ScoredPairs, key: PRNGKeyArray | None) -> tuple[Array, Array]:
    """Scores of the true and of the bad summaries, in one pass of twice the batch."""
    tokens = jnp.concatenate([pairs.good_tokens, pairs.bad_tokens])
    kinds = jnp.concatenate([pairs.good_kinds, pairs.bad_kinds])
    good, bad = jnp.split(policy.bind(params).score(tokens, kinds, dropout_key=key), 2)
    return good, bad
