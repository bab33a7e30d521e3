"""What ends a run that has begun tells by its exit code whether it may be started again."""

import errno
import sys

import jax
import pytest
from failing_runs import fail

from clp_jax import main as cli
from clp_jax.data.reader import UnreadableError
from clp_jax.interop.object_store import StoreError, StorePath, _failure
from clp_jax.processes import FAILURE, RESTARTABLE
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.failures import exit_code
from clp_jax.training.guards import GuardError
from clp_jax.training.run_directory import RunDirectoryError

PLACE = StorePath.parse("gs://bucket/run")


def because_of(error, cause):
    error.__cause__ = cause
    return error


def saving(cause):
    return because_of(CheckpointError("the checkpoint of step 4 could not be written"), cause)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "Input/output error"), RESTARTABLE),
        (OSError(errno.ESTALE, "Stale file handle"), RESTARTABLE),
        (TimeoutError("the store took too long"), RESTARTABLE),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), RESTARTABLE),
        (_failure(PLACE, "write", ValueError("UNAVAILABLE: no answer")), RESTARTABLE),
        (saving(_failure(PLACE, "read", ValueError("DEADLINE_EXCEEDED"))), RESTARTABLE),
        (saving(OSError(errno.EIO, "Input/output error")), RESTARTABLE),
        (UnreadableError("a/train has records that can't be read"), RESTARTABLE),
        (saving(ValueError("UNAVAILABLE: Error writing file")), RESTARTABLE),
        (saving(RuntimeError("process 1 could not write its part; its own message says why")), RESTARTABLE),
        (jax.errors.JaxRuntimeError("INTERNAL: Accelerator device halted prematurely"), RESTARTABLE),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer"), RESTARTABLE),
        (OSError(errno.ENOSPC, "No space left on device"), FAILURE),
        (OSError(errno.EACCES, "Permission denied"), FAILURE),
        (_failure(PLACE, "write", ValueError("PERMISSION_DENIED: no")), FAILURE),
        (StoreError(f"{PLACE} was started again elsewhere"), FAILURE),
        (saving(OSError(errno.EDQUOT, "Disk quota exceeded")), FAILURE),
        (saving(ValueError("Error writing file: No space left on device")), FAILURE),
        (saving(ValueError("Error opening file: Read-only file system")), FAILURE),
        (saving(FileExistsError("4 exists: it was not overwritten")), FAILURE),
        (because_of(RunDirectoryError("the disk is full"), OSError(errno.ENOSPC, "No space left")), FAILURE),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), FAILURE),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: wrong program"), None),
        (GuardError("3 steps in a row"), None),
        (ValueError("a bug"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_failures_of_a_run_that_has_begun(error, code):
    assert exit_code(error) == code


@pytest.mark.parametrize(
    ("how", "at", "code", "said"),
    [
        ("disk", 2, RESTARTABLE, "clp fail: error: [Errno 5] Input/output error: '/data/shard'\n"),
        ("disk", -1, FAILURE, "clp fail: error: [Errno 5] Input/output error: '/data/shard'\n"),
        ("full", 2, FAILURE, "clp fail: error: /data/shard: the disk is full"),
        ("device", 2, RESTARTABLE, "Traceback (most recent call last):"),
    ],
)
def test_the_command_ends_with_it(tmp_path, monkeypatch, capsys, how, at, code, said):
    monkeypatch.setattr(cli, "COMMANDS", {"fail": "failing_runs.fail"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fail", "--run_dir=run", f"--how={how}", f"--at={at}"]) == code
    assert said in capsys.readouterr().err


def test_what_is_too_large_for_a_device_is_a_bug_to_look_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as raised:
        fail(run_dir="run", how="memory")
    assert raised.value.exit_code == FAILURE
