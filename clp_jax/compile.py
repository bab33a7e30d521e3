"""Compiles the programs of a training run for a TPU slice that need not be there, and says what they cost."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from clp_jax.compilation.analysis import Work, analyse
from clp_jax.compilation.report import ProgramReport, Report
from clp_jax.compilation.search import Findings, alternatives, explore
from clp_jax.compilation.topology import Topology, has_compiler
from clp_jax.models.config import PaLMConfig, T5Config
from clp_jax.partitioning import use_devices
from clp_jax.training.learner import Learner, learner_settings
from clp_jax.training.run_directory import write_atomically
from clp_jax.training.stage import DataShape, Outline, OutlinedStage

UPDATE = "update"


def compile(  # noqa: A001
    *,
    topology: str,
    training: Callable[..., Mapping[str, Any]],
    num_slices: int = 1,
    inputs: int = 512,
    targets: int = 512,
    model: T5Config | PaLMConfig | None = None,
    programs: Sequence[str] | None = None,
    output: str | os.PathLike | None = None,
    options: Mapping[str, str] | None = None,
    search: bool = False,
    layouts: Sequence[str] = ("sharding/fsdp.gin", "sharding/fsdp_tensor.gin"),
    remats: Sequence[str] = ("minimal", "full"),
    batches: Sequence[int] = (),
) -> Report:
    """Compiles a stage for TPUs and reports memory, exchanges and time, on a machine without one.

    Takes the gin files and bindings of `clp train`. Data and checkpoints need not exist: their lengths, and the model where
    it is a checkpoint's, are given here. Needs libtpu: pip install 'clp-jax[aot]'. The exit code is 1 where a program does
    not fit, or, of a search, none of what was tried; the report is written all the same, and says `"fits": false`.

    Args:
        topology: the chip, and chips along each dimension of a slice, as in v5p:4x4x8 or v5e:16x16.
        training: what `clp train` is given: its gin files and bindings.
        num_slices: slices of this shape, joined by the data-centre network.
        inputs: positions of an input, or of a prompt; 0 where a decoder-only policy has none.
        targets: positions of a target; completions have the stage's own.
        model: of the checkpoint that the stage begins with, where the stage has no model of its own.
        programs: of the stage, by name: update, and for reinforcement learning prefill and rollout; None compiles all.
        output: a file for the report, as JSON; of a search, written anew after each trial.
        options: of libtpu's compiler, as in --options=xla_tpu_enable_latency_hiding_scheduler=true; a run is given the same in
            LIBTPU_INIT_ARGS.
        search: compiles every layout with every remat policy and batch size, and recommends what fits and trains most tokens a
            second: in whole steps, rollouts included.
        layouts: gin files to search.
        remats: values of REMAT to search.
        batches: values of BATCH_SIZE to search; by default half the stage's own, that, and twice that.

    Raises:
        ValueError: for an unknown topology or program, a mesh that does not fit, a stage that can't be compiled so, an option
            that the compiler does not know, or an output that can't be written.
        SystemExit: with 1 when all is done, where memory does not suffice.
    """
    flags = {name: {"true": True, "false": False}.get(text, text) for name, text in (options or {}).items()}
    where, console, data = Topology.parse(topology, num_slices), Console(width=140), DataShape(inputs, targets, model)
    found: Report | Findings
    if output is not None:
        _make_writable(Path(output))
    if not has_compiler():
        # A mesh that does not divide the devices is told all the same.
        with use_devices(where.stand_ins()):
            training()
    with use_devices(where.devices()):
        if search:
            trials = alternatives(training()["stage"].batch_size, layouts, remats, batches)
            found = explore(
                trials,
                lambda *given: Job.of(training(*given)).report(where, data, programs, flags),
                console,
                lambda so_far: _write(output, so_far),
            )
        else:
            found = Job.of(training()).report(where, data, programs, flags)
            _write(output, found)
    found.show(console)
    report = found.best if isinstance(found, Findings) else found
    if not report.fits:
        raise SystemExit(1)
    return report


def _make_writable(path: Path) -> None:
    """Finds out whether a file can be written, before what is to be in it costs minutes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            open(path, "a").close()
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"the report can't be written to {path}: {error.strerror}. Give --output=FILE in a directory that you can write to."
        ) from error


def _write(output: str | os.PathLike | None, found: Report | Findings) -> None:
    if output is not None:
        write_atomically(Path(output), json.dumps(found.to_json(), indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Job:
    """What of the settings of `clp_jax.train.train` decides its programs; see there.

    Attributes:
        stage: what is trained.
        learner: made with everything else, of a stage's outline.
    """

    stage: OutlinedStage
    learner: Callable[[Outline], Learner]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Job":
        """Picks it from the arguments of `train`.

        Raises:
            ValueError: for a stage that has no `outline`.
        """
        stage = arguments["stage"]
        if not isinstance(stage, OutlinedStage):
            raise ValueError(
                f"the stage {type(stage).__name__} has no outline(data): it can't be compiled without its data and checkpoints."
            )
        settings = learner_settings(arguments)
        return cls(stage, lambda outline: Learner.for_stage(outline, **settings))

    def report(
        self,
        topology: Topology,
        data: DataShape,
        programs: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Report:
        """Compiles programs, all by default."""
        outline = self.stage.outline(data)
        learner = self.learner(outline)
        known = (UPDATE, *outline.programs)
        for name in programs or ():
            if name not in known:
                raise ValueError(f"compile.programs names {name!r}: this stage has {', '.join(known)}.")
        return Report(
            topology=topology.name,
            num_slices=topology.num_slices,
            chips=topology.chips,
            mesh={name: size for name, size in learner.mesh.shape.items() if size > 1},
            parameters=sum(leaf.size for leaf in jax.tree.leaves(outline.params)),
            programs=tuple(_compiled(name, outline, learner, topology, options) for name in programs or known),
            versions={"jax": jax.__version__, "libtpu": _libtpu_version()},
        )


def _compiled(
    name: str, outline: Outline, learner: Learner, topology: Topology, options: Mapping[str, Any] | None
) -> ProgramReport:
    mesh: Mesh = learner.mesh
    if name == UPDATE:
        lowered = learner.lower(outline.params, outline.frozen, outline.batch)
        return analyse(lowered, Work(name, outline.flops, outline.tokens_per_batch), topology, mesh, options)
    program = outline.programs[name]
    arguments = [learner.abstract(*pair) for pair in zip(program.arguments, program.logical_axes, strict=True)]
    with learner.activate():
        lowered = jax.jit(program.function).lower(*arguments)
    return analyse(
        lowered, Work(name, program.flops, program.tokens, program.trips, program.runs), topology, mesh, options
    )


def _libtpu_version() -> str:
    import libtpu

    return str(getattr(libtpu, "__version__", "unknown"))
