"""Steps of a directory: names, retention against its definition, and what is never removed."""

import itertools
import math

import pytest

from clp_jax.training.checkpoint_steps import (
    KeepBest,
    Retention,
    as_path,
    complete_steps,
    damaged_steps,
    numbered_steps,
    remove,
    set_aside,
    unfinished_steps,
)

NAMES = [
    "1",
    "02",
    "10",
    "x3",
    "4.unfinished",
    "5.removing",
    "6.damaged",
    "6.damaged.1",
    "7.orbax-checkpoint-tmp-99",
    "٣",
]


def make(directory, names):
    for name in names:
        (directory / name).mkdir(parents=True)
        (directory / name / "manifest.json").write_text("")
    return as_path(directory)


def test_names_say_what_a_directory_is(tmp_path):
    folder = make(tmp_path, NAMES)
    (tmp_path / "6.damaged.txt").write_text("a reason\n")
    assert numbered_steps(folder) == complete_steps(folder) == [1, 10]
    assert unfinished_steps(folder) == ["4.unfinished", "5.removing", "7.orbax-checkpoint-tmp-99"]
    assert damaged_steps(folder) == {"6.damaged": "a reason", "6.damaged.1": "no reason is written beside it"}
    nowhere = as_path(tmp_path / "nowhere")
    assert complete_steps(nowhere) == unfinished_steps(nowhere) == [] and damaged_steps(nowhere) == {}


@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("every", [None, 1, 4])
@pytest.mark.parametrize("best", [None, KeepBest("loss"), KeepBest("loss", lowest=False)])
def test_a_step_is_kept_if_anything_keeps_it(last, every, best):
    for values in itertools.product([0.5, 0.25, None, math.nan], repeat=4):
        steps = {3 * i + 2: ({} if value is None else {"loss": value}) for i, value in enumerate(values)}
        expected = set(sorted(steps)[-last:])
        expected |= {step for step in steps if every and step % every == 0}
        scored = [(m["loss"], step) for step, m in steps.items() if "loss" in m and not math.isnan(m["loss"])]
        if best and scored:
            value = (min if best.lowest else max)(score for score, _ in scored)
            expected.add(max(step for score, step in scored if score == value))
        assert set(Retention(last, every, best).kept(steps)) == expected


def test_the_best_by_a_metric_that_there_is_not():
    steps = {2: {"x": 1.0}, 4: {"loss": 0.5}}
    for best in (None, KeepBest("loss"), KeepBest("x")):
        assert Retention(best=best).without_best(steps) is None
    assert Retention(best=KeepBest("y")).without_best({}) is None
    assert "metric 'y', which no checkpoint has: 2, 4 have loss, x" in Retention(best=KeepBest("y")).without_best(steps)


def test_nothing_to_keep_is_nothing_kept():
    assert Retention(2, 3, KeepBest("loss")).kept({}) == {}


@pytest.mark.parametrize(("settings", "name"), [((0,), "keep_checkpoints is 0"), ((2, 0), "keep_every is 0")])
def test_settings_are_checked(settings, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1"):
        Retention(*settings)


def test_removing_is_finished_after_a_death_in_the_middle(tmp_path):
    folder = make(tmp_path, ["1", "2"])
    (tmp_path / "1").rename(tmp_path / "1.removing")  # As far as the last process came.
    make(tmp_path, ["1"])
    remove(folder / "1")
    remove(folder / "2")
    assert list(tmp_path.iterdir()) == []
    make(tmp_path, ["3.removing"])
    remove(folder / "3.removing")
    assert list(tmp_path.iterdir()) == []


def test_what_is_set_aside_keeps_its_files_and_its_reason(tmp_path):
    folder = make(tmp_path, ["3", "3.damaged"])
    (tmp_path / "3" / "mark").write_text("x")
    assert set_aside(folder / "3", "a byte") == folder / "3.damaged.1"
    assert (tmp_path / "3.damaged.1" / "mark").read_text() == "x"
    assert damaged_steps(folder)["3.damaged.1"] == "a byte"


def test_other_addresses_are_no_directories():
    with pytest.raises(
        ValueError, match="nobodys://host/run is an address of another kind: expected a directory, gs://"
    ):
        as_path("nobodys://host/run")
