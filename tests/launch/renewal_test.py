"""What a job that is tried again goes on with: what was mended since, and the code of now."""

import os

import pytest
from clp_jax.launch import renewal

from .conftest import TRAINING, clp
from .conftest import typed as record

TPU = ("tpu-vm", "--topology=v5e:2x2", "--zone=us-west4-a")


pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize("target", [("local",), TPU, ("gke", "--topology=v5e:2x2")])
def test_what_was_mended_goes_along_with_a_retry(world, here, capsys, monkeypatch, target):
    (here / "go.py").write_text("raise SystemExit(1)\n")
    words = ("launch", *target, "--name=job", "--look=0.05", "--", "python3", "go.py")
    assert clp(*words) == 1
    first = record().job.code_version
    (here / "go.py").write_text(f"import runpy\nimport beside\nrunpy.run_path({TRAINING[1]!r})\n")
    (here / "beside.py").touch()
    monkeypatch.setattr(renewal, "code_version", lambda: "mended")
    assert clp(*words) == 2
    assert "clp jobs retry job goes on with it (with the files and the code of now)" in capsys.readouterr().err
    assert clp("jobs", "retry", "job", "--look=0.05") == 0
    assert len(world.runs) >= 1 and record().job.code_version == "mended"
    assert sorted(path.name for path in (record().path / "files").iterdir()) == ["beside.py", "go.py"]
    assert not list(record().path.glob(".new-*"))
    assert clp("jobs", "status", "job") == 0
    out = capsys.readouterr().out
    assert f"  code until attempt 1: {first}\n" in out and "  code: mended\n" in out


def test_a_retry_refuses_what_a_launch_refuses_and_where_nothing_is_goes_on(world, here, capsys, tmp_path):
    (here / "go.py").write_text("raise SystemExit(1)\n")
    assert clp("launch", *TPU, "--name=job", "--look=0.05", "--", "python3", "go.py") == 1
    before = (record().code, record().states)
    (here / "go.py").write_text('KEY = {"private_key": 1}\n')
    assert clp("jobs", "retry", "job") == 2
    assert "go.py holds a private key" in capsys.readouterr().err and (record().code, record().states) == before
    os.chdir(tmp_path)
    here.rename(tmp_path / "moved")
    assert clp("jobs", "retry", "job", "--look=0.05") == 1
    assert "job goes on with the code and the files of then" in capsys.readouterr().err and record().code == before[0]
