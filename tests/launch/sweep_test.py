"""Sweep files: what they say, how trials are named, and what is wrong with them in one line."""

import re

import pytest
from clp_jax.launch import space
from clp_jax.launch.sweep import Sweep, Trial, check_trials, command_lines, gin_text, read_sweep

from clp_jax.main import COMMANDS

HEAD = "command: train --gin_file=examples/pydoc_sft.gin\n"

FULL = """\
command: clp train --gin_file=a.gin --gin.TEXT='two words'
then:
  - evaluate --gin.RUN_DIR={run_dir}
space:
  product:
    - grid: {LEARNING_RATE: [1e-3, 3E-4], LAYERS: [[1, 2], "@full()"]}
    - zip:
        - grid: {A: [1, 2]}
        - sobol: {count: 2, seed: 7, ranges: {B: {uniform: [0, 1]}}}
seeds: [3, 5]
metrics: {loss: minimize, reward: maximize}
"""


def written(tmp_path, text, name="sweep.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_yaml_says_what_python_says(tmp_path):
    python = """
from clp_jax.launch import space
from clp_jax.launch.sweep import Sweep
sweep = Sweep(
    "clp train --gin_file=a.gin --gin.TEXT='two words'",
    space.product(
        space.grid({"LEARNING_RATE": [1e-3, 3e-4], "LAYERS": [[1, 2], "@full()"]}),
        space.zip(space.grid({"A": [1, 2]}), space.sobol({"B": space.uniform(0, 1)}, count=2, seed=7)),
    ),
    seeds=[3, 5],
    then=["evaluate --gin.RUN_DIR={run_dir}"],
    metrics={"loss": "minimize", "reward": "maximize"},
)
"""
    ours, theirs = read_sweep(written(tmp_path, FULL)), read_sweep(written(tmp_path, python, "sweep.py"))
    assert ours.trials() == theirs.trials()
    assert len(ours.trials()) == 2 * 2 * 2 * 2
    assert ours.commands() == theirs.commands()
    assert ours.metrics == theirs.metrics == {"loss": "minimize", "reward": "maximize"}


def test_command_lines_of_a_trial(tmp_path):
    sweep = read_sweep(written(tmp_path, FULL))
    first, then = command_lines(sweep.commands(), sweep.trials()[0], "runs/x")
    assert first[:4] == ["train", "--gin_file=a.gin", "--gin.TEXT=two words", "--run_dir=runs/x"]
    assert first[4:7] == ["--gin.LEARNING_RATE=0.001", "--gin.LAYERS=[1, 2]", "--gin.A=1"]
    assert first[-1] == "--seed=3"
    assert then == ["evaluate", "--gin.RUN_DIR=runs/x"]
    (named,) = command_lines([("train", "--gin.RUN_DIR={run_dir}")], Trial({}), "runs/x")
    assert named == ["train", "--gin.RUN_DIR=runs/x"]


def test_names_are_of_bindings_and_seed_alone():
    trials = Sweep("train", space.grid({"A": [1, 2], "B": [3]}), seeds=2).trials()
    swapped = Sweep("train --more", [{"B": 3, "A": 2}], seeds=[1]).trials()
    assert trials[3].name == swapped[0].name
    assert len({trial.name for trial in trials}) == 4
    assert len({trial.setting for trial in trials}) == 2
    assert Trial({"A": "1"}).name != Trial({"A": "1.0"}).name
    assert Trial({"A": "1"}).name == "1ffee5b634"  # Run directories of earlier versions are found again.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "0.001"), ("1e-3", "0.001"), (True, "True"), (None, "None"), ("@a/full()", "@a/full()"), ("%ALPHA", "%ALPHA"),
        ("runs/x", "runs/x"), ("'q'", "'q'"), ([1, "a"], "[1, 'a']"), ({"a": (1, 2)}, "{'a': (1, 2)}"),
    ],
)  # fmt: skip
def test_values_as_typed(value, text):
    assert gin_text(value) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: [{A: 1}]", "command is missing"),
        (HEAD + "spase: [{A: 1}]", "unknown key 'spase' (did you mean space?)"),
        (HEAD, "a sweep has a space or a search"),
        (HEAD + "space: [{A: 1}]\nsearch: {trials: 2, ranges: {A: {uniform: [0, 1]}}}", "a space or a search"),
        (HEAD + "space: [{A: 1}, {A: 1.0}, {A: 1}]", "the same trial twice: A=1."),
        (HEAD + "space: []", "space: it is empty"),
        (HEAD + "space: 3", "space: 3: expected grid"),
        (HEAD + "space: {grid: {}}", "grid: it is empty"),
        (HEAD + "space: {grid: {A: []}}", "grid: A has no values"),
        (HEAD + "space: {grid: {A: 3}}", "grid: A is 3: expected a list of values"),
        (HEAD + "space: {grid: {A: [1]}, zip: []}", "grid and zip: expected one of"),
        (HEAD + "space: {gird: {A: [1]}}", "unknown key 'gird' (did you mean grid?)"),
        (HEAD + "space: {sobol: {ranges: {A: {uniform: [0, 1]}}}}", "sobol: count is missing"),
        (HEAD + "space: {random: {count: 2, ranges: {A: {uniform: 1}}}}", "uniform: 1: expected [LOW, HIGH]"),
        (HEAD + "space: {random: {count: 2, ranges: {A: {unifrom: [0, 1]}}}}", "unknown key 'unifrom'"),
        (HEAD + "space: [{A: 1}]\nseeds: -1", "seeds: -1"),
        (HEAD + "space: [{A: 1}]\nseeds: [0, 0]", "the same trial twice: A=1 seed=0"),
        (HEAD + "space: [{A: 1}]\nseeds: two", "seeds: 'two'"),
        (HEAD + "space: [{A: 1}]\nseeds: true", "seeds: True"),
        (HEAD + "space: {random: {count: 2, seed: x, ranges: {A: {uniform: [0, 1]}}}}", "random: seed is 'x'"),
        (HEAD + "space: {sobol: {count: 2, seed: -1, ranges: {A: {uniform: [0, 1]}}}}", "sobol: seed is -1"),
        (HEAD + "search: {trials: 2, seed: x, ranges: {A: {uniform: [0, 1]}}}\nmetrics: {l: minimize}", "seed is 'x'"),
        (HEAD + "space: [{A: 1}]\nmetrics: {loss: down}", "loss is 'down': expected minimize or maximize"),
        (HEAD + "search: {trials: 0, ranges: {A: {uniform: [0, 1]}}}\nmetrics: {l: minimize}", "trials is 0"),
        (HEAD + "search: {trials: 2, ranges: {A: {uniform: [0, 1]}}}", "what is best? Give metrics"),
        ("command: ''\nspace: [{A: 1}]", "command: it is empty"),
        ("command: train 'x\nspace: [{A: 1}]", "no closing quotation"),
        ("command: 3\nspace: [{A: 1}]", "command: 3"),
        (HEAD + "space: [{A: 1}]\nspace: [{A: 2}]", "line 1: 'space' stands twice"),
        (HEAD + "space: [{A: 1", "line 2: "),
        ("- a", "it holds ['a']"),
        (HEAD + "space: !!python/object/apply:os.getpid []", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_sweep(written(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "sweep.yaml")) and "\n" not in str(error.value)


def test_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"sweep.py: sweep is 3: expected sweep = Sweep"):
        read_sweep(written(tmp_path, "sweep = 3", "sweep.py"))
    with pytest.raises(ValueError, match=r"expected a file called \*.yaml or \*.py"):
        read_sweep(tmp_path / "sweep.toml")
    for name in ("none.yaml", "none.py"):
        with pytest.raises(FileNotFoundError):
            read_sweep(tmp_path / name)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (
            [{"LEARNING_RATEE": 0.1}],
            "the trial LEARNING_RATEE=0.1: --gin.LEARNING_RATEE: nothing here uses a macro LEARNING_RATEE",
        ),
        # A value of another kind is found, wherever it stands.
        ([{"NUM_STEPS": 3}, {"NUM_STEPS": 4}, {"NUM_STEPS": "@nothing()"}], "the trial NUM_STEPS=@nothing():"),
    ],
)
def test_a_binding_that_does_not_exist(bindings, message):
    sweep = Sweep("train --gin_file=examples/pydoc_sft.gin", bindings)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_trials(sweep, sweep.trials(), "runs/x", COMMANDS)
    assert "\n" not in str(error.value)
