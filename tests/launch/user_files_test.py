"""Which files of the user go with a command: those that it names, what they include and import, and nothing else."""

import json
import os
import subprocess
import sys

from clp_jax.launch import user_files


def files_of(command, directory):
    """The contents of the files that go along."""
    return user_files.user_files(command, directory).contents


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_files_that_come_with_the_package_stay_there(tmp_path):
    assert files_of(("clp", "train", "--gin_file=examples/pydoc_sft.gin"), tmp_path) == {}


def test_includes_go_round_once(tmp_path):
    write(tmp_path, {"a.gin": "include 'b.gin'\n", "b.gin": "include 'a.gin'\n"})
    assert sorted(files_of(("clp", "train", "--gin_file=a.gin"), tmp_path)) == ["a.gin", "b.gin"]


def test_packages_come_with_what_makes_them_packages(tmp_path):
    files = {
        "my.gin": "import pack.sub.rewards\nfrom pack import other\n",
        "pack/__init__.py": "",
        "pack/sub/__init__.py": "from . import near\nfrom .. import far\nimport json, clp_jax.train",
        "pack/sub/rewards.py": "from .deeper import thing\nimport top",
        "pack/sub/near.py": "",
        "pack/sub/deeper.py": "thing = 1",
        "pack/far.py": "def broken(:",
        "pack/other.py": "",
        "pack/unused.py": "",
        "top.py": "",
        "clp_jax/train.py": "not the package",
    }
    write(tmp_path, files)
    found = files_of(("clp", "train", "--gin_file", "my.gin"), tmp_path)
    assert sorted(found) == sorted(set(files) - {"pack/unused.py", "clp_jax/train.py"})


def test_a_program_finds_its_modules_and_data_in_another_directory(tmp_path):
    files = {
        "tools/count.py": "import sys, words; print(words.count(open(sys.argv[1].partition('=')[2]).read()))",
        "tools/words.py": "def count(text): return len(text.split())",
        "pairs.jsonl": "a b c",
    }
    write(tmp_path / "here", files)
    command = ("python3", "tools/count.py", "--input=pairs.jsonl")
    brought = files_of(command, tmp_path / "here")
    write(tmp_path / "there", {name: content.decode() for name, content in brought.items()})
    words = (sys.executable, *command[1:])
    done = subprocess.run(words, cwd=tmp_path / "there", capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_only_gin_files_are_named_from_elsewhere(tmp_path):
    write(tmp_path, {"o.gin": "", "data.jsonl": "", "here/other": ""})
    command = ("clp", "score", "--gin_file=../o.gin", "--input=../data.jsonl", f"--output={tmp_path / 'data.jsonl'}")
    assert list(files_of(command, tmp_path / "here")) == [str(tmp_path / "o.gin")]


def test_values_of_bindings_and_words_that_are_no_paths(tmp_path):
    (tmp_path / "prompts.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    odd = ("x" * 5000, "a\0b", "line\nline", "", "=", "folder", "--gin.X=folder")
    assert files_of(("clp", "sample", "--gin.PROMPTS='prompts.txt'", *odd), tmp_path) == {"prompts.txt": b"hello"}


def test_a_link_keeps_the_name_that_was_given(tmp_path):
    (tmp_path / "real.gin").write_text("A = 1")
    os.symlink("real.gin", tmp_path / "link.gin")
    assert files_of(("clp", "train", "--gin_file=link.gin"), tmp_path) == {"link.gin": b"A = 1"}


def test_what_is_too_large_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(user_files, "LARGEST_BYTES", 4)
    write(tmp_path, {"small": "1234", "large": "12345"})
    command = ("cat", "small", "large")
    found = user_files.user_files(command, tmp_path)
    assert list(found.paths) == ["small"] and "5 bytes, more than the 4" in found.left["large"]


def test_gin_files_of_search_paths_and_the_data_that_they_name(tmp_path):
    files = {
        "cfg/mine.gin": "include 'more/base.gin'\nPROMPTS = 'prompts.txt'\nSPLIT = 'train'\n",
        "cfg/more/base.gin": "FILES = ['data/a.txt', \"data/b.txt\"]  # what it reads\nDATA_DIR = 'data'\n",
        "prompts.txt": "hello",
        "data/a.txt": "a",
        "data/b.txt": "b",
        "cfg/other.gin": "",
    }
    write(tmp_path, files)
    found = user_files.user_files(("clp", "train", "--gin_search_paths=cfg", "--gin_file=mine.gin"), tmp_path)
    assert sorted(found.paths) == sorted(set(files) - {"cfg/other.gin"})
    assert (found.left, found.misplaced) == ({"data": "is a directory"}, {})
    found = user_files.user_files(
        ("clp", "train", "--gin_search_paths", "data,cfg", "--gin_file", "mine.gin"), tmp_path
    )
    assert (found.left, found.misplaced) == ({}, {})
    (tmp_path / "none").mkdir()
    found = user_files.user_files(("clp", "train", "--gin_search_paths=none", "--gin_file=cfg/mine.gin"), tmp_path)
    assert "none, of which no gin file goes with the command" in found.misplaced["none"]


def test_modules_that_python_runs_and_programs(tmp_path):
    files = {
        "pack/__init__.py": "",
        "pack/go.py": "import words",
        "pack/__main__.py": "",
        "words.py": "",
        "run.sh": "#!",
    }
    write(tmp_path, files)
    (tmp_path / "run.sh").chmod(0o755)
    assert sorted(files_of(("python3", "-m", "pack.go"), tmp_path)) == ["pack/__init__.py", "pack/go.py", "words.py"]
    assert sorted(files_of(("python3", "-m", "pack"), tmp_path)) == ["pack/__init__.py", "pack/__main__.py"]
    assert list(files_of(("python3", "-c", "import words"), tmp_path)) == ["words.py"]
    assert user_files.user_files(("./run.sh", "words.py"), tmp_path).executable == {"run.sh"}


def test_commands_of_pipelines_and_sweeps_name_files(tmp_path):
    stages = [
        {"name": "sft", "command": "train --gin_file=sft.gin --gin.F=words.txt", "outputs": ["out.txt"]},
        {"name": "more", "command": ["train", "--gin_search_paths=own", "--gin_file=more.gin"], "inputs": ["in.txt"]},
    ]
    files = dict.fromkeys(["words.txt", "out.txt", "in.txt", "own/more.gin", "base.gin", "unused.gin"], "")
    files["sft.gin"] = "include 'base.gin'\n"
    files["all.yaml"] = json.dumps({"name": "all", "stages": stages})
    files["sweep.yml"] = json.dumps({"command": "train --gin_file=sft.gin", "space": {}})
    write(tmp_path, files)
    found = files_of(("clp", "pipeline", "all.yaml"), tmp_path)
    assert sorted(found) == ["all.yaml", "base.gin", "in.txt", "own/more.gin", "sft.gin", "words.txt"]
    assert sorted(files_of(("clp", "sweep", "--file=sweep.yml"), tmp_path)) == ["base.gin", "sft.gin", "sweep.yml"]
    for text in ("stages: [1, {command: ''}, {command: [2]}]", "a: b: c", "[]", "stages: {}", "command: x\ninputs: 3"):
        write(tmp_path, {"odd.yaml": text})
        assert list(files_of(("clp", "pipeline", "odd.yaml"), tmp_path)) == ["odd.yaml"]


def test_lists_of_files(tmp_path):
    write(tmp_path, {"a.txt": "", "b.txt": "", "d,e.txt": ""})
    for value in (
        "a.txt,b.txt",
        "['a.txt','b.txt']",
        "('a.txt', \"b.txt\")",
        "{'x': 'a.txt', 'y': 'b.txt'}",
        "'a.txt,b.txt'",
    ):
        assert sorted(files_of(("clp", "score", f"--gin.F={value}"), tmp_path)) == ["a.txt", "b.txt"], value
    assert list(files_of(("cat", "d,e.txt"), tmp_path)) == ["d,e.txt"]


def test_what_a_worker_would_not_find_is_told(tmp_path):
    write(tmp_path, {"abs.py": "", "here/a.txt": "", "here/data/x": ""})
    here = tmp_path / "here"
    found = user_files.user_files(("python3", "../abs.py", f"{here}/a.txt", f"--in={tmp_path}/abs.py", "data/"), here)
    assert found.paths == {}
    assert "Launch from a directory that it is in" in found.misplaced["../abs.py"]
    assert found.misplaced[f"{here}/a.txt"].endswith("write a.txt.")
    assert list(found.left) == [f"{tmp_path}/abs.py", "data/"]


def test_more_dots_than_folders(tmp_path):
    write(tmp_path, {"far.py": f"from {'.' * 40} import x\n"})
    assert list(files_of(("python3", "far.py"), tmp_path)) == ["far.py"]
