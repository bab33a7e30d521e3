"""A pipeline: the stages of a recipe as data, each a command with what it needs and what it leaves."""

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.launch.buckets import seen_from_here
from clp_jax.launch.command_words import command_words, program_words
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.fingerprint import is_remote
from clp_jax.launch.options import split
from clp_jax.launch.yaml_files import check_keys, read_yaml

_NAME = re.compile(r"[a-z]([a-z0-9_-]{0,28}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
        name: of the stage.
        command: its words; ``clp`` stands for this package's command.
        outputs: files and directories that it leaves; relative to the working directory, or in a bucket.
        needs: stages that must be done before; their outputs are what this one is made of.
        inputs: more files and directories that it is made of.
        target: what is typed after ``clp launch`` to say where it runs, a slice among its options; nothing runs it here.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    target: tuple[str, ...] = ()

    def is_elsewhere(self, path: str) -> bool:
        """Whether a path of this stage is in a bucket: as it is written, or where the target's workers have it."""
        return is_remote(seen_from_here(path, split(self.target)[1]) or path)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which each one's needs come before it.

    Attributes:
        name: of the pipeline.
        stages: by name.
    """

    name: str
    stages: Mapping[str, Stage]

    def only(self, names: Iterable[str]) -> "Pipeline":
        """These stages and all that they need.

        Raises:
            LaunchError: for a stage that there is not.
        """
        waiting, kept = list(names), set()
        while waiting:
            name = waiting.pop()
            if name not in self.stages:
                raise LaunchError(f"there is no stage {name!r}: there are {', '.join(self.stages)}.")
            kept.add(name)
            waiting += self.stages[name].needs
        return Pipeline(self.name, {name: stage for name, stage in self.stages.items() if name in kept})


def shipped_files() -> Path:
    """The directory of the examples that come with the package, in a checkout and in a wheel."""
    return Path(__file__).parent.parent / "gin_configs"


def find_pipeline(name: str) -> Path:
    """A pipeline's file: as the path says, or among those that come with the package.

    Raises:
        FileNotFoundError: when there is none.
    """
    found = next((path for path in (Path(name), shipped_files() / name) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(2, "no such file", name)
    return found


def read_pipeline(path: Path, commands: Collection[str]) -> Pipeline:
    """Reads a pipeline.

    Args:
        path: of the file.
        commands: of `clp`; a stage's command that begins with something else is any other program.

    Raises:
        LaunchError: for unknown or missing keys, names that stand twice, needs that are no stages or go round, outputs of
            two stages, and commands that are not there.
    """
    content = read_yaml(path)
    try:
        check_keys(content, ["name", "stages"], ["name", "stages"], "a pipeline")
        name = _checked_name(content["name"], "the pipeline")
        if not isinstance(content["stages"], list) or not content["stages"]:
            raise LaunchError(f"stages: {content['stages']!r}: expected a list of stages.")
        stages = [_stage(number, given, commands) for number, given in enumerate(content["stages"], 1)]
        return Pipeline(name, _sorted(_checked(stages)))
    except ValueError as error:
        raise LaunchError(f"{path}: {error}") from None


def _stage(number: int, given: Any, commands: Collection[str]) -> Stage:
    known = [field.name for field in dataclasses.fields(Stage)]
    where = (
        f"stage {given['name']}"
        if isinstance(given, dict) and isinstance(given.get("name"), str)
        else f"stage {number}"
    )
    check_keys(given, known, ["name", "command", "outputs"], where)
    outputs, needs, inputs = (_texts(given.get(key, []), f"{where}: {key}") for key in ("outputs", "needs", "inputs"))
    if not outputs:
        raise LaunchError(f"{where}: outputs: there are none: without them nobody knows whether it is done.")
    words = command_words(given["command"], f"{where}: command")
    command = program_words(words, commands, where)
    target = command_words(given["target"], f"{where}: target") if "target" in given else ()
    return Stage(_checked_name(given["name"], where), command, outputs, needs, inputs, target)


def _checked(stages: Sequence[Stage]) -> Sequence[Stage]:
    names = [stage.name for stage in stages]
    owners: dict[str, str] = {}
    for stage in stages:
        if names.count(stage.name) > 1:
            raise LaunchError(f"two stages are called {stage.name}.")
        for need in stage.needs:
            if need not in names:
                raise LaunchError(f"stage {stage.name} needs {need}, which is no stage: there are {', '.join(names)}.")
        for output in stage.outputs:
            other = owners.setdefault(os.path.normpath(output), stage.name)
            if other != stage.name:
                raise LaunchError(f"stages {other} and {stage.name} have the same output {output}.")
    return stages


def _sorted(stages: Sequence[Stage]) -> dict[str, Stage]:
    """The stages in the order they were written in, but for needs, which come first."""
    waiting, done = {stage.name: stage for stage in stages}, dict[str, Stage]()
    while waiting:
        ready = next((stage for stage in waiting.values() if set(stage.needs) <= done.keys()), None)
        if ready is None:
            raise LaunchError(f"needs go round: {' -> '.join(_cycle(waiting))}.")
        done[ready.name] = waiting.pop(ready.name)
    return done


def _cycle(stages: Mapping[str, Stage]) -> list[str]:
    trail = [next(iter(stages))]
    while trail.count(trail[-1]) == 1:
        trail.append(next(need for need in stages[trail[-1]].needs if need in stages))
    return trail[trail.index(trail[-1]) :]


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise LaunchError(f"{where}: its name is {name!r}: expected up to 30 lower-case letters, digits, - and _.")
    return name


def _texts(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(item, str) and item for item in given):
        raise LaunchError(f"{where}: {given!r}: expected a list of text.")
    return tuple(given)
