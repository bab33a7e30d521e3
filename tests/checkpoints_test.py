"""`clp checkpoints`: what it says, what it removes, and what it never does."""

import dataclasses
import shutil

import jax.numpy as jnp
import pytest

from clp_jax.checkpoints import checkpoints
from clp_jax.main import main
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_steps import Retention
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.guards import Guards
from clp_jax.training.run_directory import RunDirectory, RunDirectoryError
from clp_jax.training.saved_params import save_params
from clp_jax.training.train_state import TrainState

LOSSES = {2: 0.5, 4: 0.25, 6: 0.75, 8: 1.0}


def state_of(step):
    params = {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.full((4,), step, jnp.bfloat16)}
    return TrainState(jnp.int32(step), params, {"slot": jnp.ones(3)}, None, jnp.zeros(2, jnp.uint32), Guards().init())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    with Checkpoints(run / "checkpoints", Retention(10)) as saving:
        for step, loss in LOSSES.items():
            saving.save(step, state_of(step), {"examples": step}, {"stage": "toy"}, {"evaluation/loss": loss, "x": 1.0})
    save_params(run / "reference", state_of(0).params, {"stage": "toy"})
    (run / "config.gin").write_text("")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def steps(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_list_shows_every_step_and_what_is_not_one(run, capsys):
    (run / "checkpoints" / "10.unfinished").mkdir()
    (run / "checkpoints" / "3.damaged").mkdir()
    (run / "checkpoints" / "3.damaged.txt").write_text("a byte fell over\n")
    (run / "checkpoints" / "6" / "manifest.json").unlink()
    checkpoints("list", str(run))
    shown = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line.startswith("│")
    ]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("2", "0.5", "complete"),
        ("4", "0.25", "complete"),
        ("6", "0.75", "no manifest: damaged, or being written"),
        ("8", "1", "complete"),
        ("10.unfinished", "", "unfinished"),
        ("3.damaged", "", "a byte fell over"),
    ]
    assert "evaluation/loss" in shown and " kB " in shown


def test_verify_reads_all_and_fails_with_the_reasons(run, capsys):
    assert main(["checkpoints", "verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(": intact: " in line for line in lines) and "/reference: " in lines[-1]
    shorter = run / "checkpoints" / "4" / "params" / "_METADATA"
    shorter.write_bytes(shorter.read_bytes()[:-1])
    (run / "reference" / "manifest.json").unlink()
    (run / "reference" / "run.json").unlink()
    assert main(["checkpoints", "verify", str(run)]) == 2
    said = capsys.readouterr()
    assert "checkpoints/4: DAMAGED: params/_METADATA has" in said.out
    assert "clp checkpoints: error: 1 of 4 checkpoints are damaged: 4." in said.err
    assert main(["checkpoints", "verify", str(run / "checkpoints" / "8")]) == 0
    assert main(["checkpoints", "verify", str(run / "checkpoints" / "4")]) == 2


def test_gc_says_what_it_would_remove_and_removes_just_that(run, capsys):
    settings = {"keep_checkpoints": 1, "keep_every": 3, "keep_best": "evaluation/loss"}
    (run / "checkpoints" / "9.unfinished").mkdir()
    checkpoints("gc", str(run), **settings, dry_run=True)
    said = capsys.readouterr().out
    assert steps(run) == ["2", "4", "6", "8", "9.unfinished"]
    checkpoints("gc", str(run), **settings)
    assert capsys.readouterr().out == said.replace("would remove", "removed")
    assert steps(run) == ["4", "6", "8"]
    for line in ("kept 4: best by evaluation/loss", "kept 6: a multiple of 3", "kept 8: one of the last 1"):
        assert line in said.splitlines()
    checkpoints("gc", str(run), keep_checkpoints=1, keep_best="evaluation/loss", highest=True)
    assert steps(run) == ["8"]
    checkpoints("gc", str(run), keep_checkpoints=1)
    assert "nothing to remove" in capsys.readouterr().out


def test_gc_removes_nothing_where_no_step_has_the_metric(run, capsys):
    words = ["checkpoints", "gc", str(run), "--keep_checkpoints=1"]
    assert main([*words, "--keep_best=evaluaton/loss"]) == 2
    said = capsys.readouterr()
    assert (
        "keep_best asks for the metric 'evaluaton/loss' (did you mean 'evaluation/loss'?), which no checkpoint has: 2, 4, "
        "6, 8 have evaluation/loss, x. Nothing was removed." in said.err
    )
    assert not said.out and steps(run) == ["2", "4", "6", "8"]


def test_gc_keeps_intact_steps_in_the_place_of_damaged_ones(run, capsys):
    (run / "checkpoints" / "8" / "run.json").write_text("{}")
    (run / "checkpoints" / "3.damaged").mkdir()
    (run / "checkpoints" / "3.damaged.txt").write_text("")
    checkpoints("gc", str(run), keep_checkpoints=1)
    assert steps(run) == ["3.damaged", "3.damaged.txt", "6", "8"]
    assert "kept 8: damaged, and not a checkpoint to rely on: run.json has 2 bytes" in capsys.readouterr().out
    checkpoints("gc", str(run), keep_checkpoints=1, damaged=True)
    assert steps(run) == ["6", "8"]


def test_gc_waits_for_no_run_that_goes_on(run):
    with RunDirectory(run).lock():
        with pytest.raises(RunDirectoryError, match="another process is training in"):
            checkpoints("gc", str(run), keep_checkpoints=1)
        checkpoints("gc", str(run), keep_checkpoints=1, dry_run=True)
    assert steps(run) == ["2", "4", "6", "8"]


def test_diff_compares_leaf_by_leaf(run, tmp_path, capsys):
    other = dataclasses.replace(state_of(2), params={"kernel": jnp.zeros((4, 3)), "new": jnp.ones(1)})
    with Checkpoints(tmp_path / "other") as saving:
        saving.save(2, other, {"examples": 2}, {"stage": "toy"}, {})
    checkpoints("diff", str(run / "checkpoints" / "2"), str(run / "checkpoints" / "8"))
    shown = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line.startswith("│")
    ]
    assert rows == [
        ["params/bias", "values", "6", "0.75"],
        ["training/step", "values", "6", "0.75"],
        ["run.json: position", "differs", "", ""],
        ["run.json: step", "differs", "", ""],
    ]
    assert "5 arrays are the same to the bit, 4 differences" in shown
    checkpoints("diff", str(run / "checkpoints" / "2"), str(tmp_path / "other"))
    shown = capsys.readouterr().out
    for name, what in (
        ("bias", "only in the first"),
        ("new", "only in the second"),
        ("kernel", "shape (3, 4) and (4, 3)"),
    ):
        assert any(f"params/{name}" in line and what in line for line in shown.splitlines())
    checkpoints("diff", str(run), str(run))
    assert "0 differences" in capsys.readouterr().out


def test_mistakes_are_said_clearly(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="diff takes two checkpoints, the other actions one directory"):
        checkpoints("diff", str(run))
    with pytest.raises(ValueError, match="diff takes two checkpoints"):
        checkpoints("list", str(run), str(run))
    with pytest.raises(CheckpointError, match="nowhere does not exist. Give a run directory"):
        checkpoints("list", str(tmp_path / "nowhere"))
    for action in ("list", "verify"):
        with pytest.raises(CheckpointError, match="there are no checkpoints in"):
            checkpoints(action, str(tmp_path))
    assert main(["checkpoints", "forget", str(run)]) == 2
    assert "--action is 'forget': expected Literal['verify', 'list', 'gc', 'diff']" in capsys.readouterr().err
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        checkpoints("gc", str(run), keep_checkpoints=0)
    assert steps(run) == ["2", "4", "6", "8"]
