"""A sweep: one command, and the bindings that its trials add to it."""

import dataclasses
import hashlib
import json
import runpy
from ast import literal_eval
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clp_jax.launch import space as spaces
from clp_jax.launch.command_words import command_words, program_words, resolved_config
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.yaml_files import check_keys, read_yaml

GOALS = ("minimize", "maximize")
RUN_DIR = "{run_dir}"
TRIALS_FILE = "trials.jsonl"

_KINDS = {"uniform": spaces.uniform, "log_uniform": spaces.log_uniform, "integers": spaces.integers}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        bindings: text after ``--gin.NAME=`` by name.
        seed: of the run; None leaves the command's own.
    """

    bindings: Mapping[str, str]
    seed: int | None = None

    @property
    def setting(self) -> str:
        """The hash of the bindings: what repeats over seeds have in common."""
        return _hash({name: self.bindings[name] for name in sorted(self.bindings)})

    @property
    def name(self) -> str:
        """The hash that names the trial, the same whatever else the sweep tries."""
        return self.setting if self.seed is None else _hash([self.setting, self.seed])

    def words(self) -> list[str]:
        """What it adds to the command."""
        seed = [] if self.seed is None else [f"--seed={self.seed}"]
        return [*(f"--gin.{name}={text}" for name, text in self.bindings.items()), *seed]

    @property
    def shape(self) -> frozenset[tuple[str, str]]:
        """The bindings that may change what is compiled, and how much memory that needs: not numbers with a point."""
        return frozenset((name, text) for name, text in self.bindings.items() if _kind(text) != "float")

    @property
    def parameters(self) -> dict[str, str]:
        """What it tries, by name: the bindings and the seed."""
        return {**self.bindings, **({} if self.seed is None else {"seed": str(self.seed)})}

    def __str__(self) -> str:
        return " ".join(f"{name}={text}" for name, text in self.parameters.items()) or "no bindings"


@dataclasses.dataclass(frozen=True)
class Search:
    """An adaptive search: each trial's bindings follow from the metrics of those before.

    Attributes:
        ranges: by name.
        trials: in all, without the repeats over seeds.
        seed: of the search.
    """

    ranges: Mapping[str, spaces.Range]
    trials: int
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.trials, bool) or not isinstance(self.trials, int) or self.trials < 1:
            raise LaunchError(f"search: trials is {self.trials!r}: expected a whole number of at least 1.")
        spaces.check_seed("search", self.seed)
        spaces.check_ranges("search", self.ranges)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        command: what every trial runs, without ``clp``; ``{run_dir}`` stands for the trial's run directory, which is given
            as ``--run_dir`` where the command does not name it.
        space: the trials; combinators of `clp_jax.launch.space` make it.
        search: the trials of an adaptive search instead.
        seeds: of every trial: so many from 0, or these; None leaves the command's own seed.
        then: more commands, run one after another; they know ``{run_dir}`` and no bindings.
        metrics: ``minimize`` or ``maximize`` by name; the first one orders the table.
    """

    command: str | Sequence[str]
    space: spaces.Space | None = None
    search: Search | None = None
    seeds: int | Sequence[int] | None = None
    then: Sequence[str] = ()
    metrics: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commands()
        if (self.space is None) == (self.search is None):
            raise LaunchError("a sweep has a space or a search: expected one of them.")
        if self.search is not None and not self.metrics:
            raise LaunchError(
                "search: what is best? Give metrics, as in metrics: {evaluation/cross_entropy: minimize}."
            )
        for name, goal in self.metrics.items():
            if goal not in GOALS:
                raise LaunchError(f"metrics: {name} is {goal!r}: expected minimize or maximize.")
        self.all_seeds()
        self.trials()

    def commands(self) -> list[tuple[str, ...]]:
        """The words of the command, and of those after it."""
        return [command_words(self.command, "command"), *(command_words(command, "then") for command in self.then)]

    def all_seeds(self) -> list[int | None]:
        """The seeds of every trial."""
        if self.seeds is None:
            return [None]
        given = list(range(self.seeds)) if isinstance(self.seeds, int) else list(self.seeds)
        if isinstance(self.seeds, bool):
            given = []
        if not given or any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**32 for s in given):
            raise LaunchError(
                f"seeds: {self.seeds!r}: expected their number, or a list of whole numbers in [0, 2**32)."
            )
        return list(given)

    def trials(self) -> list[Trial]:
        """All trials of the space; those of a search are not known before.

        Raises:
            LaunchError: for an empty space, or the same trial twice.
        """
        if self.space is None:
            return []
        if not self.space:
            raise LaunchError("space: it is empty: expected at least one trial.")
        found: dict[str, Trial] = {}
        for bindings in self.space:
            for trial in self.repeats(bindings):
                if trial.name in found:
                    raise LaunchError(f"space: the same trial twice: {trial}.")
                found[trial.name] = trial
        return list(found.values())

    def repeats(self, bindings: Mapping[str, Any]) -> list[Trial]:
        """The trials of some bindings, one for each seed."""
        texts = {spaces.check_name(name): gin_text(value) for name, value in bindings.items()}
        return [Trial(texts, seed) for seed in self.all_seeds()]


def command_lines(commands: Sequence[Sequence[str]], trial: Trial, run_dir: str) -> list[list[str]]:
    """The command lines of a trial, without ``clp``.

    Args:
        commands: of the sweep.
        trial: the trial.
        run_dir: what ``{run_dir}`` stands for.
    """
    first, *rest = commands
    own = [] if any(RUN_DIR in word for word in first) else [f"--run_dir={RUN_DIR}"]
    lines = [[*first, *own], *rest]
    replaced = [[word.replace(RUN_DIR, run_dir) for word in line] for line in lines]
    return [[*replaced[0], *trial.words()], *replaced[1:]]


def gin_text(value: Any) -> str:
    """A value as typed after ``--gin.NAME=``; what is the same to gin is the same text."""
    text = value.strip() if isinstance(value, str) else repr(value)
    try:
        return repr(literal_eval(text))
    except (ValueError, SyntaxError):
        return text


def check_trials(sweep: Sweep, trials: Iterable[Trial], run_dir: str, commands: Collection[str]) -> None:
    """Resolves configurations that use every name and every kind of value, in processes that run nothing.

    Args:
        sweep: the sweep.
        trials: of it.
        run_dir: of a trial.
        commands: of `clp`; what other programs make of their words, nobody knows before.

    Raises:
        LaunchError: with what the command says of a binding that does not exist or does not fit.
    """
    seen: set[tuple[str, str]] = set()
    for number, trial in enumerate(trials):
        kinds = {(name, _kind(text)) for name, text in trial.bindings.items()}
        if number and kinds <= seen:
            continue
        seen |= kinds
        lines = command_lines(sweep.commands(), trial, run_dir)
        for words in lines[: 1 if number else None]:
            if program_words(words, commands, "command")[0] != "clp":
                continue
            try:
                resolved_config(words)
            except LaunchError as error:
                raise LaunchError(f"the trial {trial}: {error}") from None


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file: ``sweep.yaml`` is data, ``sweep.py`` is the user's Python that defines ``sweep``.

    Raises:
        FileNotFoundError: when there is none.
        LaunchError: for anything in it that is wrong.
    """
    if path.suffix in (".yaml", ".yml"):
        content = read_yaml(path)
    elif path.suffix == ".py":
        if not path.is_file():
            raise FileNotFoundError(2, "no such file", str(path))
        content = {"sweep": runpy.run_path(str(path)).get("sweep")}
        if not isinstance(content["sweep"], Sweep):
            raise LaunchError(f"{path}: sweep is {content['sweep']!r}: expected sweep = Sweep(command=..., space=...).")
        return content["sweep"]
    else:
        raise LaunchError(f"{path}: expected a file called *.yaml or *.py.")
    try:
        fields = [field.name for field in dataclasses.fields(Sweep)]
        check_keys(content, fields, ["command"], "a sweep")
        parts: dict[str, Any] = dict(content)
        if "space" in content:
            parts["space"] = _space(content["space"])
        if "search" in content:
            given = check_keys(content["search"], ["ranges", "trials", "seed"], ["ranges", "trials"], "search")
            parts["search"] = Search(_ranges(given["ranges"]), given["trials"], _seed("search", given))
        for key, kinds, expected in (
            ("command", (str, list), "text or a list of words"),
            ("then", (list,), "a list of commands"),
            ("metrics", (dict,), "names and minimize or maximize"),
            ("seeds", (int, list), "their number or a list"),
        ):
            if key in content and not isinstance(content[key], kinds):
                raise LaunchError(f"{key}: {content[key]!r}: expected {expected}.")
        return Sweep(**parts)
    except ValueError as error:
        raise LaunchError(f"{path}: {error}") from None


def _space(content: Any) -> spaces.Space:
    """A space as YAML says it: a list of trials, or the name of a combinator and what it is given."""
    if isinstance(content, list):
        if not all(isinstance(trial, dict) for trial in content):
            raise LaunchError(f"space: {content!r}: expected a list of trials, each with names and values.")
        return content
    known = ["grid", "product", "zip", "random", "sobol"]
    check_keys(content, known, [], "space")
    if len(content) != 1:
        raise LaunchError(f"space: {' and '.join(map(str, content)) or 'nothing'}: expected one of {', '.join(known)}.")
    ((kind, given),) = content.items()
    if kind == "grid":
        if not isinstance(given, dict):
            raise LaunchError(f"grid: {given!r}: expected names and lists of values.")
        return spaces.grid(given)
    if kind in ("product", "zip"):
        if not isinstance(given, list):
            raise LaunchError(f"{kind}: {given!r}: expected a list of spaces.")
        return (spaces.product if kind == "product" else spaces.zip)(*map(_space, given))
    check_keys(given, ["ranges", "count", "seed"], ["ranges", "count"], kind)
    sample = spaces.random if kind == "random" else spaces.sobol
    return sample(_ranges(given["ranges"]), given["count"], _seed(kind, given))


def _seed(where: str, given: Mapping[str, Any]) -> int:
    return spaces.check_seed(where, given.get("seed", 0))


def _ranges(content: Any) -> dict[str, spaces.Range]:
    if not isinstance(content, dict):
        raise LaunchError(f"ranges: {content!r}: expected names and ranges.")
    found = {}
    for name, given in content.items():
        check_keys(given, [*_KINDS, "choice"], [], f"ranges: {name}")
        if len(given) != 1:
            raise LaunchError(f"ranges: {name}: {given!r}: expected one of {', '.join(_KINDS)}, choice.")
        ((kind, ends),) = given.items()
        if kind != "choice" and not (isinstance(ends, list) and len(ends) == 2):
            raise LaunchError(f"ranges: {name}: {kind}: {ends!r}: expected [LOW, HIGH].")
        found[name] = spaces.choice(ends) if kind == "choice" else _KINDS[kind](*ends)
    return found


def _kind(text: str) -> str:
    """The kind of a value: one number is as good as another, one name is not."""
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if isinstance(value, str) else type(value).__name__


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
