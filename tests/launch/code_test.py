"""The archive that workers get: an installation of this code, the same bytes for the same content, and nothing else."""

import io
import os
import subprocess
import sys
import tarfile

import pytest
from clp_jax.launch import code
from clp_jax.launch.errors import LaunchError


def unpack(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def test_what_is_in_it_is_an_installation(tmp_path):
    data = code.archive({"a/my.gin": b"A = 1"}, "tpu")
    files = unpack(data)
    assert files["work/a/my.gin"] == b"A = 1"
    assert {
        "clp_jax/main.py",
        "clp_jax/launch/code.py",
        "clp_jax/tasks/pydoc.py",
        "clp_jax/gin_configs/runs/train.gin",
    } <= set(files)
    assert {name.split("/")[0] for name in files} == {
        "clp_jax", "work", "requirements.txt", "constraints.txt", "ENVIRONMENT", "VERSION"
    }  # fmt: skip
    assert files["VERSION"].decode() == f"{code.code_version()}\n"
    requirements = files["requirements.txt"].decode().splitlines()
    assert "jax[tpu]>=0.10" in requirements and "gin-config>=0.5" in requirements
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(tmp_path, filter="data")
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    program = "import clp_jax, clp_jax.launch, sys; from clp_jax.main import main; print(clp_jax.__file__); sys.exit(main(['jobs', 'list']))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == str(tmp_path / "clp_jax" / "__init__.py")


def test_the_same_content_is_the_same_archive_and_the_same_environment():
    assert code.archive({"a": b"1"}, "tpu") == code.archive({"a": b"1"}, "tpu")
    found = [unpack(code.archive(*given))["ENVIRONMENT"] for given in (({}, "tpu"), ({"a": b"1"}, "tpu"), ({}, None))]
    assert found[0] == found[1] != found[2]


def test_programs_may_be_run_and_other_files_not():
    with tarfile.open(fileobj=io.BytesIO(code.archive({"run.sh": b"", "a": b""}, None, {"run.sh"}))) as tar:
        assert [tar.getmember(name).mode for name in ("work/run.sh", "work/a")] == [0o755, 0o644]


def test_an_extra_that_there_is_not():
    with pytest.raises(LaunchError, match="there is no extra 'gpu': there are aot, cuda"):
        code.requirements("gpu")


def test_an_installation_says_its_version_and_requirements(monkeypatch):
    monkeypatch.setattr(code, "checkout", lambda: None)
    monkeypatch.setattr(code, "source_files", lambda: {"a": b""})
    monkeypatch.setattr(code.importlib.metadata, "version", lambda name: "1.2")
    entries = ["jax>=0.10", 'libtpu; extra == "aot"', 'jax[tpu]>=0.10; extra == "tpu"']
    monkeypatch.setattr(code.importlib.metadata, "requires", lambda name: entries)
    assert code.code_version().startswith("1.2+")
    assert code.requirements("tpu") == ["jax>=0.10", "jax[tpu]>=0.10"]
    assert code.requirements(None) == ["jax>=0.10"]
