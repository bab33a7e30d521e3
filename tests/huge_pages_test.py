"""Large pages: asked for once, where the kernel gives them to those who ask, and for the same command."""

import platform
import subprocess
import sys

import pytest

from clp_jax.huge_pages import begin_again_with_them

PROGRAM = """
import os, sys
from clp_jax.huge_pages import begin_again_with_them
begin_again_with_them()
print(os.environ.get("GLIBC_TUNABLES"), os.getpid(), *sys.argv[1:])
"""


def begun_again(tmp_path, setting, environment):
    (tmp_path / "enabled").write_text(setting)
    done = []
    begin_again_with_them(tmp_path / "enabled", environment, lambda *given: done.append(given))
    return done


@pytest.fixture
def _a_library_that_can(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))


@pytest.mark.usefixtures("_a_library_that_can")
def test_it_begins_again_with_the_same_words_and_environment(tmp_path):
    environment = {"HOME": "/home/me", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    ((program, words, found),) = begun_again(tmp_path, "always [madvise] never", environment)
    assert program == words[0] == sys.executable and list(words[1:]) == sys.orig_argv[1:]
    assert found == environment | {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}
    assert begun_again(tmp_path, "always [madvise] never", found) == []


@pytest.mark.usefixtures("_a_library_that_can")
@pytest.mark.parametrize(
    ("setting", "tunables"),
    [("[always] madvise never", ""), ("always madvise [never]", ""), ("[madvise]", "glibc.malloc.hugetlb=0")],
)
def test_it_goes_on_where_there_is_nothing_to_ask_for(tmp_path, setting, tunables):
    assert begun_again(tmp_path, setting, {"GLIBC_TUNABLES": tunables}) == []


@pytest.mark.parametrize("library", [("", ""), ("glibc", "2.31"), ("musl", "1.2")])
def test_it_goes_on_with_a_library_that_knows_nothing_of_it(tmp_path, monkeypatch, library):
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    assert begun_again(tmp_path, "[madvise]", {}) == []


def test_a_program_stays_the_same_process(tmp_path):
    """Whatever this machine has: the program runs to its end, under one number, with its words."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "one", "two words"], stdout=subprocess.PIPE, text=True)
    said = process.communicate(timeout=60)[0].split()
    assert process.returncode == 0 and said[1:] == [str(process.pid), "one", "two", "words"]
