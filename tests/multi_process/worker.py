"""One process of a group: does the jobs of a plan one after another, as `clp train` and `clp replay` do, and leaves."""

import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flipped_bits import flip_a_bit
from tiny_policies import varied_params
from tiny_runs import MODEL

from clp_jax import processes
from clp_jax.data.vocabulary import Vocabulary
from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.config import MoEConfig
from clp_jax.models.heads import ScorerConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless
from clp_jax.partitioning import Rules, make_mesh
from clp_jax.preferences import Dirichlet
from clp_jax.replay import replay
from clp_jax.rewards.learned import LearnedReward
from clp_jax.rewards.programmatic import Brevity
from clp_jax.train import train
from clp_jax.training.clp import ConditionalPolicy
from clp_jax.training.estimators import ValueBaseline
from clp_jax.training.optimizers import AdamW
from clp_jax.training.reward_models import PairSource, RewardModel
from clp_jax.training.supervised import Supervised

BATCH = ("batch", ("slice", "data", "fsdp", "expert"))
TENSOR = (("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"), ("act_mlp", "tensor"), ("act_heads", "tensor"))
EXPERTS = MoEConfig(num_experts=4, router=Dropless(2))


def taste(home):
    """A reward model nobody has trained: its parameters lie as a policy's do, and all processes score together."""
    scorer = Policy(ScorerConfig(MODEL))
    return LearnedReward("taste", scorer, varied_params(scorer), Vocabulary.load(f"{home}/prompts").fingerprint)


def policy(home, **changes):
    """The multi-objective stage."""
    settings = {
        "initial_checkpoint": f"{home}/sft",
        "data_dir": f"{home}/prompts",
        "rewards": (Brevity(limit=4), taste(home)),
        "preferences": Dirichlet(2, alpha=0.1),
        "conditioning": ParameterConditioning("full", 2),
        "estimator": ValueBaseline(hidden_dim=4),
        "batch_size": 16,
        "num_samples": 2,
        "num_groups": 2,
        "num_chunks": 2,
        "max_length": 4,
        "statistics_prompts": 8,
    }
    return ConditionalPolicy(**settings | changes)


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """A stage with one example, in the third batch, whose loss is not a number: a row of one process alone."""

    stage: object

    def setup(self, run_dir, seed):
        """That of the stage, with another loss."""
        found = self.stage.setup(run_dir, seed)
        bad = found.source.example_ids({"examples": 2 * self.stage.batch_size})[5]

        def loss_fn(params, frozen, batch, key):
            loss, weight, metrics = found.loss_fn(params, frozen, batch, key)
            return loss + jnp.where(batch.example_ids == bad, jnp.nan, 0.0).sum(), weight, metrics

        return dataclasses.replace(found, loss_fn=loss_fn)


# Name of a job -> its stage, the sizes of its mesh axes (data takes the rest), and its rules.
JOBS = {
    "packed": lambda home: (
        Poisoned(
            Supervised(
                dataclasses.replace(MODEL, dropout_rate=0.1), f"{home}/packed", batch_size=8, evaluation_batches=1
            )
        ),
        {"fsdp": 2, "tensor": 2},
        Rules((BATCH, *TENSOR)),
    ),
    "experts": lambda home: (
        Supervised(dataclasses.replace(MODEL, moe=EXPERTS), f"{home}/packed", batch_size=8, evaluation_batches=1),
        {"expert": 4},
        Rules((BATCH, ("expert", "expert"), ("act_expert", "expert"))),
    ),
    "rewards": lambda home: (
        RewardModel(
            "true", f"{home}/prompts", MODEL, "preference", ("foreign", "swap"), batch_size=8, evaluation_pairs=6
        ),
        {},
        Rules((BATCH,)),
    ),
    "policy": lambda home: (policy(home), {"fsdp": 2}, Rules((BATCH, ("embed", "fsdp")))),
}


def held_rows(batch):
    """The whole numbers of a batch that this process holds: by name, the first row of each shard and its rows."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.issubdtype(leaf.dtype, np.integer):
            shards = (
                [(s.index[0].indices(leaf.shape[0])[0] if s.index else 0, s.data) for s in leaf.addressable_shards]
                if isinstance(leaf, jax.Array)
                else [(0, leaf)]
            )
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = [
                [first, np.atleast_1d(x).tolist()] for first, x in shards
            ]
    return found


def hang():
    """Stands still."""
    time.sleep(3600)


class Recording:
    """A source that notes what this process was given, and does not hurry.

    Args:
        source: of a stage.
        path: of the notes: for each step a line before its batch is made, and one after, with its whole numbers.
        pause: seconds before each step.
        hang_at: the step before which this process stands still, if any.
        flip_at: the step before which a bit is another one on a device of this process, if any.
    """

    def __init__(self, source, path, pause, hang_at, flip_at):
        self._source, self._path, self._pause, self._hang_at, self._flip_at = source, path, pause, hang_at, flip_at

    def next(self, state, frozen):
        """The next batch."""
        time.sleep(self._pause)
        position = self._source.position()["examples"]
        self._note({"begins": position})
        batch, metrics = self._source.next(state, frozen)
        self._note({"position": position, "rows": held_rows(batch)})
        if self._hang_at is not None and int(state.step) == self._hang_at:
            hang()
        if self._flip_at is not None and int(state.step) == self._flip_at:
            flip_a_bit(state.rng)
        return batch, metrics

    def _note(self, line):
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def position(self):
        """That of the source."""
        return self._source.position()

    def restore(self, position):
        """Goes there."""
        self._source.restore(position)

    def example_ids(self, position):
        """Those of the source."""
        return self._source.example_ids(position)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A stage whose source is `Recording`."""

    stage: object
    path: str
    pause: float
    hang_at: int | None
    flip_at: int | None
    evaluation_seconds: int

    def setup(self, run_dir, seed):
        """That of the stage."""
        found = self.stage.setup(run_dir, seed)
        if self.evaluation_seconds:
            found = dataclasses.replace(found, evaluate=self._slowly(found.evaluate))
        if isinstance(found.source, PairSource):
            _note_reading(found.source.data, self.path)
        return dataclasses.replace(
            found, source=Recording(found.source, self.path, self.pause, self.hang_at, self.flip_at)
        )

    def _slowly(self, evaluate):
        def slow(params):
            for second in range(self.evaluation_seconds):
                yield
                print(f"evaluates since {second} s", flush=True)
                time.sleep(1)
            return (yield from evaluate(params))

        return slow


def _note_reading(data, path):
    """Notes which records of each batch this process reads."""
    read = data.read

    def noted(ids):
        with open(path, "a") as file:
            file.write(json.dumps({"position": data.position - data.batch_size, "reads": ids.tolist()}) + "\n")
        return read(ids)

    data.read = noted


def mesh_of(sizes, crossed):
    """The mesh; where it is crossed, the last of its axes goes across processes."""
    if not crossed:
        return make_mesh(data=-1, **sizes)
    each = jax.local_device_count()
    mesh = make_mesh(
        data=-1, devices=[device for first in range(each) for device in jax.devices()[first::each]], **sizes
    )
    last = max(sizes, key=mesh.axis_names.index)
    along = np.moveaxis(mesh.devices, mesh.axis_names.index(last), 0).reshape(sizes[last], -1)
    assert len({device.process_index for device in along[:, 0]}) == min(sizes[last], jax.process_count())
    return mesh


def run(plan, job):
    """Trains one job of a plan, or makes a step of it again."""
    stage, sizes, rules = JOBS[job["name"]](plan["home"])
    number = processes.index()
    path = f"{job.get('notes', job['run_dir'])}.notes.{plan['num_processes']}.{number}"
    hang_at, flip_at = (job.get(f"{what}_at") if number == job.get(f"{what}_in") else None for what in ("hang", "flip"))
    what = {
        "stage": Recorded(stage, path, job.get("pause", 0.0), hang_at, flip_at, job.get("evaluation_seconds", 0)),
        # Adam divides a gradient by its own size, also one of rounding errors alone; a large epsilon leaves those small. So do
        # small steps: large ones drive two runs apart that differ in a last bit.
        "optimizer": AdamW(0.001, epsilon=1e-3, weight_decay=0.1),
        "seed": 3,
        "mesh": mesh_of(sizes, job.get("crossed", False)),
        "rules": rules,
    }
    if "replay" in job:
        replay(job["run_dir"], step=job["replay"], training=lambda: what)
        return
    train(
        run_dir=job["run_dir"],
        num_steps=job["num_steps"],
        log_every=1,
        evaluate_every=job.get("evaluate_every"),
        checkpoint_every=job.get("checkpoint_every"),
        replica_check_every=job.get("replica_check_every"),
        watchdog_seconds=job.get("watchdog_seconds", 600.0),
        **what,
    )


def main(path, number):
    """Does what a plan says; the exit code."""
    plan = json.loads(Path(path).read_text())
    jax.config.update("jax_num_cpu_devices", plan["devices"])
    try:
        # Also where there is one: with a coordinator JAX sums through gloo, in the order of several processes.
        processes.start(processes.Processes(plan["address"], plan["num_processes"], number))
        assert jax.process_count() == plan["num_processes"] and jax.local_device_count() == plan["devices"]
        for job in plan["jobs"]:
            run(plan, job)
    except SystemExit as stop:
        return processes.leave(stop.code)
    except Exception as error:
        processes.await_verdict(error)
        traceback.print_exc()
        return processes.leave(processes.exit_code_of(error) or processes.FAILURE, str(error))
    return processes.leave(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
