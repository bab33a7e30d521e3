"""An allocator that keeps memory: asked for once, where a CPU computes, and for the same command."""

import platform
import subprocess
import sys

import pytest

from clp_jax.allocator import TUNABLES, begin_again

# Takes and gives back 256 MiB, a number of times: pages that are kept are touched for the first time once.
PROGRAM = """
import ctypes, os, resource, sys
from clp_jax.allocator import begin_again
begin_again()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
def touch():
    place = library.malloc(ctypes.c_size_t(2**28))
    ctypes.memset(place, 1, 2**28)
    library.free(place)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    touch()
print(os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, *sys.argv[1:])
"""


def begun_again(devices, environment):
    done = []
    begin_again(devices, environment, lambda *given: done.append(given))
    return done


@pytest.fixture
def _its_own(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))


@pytest.mark.usefixtures("_its_own")
def test_it_begins_again_with_the_same_words_and_environment(tmp_path):
    ours = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    for given, expected in (("", ours), ("glibc.cpu.x86_shstk=off", f"glibc.cpu.x86_shstk=off:{ours}")):
        environment = {"HOME": "/home/me"} | ({"GLIBC_TUNABLES": given} if given else {})
        ((program, words, found),) = begun_again(tmp_path, environment)
        assert program == words[0] == sys.executable and list(words[1:]) == sys.orig_argv[1:]
        assert found == environment | {"GLIBC_TUNABLES": expected}
        assert begun_again(tmp_path, found) == []


@pytest.mark.usefixtures("_its_own")
@pytest.mark.parametrize("device", ["accel0", "vfio/3", "nvidia0", "kfd"])
def test_hosts_of_accelerators_keep_theirs(tmp_path, device):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert begun_again(tmp_path, {}) == []


@pytest.mark.usefixtures("_its_own")
def test_what_a_user_says_of_it_stays(tmp_path):
    assert begun_again(tmp_path, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == []


@pytest.mark.parametrize("library", ["", "musl"])
def test_other_libraries_know_nothing_of_it(tmp_path, monkeypatch, library):
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    assert begun_again(tmp_path, {}) == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept(tmp_path):
    """2 GiB in all, 524,288 small pages or 1,024 large ones; the process and its words are the same."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "one", "two words"], stdout=subprocess.PIPE, text=True)
    number, faults, *words = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0 and (int(number), words) == (process.pid, ["one", "two", "words"])
    assert int(faults) < 100
