"""Fingerprints change with the content, and with nothing else."""

import os

from clp_jax.launch import fingerprint as module
from clp_jax.launch.fingerprint import fingerprint, is_remote


def test_content_counts_and_times_do_not(tmp_path):
    path = tmp_path / "file"
    path.write_text("abc")
    before = fingerprint(path)
    os.utime(path, (1, 1))
    assert fingerprint(path) == before
    time = path.stat()
    path.write_text("abd")
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    # The size and the time are the same.
    assert fingerprint(path) != before
    assert fingerprint(tmp_path / "none") is None


def test_directories_are_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "a" / "y").write_text("2")
    first = fingerprint(tmp_path)
    (tmp_path / ".lock").write_text("")
    assert fingerprint(tmp_path) == first
    (tmp_path / "results.json").write_text("{}")
    assert fingerprint(tmp_path) != first
    assert fingerprint(tmp_path, {tmp_path / "results.json"}) == first
    (tmp_path / "results.json").unlink()
    (tmp_path / "a" / "y").rename(tmp_path / "a" / "z")
    assert fingerprint(tmp_path) != first


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(module, "_PIECE_BYTES", 10)
    path = tmp_path / "file"
    content = bytearray(200)
    found = set()
    for place in (0, 100, 199):
        content[place] += 1
        path.write_bytes(content)
        found.add(fingerprint(path))
    path.write_bytes(content + b"\0")
    found.add(fingerprint(path))
    assert len(found) == 4


def test_buckets():
    assert is_remote("gs://bucket/x") and not is_remote("/gs/x") and not is_remote("x:y")
