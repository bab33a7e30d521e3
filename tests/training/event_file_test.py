"""Event files: known checksums, a reader of our own, and TensorFlow's where it is installed."""

import importlib.util
import json
import struct
import subprocess
import sys

import pytest

from clp_jax.training.event_file import EventFileWriter, crc32c


def test_checksums_of_rfc_3720():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43


def records(path):
    data, out = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        out.append(data[12 : 12 + length])
        data = data[16 + length :]
    return out


def test_the_bytes_of_an_event(tmp_path):
    writer = EventFileWriter(tmp_path, purge_step=1)
    writer.scalars(300, {"loss": 0.5}, wall_time=1.0)
    writer.close()
    version, started, scalars = records(writer.path)
    assert b"brain.Event:2" in version
    assert started.endswith(b"\x10\x01" + b"\x3a\x02\x08\x01")  # step 1, session log with status START
    summary = b"\x0a\x04loss" + b"\x15" + struct.pack("<f", 0.5)
    value = b"\x0a" + bytes([len(summary)]) + summary
    assert scalars == b"\x09" + struct.pack("<d", 1.0) + b"\x10\xac\x02" + b"\x2a" + bytes([len(value)]) + value


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="TensorFlow reads the file")
def test_tensorflow_reads_what_we_write(tmp_path):
    writer = EventFileWriter(tmp_path, purge_step=7)
    writer.scalars(7, {"loss": 1.5, "evaluation/accuracy": 0.25}, wall_time=12.5)
    writer.close()
    code = (
        "import sys, json, tensorflow as tf\n"
        "from tensorflow.core.util import event_pb2\n"
        "events = [event_pb2.Event.FromString(r.numpy()) for r in tf.data.TFRecordDataset(sys.argv[1])]\n"
        "values = {v.tag: v.simple_value for v in events[2].summary.value}\n"
        "status = events[1].session_log.status\n"
        "print(json.dumps([events[0].file_version, status, events[1].step, events[2].step, events[2].wall_time, values]))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(writer.path)], capture_output=True, text=True, check=True)
    expected = ["brain.Event:2", 1, 7, 7, 12.5, {"loss": 1.5, "evaluation/accuracy": 0.25}]
    assert json.loads(out.stdout.splitlines()[-1]) == expected


def test_training_imports_neither_tensorflow_nor_gin():
    code = (
        "import sys, clp_jax.train, orbax.checkpoint, rich.progress\n"
        "print([m for m in ('tensorflow', 'gin', 'clu', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
