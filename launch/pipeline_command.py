"""`clp pipeline FILE`: runs the stages of a recipe that are not done."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from clp_jax.launch.errors import LaunchError
from clp_jax.launch.options import build, describe, option, split
from clp_jax.launch.pipeline import find_pipeline, read_pipeline, shipped_files
from clp_jax.launch.pipeline_run import print_plan, run_pipeline


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """What `clp pipeline` takes."""

    stages: tuple[str, ...] = option("these alone, and what they need: A,B", ())
    max_concurrent: int = option("stages at once, where their needs allow", 1)
    dir: str | None = option("of the pipeline's own files; by default runs/NAME/pipeline", None)
    force: bool = option("run what clp compile says does not fit, or what it can't look at", False)
    dry_run: bool = option("print what would be done about each stage, and do nothing", False)


def pipeline(words: Sequence[str], commands: Collection[str]) -> int:
    """Runs `clp pipeline`.

    Args:
        words: what was typed after it.
        commands: of `clp`, that a stage's command may begin with.

    Returns:
        The exit code: 0, 1 where a stage failed, 128 and a signal's number.

    Raises:
        LaunchError: for what is wrong, before any stage runs.
    """
    places, given, command = split(words)
    if "help" in given or not places:
        print(_usage())
        return 0
    if len(places) > 1 or command:
        raise LaunchError(f"what is {[*places[1:], *command][0]!r}? clp pipeline FILE [--OPTION=VALUE] ...")
    options = build(PipelineOptions, given, "clp pipeline")
    found = read_pipeline(find_pipeline(places[0]), commands)
    directory = Path(options.dir or f"runs/{found.name}/pipeline")
    if options.stages:
        found = found.only(options.stages)
    if options.dry_run:
        print_plan(found, directory)
        return 0
    return run_pipeline(found, directory, commands, options.max_concurrent, options.force)


def _usage() -> str:
    lines = ["clp pipeline: runs the stages of a recipe that are not done, or whose inputs have changed.", ""]
    lines += ["usage: clp pipeline FILE [--OPTION=VALUE] ...", "", "Options:", *describe(PipelineOptions)]
    examples = sorted(path.relative_to(shipped_files()).as_posix() for path in shipped_files().rglob("*.yaml"))
    return "\n".join(
        [*lines, "", f"Files that come with clp: {', '.join(examples)}. docs/sweeps.md tells what they say."]
    )
