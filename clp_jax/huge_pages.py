"""Large pages for a process's memory, which the C library asks the kernel for where it was told to when the process began.

On a CPU, XLA takes fresh memory in every step, and the first touch of each page of 4 KiB costs more than filling it.
"""

import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def begin_again_with_them(
    setting: Path = _SETTING,
    environment: Mapping[str, str] = os.environ,
    execute: Callable[[str, list[str], dict[str, str]], object] = os.execve,
) -> None:
    """Replaces this program by itself with large pages asked for, once, where the kernel gives them to those who ask.

    To be called before anything is done. A user's own ``GLIBC_TUNABLES`` with that tunable is left alone:
    ``glibc.malloc.hugetlb=0`` keeps small pages.

    Args:
        setting: the kernel's; ``madvise`` is for those who ask.
        environment: of this process.
        execute: replaces the program.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    library, version = platform.libc_ver()
    knows = library == "glibc" and tuple(int(x) for x in version.split(".")[:2]) >= (2, 35)
    if _TUNABLE in tunables or not knows or not setting.is_file() or "[madvise]" not in setting.read_text("ascii"):
        return
    given = f"{tunables}:" if tunables else ""
    words = [sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    execute(sys.executable, words, {**environment, "GLIBC_TUNABLES": f"{given}{_TUNABLE}=1"})
