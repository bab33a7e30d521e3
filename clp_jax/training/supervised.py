"""The supervised stage: pretraining and finetuning on prepared examples."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Metrics, Params, PRNGKeyArray
from clp_jax.data.batch import Batch, abstract_batch
from clp_jax.data.reader import DataSource, sequence_batch
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.host_rows import HostRows
from clp_jax.interop.t5x_slots import AdafactorSlots
from clp_jax.models.config import PaLMConfig, T5Config
from clp_jax.models.flops import Sizes, training_flops
from clp_jax.models.language_model import routing_loss
from clp_jax.models.layer import fold
from clp_jax.models.layout import upcycled
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import from_json, to_json
from clp_jax.nn.vocabulary_loss import chunked_token_statistics
from clp_jax.objectives.losses import token_cross_entropy
from clp_jax.training.adafactor_slots import load_slots
from clp_jax.training.checkpoint_manifest import leaves_by_path
from clp_jax.training.places import local_files
from clp_jax.training.saved_params import find_checkpoint
from clp_jax.training.stage import DataBatches, DataShape, Derived, Evaluation, Outline, StageSetup, inherited
from clp_jax.training.streamed_params import open_params
from clp_jax.training.transfer import Transfer

# A policy may be trained on with other values of these: they change how it is computed, not what.
_FREE_FIELDS = frozenset(
    {"dropout_rate", "dtype", "param_dtype", "remat", "scan_unroll", "pad_id", "eos_ids"}
    | {
        "balance_weight",
        "balance_by",
        "z_weight",
        "dispatch",
        "jitter",
        "train_capacity",
        "eval_capacity",
        "fixed_capacity",
        "group",
    }
)


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Trains a policy to predict targets from inputs, token by token.

    Attributes:
        model: the policy's sizes; its vocabulary must hold the data's. None takes the initial checkpoint's.
        data_dir: prepared examples, packed or not.
        batch_size: rows in a batch.
        z_loss: coefficient of ``(log Z)²``.
        initial_checkpoint: a run whose parameters it starts from; None starts from scratch. Adafactor goes on from the state
            that `clp convert --optimizer` put beside a policy of T5X's; the learning rate's schedule begins anew.
        transfer: which parameters of the initial checkpoint go where, if it is of another model; None wants the same one.
        upcycle: whether the initial checkpoint is a dense policy whose blocks become the experts (`upcycled`).
        evaluation_batches: of the validation split.
    """

    model: T5Config | PaLMConfig | None
    data_dir: str
    batch_size: int = 64
    z_loss: float = 0.0
    initial_checkpoint: str | None = None
    transfer: Transfer | None = None
    upcycle: bool = False
    evaluation_batches: int = 8

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("evaluation_batches", 1), ("z_loss", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Supervised.{name} is {getattr(self, name)}: expected at least {least}.")
        if self.transfer is not None and (self.upcycle or self.initial_checkpoint is None):
            raise ValueError("Supervised.transfer says where an initial_checkpoint's parameters go, without upcycle.")
        if self.model is None and (self.initial_checkpoint is None or self.upcycle):
            raise ValueError(
                "Supervised.model is None: expected a model, or an initial_checkpoint whose model is trained on."
            )

    def outline(self, data: DataShape) -> Outline:
        """See `clp_jax.training.stage.OutlinedStage`."""
        model = data.model if self.model is None else self.model
        if model is None:
            raise ValueError("Supervised.model is None, the initial checkpoint's: give the model itself to compile it.")
        policy = Policy(model)
        return Outline(
            params=policy.abstract(),
            loss_fn=SupervisedLoss(policy, self.z_loss),
            batch=abstract_batch(self.batch_size, data.inputs, data.targets),
            flops=training_flops(model, Sizes(self.batch_size, data.inputs, self.batch_size, data.targets)),
            tokens_per_batch=self.batch_size * (data.inputs + data.targets),
            logical_axes=policy.logical_axes(),
        )

    def setup(self, run_dir: Path, seed: int) -> StageSetup:
        """See `clp_jax.training.stage.Stage`."""
        params, description, step = (
            (None, {}, 0) if self.initial_checkpoint is None else open_params(self.initial_checkpoint)
        )
        model = from_json(description["model"]) if self.model is None else self.model
        vocabulary = Vocabulary.load(self.data_dir)
        if model.vocab_size < vocabulary.size:
            raise ValueError(
                f"the model has {model.vocab_size} tokens, the vocabulary of {self.data_dir} {vocabulary.size}: "
                f"set vocab_size to at least {vocabulary.size}."
            )
        ends, pad_id = vocabulary.eos_ids, vocabulary.pad_id
        if ends[0] not in model.eos_ids or model.pad_id not in (pad_id, -1):
            raise ValueError(
                f"the model ends with tokens {model.eos_ids} and is padded with {model.pad_id}, the vocabulary of "
                f"{self.data_dir} ends with {ends} and is padded with {pad_id}: set eos_ids and pad_id (EOS_IDS, PAD_ID)."
            )
        policy = Policy(model)
        loss_fn = SupervisedLoss(policy, self.z_loss)
        converter = functools.partial(sequence_batch, start_id=model.start_id)
        data = DataSource(self.data_dir, "train", batch_size=self.batch_size, converter=converter, seed=seed)
        lengths = data.manifest.lengths
        own = {
            "stage": "supervised",
            "model": to_json(model),
            "vocabulary": vocabulary.fingerprint,
            "data": data.manifest.fingerprint,
            "prompt_length": lengths["inputs"],
        }
        if not self.upcycle:
            own |= inherited(description)
        return StageSetup(
            params=self._initial(policy, seed, params, description, step),
            loss_fn=loss_fn,
            source=DataBatches(data),
            describe=lambda: own,
            tokens_per_batch=self.batch_size * (lengths["inputs"] + lengths["targets"]),
            logical_axes=policy.logical_axes(),
            evaluate=self._evaluator(loss_fn),
            vocabulary=vocabulary,
            slots=self._slots(description),
            flops=training_flops(model, Sizes(self.batch_size, lengths["inputs"], self.batch_size, lengths["targets"])),
        )

    def _slots(self, description: dict[str, Any]) -> AdafactorSlots | None:
        """The optimizer's state of a converted policy that is trained on, where it was converted too."""
        other = self.upcycle or self.transfer is not None
        if self.initial_checkpoint is None or other or description["stage"] != "converted":
            return None
        return load_slots(local_files(find_checkpoint(self.initial_checkpoint).parent.parent))

    def _initial(
        self, policy: Policy, seed: int, params: Params | None, description: dict[str, Any], step: int
    ) -> Callable[[], Params] | Derived:
        """The first parameters: fresh ones, or the initial checkpoint's."""

        def fresh() -> Params:
            return policy.init(jax.random.key(seed))

        if params is None:
            return fresh
        if self.transfer is None:
            dense = self._same_model(policy, description)
        if self.upcycle:

            def sparse(tree: Params) -> Params:
                return upcycled(tree, dense.config, policy.config, jax.random.key(seed))

            trees, axes = (params,), (dense.logical_axes(),)
            plan = Transfer().plan(Derived(sparse, trees, axes).abstract(), policy.abstract())
            made = Derived(lambda tree: plan.fill(leaves_by_path(sparse(tree)), fresh), trees, axes)
        else:
            plan = (self.transfer or Transfer()).plan(params, policy.abstract())
            made = plan.derived(policy.logical_axes(), fresh)
        plan.account.report(str(self.initial_checkpoint), step)
        return made

    def _same_model(self, policy: Policy, description: dict[str, Any]) -> Policy:
        """The initial checkpoint's policy, which must be this one, or one that can be upcycled to it."""
        dense = from_json(description["model"])
        stored, wanted = _fixed(to_json(dense)), _fixed(to_json(policy.config))
        for name, value in wanted.items():
            if stored.get(name) == value or (self.upcycle and name == "moe"):
                continue
            hint = " To make its blocks the experts, set upcycle=True." if name == "moe" and not self.upcycle else ""
            raise ValueError(
                f"{self.initial_checkpoint} is of another model: its {name} is {stored.get(name)}, model has {value}.{hint}"
            )
        return Policy(dense)

    def _evaluator(self, loss_fn: "SupervisedLoss") -> Callable[[Params], Evaluation]:
        converter = functools.partial(sequence_batch, start_id=loss_fn.policy.config.start_id)
        data = DataSource(self.data_dir, "validation", batch_size=self.batch_size, converter=converter)
        alone = dataclasses.replace(loss_fn, policy=loss_fn.policy.served())
        step = jax.jit(alone.measured)

        def evaluate(params: Params) -> Evaluation:
            rows, found, ahead = HostRows.of(self.batch_size), [], []
            for batch in data.epoch_batches(self.evaluation_batches * self.batch_size):
                yield
                ahead.append(step(params, rows.place(batch)))
                if len(ahead) > 1:  # The device has the next one: it need not wait, and nobody waits long for it.
                    found.append(jax.device_get(ahead.pop(0)))
            counts, sums = zip(*found, *jax.device_get(ahead), strict=True)
            tokens = max(float(np.sum(counts, dtype=np.float64)), 1.0)
            means = {name: float(np.sum([s[name] for s in sums], dtype=np.float64)) / tokens for name in sums[0]}
            return means | {"perplexity": math.exp(min(means["cross_entropy"], 700.0))}

        return evaluate


def _fixed(model: Any) -> Any:
    """A model's description without the free fields."""
    if not isinstance(model, dict):
        return model
    return {name: _fixed(value) for name, value in model.items() if name not in _FREE_FIELDS}


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy of the targets, as the learner calls every loss.

    Attributes:
        policy: the policy.
        z_loss: coefficient of ``(log Z)²``.
    """

    policy: Policy
    z_loss: float = 0.0

    def __call__(self, params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Array, Metrics]:
        """Summed loss, number of target tokens, and metrics that are means over them."""
        loss, weight, sums = self.sums(params, batch, key if self.policy.config.is_stochastic else None)
        return loss, weight, jax.tree.map(lambda total: total / jnp.maximum(weight, 1.0), sums)

    def sums(self, params: Params, batch: Batch, key: PRNGKeyArray | None) -> tuple[Array, Array, Metrics]:
        """Summed loss, number of target tokens, and summed metrics; `key` None is evaluation."""
        model = self.policy.bind(params)
        encoded = model.encode(jnp.asarray(batch.inputs), jnp.asarray(batch.input_segments), dropout_key=fold(key, 0))
        decoded = model.decode(
            jnp.asarray(batch.decoder_inputs), encoded, jnp.asarray(batch.target_segments), dropout_key=fold(key, 1)
        )
        found = chunked_token_statistics(decoded.hidden, model.logits, jnp.asarray(batch.targets))
        loss, weight, metrics = token_cross_entropy(
            found.log_probs, found.log_z, found.correct, jnp.asarray(batch.loss_weights), self.z_loss
        )
        auxiliary, routing = routing_loss(self.policy.config.moe, decoded.routing)
        # A mean of its own: it weighs as the mean cross-entropy does, whatever the number of tokens.
        return loss + auxiliary * weight, weight, metrics | {name: value * weight for name, value in routing.items()}

    def measured(self, params: Params, batch: Batch) -> tuple[Array, Metrics]:
        """Number of target tokens, and summed metrics, of evaluation: none depends on what an example is packed with.

        Examples whose tokens would compete for experts' room are read one after the other, in as many passes as the fullest
        row has examples.
        """
        inputs, targets = jnp.asarray(batch.input_segments), jnp.asarray(batch.target_segments)

        def of_example(number: Array | int) -> tuple[Array, Metrics]:
            chosen = dataclasses.replace(
                batch,
                input_segments=(inputs == number).astype(jnp.int32),
                target_segments=(targets == number).astype(jnp.int32),
                loss_weights=jnp.asarray(batch.loss_weights) * (targets == number),
            )
            return self.sums(params, chosen, None)[1:]

        if not self.policy.config.shares_room:
            return self.sums(params, batch, None)[1:]
        last = jnp.maximum(inputs.max(initial=0), targets.max(initial=0))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_example, 1))
        return jax.lax.fori_loop(
            1, last + 1, lambda number, total: jax.tree.map(jnp.add, total, of_example(number)), nothing
        )
