"""What a training stage gives the loop: parameters, a loss and a source of batches.

A stage is a frozen dataclass of settings. Its `setup` does the loading and building; the learner, the checkpoints, the
metrics and the loop are the same for every stage.
"""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax

from clp_jax.array_types import Array, Metrics, Params, PRNGKeyArray, PyTree
from clp_jax.host_rows import HostRows
from clp_jax.interop.t5x_slots import AdafactorSlots
from clp_jax.training.train_state import TrainState

# (params, frozen, batch, key) -> (summed loss float[], weight float[], metrics). The learner descends the sum divided by
# the weight. Each metric is a mean over the same weight, so that micro-batches average to what one batch would give.
Evaluation: TypeAlias = Generator[None, None, dict[str, float]]
LossFn: TypeAlias = Callable[[Params, Any, Any, PRNGKeyArray], tuple[Array, Array, Metrics]]


@runtime_checkable
class Source(Protocol):
    """Yields batches; its position, with the train state, decides all that it yields."""

    def next(self, state: TrainState, frozen: Any) -> tuple[Any, dict[str, float]]:
        """The batch that `state` learns from, a pytree whose leaves lead with examples, and metrics of making it.

        In a run of several processes its leaves are global arrays; see `clp_jax.host_rows`.
        """

    def position(self) -> dict[str, int]:
        """Where the next batch starts: values that JSON can hold."""

    def restore(self, position: dict[str, int]) -> None:
        """Goes to a position that `position` gave."""

    def example_ids(self, position: dict[str, int]) -> list[int]:
        """The examples of the whole batch that starts at a position, by their numbers in the data."""


@runtime_checkable
class Saveable(Protocol):
    """Something that writes itself to a directory: the vocabulary."""

    def save(self, directory: Any) -> Any:
        """Writes it."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """First parameters that are made of other arrays, where they live: no process holds more of them than its devices do.

    Attributes:
        function: makes them; pure, called under `jit`, so that a sharded tree is never whole on one device.
        arguments: trees of arrays; those that are in files yet (`clp_jax.host_rows.InParts`) are read one after another.
        logical_axes: a tree for each argument; None, anywhere, is replicated.
    """

    function: Callable[..., Params]
    arguments: tuple[PyTree, ...] = ()
    logical_axes: tuple[PyTree, ...] = ()

    def abstract(self) -> Params:
        """Their shapes and types; nothing is read."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.arguments)
        return jax.eval_shape(self.function, *shapes)


@dataclasses.dataclass(frozen=True)
class StageSetup:
    """A stage ready to run.

    Attributes:
        params: where training starts: a tree of arrays, a function without arguments that makes one under `jit`, or `Derived`.
            A resumed run makes and reads none of them.
        loss_fn: what the learner descends.
        source: where batches come from.
        describe: what rebuilds the model from a checkpoint, as JSON; ``"stage"`` names the stage and ``"model"`` its config.
        tokens_per_batch: for the tokens/s that are shown.
        frozen: what the loss reads and the learner leaves alone, a tree of arrays.
        logical_axes: names for each dimension of each parameter; None, anywhere in the tree, is replicated.
        frozen_logical_axes: the same for `frozen`.
        evaluate: parameters to metrics, run every so many steps; its names appear under ``evaluation/``. It yields before each
            of its batches, equally often in all processes, and may be left there: it computes little in advance.
        vocabulary: is copied to the run directory.
        slots: what an Adafactor goes on from; None begins anew.
        flops: of one step by the model alone, what the source computes included; None where nobody counted.
    """

    params: Params | Callable[[], Params] | Derived
    loss_fn: LossFn
    source: Source
    describe: Callable[[], dict[str, Any]]
    tokens_per_batch: int
    frozen: PyTree = dataclasses.field(default_factory=dict)
    logical_axes: PyTree = None
    frozen_logical_axes: PyTree = None
    evaluate: Callable[[Params], Evaluation] | None = None
    vocabulary: Saveable | None = None
    slots: AdafactorSlots | None = None
    flops: float | None = None


@dataclasses.dataclass(frozen=True)
class DataShape:
    """What a stage reads from disk before it knows its arrays, for those who only ask what they would be.

    Attributes:
        inputs: positions of an input, or of a prompt.
        targets: positions of a target.
        model: of the checkpoint that the stage begins with, where the stage has no model of its own.
    """

    inputs: int
    targets: int
    model: Any = None

    def __post_init__(self):
        for name, least in (("inputs", 0), ("targets", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"DataShape.{name} is {getattr(self, name)}: expected at least {least}.")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that a stage runs besides the update.

    Attributes:
        function: pure, of arrays.
        arguments: their shapes.
        logical_axes: a tree for each argument; None, anywhere, is replicated.
        flops: floating-point operations of the model itself (`clp_jax.models.flops`).
        tokens: that it reads or makes.
        trips: iterations of its loops that end when they like, at most.
        runs: executions in one step; 0 for a part of another program, which is compiled to be looked at.
    """

    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    logical_axes: tuple[PyTree, ...]
    flops: float
    tokens: int
    trips: int = 1
    runs: int = 1


@dataclasses.dataclass(frozen=True)
class Outline:
    """A stage as shapes: enough to compile its programs. Nothing is read, and no array is made.

    Attributes:
        params: shapes of the parameters.
        loss_fn: see `StageSetup`.
        batch: shapes of a batch.
        flops: of one update's forward and backward pass, by the model alone.
        tokens_per_batch: see `StageSetup`.
        frozen: shapes of what the loss reads and the learner leaves alone.
        logical_axes: see `StageSetup`.
        frozen_logical_axes: see `StageSetup`.
        programs: what else the stage runs, by name.
    """

    params: Params
    loss_fn: LossFn
    batch: PyTree
    flops: float
    tokens_per_batch: int
    frozen: PyTree = dataclasses.field(default_factory=dict)
    logical_axes: PyTree = None
    frozen_logical_axes: PyTree = None
    programs: Mapping[str, Program] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Stage(Protocol):
    """Settings of one kind of training."""

    def setup(self, run_dir: Path, seed: int) -> StageSetup:
        """Loads and builds what the loop needs.

        Args:
            run_dir: exists; the stage may write files of its own there, the same ones again when a run is resumed.
            seed: decides every random number.
        """


@runtime_checkable
class OutlinedStage(Stage, Protocol):
    """A stage that can be compiled without its data and its checkpoints."""

    def outline(self, data: DataShape) -> Outline:
        """What `setup` would build, as shapes.

        Args:
            data: stands for the prepared data and the checkpoints, which need not be there.
        """


@runtime_checkable
class BatchStream(Protocol):
    """A reader of prepared examples, as `clp_jax.data.reader.DataSource` is."""

    position: int
    batch_size: int

    def next(self) -> Any:
        """This process's rows of the next batch."""

    def seek(self, position: int) -> None:
        """Goes to a global example index."""

    def example_ids(self, start: int, count: int) -> Any:
        """Record numbers of the global example indices from `start` on."""


@dataclasses.dataclass(frozen=True)
class DataBatches:
    """The source of every stage that learns from prepared examples as they are.

    Attributes:
        data: the reader; its global example index is all there is to resume.
    """

    data: BatchStream

    def next(self, state: TrainState, frozen: Any) -> tuple[Any, dict[str, float]]:
        """The next batch of examples."""
        return HostRows.of(self.data.batch_size).place(self.data.next()), {}

    def position(self) -> dict[str, int]:
        """The global index of the next example."""
        return {"examples": int(self.data.position)}

    def restore(self, position: dict[str, int]) -> None:
        """Goes to a position that `position` gave."""
        self.data.seek(position["examples"])

    def example_ids(self, position: dict[str, int]) -> list[int]:
        """The examples of the whole batch that starts at a position."""
        return self.data.example_ids(position["examples"], self.data.batch_size).tolist()


def inherited(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says of the checkpoint of another framework that it began with, if it did (`clp convert`)."""
    return {name: description[name] for name in ("origin", "provenance") if description.get(name)}
