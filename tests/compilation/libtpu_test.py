"""libtpu is told that it is alone exactly where it is."""

import importlib.util
import os

import pytest

from clp_jax.compilation import libtpu


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in libtpu._ALONE:
        monkeypatch.setenv(name, "")  # Restored afterwards.
        monkeypatch.delenv(name)


installed = importlib.util.find_spec("libtpu") is not None


def test_without_a_tpu_it_is_told(tmp_path):
    assert libtpu.settle(tmp_path) == installed
    assert all((name in os.environ) == installed for name in libtpu._ALONE)


def test_what_the_user_says_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    libtpu.settle(tmp_path)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "a,b"


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
def test_with_a_tpu_nothing_is_said(tmp_path, device):
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert not libtpu.settle(tmp_path)
    assert not any(name in os.environ for name in libtpu._ALONE)
