"""What a pipeline remembers of its stages: what each was made of when its command began, and whether it was done."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.launch.command_words import WITHOUT_CONFIG, resolved_config
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.fingerprint import fingerprint, is_remote
from clp_jax.launch.job import write
from clp_jax.launch.pipeline import Pipeline, Stage

STATE_FILE = "stages.json"


@dataclasses.dataclass(frozen=True)
class Made:
    """What a stage is made of.

    Attributes:
        command: its words.
        config: the fingerprint of its resolved configuration.
        inputs: fingerprints of files and directories by path.
    """

    command: tuple[str, ...]
    config: str
    inputs: Mapping[str, str]

    def difference(self, earlier: "Made") -> str | None:
        """What has changed since, in words; None where nothing has."""
        if self.command != earlier.command:
            return "its command has changed"
        if self.config != earlier.config:
            return "its configuration has changed"
        paths = [
            path for path in {**self.inputs, **earlier.inputs} if self.inputs.get(path) != earlier.inputs.get(path)
        ]
        return f"{', '.join(paths)} {'has' if len(paths) == 1 else 'have'} changed" if paths else None


class StageStates:
    """The states of a pipeline's stages, in a file that is there whole or not at all.

    Args:
        directory: of the pipeline's own files.
    """

    def __init__(self, directory: Path):
        self._path = directory / STATE_FILE
        self._stored: dict[str, Any] = {}
        if self._path.is_file():
            try:
                self._stored = _checked(json.loads(self._path.read_text()))
            except (ValueError, KeyError):
                raise LaunchError(
                    f"{self._path} is damaged: remove it, and every stage looks at what is there."
                ) from None

    def made(self, stage: Stage) -> Made | None:
        """What a stage was made of when its command last began."""
        stored = self._stored.get(stage.name)
        return None if stored is None else Made(tuple(stored["command"]), stored["config"], stored["inputs"])

    def is_done(self, stage: Stage) -> bool:
        """Whether its command has ended well since."""
        return bool(self._stored.get(stage.name, {}).get("done"))

    def outputs(self, stage: Stage) -> Sequence[str]:
        """What its command, as it last began, was to leave."""
        return self._stored.get(stage.name, {}).get("outputs", stage.outputs)

    def identity(self, stage: Stage) -> str:
        """What stands for outputs in a bucket: what they were made of."""
        stored = {
            key: value for key, value in self._stored.get(stage.name, {}).items() if key not in ("done", "outputs")
        }
        return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()

    def write(self, stage: Stage, made: Made, done: bool) -> None:
        """Remembers a stage."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stored[stage.name] = dataclasses.asdict(made) | {"outputs": stage.outputs, "done": done}
        write(self._path, json.dumps(self._stored, indent=1) + "\n")


def config_of(stage: Stage) -> str:
    """The fingerprint of a stage's resolved configuration.

    Raises:
        LaunchError: with what the command says is wrong.
    """
    program, *words = stage.command
    if program != "clp" or words[0] in WITHOUT_CONFIG:
        return ""
    try:
        return hashlib.sha256(resolved_config(words).encode()).hexdigest()
    except LaunchError as error:
        raise LaunchError(f"stage {stage.name}: {error}") from None


def made_of(pipeline: Pipeline, stage: Stage, config: str, states: StageStates) -> Made:
    """What a stage, all of whose needs are done, is made of now.

    Raises:
        LaunchError: for an input that is not there.
    """
    # What other stages leave below a path is theirs: an evaluation writes into the run directory it reads.
    owned = {
        Path(output) for other in pipeline.stages.values() for output in other.outputs if not other.is_elsewhere(output)
    }
    inputs: dict[str, str] = {}
    for need in stage.needs:
        other = pipeline.stages[need]
        for output in other.outputs:
            inputs[output] = states.identity(other) if other.is_elsewhere(output) else _of(output, owned, stage)
    for path in stage.inputs:
        inputs[path] = "" if stage.is_elsewhere(path) else _of(path, owned, stage)
    for path in _named_files(stage):
        inputs.setdefault(path, _of(path, owned, stage))
    return Made(stage.command, config, inputs)


def missing_outputs(stage: Stage) -> list[str]:
    """The outputs that are not there; those in a bucket are trusted."""
    return [output for output in stage.outputs if not stage.is_elsewhere(output) and not os.path.lexists(output)]


def check_movable(stage: Stage, states: StageStates) -> None:
    """Raises `LaunchError` for outputs of earlier in a bucket: nobody moves those aside."""
    for output in stage.outputs:
        if stage.is_elsewhere(output) and output in states.outputs(stage):
            raise LaunchError(f"stage {stage.name}: {output} was made of other things: give it another path.")


def move_away(stage: Stage, states: StageStates) -> list[str]:
    """Moves the outputs of a stage aside, so that its command makes them anew; returns where they are now.

    Raises:
        LaunchError: for outputs in a bucket.
    """
    check_movable(stage, states)
    moved = []
    for output in stage.outputs:
        if stage.is_elsewhere(output):
            continue
        path = Path(output)
        if os.path.lexists(path):
            number = next(n for n in range(1, 10**6) if not os.path.lexists(f"{path}.old-{n}"))
            path.rename(f"{path}.old-{number}")
            moved.append(f"{path}.old-{number}")
    return moved


def _checked(stored: Any) -> dict[str, Any]:
    """What was stored, where it is what `StageStates.write` wrote."""
    kinds = {"command": list, "config": str, "inputs": dict}
    for state in stored.values() if isinstance(stored, dict) else [None]:
        if not isinstance(state, dict) or not all(isinstance(state[name], kind) for name, kind in kinds.items()):
            raise ValueError
    return stored


def _of(path: str, owned: set[Path], stage: Stage) -> str:
    found = fingerprint(Path(path), owned - {Path(path)})
    if found is None:
        raise LaunchError(f"stage {stage.name}: its input {path} is not there.")
    return found


def _named_files(stage: Stage) -> list[str]:
    """Files that the command names, as in ``--input=pairs.jsonl``; what gin files say is in the configuration."""
    own = [os.path.abspath(output) for output in stage.outputs if not is_remote(output)]
    found = []
    for word in stage.command[1:]:
        name = word.partition("=")[2] or word
        is_own = any(os.path.commonpath([os.path.abspath(name), output]) == output for output in own)
        if not name.endswith(".gin") and len(name) < 1024 and Path(name).is_file() and not is_own:
            found.append(name)
    return found
