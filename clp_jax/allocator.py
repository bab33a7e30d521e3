"""The C library's allocator, told to keep what a program has given back.

On a CPU, XLA takes all of a step's memory anew, and the allocator would take it from the kernel each time: every page is a
fault and is filled with zeros, which costs a small policy a third of a step (docs/speed.md). It is told before a process
begins, or not at all.
"""

import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

TUNABLES = {
    # Arenas of other threads map large blocks by themselves, and unmap them.
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**40,
    # Large pages, where the kernel gives them to those who ask.
    "glibc.malloc.hugetlb": 1,
}
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def begin_again(
    devices: Path = Path("/dev"),
    environment: Mapping[str, str] = os.environ,
    execute: Callable[[str, list[str], dict[str, str]], object] = os.execve,
) -> None:
    """Replaces this program by itself, once, with an allocator that keeps memory, where a CPU computes.

    To be called before anything is done. Beside an accelerator, hosts keep the allocator as it is; so does a user whose
    ``GLIBC_TUNABLES`` say anything of it: ``glibc.malloc.hugetlb=0`` is enough.

    Args:
        devices: where the system shows its devices.
        environment: of this process.
        execute: replaces the program.
    """
    given = environment.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc." in given:
        return
    if any(found for pattern in _ACCELERATORS for found in devices.glob(pattern)):
        return
    ours = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    sys.stdout.flush()
    sys.stderr.flush()
    words = [sys.executable, *sys.orig_argv[1:]]
    execute(sys.executable, words, {**environment, "GLIBC_TUNABLES": f"{given}:{ours}" if given else ours})
