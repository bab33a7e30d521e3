"""Groups of real processes on this machine, each with virtual devices of its own."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tiny_runs import make_data, make_packed, make_supervised

ROOT = Path(__file__).parents[2]
PATHS = (ROOT, ROOT / "tests" / "fixtures", Path(__file__).parent)


@dataclasses.dataclass
class Group:
    """Processes that run one plan.

    Attributes:
        processes: the children, by number.
        logs: what they print.
    """

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; fails, with what the processes printed, where they do not end in time."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"processes did not end within {seconds} s.\n{self.text()}") from None

    def text(self) -> str:
        """Everything that was printed."""
        return "\n".join(f"--- process {i}\n{path.read_text()}" for i, path in enumerate(self.logs))

    def succeed(self, seconds: float = 900) -> None:
        """Waits until all have ended well."""
        codes = self.wait(seconds)
        assert codes == [0] * len(codes), f"exit codes {codes}.\n{self.text()}"

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def make_home(path: Path) -> Path:
    """The data of all jobs, and the supervised policy that reinforcement learning starts from."""
    make_packed(path / "packed")
    make_supervised(path / "sft", make_data(path / "prompts"))
    return path


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def compiled_programs(home: Path) -> dict[str, str]:
    """Variables by which processes share what they compile: most of a short run is that, and most runs are another's again."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(directory: Path, home: Path, jobs: list[dict], *, num_processes: int, devices: int, **variables) -> Group:
    """Starts the processes of a plan.

    Args:
        directory: for the plan and the logs.
        home: with the data.
        jobs: names of `worker.JOBS`, with where and how to train them.
        num_processes: how many.
        devices: of each process.
        **variables: for their environment.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plan = {"home": str(home), "jobs": jobs, "num_processes": num_processes, "devices": devices}
    path = directory / "plan.json"
    path.write_text(json.dumps(plan | {"address": f"127.0.0.1:{free_port()}"}))
    environment = os.environ | compiled_programs(home)
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    processes, logs = [], []
    for number in range(num_processes):
        logs.append(directory / f"log.{number}")
        with open(logs[-1], "w") as log:
            command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(path), str(number)]
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment | variables)
            )
    return Group(processes, logs)
