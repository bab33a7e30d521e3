"""W&B: the real package, offline, where it is installed; a word of advice where it is not."""

import sys

import pytest

from clp_jax.training.wandb_scalars import WandbScalars


def test_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own way to say that it can't be imported.
    with pytest.raises(
        RuntimeError, match=r"wandb_project is 'p', but wandb can't be imported .*pip install 'clp-jax\[wandb\]'"
    ):
        WandbScalars("p", tmp_path, "")


@pytest.mark.filterwarnings("ignore")  # Of the package itself.
def test_numbers_are_written_offline_and_a_run_goes_on_as_the_same(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="shows metrics at W&B with the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = []
    for first in (1, 3):
        scalars = WandbScalars("project", tmp_path / "run", "seed = 1\n")
        names.append((scalars._run.id, scalars._run.name, scalars._run.config["gin"]))
        for step in (first, first + 1):
            scalars.scalars(step, {"loss": 1 / step, "evaluation/loss": 2.0}, 0.0)
        assert scalars._run.summary["loss"] == 1 / (first + 1)
        scalars.close()
    assert names[0] == names[1] == (names[0][0], "run", "seed = 1\n")
    assert len(list((tmp_path / "run").rglob("*.wandb"))) == 2
