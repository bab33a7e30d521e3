"""Metrics: full precision, resuming, cut-off lines, full disks."""

import errno
import json

import numpy as np
import pytest

from clp_jax.training.metrics import MetricWriter, drop_lines_after, read_metrics
from clp_jax.training.run_directory import RunDirectoryError, open_run_directory


def test_floats_keep_every_bit(tmp_path):
    directory = open_run_directory(tmp_path)
    loss = np.float32(0.1)
    with MetricWriter(directory, "toy", 0) as writer:
        writer.write(1, {"loss": float(loss), "third": 1 / 3, "undefined": float("nan")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"loss": 0.10000000149011612' in line and '"undefined": null' in line
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert np.float32(record["loss"]) == loss and record["third"] == 1 / 3
    assert record["step"] == 1 and record["stage"] == "toy" and record["wall_time"] > 1e9


def test_a_resumed_run_repeats_no_step(tmp_path):
    directory = open_run_directory(tmp_path)
    with MetricWriter(directory, "toy", 0) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    with MetricWriter(directory, "toy", 3) as writer:
        writer.write(4, {"loss": 40.0})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:3] == kept
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    drop_lines_after(path, 10)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(path)


def test_a_full_disk_is_said_clearly(tmp_path, monkeypatch):
    with MetricWriter(open_run_directory(tmp_path), "toy", 0) as writer:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer._shown[0], "scalars", full)
        with pytest.raises(RunDirectoryError, match="the disk is full"):
            writer.write(1, {"loss": 1.0})
