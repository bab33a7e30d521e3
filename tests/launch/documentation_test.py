"""`docs/launching.md`, followed: every command of a target's section as it is typed there, to the end of a first run.

The tools are the fakes, and what they start really trains. Placeholders of the page are filled in, slices are small, and the user's
`my.gin` makes the model tiny.
"""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from clp_jax.launch import command as launching
from clp_jax.launch import command_words, supervisor
from clp_jax.launch.command_words import resolved_config
from clp_jax.launch.job import all_records, jobs_directory
from tiny_runs import make_data

from clp_jax.main import main

from .conftest import until

PAGE = Path(__file__).parents[2] / "docs" / "launching.md"
STEPS = 12
TINY = f"""
VOCAB_SIZE = 32
BATCH_SIZE = 8
NUM_STEPS = {STEPS}
WARMUP_STEPS = 2
CHECKPOINT_EVERY = 4
LOG_EVERY = 1

from __gin__ import dynamic_registration
from clp_jax.models import config
config.T5Config.t5_1_1:
  embed_dim = 8
  mlp_dim = 12
  num_heads = 2
  head_dim = 4
"""
SWEEP = "command: train --gin_file=my.gin\nspace: {grid: {LEARNING_RATE: [1e-3, 2e-3]}}\nmetrics: {loss: minimize}\n"


def section(title):
    """The text of a section."""
    (found,) = [text for text in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE) if text.startswith(title)]
    return found


def commands(text):
    """The commands of a text, in order: its indented lines, without the remarks behind them."""
    lines = re.sub(r" \\\n +", " ", text).splitlines()
    typed = [line[4:] for line in lines if re.match(r"    [a-z]", line)]
    return [re.sub(r"\s+#.*", "", line) for line in typed]


class Reader:
    """Who follows the page: types its commands, in a directory of his own."""

    def __init__(self, world, home, monkeypatch):
        self.world, self.home, self._monkeypatch = world, home, monkeypatch
        self.filled_in = {
            "BUCKET": "my-bucket",
            "PROJECT": "my-project",
            "NUMBER": "123",
            "CLUSTER": "my-cluster",
            "/mnt/b": str(home / "mnt" / "b"),
            # Nobody has hosts to spare here; processes that train together are those of `local`.
            "v5e:4x4": "v5e:2x2",
            "--nodes=4": "--nodes=1",
            "--devices_per_process=4": "--devices_per_process=1",
        }

    def type(self, line):
        """Types a line; a launch goes on in the background, as in another terminal."""
        for placeholder, value in self.filled_in.items():
            line = line.replace(placeholder, value)
        words = shlex.split(os.path.expandvars(line))
        if words[0] == "export":
            self._monkeypatch.setenv(*words[1].split("=", 1))
        elif words[:2] == ["clp", "prepare"]:
            make_data(Path("runs/pydoc/data"))
        elif words[0] == "clp":
            return main(words[1:])
        else:
            assert shutil.which(words[0]), f"there is no {words[0]}"
            assert subprocess.run(words, check=False).returncode == 0, line
        return 0


@pytest.fixture
def reader(world, monkeypatch):
    real_sleep = time.sleep
    real_config = functools.cache(lambda *words: resolved_config(words))
    # Looks are ten seconds apart, and the same configuration is asked for again and again.
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: real_sleep(min(seconds, 0.1)))
    monkeypatch.setattr(command_words, "resolved_config", lambda words: real_config(*words))
    # What fits is another test.
    monkeypatch.setattr(launching, "check_that_it_fits", lambda *_: None)
    monkeypatch.syspath_prepend(str(PAGE.parents[1]))
    monkeypatch.setenv("PYTHONPATH", str(PAGE.parents[1]))
    # Nodes of a cluster have a /tmp of their own.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        home = Path(folder)
        monkeypatch.setenv("HOME", folder)
        monkeypatch.delenv("CLP_JOBS_DIR")
        (home / "work").mkdir()
        monkeypatch.chdir(home / "work")
        yield Reader(world, home, monkeypatch)


def begin_the_page(reader):
    """The file of the page's beginning, made tiny, and the commands there that are no launches."""
    start = PAGE.read_text().partition("\n## ")[0]
    (text,) = re.findall(r"```gin\n# my.gin\n(.*?)```", start, flags=re.DOTALL)
    Path("my.gin").write_text(text + TINY)
    for line in commands(start):
        if not line.startswith("clp launch"):
            reader.type(line)


def launch(reader, line):
    """Types a launch, stops it when it runs, and lets it go on: as the page says for every job."""
    codes = []
    launcher = threading.Thread(target=lambda: codes.append(reader.type(line)))
    launcher.start()

    def record():
        return next(iter(all_records(jobs_directory(), pytest.fail)), None)

    until(lambda: codes or (record() and record().state and record().state.phase == "running"), seconds=120)
    assert not codes, "it ended before it ran"
    stop, retry = (
        next(c for c in commands(section("What happens")) if f"jobs {word}" in c) for word in ("stop", "retry")
    )
    job = record().job.name
    reader.type("clp jobs list")
    reader.type(stop.replace("NAME", job))
    launcher.join(60)
    assert codes == [0] and record().state.phase == "stopped"
    assert reader.type(retry.replace("NAME", job)) == 0
    return record()


def check_the_run(path):
    """That a run directory is that of a run that has ended."""
    assert str(STEPS) in [entry.name for entry in (path / "checkpoints").iterdir()]
    assert f'"step": {STEPS}' in (path / "metrics.jsonl").read_text()


SECTIONS = {
    "local": ("On this machine", "work/runs/pydoc/sft"),
    "tpu-vm": ("TPU VMs", "work/runs/first"),
    "gke": ("GKE", "mnt/b/run"),
    "slurm": ("SLURM", "work/runs/x"),
    "xmanager": ("XManager", "work/runs/pydoc/sft"),
}


@pytest.mark.parametrize("target", SECTIONS)
def test_a_first_run(reader, capfd, target):
    if target == "xmanager" and importlib.util.find_spec("xmanager") is None:
        pytest.skip("needs the extra `xmanager`")
    title, run_dir = SECTIONS[target]
    begin_the_page(reader)
    if target == "gke":
        # "The bucket is made and filled as for `tpu-vm`."
        for line in commands(section("TPU VMs")):
            if line.startswith("gcloud storage") and "run" not in line.split("gs://")[1]:
                reader.type(line)
    job = None
    for line in commands(section(title)):
        if line.startswith(f"clp launch {target}"):
            if "--executor=vertex" in line:
                continue  # There is no Google here.
            if "--dry_run" in line:
                assert reader.type(line) == 0
                assert not jobs_directory().exists() and not reader.world.state
                assert "and the same without `--dry_run`" in section(title)
                line = line.replace(" --dry_run", "")
            job = launch(reader, line)
        elif not line.startswith(("uv ", "sqlite3 ")):
            if line.startswith("clp sweep"):
                Path("sweep.yaml").write_text(SWEEP)
            assert reader.type(line) == 0
    assert job is not None and job.state.phase == "succeeded"
    check_the_run(reader.home / run_dir)
    # Nothing is left that would be paid for.
    state = reader.world.state
    assert not state.get("resources") and not state.get("jobsets")
    assert all(entry["state"] not in ("PENDING", "RUNNING") for entry in state.get("slurm", []))
    capfd.readouterr()
    for line in commands(section("What happens")):
        if re.match("clp jobs (list|status|logs)", line):
            assert reader.type(line.replace("NAME", job.job.name)) == 0
    told = capfd.readouterr()
    assert "stopped" in told.out and "retried" in told.out and "succeeded" in told.out
    gone = target in ("tpu-vm", "gke")
    assert ("its output with it" in told.err) if gone else re.search(rf"^\[\d\] .*\b{STEPS}\b", told.out, re.MULTILINE)
