"""What is brought to workers, what is not, and who is told before anything is rented."""

import pytest
from clp_jax.launch.job import jobs_directory

from .conftest import TRAINING, clp
from .conftest import typed as record

TPU = ("tpu-vm", "--topology=v5e:2x2", "--zone=us-west4-a")


pytestmark = pytest.mark.usefixtures("here")


def test_gin_files_elsewhere_are_refused_where_they_would_have_to_be_brought(tmp_path, capsys):
    (tmp_path / "x.gin").write_text("X = 1")
    words = ("--", "true", f"--gin_file={tmp_path / 'x.gin'}")
    assert clp("launch", "gke", "--topology=v5e:2x2", "--run_dir=gs://b/r", *words) == 2
    assert "a worker would not find it" in capsys.readouterr().err
    assert not jobs_directory().exists()
    assert clp("launch", "local", "--name=job", "--look=0.05", *words) == 0
    assert (record().path / "files" / str(tmp_path)[1:] / "x.gin").read_text() == "X = 1"


def test_what_goes_and_what_does_not_is_told_before_anything_is_rented(world, here, capsys):
    (here / "data").mkdir()
    (here / "run.sh").write_text('#!/bin/sh\ncat a.txt; exec python3 "$@"\n')
    (here / "run.sh").chmod(0o755)
    (here / "a.txt").write_text("a\n")
    words = ("--name=job", "--look=0.05", "--", "./run.sh", TRAINING[1], "a.txt,none", "--data=data")
    left = "data is a directory: it does not go with the command, and a worker finds it only on a disk that it shares."
    assert clp("launch", *TPU, "--dry_run", *words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "# with the command goes: run.sh (39 bytes), a.txt (2 bytes)" and f"# {left}" in out[:4]
    # It is a program on the worker too.
    assert clp("launch", *TPU, *words) == 0
    told = capsys.readouterr().err.splitlines()
    assert told.index(left) < next(number for number, line in enumerate(told) if line.startswith("job: "))
    assert {tuple(run["words"]) for run in world.runs} == {("a.txt,none", "--data=data")}
    (here / "b.py").touch()
    for name, advice in (("../x.py", "Launch from a directory"), (f"{here}/b.py", "write b.py.")):
        (here / name).touch()
        for dry in ([], ["--dry_run"]):
            assert clp("launch", *TPU, *dry, "--", "python3", name) == 2
            assert advice in capsys.readouterr().err
