"""`clp launch` and `clp jobs` as they are typed: exit codes, one line for a mistake, and what is left behind."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clp_jax.launch import command as launching
from clp_jax.launch.command_words import run_dir_of
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import jobs_directory
from clp_jax.launch.local import local_command
from clp_jax.launch.targets import find_target

from clp_jax import main as cli

from .conftest import AWKWARD, TRAINING, clp, phases, until
from .conftest import typed as record

pytestmark = pytest.mark.usefixtures("here")


def test_a_job_is_launched_shown_and_found_again(world, capsys):
    assert clp("launch", "local", "--name=job", "--look=0.05", "--processes=2", "--", *TRAINING, AWKWARD) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == ["job: queued", "job: running", "job: succeeded"]
    assert [run["words"] for run in world.runs] == [[AWKWARD]] * 2
    assert clp("jobs", "list") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["NAME", "TARGET", "STATE", "ATTEMPT", "CHECKPOINT", "SINCE"]
    assert out[1].split()[:4] == ["job", "local", "succeeded", "1"]
    assert clp("jobs", "status", "job") == 0
    out = capsys.readouterr().out
    assert "target: local --processes=2" in out and "attempt 1  succeeded" in out and "code: " in out
    assert clp("jobs", "logs", "job", "--lines=1") == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[0] the last line", "[1] the last line"]


def test_the_same_command_is_the_same_job(world, capsys):
    words = ("launch", "local", "--look=0.05", "--", *TRAINING, "--steps=1")
    assert clp(*words) == 0
    assert clp(*words) == 2
    assert "this job is there already, and succeeded" in capsys.readouterr().err
    assert clp(*words[:-1], "--steps=2") == 0
    assert len(world.runs) == 2 and len(list(jobs_directory().iterdir())) == 2


def test_a_launcher_that_died_is_taken_over_by_the_same_command(world, capsys):
    world.trouble("training", {"until": "go"})
    words = ("launch", "local", "--name=job", "--look=0.05", "--", *TRAINING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen(
        [sys.executable, "-m", "clp_jax.main", *words], env=environment, stderr=subprocess.DEVNULL
    )
    until(lambda: world.runs)
    assert clp(*words) == 2
    assert "another launcher looks after job" in capsys.readouterr().err
    launcher.kill()
    launcher.wait()
    (world.path / "go").touch()
    assert clp(*words) == 0
    assert "going on with job" in capsys.readouterr().err
    assert len(world.runs) == 1 and phases(record())[-1] == "succeeded"


def test_failing_retrying_and_watching(world, capsys):
    world.trouble("training", {"code": 2})
    assert clp("launch", "local", "--name=job", "--look=0.05", "--", *TRAINING) == 1
    assert "exit code 2. The last lines:" in capsys.readouterr().err
    assert clp("jobs", "retry", "job", "--look=0.05") == 0
    assert phases(record())[-5:] == ["failed", "retried", "queued", "running", "succeeded"]
    assert clp("jobs", "watch") == 0


def test_output_that_went_with_its_machine_is_not_silence(world, capsys):
    world.trouble("training", {"code": 2})
    where = ("--topology=v5e:2x2", "--zone=us-west4-a", "--name=job", "--look=0.05")
    assert clp("launch", "tpu-vm", *where, "--", *TRAINING) == 1
    capsys.readouterr()
    assert clp("jobs", "logs", "job") == 0
    assert capsys.readouterr().err.startswith(
        "job: what it ran on is given back, and its output with it; clp jobs status job"
    )
    assert clp("jobs", "status", "job") == 0
    out = capsys.readouterr().out
    assert "[job-1-w-0] the last line" in out and "looked after" not in out


def test_stopping_a_job_that_another_launcher_looks_after(world, capsys):
    world.trouble("training", {"sleep": 60})
    assert clp("launch", "local", "--name=job", "--look=0.05", "--detach", "--", *TRAINING) == 0
    until(lambda: world.runs)
    assert record().is_held
    assert clp("jobs", "stop", "job") == 0
    found = capsys.readouterr()
    assert found.out == "job: stopped: as asked\n"
    assert "job is asked to save and end; its target is given back then." in found.err.splitlines()
    assert list(record().attempt_directory.glob("worker-0/exit"))
    assert clp("jobs", "stop", "job") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "tpu"], "there is no target 'tpu' (did you mean tpu-vm?)."),
        (["launch", "local"], "there is no command: write it after --"),
        (
            ["launch", "local", "extra", "--", "x"],
            "what is 'extra'? Options are --NAME=VALUE; the command comes after --.",
        ),
        (["launch", "local", "--name=A", "--", "true"], "the name of the job is 'A'"),
        (["launch", "local", "--name=a", "--name=b", "--", "true"], "--name is given twice."),
        (["launch", "local", "--", "no-such-program"], "there is no command 'no-such-program' on this machine."),
        (
            ["launch", "tpu-vm", "--topology=v5e:4x4", "--zone=us-west4-a", "--", "trian", "--gin_file=a.gin"],
            "there is no command 'trian' (did you mean train?).",
        ),
        (["launch", "local", "--look=soon", "--", "true"], "--look is 'soon': expected a number."),
        (
            ["launch", "tpu-vm", "--topology=v5e:4x4", "--", "true"],
            "clp launch tpu-vm still needs --zone=VALUE (where).",
        ),
        (["jobs", "lst"], "clp jobs can't 'lst' (did you mean list?)."),
        (["jobs", "status"], "of which job? clp jobs status NAME"),
        (["jobs", "status", "none"], "there is no job 'none'"),
        (["jobs", "list", "--lnes=3"], "clp jobs has no option --lnes (did you mean lines?)."),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(world, capsys, words, message):
    assert clp(*words) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"clp {words[0]}: error: ") and message in told and told.count("\n") == 1
    assert not jobs_directory().exists() and world.calls() == []


def test_a_name_of_another_job_is_refused(capsys):
    assert clp("launch", "local", "--name=job", "--look=0.05", "--", *TRAINING) == 0
    assert clp("launch", "local", "--name=job", "--look=0.05", "--", *TRAINING, "other") == 2
    assert "there is another job 'job'" in capsys.readouterr().err


TAKEN = {
    "tpu-vm": (
        ("--topology=v5e:2x2", "--zone=us-west4-a"),
        "there is a queued resource job-1 in us-west4-a already: give another --name.",
    ),
    "gke": (("--topology=v5e:2x2",), "there is a JobSet job-1 already: give another --name."),
    "slurm": ((), "there is a job job-1 in the queue already: give another --name."),
    "local": ((), "give this one another name: --name=NAME."),
    "xmanager": ((), "give this one another name: --name=NAME."),
}


@pytest.mark.parametrize("target", TAKEN)
def test_a_name_that_is_taken_is_one_line_and_nothing_is_created(world, capsys, monkeypatch, target):
    """By a job of another directory of records, where the target has names of its own; else by another job."""
    options, message = TAKEN[target]
    made, there = world.record(target, dict(option[2:].split("=") for option in options), words=("other",))
    if target in ("tpu-vm", "gke", "slurm"):
        monkeypatch.setenv("CLP_JOBS_DIR", "/var/tmp/clp-jobs-of-nobody")
        made.append("queued", attempt=1)
        there.submit(made)
    before = (world.state, world.calls("sbatch"), sorted(jobs_directory().glob("*")))
    assert clp("launch", target, *options, "--name=job", "--", *TRAINING) == 2
    told = capsys.readouterr().err
    assert told.startswith("clp launch: error: ") and told.endswith(f"{message}\n") and told.count("\n") == 1
    assert (world.state.get("created"), world.runs) == (before[0].get("created"), [])
    assert (world.calls("sbatch"), sorted(jobs_directory().glob("*"))) == before[1:]


@pytest.mark.parametrize(
    "words", [["launch", "--help"], ["launch", "gke", "-h"], ["jobs", "--help"], ["launch"], ["jobs"]]
)
def test_help(capsys, words):
    assert clp(*words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"clp {words[0]}: ") and "usage: " in out
    if "gke" in words:
        assert "--topology  the slice, as in v5e:4x4 or v5p:4x4x4 (required)" in out


@pytest.mark.parametrize(
    "target",
    [
        ["local", "--processes=2"],
        ["tpu-vm", "--topology=v5e:4x4", "--zone=us-west4-a"],
        ["gke", "--topology=v5e:4x4"],
        ["slurm", "--nodes=2"],
        ["xmanager"],
    ],
    ids=lambda words: words[0],
)
def test_a_dry_run_needs_no_tools_and_leaves_nothing(world, capsys, monkeypatch, target):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert clp("launch", *target, "--name=job", "--dry_run", "--", sys.executable, "-c", "print('$(x)')") == 0
    out = capsys.readouterr().out
    assert "$ " in out and str(jobs_directory() / "job" / "attempts" / "1") in out
    assert len(out) < 40_000
    assert not jobs_directory().exists() and world.calls() == []


def test_a_commands_own_mistake_comes_before_anything(world, capsys):
    assert clp("launch", "local", "--", "train", "--gin_file=examples/pydoc_sft.gin", "--gin.NO_SUCH=1") == 2
    told = capsys.readouterr().err
    assert told.startswith("clp launch: error: the command is refused.") and "NO_SUCH" in told
    assert not jobs_directory().exists()


def test_the_run_directory_is_what_the_configuration_says(tmp_path):
    words = ("clp", "train", "--gin_file=examples/pydoc_sft.gin", f"--gin.SFT_DIR='{tmp_path}/a run'")
    assert run_dir_of(words) == f"{tmp_path}/a run"
    assert run_dir_of(("python3", "x.py")) is None
    assert run_dir_of(("clp", "pipeline", "x.yaml")) is None and run_dir_of(("clp", "sweep", "--file=x.py")) is None
    assert run_dir_of((*words[:-1], "--gin.SFT_DIR='gs://b/run'")) == "gs://b/run"
    with pytest.raises(LaunchError, match="'hdfs://b/run': expected a directory, gs://BUCKET/NAME or s3://BUCKET/NAME"):
        run_dir_of((*words[:-1], "--gin.SFT_DIR='hdfs://b/run'"))


SLICES = find_target("tpu-vm", {"topology": "v5e:4x4", "zone": "us-west4-a", "num_slices": "2"})


COMPILER = """#!/bin/sh
echo "$@" > {folder}/asked
for word in "$@"; do case "$word" in --output=*) [ -z '{report}' ] || echo '{report}' > "${{word#--output=}}";; esac; done
echo "clp compile: error: a mesh of 3." >&2
exit {code}
"""
FITS, TOO_LARGE = (
    json.dumps(
        {
            "fits": fits,
            "programs": [
                {
                    "name": "update",
                    "memory": {"fits": fits, "needed": 24 << 30, "limit": 16 << 30},
                    "advice": "REMAT=full.",
                }
            ],
        }
    )
    for fits in (True, False)
)


@pytest.mark.parametrize(
    ("code", "report", "message"),
    [
        (0, FITS, None),
        # Whether or not the command itself calls that a failure.
        *(
            (
                code,
                TOO_LARGE,
                r"it does not fit v5e:4x4: update needs 24\.0 GiB of a device's 16\.0\. REMAT=full\. \(--force",
            )
            for code in (0, 1)
        ),
        (2, "", r"it can't be compiled for the slice: a mesh of 3\. \(--force"),
        (2, FITS, r"it can't be compiled for the slice: a mesh of 3\. \(--force"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_rented(tmp_path, monkeypatch, code, report, message):
    program = tmp_path / "compiler"
    program.write_text(COMPILER.format(folder=tmp_path, report=report, code=code))
    program.chmod(0o755)
    monkeypatch.setattr(launching, "local_command", lambda words: (str(program), *words))
    monkeypatch.setattr(launching, "_has_compiler", lambda: True)
    words = ("clp", "train", "--gin_file=a.gin", "--run_dir=x", "--gin_file", "b.gin", "--num_steps", "3")
    job = launching.Job("job", words, "tpu-vm")
    if message is None:
        launching.check_that_it_fits(SLICES, job, ("train", "compile"))
    else:
        with pytest.raises(LaunchError, match=message):
            launching.check_that_it_fits(SLICES, job, ("train", "compile"))
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:-1] == [
        *("clp", "compile", "--gin_file=a.gin", "--gin_file", "b.gin"),
        *("--topology=v5e:4x4", "--num_slices=2"),
    ]


@pytest.mark.parametrize("mlp_dim", [256, 1 << 24])
def test_the_compiler_itself_says_what_fits(world, capsys, monkeypatch, mlp_dim):
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra `aot`")
    monkeypatch.setenv("XLA_FLAGS", "")
    (world.path / "buckets" / "bkt").mkdir(parents=True)
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 1, "embed_dim": 128, "head_dim": 32, "mlp_dim": mlp_dim}
    words = ["train", "--gin_file=examples/pydoc_sft.gin", "--gin.RUN_DIR=/mnt/b/run"]
    words += [f"--gin.t5_1_1.{name}={value}" for name, value in sizes.items()]
    # The compiler takes twice as long for a batch and a vocabulary of the usual size, on four chips.
    words += ["--gin.BATCH_SIZE=4", "--gin.VOCAB_SIZE=128"]
    world.trouble("create", "quota")
    where = ("--topology=v5e:1x1", "--zone=us-west4-a", "--mounts=bkt=/mnt/b")
    code = clp("launch", "tpu-vm", *where, "--name=job", "--look=0.05", "--", *words)
    told = capsys.readouterr().err
    asked = [call for call in world.calls("gcloud") if "create" in call]
    if mlp_dim == 256:
        # It fits, so it is asked for; that there is no quota is another matter.
        assert (code, len(asked)) == (1, 1) and "Quota limit" in told
    else:
        assert (code, asked) == (2, []) and not jobs_directory().exists()
        (needed,) = re.findall(r"error: it does not fit v5e:1x1: update needs (\S+) GiB of a device's 15\.8\.", told)
        # Parameters and two moments of three matrices in each of two layers, in float32.
        assert float(needed) > 3 * 3 * 2 * 4 * 128 * mlp_dim / 2**30


def test_files_of_the_user_shadow_no_library(world, here):
    (here / "json.py").write_text("raise SystemExit('not this one')\n")
    (here / "jax").mkdir()
    (here / "jax" / "__init__.py").write_text("raise SystemExit('nor this one')\n")
    done = subprocess.run(
        [*local_command(("clp", "jobs", "list"))], cwd=here, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (here / "my.gin").write_text("include 'examples/pydoc_sft.gin'\n")
    assert run_dir_of(("clp", "train", "--gin_file=my.gin", "--gin.SFT_DIR=runs/mine")) == "runs/mine"


HIDDEN = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "libtpu" else real(name, *rest)
from clp_jax.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("tensor", [2, 3])
def test_without_the_compiler_the_mesh_is_known_and_nothing_else(tmp_path, capsys, monkeypatch, tensor):
    # A Python that has no libtpu.
    program = tmp_path / "without"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(HIDDEN)} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(launching, "local_command", lambda words: (str(program), *words))
    monkeypatch.setattr(launching, "_has_compiler", lambda: False)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    layout = ("--gin_file=sharding/fsdp_tensor.gin", f"--gin.TENSOR={tensor}")
    job = launching.Job("job", ("clp", "train", "--gin_file=examples/pydoc_sft.gin", *layout), "tpu-vm")
    if tensor == 2:
        launching.check_that_it_fits(SLICES, job, ("train", "compile"))
    else:
        with pytest.raises(
            LaunchError, match=r"make_mesh\(fsdp=-1, tensor=3\): the sizes must multiply to the 32 devices"
        ):
            launching.check_that_it_fits(SLICES, job, ("train", "compile"))
    assert "The extra `aot` is not installed" in capsys.readouterr().err


def test_gin_files_and_modules_are_in_the_record(world, here):
    (here / "mine").mkdir()
    (here / "mine" / "a.gin").write_text("include 'b.gin'\nimport rewards.short\n")
    (here / "mine" / "b.gin").write_text("X = 1\n")
    (here / "rewards").mkdir()
    (here / "rewards" / "short.py").write_text("def short(): return 1\n")
    assert clp("launch", "local", "--name=job", "--look=0.05", "--", *TRAINING, "--gin_file", "mine/a.gin") == 0
    kept = record().path / "files"
    assert sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*.*")) == [
        "mine/a.gin",
        "mine/b.gin",
        "rewards/short.py",
    ]
    stored = json.loads((record().path / "job.json").read_text())
    assert stored["command"] == [*TRAINING, "--gin_file", "mine/a.gin"] and stored["directory"] == str(here)


def test_who_has_read_enough_is_no_error(world):
    for name in ("one", "two"):
        world.record("local", {}, name=name, words=["word"] * 20_000)
    words = (sys.executable, "-m", "clp_jax.main", "jobs", "status", "one", "two")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"one\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("words", [["jobs", "list"], ["launch", "local", "--", "true"]])
def test_a_directory_of_records_that_is_a_file(capsys, tmp_path, monkeypatch, words):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLP_JOBS_DIR", str(tmp_path / "file"))
    assert clp(*words) == 2
    assert capsys.readouterr().err == (
        f"clp {words[0]}: error: {tmp_path}/file is a file: expected the directory of records: $CLP_JOBS_DIR says which.\n"
    )


def test_a_wrong_look_leaves_nothing(capsys):
    assert clp("launch", "local", "--look=-1", "--", "true") == 2
    assert "--look is -1: expected seconds, more than 0." in capsys.readouterr().err
    assert not jobs_directory().exists()


def test_clp_stands_for_this_package():
    assert local_command(("clp", "train", "x")) == (sys.executable, "-P", "-m", "clp_jax.main", "train", "x")
    assert local_command(("python3", "x")) == ("python3", "x")


OTHER_CHECKOUT = """
import sys
from importlib.util import spec_from_file_location
from pathlib import Path

class Editable:
    # What an editable installation of another checkout adds.
    @staticmethod
    def find_spec(name, path=None, target=None):
        file = Path("other") / f"{name.rpartition('.')[2]}.py"
        return spec_from_file_location(name, file) if file.is_file() else None

sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in repr(f)] + [Editable] * OTHER
import clp_jax.launch, clp_jax.tasks
from clp_jax.main import main
print(clp_jax.launch.__file__, clp_jax.tasks.__file__)
sys.exit(main(["jobs", "list"]))
"""


@pytest.mark.parametrize("other", [False, True], ids=["none", "another checkout"])
def test_a_checkout_uses_what_is_beside_it_whatever_is_installed(tmp_path, other):
    root = Path(cli.__file__).parents[1]
    (tmp_path / "other").mkdir()
    for name in ("launch", "tasks"):
        (tmp_path / "other" / f"{name}.py").touch()
    environment = {"PYTHONPATH": str(root), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    program = OTHER_CHECKOUT.replace("OTHER", str(int(other)))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files, table = done.stdout.splitlines()
    assert files.split() == [str(root / "launch" / "__init__.py"), str(root / "tasks" / "__init__.py")]
    assert table.split() == ["NAME", "TARGET", "STATE", "ATTEMPT", "CHECKPOINT", "SINCE"]
