"""Run directories: what is refused, what is allowed, and that nothing is overwritten."""

import errno
import json
import os
import subprocess
import sys

import pytest
from run_configurations import CONFIG

from clp_jax.training.run_directory import (
    RunDirectoryError,
    disk_errors,
    open_run_directory,
    write_atomically,
)


def test_the_same_run_enters_again_and_another_is_refused(tmp_path):
    open_run_directory(tmp_path / "run", CONFIG).write_description({})
    assert open_run_directory(tmp_path / "run", CONFIG).path == tmp_path / "run"
    other = CONFIG.replace("0.001", "0.01").replace("import clp_jax.train\n", "") + "new.binding = 3\n"
    with pytest.raises(RunDirectoryError) as error:
        open_run_directory(tmp_path / "run", other)
    assert "import clp_jax.train" in str(error.value)
    assert "  Adafactor.learning_rate: 0.001 -> 0.01\n" in str(error.value)
    assert "  new.binding: unset -> 3\n" in str(error.value)
    assert (tmp_path / "run" / "config.gin").read_text() == CONFIG


def test_comments_and_lengths_may_change(tmp_path):
    open_run_directory(tmp_path, CONFIG)
    (tmp_path / "description.json").write_text("{}")  # It has begun.
    longer = CONFIG.replace("num_steps = 100", "num_steps = 200").replace("A comment", "Another") + "NUM_STEPS = 7\n"
    open_run_directory(tmp_path, longer).write_config(longer)
    assert (tmp_path / "config.gin").read_text() == longer


def test_a_length_that_a_schedule_uses_may_not_change(tmp_path):
    config = "NUM_STEPS = {}\ntrain.train.num_steps = %NUM_STEPS\n{}"
    open_run_directory(tmp_path / "constant", config.format(10, "")).write_description({})
    open_run_directory(tmp_path / "constant", config.format(20, ""))
    decaying = "schedules.linear_decay.decay_steps = %NUM_STEPS\n"
    open_run_directory(tmp_path / "decaying", config.format(10, decaying)).write_description({})
    with pytest.raises(RunDirectoryError, match="NUM_STEPS: 10 -> 20"):
        open_run_directory(tmp_path / "decaying", config.format(20, decaying))


def test_a_run_that_never_began_may_be_corrected(tmp_path):
    first = open_run_directory(tmp_path, "SFT_DIR = 'nosuch'\n")
    (tmp_path / "reference").mkdir()
    (tmp_path / "rewards.json").write_text("{}")  # What an abandoned set-up fitted, to the wrong rewards perhaps.
    second = open_run_directory(tmp_path, "SFT_DIR = 'sft'\n")
    assert (tmp_path / "config.gin").read_text() == "SFT_DIR = 'sft'\n" and second == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.gin"]
    second.write_description({"stage": "toy"})
    with pytest.raises(RunDirectoryError, match="another configuration"):
        open_run_directory(tmp_path, "SFT_DIR = 'other'\n")


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(RunDirectoryError, match="has metrics.jsonl but no config.gin: nothing in it was overwritten"):
        open_run_directory(tmp_path, CONFIG)
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"
    assert not (tmp_path / "config.gin").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match="file is a file. Give a directory"):
            open_run_directory(path, CONFIG)
    assert (tmp_path / "file").read_text() == "precious"


def test_other_addresses_are_no_directories():
    with pytest.raises(
        RunDirectoryError, match="run directory nobodys://host/run is an address of another kind: expected"
    ):
        open_run_directory("nobodys://host/run", CONFIG)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full. Free some space and run the same command again"),
        (errno.EDQUOT, "quota is used up"),
        (errno.EROFS, "read-only file system. Give a run directory elsewhere"),
        (errno.EACCES, "not writable for you"),
    ],
)
def test_disk_errors_say_what_to_do(tmp_path, number, message):
    with pytest.raises(RunDirectoryError, match=message), disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="Interrupted"), disk_errors(tmp_path):
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))


def test_a_read_only_directory(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # Permission bits do not stop root, which may run this test.
    with pytest.raises(RunDirectoryError, match="not writable for you"):
        open_run_directory(tmp_path, CONFIG)
    assert not list(tmp_path.iterdir())


def test_descriptions_must_agree(tmp_path):
    directory = open_run_directory(tmp_path)
    assert directory.description() is None
    directory.write_description({"stage": "a", "model": {"sizes": (1, 2), "rate": 0.5}})
    directory.write_description({"stage": "a", "model": {"sizes": [1, 2], "rate": 0.5}})
    assert json.loads((tmp_path / "description.json").read_text())["model"]["sizes"] == [1, 2]
    with pytest.raises(RunDirectoryError, match=r"another model.rate: it was 0.5, now it is 0.25"):
        directory.write_description({"stage": "a", "model": {"sizes": [1, 2], "rate": 0.25}})
    with pytest.raises(RunDirectoryError, match=r"another model.extra: it was missing, now it is 1"):
        directory.write_description({"stage": "a", "model": {"sizes": [1, 2], "rate": 0.5, "extra": 1}})


def test_the_latest_step_counts_complete_checkpoints_only(tmp_path):
    directory = open_run_directory(tmp_path)
    assert directory.latest_step() is None
    for name in ("9", "10", "12.unfinished", "13.damaged", "14"):
        (directory.checkpoints / name).mkdir(parents=True)
        if name != "14":
            (directory.checkpoints / name / "manifest.json").write_text("")
    assert directory.latest_step() == 10


def test_a_second_process_is_refused(tmp_path):
    directory = open_run_directory(tmp_path)
    code = (
        "import sys; from clp_jax.training.run_directory import open_run_directory\n"
        "with open_run_directory(sys.argv[1]).lock(): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with directory.lock():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is training in" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
