"""Secrets on the command line of `clp launch`: refused where they are stored, and written nowhere."""

import tempfile

import pytest
from clp_jax.launch.job import jobs_directory

from .conftest import TRAINING, clp
from .conftest import typed as record

pytestmark = pytest.mark.usefixtures("here")


def test_a_secret_in_the_command_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert clp("launch", "local", "--", "true", "--key=0123456789abcdef") == 2
    told = capsys.readouterr().err
    assert "the value of $WANDB_API_KEY stands in the command" in told and "0123456789abcdef" not in told
    assert not jobs_directory().exists()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("local", []),
        ("slurm", []),
        ("gke", ["--topology=v5e:2x2"]),
        ("tpu-vm", ["--topology=v5e:2x2", "--zone=us-west4-a"]),
    ],
)
def test_secrets_of_the_environment_are_written_nowhere(world, monkeypatch, target, options):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    # Nodes have no /tmp together.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        monkeypatch.setenv("CLP_JOBS_DIR", folder)
        assert clp("launch", target, *options, "--name=job", "--look=0.05", "--", *TRAINING) == 0
        files = [path for path in jobs_directory().rglob("*") if path.is_file()]
        assert files and not [path for path in files if b"0123456789abcdef" in path.read_bytes()]
    assert "0123456789abcdef" not in (world.path / "calls.jsonl").read_text() if world.calls() else target == "local"
    # A cluster's nodes and this machine have the variable; what is elsewhere has it only where it is asked for.
    assert [run.get("WANDB_API_KEY") for run in world.runs] == [
        "0123456789abcdef" if target in ("local", "slurm") else None
    ]


def test_a_secret_that_a_worker_prints_is_not_in_the_record(world, here, monkeypatch, capsys):
    monkeypatch.setenv("wandb_api_key", "0123456789abcdef")
    program = "import os, sys; print('it is', os.environ['wandb_api_key']); sys.exit(1)"
    assert clp("launch", "local", "--name=job", "--look=0.05", "--", "python3", "-c", program) == 1
    assert record().state.detail.endswith("it is [$wandb_api_key]")
    assert b"0123456789abcdef" not in (record().path / "states.jsonl").read_bytes()
    assert "0123456789abcdef" not in capsys.readouterr().err


def test_the_value_of_a_named_secret_is_refused_and_redacted(world, capsys, monkeypatch):
    monkeypatch.setenv("WANDB", "the-secret-value")
    where = ["tpu-vm", "--topology=v5e:2x2", "--zone=us-west4-a", "--secrets=WANDB=mine", "--name=job", "--look=0.05"]
    assert clp("launch", *where, "--", "true", "--key=the-secret-value") == 2
    assert "the value of $WANDB stands in the command" in capsys.readouterr().err
    program = "import os, sys; print('it is', os.environ['WANDB']); sys.exit(1)"
    assert clp("launch", *where, "--", "python3", "-c", program) == 1
    assert record().state.detail.endswith("it is [$WANDB]")
    assert not [path for path in jobs_directory().rglob("*") if path.is_file() and b"the-secret" in path.read_bytes()]


@pytest.mark.parametrize(
    "text", ["-----BEGIN OPENSSH PRIVATE KEY-----\n", '{"type": "service_account", "private_key": "x"}']
)
def test_a_private_key_does_not_go_along(here, capsys, text):
    (here / "key").write_text(text)
    assert clp("launch", "local", "--", "true", "--key=key") == 2
    assert "key holds a private key" in capsys.readouterr().err
    assert not jobs_directory().exists()
