"""Network namespaces of Linux: processes on one machine with addresses of their own, and a network between them."""

import dataclasses
import hashlib
import shutil
import socket
from pathlib import Path

from clp_jax.launch.calls import call, carry_out
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.target import Run, Step, Write

_MOST = 250
# `ip netns exec` lays the files of a namespace's folder here over those of /etc.
_FILES = Path("/etc/netns")


@dataclasses.dataclass(frozen=True)
class Namespaces:
    """One namespace for each process, joined by a bridge.

    Attributes:
        resource: that they are of; their names follow from it.
        count: how many.
    """

    resource: str
    count: int

    def address(self, index: int) -> str:
        """Of a namespace: in the block that is kept for benchmarks of networks (RFC 2544)."""
        return f"198.18.{int(self._digest[:2], 16)}.{index + 1}"

    def enter(self, index: int) -> tuple[str, ...]:
        """The words before a command that runs in a namespace."""
        return ("ip", "netns", "exec", self._name(index))

    def create(self) -> list[Step]:
        """The commands that make them, and their files."""
        words = [f"link add {self._bridge} type bridge", f"link set {self._bridge} up"]
        for i in range(self.count):
            name, port = self._name(i), f"cv{self._digest}{i}"
            words += [
                f"netns add {name}",
                f"link add {port} type veth peer name eth0 netns {name}",
                f"link set {port} master {self._bridge} up",
                f"-n {name} addr replace {self.address(i)}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
            ]
        # Processes tell each other where they are by asking for the host's own name, which elsewhere is 127.0.0.1.
        hosts = [f"127.0.0.1 localhost\n{self.address(i)} {socket.gethostname()}\n" for i in range(self.count)]
        return [
            *(Run(("ip", *line.split()), timeout=20.0) for line in words),
            *(Write(_FILES / self._name(i) / "hosts", text) for i, text in enumerate(hosts)),
        ]

    def delete(self) -> None:
        """Removes them, with their ends of the network; those that are not there are no error."""
        lines = [f"netns delete {self._name(i)}" for i in range(self.count)]
        for line in [*lines, f"link delete {self._bridge}"]:
            call(Run(("ip", *line.split()), timeout=20.0), may_fail=True)
        for i in range(self.count):
            shutil.rmtree(_FILES / self._name(i), ignore_errors=True)

    @property
    def _digest(self) -> str:
        return hashlib.sha256(self.resource.encode()).hexdigest()[:8]

    @property
    def _bridge(self) -> str:
        return f"cb{self._digest}"

    def _name(self, index: int) -> str:
        return f"clp-{self._digest}-{index}"


def check_namespaces(count: int) -> None:
    """Makes one and removes it.

    Raises:
        LaunchError: where that is not permitted.
    """
    if count > _MOST:
        raise LaunchError(f"--processes is {count}: expected at most {_MOST} with --namespaces.")
    probe = Namespaces("probe", 1)
    try:
        carry_out(probe.create())
    except (LaunchError, OSError) as error:
        raise LaunchError(f"--namespaces needs the rights of root for networks: {error}") from error
    finally:
        probe.delete()
