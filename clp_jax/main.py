"""`clp <command> ...`: finds the entry function, gives it its configuration, and turns mistakes into one line."""

import errno
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clp_jax import __version__, allocator, processes
from clp_jax.command_line import SPANNING, EntryPoint, Invocation, parse, usage
from clp_jax.compilation import libtpu
from clp_jax.gin_utils.files import ConfigError, Header, SearchPath, all_files, bindings, read_file, suggest

# In the order they are used.
COMMANDS = {
    "prepare": "clp_jax.prepare.prepare",
    "train": "clp_jax.train.train",
    "evaluate": "clp_jax.evaluate.evaluate",
    "report": "clp_jax.report.report",
    "sample": "clp_jax.sample.sample",
    "score": "clp_jax.score.score",
    "convert": "clp_jax.convert.convert",
    "checkpoints": "clp_jax.checkpoints.checkpoints",
    "experiment": "clp_jax.experiment.experiment",
    "compile": "clp_jax.compile.compile",
    "replay": "clp_jax.replay.replay",
}

# Arguments of commands that stand for another command, configured by the same files.
BORROWED = {"compile": {"training": "train"}, "replay": {"training": "train"}}
# Without gin files, the configuration of the run directory that this argument names.
OF_A_RUN = {"replay": "run_dir"}

# Those that compute, much the same again and again.
COMPUTING = ("train", "evaluate", "sample", "score", "replay", "experiment")

# Those that run commands elsewhere: they know command lines, and nothing of gin.
LAUNCHING = {
    "launch": "Runs a command elsewhere (TPUs, clusters, processes here), and looks after it.",
    "jobs": "Lists, shows, stops and retries what was launched.",
    "sweep": "Tries a command with many bindings and seeds; clp sweep report tells what came of it.",
    "pipeline": "Runs the stages of a recipe that are not done, or whose inputs have changed.",
}

PACKAGE = "clp_jax"

USER_ERROR = 2


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        words: what was typed after `clp`; this process's own by default.

    Returns:
        The exit code: 0, 1 for a failure of the machine (a full disk), 2 for a mistake of the user, and
        `clp_jax.processes.RESTARTABLE` for what goes on when the same command is started again.
    """
    is_program = words is None
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"clp_jax {__version__}")
        return 0
    command, *rest = words
    if command not in LAUNCHING and (command not in COMMANDS or _entry_point(command) is None):
        known = [*_available(), *LAUNCHING]
        print(f"clp: error: there is no command {command!r}{suggest(command, known)}.", file=sys.stderr)
        return USER_ERROR
    try:
        if command in LAUNCHING:
            code = _launch(command, rest)
            sys.stdout.flush()
            return code
        if is_program and command in COMPUTING:
            allocator.begin_again()
        return processes.leave(_run(command, rest))
    except SystemExit as stop:
        processes.leave(stop.code if isinstance(stop.code, int) else processes.FAILURE)
        raise
    except BrokenPipeError:
        if command not in LAUNCHING:
            raise
        # Whoever read it has seen enough, as `head`; Python would flush what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        processes.await_verdict(error)
        message, code = _explain(error)
        code = processes.exit_code_of(error) or code
        if message is None or "--debug" in rest:
            if processes.count() > 1 or code == processes.RESTARTABLE:
                traceback.print_exc()
                return processes.leave(code, f"{type(error).__name__}: {error}")
            raise
        print(f"clp {command}: error: {message}", file=sys.stderr)
        return processes.leave(code, message)
    except KeyboardInterrupt:
        if "--debug" in rest:
            raise
        print(f"clp {command}: interrupted.", file=sys.stderr)
        return processes.leave(128 + 2, "interrupted")


def _run(command: str, words: Sequence[str]) -> int:
    entry = _entry_point(command)
    assert entry is not None
    invocation = parse(words, entry)
    if "help" in invocation.switches:
        print(usage(command, entry))
        for text in _files_help(invocation):
            print(f"\n{text}")
        return 0
    # Modules next to the user's own gin files: rewards, tasks.
    sys.path.append(os.getcwd())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    libtpu.settle()
    # A command that runs again, or goes on, finds its programs compiled.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/clp_jax").expanduser()))
    from clp_jax.gin_utils.configuration import configure

    if command in OF_A_RUN and not invocation.gin_files:
        invocation.gin_files = _own_configuration(invocation.arguments.get(OF_A_RUN[command]))
    for name in invocation.gin_files:
        read_file(name, SearchPath(invocation.search_paths))  # Finds slips before JAX is imported.
    if command in SPANNING and "print_config" not in invocation.switches:
        others = processes.find_processes(invocation.processes, os.environ)
        if others is not None:
            processes.start(others)
    configuration = configure(
        _function(command),
        gin_files=invocation.gin_files,
        gin_bindings=invocation.gin_bindings,
        search_paths=invocation.search_paths,
        arguments=invocation.arguments,
        borrowed={name: _function(other) for name, other in BORROWED.get(command, {}).items()},
    )
    if "print_config" in invocation.switches:
        print(configuration.text, end="")
        return 0
    arguments: dict[str, Any] = configuration.build()
    if entry.takes_config_text:
        arguments["config_text"] = configuration.text
    _function(command)(**arguments)
    return 0


def _own_configuration(run_dir: str | None) -> list[str]:
    if run_dir is not None and "://" in run_dir:  # What reads stores need not be imported for anything else.
        places = importlib.import_module("clp_jax.training.places")
        run_dir = str(places.local_files(places.as_path(run_dir)))
    path = Path(run_dir or "") / "config.gin"
    if run_dir is None or not path.is_file():
        raise ConfigError(f"there is no {path}: give a run directory, or the gin files of the run.")
    return [str(path)]


def _function(command: str) -> Any:
    module, name = COMMANDS[command].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _launch(command: str, words: Sequence[str]) -> int:
    """Gives a command line to `launch/`."""
    # A sweep file is Python of the user, and may import what is next to it.
    sys.path.append(os.getcwd())
    known = [*_available(), *LAUNCHING]
    if command == "jobs":
        return importlib.import_module("clp_jax.launch.jobs").jobs(words)
    module = {"launch": "command", "sweep": "sweep_command", "pipeline": "pipeline_command"}[command]
    return getattr(importlib.import_module(f"clp_jax.launch.{module}"), command)(words, commands=known)


def _entry_point(command: str) -> EntryPoint | None:
    return EntryPoint.find(*COMMANDS[command].rsplit(".", 1))


def _available() -> list[str]:
    return [command for command in COMMANDS if _entry_point(command) is not None]


def _overview() -> str:
    lines = [
        "clp: steerable language policies on JAX.",
        "",
        "usage: clp COMMAND [--gin_file=FILE] [--gin.NAME=VALUE] ...",
        "",
    ]
    for command in COMMANDS:
        entry = _entry_point(command)
        if entry is not None:
            lines.append(f"  {command:<12}{entry.summary}")
    lines += [f"  {command:<12}{summary}" for command, summary in LAUNCHING.items()]
    return "\n".join([*lines, "", "clp COMMAND --help tells more, also about the gin files given with it."])


def _files_help(invocation: Invocation) -> list[str]:
    """What the headers of the given gin files say, with the values macros have."""
    path = SearchPath(invocation.search_paths)
    texts = []
    for name in invocation.gin_files:
        file = read_file(name, path)
        values = {binding.macro: repr(binding.value) for binding, _ in bindings([file]) if binding.macro}
        headers = [member.header for member in all_files([file])]
        merged = Header(
            file.header.summary,
            {macro: text for header in headers for macro, text in header.required.items()},
            {macro: text for header in headers for macro, text in header.overridden.items()},
        )
        lines = [f"{name}: {merged.summary}"]
        still = {macro: text for macro, text in merged.required.items() if values.get(macro) in (None, "%gin.REQUIRED")}
        for title, macros in (("Required", still), ("Commonly overridden", merged.overridden)):
            lines += [f"  {title}:"] if macros else []
            for macro, text in macros.items():
                value = "VALUE" if macro in still else values.get(macro, "VALUE")
                lines.append(f"    --gin.{macro}={value}  {text}".rstrip())
        texts.append("\n".join(lines))
    return texts


def _explain(error: BaseException) -> tuple[str | None, int]:
    """One line for what a user can mend, and None for what only a programmer can."""
    if isinstance(error, ConfigError):
        return str(error), USER_ERROR
    # Gin adds where a call was configured, with addresses.
    text = re.sub(r"\n\s*In call to configurable .*", "", str(error))
    if isinstance(error, OSError):
        advice = {
            errno.ENOSPC: "the disk is full: free some space and run the same command again",
            errno.EDQUOT: "your disk quota is used up: free some space and run the same command again",
            errno.EROFS: "the file system is read-only: give another directory",
            errno.EACCES: "permission denied: change the permissions or give another path",
        }.get(error.errno or 0)
        where = f"{error.filename}: " if error.filename else ""
        if advice is not None:
            return f"{where}{advice}.", processes.FAILURE
        if isinstance(error, FileNotFoundError) and error.filename:
            return f"{where}no such file or directory.", USER_ERROR
        return text, USER_ERROR if _is_ours(error) else processes.FAILURE
    if isinstance(error, ValueError | RuntimeError) and _is_ours(error):
        return text, processes.FAILURE if _is_of_a_full_disk(error) else USER_ERROR
    in_their_code = _in_code_of_the_user(error)
    return in_their_code, processes.FAILURE if in_their_code is None else USER_ERROR


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return error is not None and (any(word in str(error) for word in words) or _is_of_a_full_disk(error.__cause__))


def _in_code_of_the_user(error: BaseException) -> str | None:
    """What went wrong in a reward or a task next to the user's gin files, from there on; None elsewhere."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
    trace = error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        module = trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
        if module != PACKAGE and "site-packages" not in path.parts and path.is_relative_to(Path.cwd()):
            lines = traceback.format_exception(type(error), error, trace)
            return f"your code raised {type(error).__name__}.\n{''.join(lines).rstrip()}"
        trace = trace.tb_next
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it, and not a library below: ours say what to do."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return raised_in.split(".")[0] == PACKAGE


if __name__ == "__main__":
    sys.exit(main())
