"""A world of fake tools on the PATH, and jobs in it."""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from clp_jax.launch import calls
from clp_jax.launch.code import archive
from clp_jax.launch.job import Job, JobRecord, jobs_directory
from clp_jax.launch.supervisor import Patience, advance, supervise
from clp_jax.launch.targets import find_target

from clp_jax.main import main

FAKES = Path(__file__).parent / "fakes"
sys.path.append(str(FAKES))

from kept_json import lets_go_wrong

TRAINING = ("python3", str(FAKES / "training.py"))
TOOLS = {"gcloud": "gcloud", "kubectl": "kubectl"} | dict.fromkeys(
    ("sbatch", "squeue", "sacct", "scancel", "srun", "scontrol"), "slurm"
)
TOOLS |= dict.fromkeys(("ssh-add", "ssh-keygen"), "agent")
MOUNTING = ("sudo", "mountpoint", "gcsfuse")
QUICK = Patience(look=0.05, first_wait=0.05, longest_wait=0.2)
# Whatever a shell could make of a word.
AWKWARD = """--gin.NAME='a  b "c" $(touch hacked) `id` ${HOME} \\n \\ ; & | * é'\nand a second line"""


@dataclasses.dataclass
class World:
    """What the fake tools see.

    Attributes:
        path: their state.
        jobs: the records.
    """

    path: Path
    jobs: Path

    def trouble(self, name, value=True, times=1):
        """Lets something go wrong the next time."""
        lets_go_wrong(self.path, name, value, times)

    def calls(self, tool=None):
        """What was called."""
        file = self.path / "calls.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [words for words in lines if tool in (None, words[0])]

    @property
    def state(self):
        """What exists."""
        file = self.path / "state.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    @property
    def runs(self):
        """What the commands were given, in the order they began."""
        file = self.path / "runs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def record(self, target, options, words=("a",), name="job", **settings):
        """A job that runs the tiny training, with its target."""
        command = ("python3", str(FAKES / "training.py"), *words)
        run_dir = settings.pop("run_dir", None)
        job = Job(name, command, target, options, run_dir, directory=str(self.path / "here"), **settings)
        made = find_target(target, options)
        extra = made.ships_code
        code = None if extra is None else _archive(extra)
        return JobRecord.create(self.jobs, job, {}, code), made

    def run(self, record, target):
        """Looks after a job until it is over."""
        (end,) = supervise([record], [target], QUICK)
        return end


@functools.cache
def _archive(extra):
    return archive({"my.gin": b"A = 1\n"}, extra)


def phases(record):
    """The phases of a job, in order; one that is told of again with another reason counts once."""
    return [phase for phase, _ in itertools.groupby(state.phase for state in record.states)]


def until(condition, seconds=60.0):
    """Waits for what other processes do, and not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def one_launcher_each(record):
    """Looks after a job until it is over, each time by a launcher that knows the disk alone; how many looks that took."""
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        again = JobRecord.load(record.path)
        advance(again, find_target(again.job.target, again.job.options), QUICK)
        return record.is_over and record.kept("deleted")

    until(look)
    return looks


def are_gone(pids):
    """Whether none of some processes runs; what nobody has taken notice of yet (a zombie) does not."""
    states = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name, in parentheses, may hold anything.
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return all(state in "ZX" for state in states)


@pytest.fixture
def here(world, monkeypatch):
    """Where commands are typed."""
    monkeypatch.chdir(world.path / "here")
    return world.path / "here"


def clp(*words):
    """The exit code of a command line."""
    return main(list(words))


def typed(name="job"):
    """The record of a job that a command line made."""
    return JobRecord.load(jobs_directory() / name)


@pytest.fixture
def empty_directory(tmp_path, monkeypatch):
    """An empty directory to work in, with no jobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLP_JOBS_DIR", str(tmp_path / "jobs"))
    return tmp_path


@pytest.fixture
def unreaped():
    """A machine whose first process takes no notice of orphans that end: here they become ours, and stay zombies."""
    become_subreaper = 36
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(become_subreaper, 1, 0, 0, 0) == 0
    yield
    assert libc.prctl(become_subreaper, 0, 0, 0, 0) == 0
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@pytest.fixture
def world(tmp_path, monkeypatch):
    path, tools = tmp_path / "world", tmp_path / "tools"
    (path / "here").mkdir(parents=True)
    tools.mkdir()
    for tool, program in TOOLS.items():
        (tools / tool).symlink_to(FAKES / f"{program}.py")
    for tool in MOUNTING:
        (tools / tool).symlink_to(FAKES / "mounting")
    python = tools / "python3"
    python.write_text((FAKES / "python3").read_text().replace("REAL_PYTHON", sys.executable))
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKES", str(path))
    monkeypatch.setenv("CLP_JOBS_DIR", str(tmp_path / "jobs"))
    monkeypatch.setattr(calls, "LONGEST", 20.0)
    yield World(path, tmp_path / "jobs")
    shutil.rmtree(path / "nodes", ignore_errors=True)
