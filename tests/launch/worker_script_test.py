"""The scripts that workers run: words unchanged, exit codes, signals, one copy; and what `shellcheck` says of all of them."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from clp_jax.launch.supervisor import advance
from clp_jax.launch.target import Run, Write
from clp_jax.launch.targets import find_batch
from clp_jax.launch.worker_script import worker_script

from .conftest import AWKWARD, QUICK, until

WORDS = ["plain", "a b", "", "*", "~", "-n", "$HOME", "`id`", "'", '"', "\\", "a\nb", "é", "!x", "#", AWKWARD]
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get('NAME')]))"


def run(tmp_path, command, environment=None, setup=(), wait=True):
    (tmp_path / "a folder").mkdir(exist_ok=True)
    text = worker_script(
        command, f"'{tmp_path / 'a folder'}'", f"'{tmp_path / 'here it is'}'", environment or {}, setup=setup
    )
    (tmp_path / "run.sh").write_text(text)
    process = subprocess.Popen(["bash", str(tmp_path / "run.sh")], stdout=subprocess.DEVNULL)
    return process.wait(60) if wait else process


def test_words_variables_and_the_folder_arrive_unchanged(tmp_path):
    assert run(tmp_path, [sys.executable, "-c", SHOW, *WORDS], {"NAME": AWKWARD}) == 0
    here = tmp_path / "here it is"
    assert json.loads((here / "log").read_text()) == [WORDS, str(tmp_path / "a folder"), AWKWARD]
    assert (here / "exit").read_text() == "0\n"
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("code", [1, 2, 75, 127])
def test_exit_codes_are_kept(tmp_path, code):
    command = [sys.executable, "-c", f"raise SystemExit({code})"] if code != 127 else ["no-such-program"]
    assert run(tmp_path, command) == code
    assert (tmp_path / "here it is" / "exit").read_text() == f"{code}\n"


def test_it_runs_once(tmp_path):
    assert [run(tmp_path, ["bash", "-c", "echo x"]) for _ in range(3)] == [0, 0, 0]
    assert (tmp_path / "here it is" / "log").read_text() == "x\n"


def test_a_script_that_is_copied_again_while_it_runs_goes_on(tmp_path):
    command = ["bash", "-c", f"until [ -f '{tmp_path}/go' ]; do sleep 0.05; done; exit 5"]
    process = run(tmp_path, command, wait=False, setup=[f"until [ -f '{tmp_path}/set' ]; do sleep 0.05; done"])
    until((tmp_path / "here it is" / "pid").exists)
    (tmp_path / "run.sh").write_text("\n" * 4000 + f"touch '{tmp_path}/hacked'\n")
    for name in ("set", "go"):
        (tmp_path / name).touch()
    assert process.wait(60) == 5 and (tmp_path / "here it is" / "exit").read_text() == "5\n"
    assert not (tmp_path / "hacked").exists()


def test_a_setup_that_fails_is_the_exit_code(tmp_path):
    assert run(tmp_path, ["true"], setup=["false || finish 75"]) == 75
    assert (tmp_path / "here it is" / "exit").read_text() == "75\n"


def test_on_a_full_disk_nothing_begins_unseen_and_no_code_is_made_up(tmp_path):
    """A folder in place of a file: what can't be written to, also by root."""
    here = tmp_path / "here it is"
    (here / "pid").mkdir(parents=True)
    assert run(tmp_path, ["touch", str(tmp_path / "begun")]) == 75
    assert not (tmp_path / "begun").exists() and (here / "exit").read_text() == "75\n"
    for path in (here / "pid", here / "claimed"):
        path.rmdir()
    (here / "exit").unlink()
    (here / "exit.new").mkdir()
    assert run(tmp_path, ["bash", "-c", "exit 3"]) == 3
    assert not (here / "exit").exists()


@pytest.mark.parametrize("during", ["setup", "command"])
def test_sigterm_is_passed_on_and_waited_for(tmp_path, during):
    program = (
        "import signal, sys, time\n"
        "def end(*_): time.sleep(0.3); print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end); print('ready', flush=True); time.sleep(60)"
    )
    setup = [f"touch '{tmp_path}/setup'", "sleep 1"] if during == "setup" else []
    process = run(tmp_path, [sys.executable, "-c", program], setup=setup, wait=False)
    here = tmp_path / "here it is"
    until((tmp_path / "setup").exists if during == "setup" else lambda: "ready" in _read(here / "log"))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == (143 if during == "setup" else 75)
    assert _read(here / "log") == ("" if during == "setup" else "ready\nsaved\n")


def _read(path):
    return path.read_text() if path.exists() else ""


SHELLCHECK = Path(sysconfig.get_path("scripts")) / "shellcheck"


shellchecked = pytest.mark.skipif(not SHELLCHECK.exists(), reason="needs shellcheck, of the extra `test`")


@shellchecked
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("local", {"processes": "2"}),
        (
            "tpu-vm",
            {
                "topology": "v5e:4x4",
                "zone": "us-west4-a",
                "bucket": "gs://b",
                "secrets": "A=b,C=d",
                "mounts": "bkt=/mnt/a b",
            },
        ),
        ("tpu-vm", {"topology": "v5e:4x4", "zone": "us-west4-a"}),
        ("gke", {"topology": "v5e:4x4", "num_slices": "2", "secrets": "A=b/c", "mounts": "bkt=/mnt/a b"}),
        ("slurm", {"nodes": "2"}),
        ("slurm", {}),
        ("slurm array", {"nodes": "2"}),
        ("xmanager", {}),
    ],
)
def test_shellcheck_has_nothing_to_say(world, tmp_path, target, options):
    record, made = world.record(target.removesuffix(" array"), options, words=WORDS)
    batch = find_batch(made, "sweep", tmp_path / "it's a folder", 2)
    steps = batch.plan([record, record]) if target == "slurm array" else made.dry_run(record)
    scripts = [(step.path.name, step.text) for step in steps if isinstance(step, Write)]
    scripts = [(name, text) for name, text in scripts if name.endswith(".sh")]
    if target == "gke":
        (manifest,) = [step.text for step in made.dry_run(record) if isinstance(step, Write)]
        scripts = [("run.sh", json.loads(manifest)["items"][0]["data"]["run.sh"])]
    # What is typed for a shell on the other side.
    runs = [word for step in steps if isinstance(step, Run) for word in step.words if word.startswith("--command=")]
    scripts += [(f"command-{i}.sh", f"#!/bin/bash\n{word.partition('=')[2]}\n") for i, word in enumerate(runs)]
    check(tmp_path, scripts)


@shellchecked
def test_shellcheck_has_nothing_to_say_of_what_is_asked_of_workers(world, tmp_path):
    """Of looking, following and stopping: what a whole life of a job on TPU VMs sends over SSH."""
    record, target = world.record("tpu-vm", {"topology": "v5e:2x2", "zone": "us-west4-a"})
    world.trouble("training", {"sleep": 60})
    until(lambda: advance(record, target, QUICK) and world.runs)
    list(target.logs(record, lines=3))
    record.stop_request.touch()
    assert world.run(record, target).phase == "stopped"
    words = {word for call in world.calls("gcloud") for word in call if word.startswith("--command=")}
    assert len(words) >= 5
    check(tmp_path, [(f"{i}.sh", f"#!/bin/bash\n{word.partition('=')[2]}\n") for i, word in enumerate(sorted(words))])


def check(tmp_path, scripts):
    assert scripts
    for name, text in scripts:
        (tmp_path / name).write_text(text)
        # What is in single quotes is meant to stay as it is.
        words = [str(SHELLCHECK), "--severity=info", "--exclude=SC2016,SC1003", str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
