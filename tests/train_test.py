"""The whole path of a run on a toy stage: resuming to the bit, refusals, signals, NaN, full disks."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from failing_disks import no_file_longer_than
from toy_runs import SETTINGS, Gradient, Toy, run

from clp_jax.processes import RESTARTABLE
from clp_jax.train import train
from clp_jax.training.checkpoint_items import CheckpointError
from clp_jax.training.checkpoint_steps import KeepBest, as_path, complete_steps, read_run
from clp_jax.training.guards import GuardError, Guards
from clp_jax.training.ledger import ACTIVITIES, LEDGER_METRICS
from clp_jax.training.metrics import TIMING_METRICS, read_metrics
from clp_jax.training.optimizers import AdamW
from clp_jax.training.run_directory import RunDirectoryError
from clp_jax.training.saved_params import load_params
from clp_jax.training.schedules import Linear


def lines(path):
    timeless = [{k: v for k, v in r.items() if k not in TIMING_METRICS} for r in read_metrics(path / "metrics.jsonl")]
    assert [r["step"] for r in timeless] == sorted({r["step"] for r in timeless})
    return timeless


def stored(path, step):
    """All arrays of a checkpoint, by file contents after reading them back."""
    import orbax.checkpoint as ocp

    folder = path / "checkpoints" / str(step)
    items = [name for name in ("params", "ema", "training") if (folder / name).is_dir()]
    trees = {name: ocp.PyTreeCheckpointHandler().restore(folder / name) for name in items}
    return jax.tree.map(np.asarray, trees) | {"run": json.loads((folder / "run.json").read_text())}


def assert_same_run(a, b, step):
    assert lines(a) == lines(b)
    one, other = stored(a, step), stored(b, step)
    assert one.pop("run") == other.pop("run")
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, accumulation):
    whole, parts = Toy(), Toy()
    result = run(tmp_path / "whole", 10, whole, accumulation=accumulation)
    assert result.step == 10 and result.metrics["evaluation/size"] > 0
    for num_steps in (3, 7, 10):  # Three processes, as far as the run can tell.
        run(tmp_path / "parts", num_steps, parts, accumulation=accumulation)
    assert parts.consumed == whole.consumed
    assert [r for r in lines(tmp_path / "parts") if r["step"] == 10] == [
        r for r in lines(tmp_path / "whole") if r["step"] == 10
    ]
    dropped = [{k: v for k, v in r.items() if not k.startswith("evaluation")} for r in lines(tmp_path / "parts")]
    expected = [{k: v for k, v in r.items() if not k.startswith("evaluation")} for r in lines(tmp_path / "whole")]
    assert dropped == expected  # Runs of 3 and 7 steps evaluate at their ends.
    one, other = stored(tmp_path / "whole", 10), stored(tmp_path / "parts", 10)
    jax.tree.map(np.testing.assert_array_equal, one, other)


class Killed(Exception):
    pass


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_crash_between_checkpoints_loses_and_repeats_nothing(tmp_path):
    def kill(step, run_dir):
        if step == 8:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "crashed", 10, Toy(hook=kill))
    assert [r["step"] for r in lines(tmp_path / "crashed")] == [1, 2, 3, 4, 5, 6, 7, 8]
    second = Toy()
    run(tmp_path / "crashed", 10, second)
    assert second.consumed == [24, 28, 32, 36]  # On from the checkpoint of step 6.
    run(tmp_path / "whole", 10)
    assert_same_run(tmp_path / "crashed", tmp_path / "whole", 10)
    crashed, whole = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("crashed", "whole"))
    assert crashed["repeated_steps"] == 2 and crashed["seconds/lost"] > 0  # Steps 7 and 8.
    assert whole["repeated_steps"] == 0 == whole["seconds/lost"]


def test_the_ledger_holds_every_second_of_a_run(tmp_path):
    began = time.monotonic()
    run(tmp_path, 7)
    run(tmp_path, 10)
    took = time.monotonic() - began
    totals = []
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        seconds = {name: value for name, value in line.items() if name.startswith("seconds/")}
        assert seconds.keys() | {"repeated_steps"} == LEDGER_METRICS
        totals.append(sum(seconds.values()))
    assert totals == sorted(totals) and all(seconds[f"seconds/{name}"] > 0 for name in ACTIVITIES[:1] + ACTIVITIES[3:8])
    # The rest is what comes before the first line and after the last one of the ledger: locks, and this test.
    records = json.loads((tmp_path / "ledger.json").read_text())
    assert [record["step"] for record in records] == [3, 6, 7, 7, 9, 10, 10]
    assert totals[-1] <= sum(records[-1]["seconds"].values()) <= took


def test_mfu_is_told_where_the_peak_is_known(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Counted(Toy):
        def setup(self, run_dir, seed):
            return dataclasses.replace(super().setup(run_dir, seed), flops=36.0)

    run(tmp_path / "unknown", 2, Counted())
    monkeypatch.setattr("clp_jax.train.peak_flops", lambda kind: 1e6)
    run(tmp_path / "known", 2, Counted())
    run(tmp_path / "uncounted", 2)
    assert not any(
        "mfu" in r for name in ("unknown", "uncounted") for r in read_metrics(tmp_path / name / "metrics.jsonl")
    )
    for line in read_metrics(tmp_path / "known" / "metrics.jsonl"):
        rate, devices = line["steps_per_second"], jax.device_count()
        assert line["mfu"] == rate * 36 / (devices * 1e6)
        assert line["tokens_per_second_per_device"] == rate * 12 / devices


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_sigterm_saves_and_says_how_to_go_on(tmp_path, capsys):
    def ask_to_stop(step, run_dir):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "stopped", 10, Toy(hook=ask_to_stop))
    assert stopped.value.code == RESTARTABLE == 75
    assert "stopped by SIGTERM after step 5 of 10. Run the same command again to go on." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    second = Toy()
    run(tmp_path / "stopped", 10, second)
    assert second.consumed == [20, 24, 28, 32, 36]
    run(tmp_path / "whole", 10)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 10)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("at", [4, 10])
def test_sigterm_ends_an_evaluation_which_is_made_when_the_run_goes_on(tmp_path, at, capsys):
    """In the middle, and at the end: where nothing but the evaluation is missing. Another one comes while it is made up."""
    done = []

    def stop_in_first_batch():
        done.clear()
        stage = Toy(evaluation_hook=in_first_batch)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "stopped", 10, stage, log_every=5, evaluate_every=4)
        assert stopped.value.code == RESTARTABLE
        return stage

    def in_first_batch(steps, batch):
        done.append((steps, batch))
        if steps in (at, 0):
            os.kill(os.getpid(), signal.SIGTERM)

    first = stop_in_first_batch()
    assert (
        done[-1] == (at, 0) and len(first.consumed) == at and complete_steps(tmp_path / "stopped/checkpoints")[-1] == at
    )
    assert f"stopped by SIGTERM after step {at} of 10" in capsys.readouterr().err
    assert stop_in_first_batch().consumed == [] and done == [(0, 0)]
    stage = Toy()
    run(tmp_path / "stopped", 10, stage, log_every=5, evaluate_every=4)
    assert stage.consumed == list(range(4 * at, 40, 4)) and stage.evaluations[0] == 0
    run(tmp_path / "whole", 10, log_every=5, evaluate_every=4)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    one, other = stored(tmp_path / "stopped", 10), stored(tmp_path / "whole", 10)
    assert (one.pop("run") == other.pop("run")) == (at != 10)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    again = Toy()
    run(tmp_path / "stopped", 10, again, log_every=5, evaluate_every=4)
    assert not again.evaluations and "is complete: 10 steps of 10" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_training_begins_there_is_nothing_to_save(tmp_path, number):
    class Slow(Toy):
        def setup(self, run_dir, seed):
            os.kill(os.getpid(), number)
            time.sleep(3600)

    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as stopped:
        run(tmp_path, 10, Slow())
    assert number == signal.SIGINT or stopped.value.code == RESTARTABLE
    assert run(tmp_path, 2).step == 2


@pytest.fixture
def _interruptible():
    """Where the tests were started in the background, a shell had SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_the_second_sigint_ends_at_once(tmp_path):
    def insist(step, run_dir):
        if step == 2:
            # To this thread: another one may take its time, and two signals that wait are one.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            assert not stopped
            stopped.append(step)
            signal.raise_signal(signal.SIGINT)

    stopped = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 10, Toy(hook=insist))
    assert stopped == [2] and complete_steps(tmp_path / "checkpoints") == []


def test_outside_the_main_thread_there_are_no_signals(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, 2)))
    thread.start()
    thread.join()
    assert results[0].step == 2


def test_a_complete_run_returns_at_once_and_may_be_extended(tmp_path, capsys):
    run(tmp_path, 4, config_text="train.num_steps = 4\nwidth = 3\n")

    def fail(step, run_dir):
        raise AssertionError("nothing should run")

    result = run(tmp_path, 4, Toy(hook=fail), config_text="train.num_steps = 4\nwidth = 3\n")
    assert result.step == 4 and result.metrics["step"] == 4
    assert "is complete: 4 steps of 4" in capsys.readouterr().err
    with pytest.raises(RunDirectoryError, match="width: 3 -> 5"):
        run(tmp_path, 4, config_text="train.num_steps = 4\nwidth = 5\n")
    assert run(tmp_path, 6, config_text="train.num_steps = 6\nwidth = 3\n").step == 6


def test_another_model_is_refused_by_its_description(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(RunDirectoryError, match=r"another model.width: it was 3, now it is 4"):
        run(tmp_path, 4, Toy(width=4))
    assert load_params(tmp_path)[2] == 2


def test_another_optimizer_or_average_is_refused_by_the_checkpoint(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(CheckpointError, match="another optimizer"):
        run(tmp_path, 4, optimizer=AdamW(0.1))
    with pytest.raises(CheckpointError, match="ema_decay was changed"):
        run(tmp_path, 4, ema_decay=None)


def test_asking_less_of_a_complete_run_leaves_its_configuration(tmp_path):
    run(tmp_path, 4, config_text="NUM_STEPS = 4\n")
    run(tmp_path, 2, config_text="NUM_STEPS = 2\n")
    assert (tmp_path / "config.gin").read_text() == "NUM_STEPS = 4\n"
    run(tmp_path, 5, config_text="NUM_STEPS = 5\n")
    assert (tmp_path / "config.gin").read_text() == "NUM_STEPS = 5\n"


def test_non_finite_steps_in_a_row_end_the_run_and_leave_the_checkpoint(tmp_path):
    explode = AdamW(Linear(1e9, 20, warmup_steps=19), max_grad_norm=None)  # The first step has a rate of 0.
    with pytest.raises(
        GuardError,
        match=r"steps 3 to 5 had a loss or a gradient that is not finite .*3 in a row.*step 4 is saved and intact.*learning rate",
    ):
        run(tmp_path, 10, optimizer=explode, checkpoint_every=1, guards=Guards(patience=3))
    params, _, step = load_params(tmp_path)
    assert np.isfinite(params["w"]).all() and step == 4
    assert [(r["step"], r["loss"] is None, r["skipped"]) for r in lines(tmp_path)][-3:] == [
        (2, False, 0),
        (3, True, 1),
        (4, True, 2),
    ]
    steps = json.loads((tmp_path / "non_finite.json").read_text())["steps"]
    assert [(s["step"], s["position"], s["example_ids"]) for s in steps] == [
        (3, {"examples": 8}, [8, 9, 10, 11]),
        (4, {"examples": 12}, [12, 13, 14, 15]),
        (5, {"examples": 16}, [16, 17, 18, 19]),
    ]
    assert [s["loss"] for s in steps] == ["nan"] * 3
    with pytest.raises(GuardError, match="steps 3 to 5"):  # The row goes on where it was.
        run(tmp_path, 10, optimizer=explode, checkpoint_every=1, guards=Guards(patience=3))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_skipped_step_leaves_all_but_the_step_as_it_was_and_resuming_changes_nothing(tmp_path, capsys):
    """The loss is finite, the gradient is not: steps 3, 4 and 7."""
    stage = Gradient(bad=frozenset({3, 4, 7}))
    run(tmp_path / "whole", 10, stage, checkpoint_every=1, keep_checkpoints=10)
    for step in (3, 4, 7):
        before, after = stored(tmp_path / "whole", step - 1), stored(tmp_path / "whole", step)
        for item in ("params", "ema"):
            jax.tree.map(np.testing.assert_array_equal, before[item], after[item])
        jax.tree.map(np.testing.assert_array_equal, before["training"]["opt_state"], after["training"]["opt_state"])
        assert after["training"]["step"] == step == before["training"]["step"] + 1
    made = stored(tmp_path / "whole", 5)["params"]["w"]
    assert (made != stored(tmp_path / "whole", 4)["params"]["w"]).any()
    assert [r["skipped"] for r in lines(tmp_path / "whole")] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [r["step"] for r in lines(tmp_path / "whole") if r["update_norm"] == 0] == [
        1,
        3,
        4,
        7,
    ]  # The first has a rate of 0.
    said = capsys.readouterr().err
    assert "step 7 is not finite, its update was left out: loss " in said and "grad_norm nan" in said
    for num_steps in (3, 8, 10):
        run(tmp_path / "parts", num_steps, stage)
    one, other = stored(tmp_path / "whole", 10), stored(tmp_path / "parts", 10)
    jax.tree.map(np.testing.assert_array_equal, one["training"], other["training"])
    jax.tree.map(np.testing.assert_array_equal, one["params"], other["params"])


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The gradient of a step may be finite and its update too large."""
    huge = AdamW(lambda step: jnp.where(step < 2, 0.1, 3e38), max_grad_norm=None, weight_decay=0.0)
    with pytest.raises(GuardError, match=r"step 3 made parameters that are not finite .*step 2 is saved"):
        run(tmp_path, 6, Gradient(), optimizer=huge, checkpoint_every=1, ema_decay=None)
    params, _, step = load_params(tmp_path)
    assert step == 2 and np.isfinite(params["w"]).all()


def test_a_save_that_fails_stops_the_run_and_loses_nothing(tmp_path):
    width = 1 << 17
    with contextlib.ExitStack() as limits:

        def limit_later(step, run_dir):
            if step == 4:
                deadline = time.monotonic() + 60  # Step 3 is written while training goes on.
                while not (run_dir / "checkpoints" / "3").is_dir() and time.monotonic() < deadline:
                    time.sleep(0.01)
                # A real failure of the operating system, in whatever thread and library.
                limits.enter_context(no_file_longer_than(width))

        with pytest.raises(CheckpointError, match="checkpoint of step 6 .*File too large.*Step 3 is intact"):
            run(tmp_path, 100, Toy(width=width, hook=limit_later))
    assert load_params(tmp_path)[2] == 3
    assert run(tmp_path, 10, Toy(width=width)).step == 10


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_damaged_checkpoint_is_set_aside_and_the_run_is_the_same_to_the_bit(tmp_path, capsys):
    run(tmp_path / "whole", 10)
    run(tmp_path / "damaged", 7)
    for step in ("7", "6"):
        file = tmp_path / "damaged" / "checkpoints" / step / "training" / "_METADATA"
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"no intact checkpoint, only damaged ones:\n  6.damaged: training/_METADATA has"
    ):
        run(tmp_path / "damaged", 10)
    assert len(lines(tmp_path / "damaged")) == 7  # What the user had is as it was.
    shutil.rmtree(tmp_path / "damaged")
    run(tmp_path / "damaged", 7, keep_checkpoints=3)
    file = tmp_path / "damaged" / "checkpoints" / "7" / "params" / "_METADATA"
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    second = Toy()
    run(tmp_path / "damaged", 10, second)
    said = capsys.readouterr().err
    assert "checkpoints/7 is damaged: params/_METADATA has" in said and "going on from step 6" in said
    assert second.consumed == [24, 28, 32, 36]
    assert lines(tmp_path / "damaged")[-1] == lines(tmp_path / "whole")[-1]
    one, other = stored(tmp_path / "damaged", 10), stored(tmp_path / "whole", 10)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_checkpoint_alone_says_what_it_is(tmp_path):
    run(tmp_path, 2, config_text="width = 3\n", keep_best=KeepBest("evaluation/size"))
    _, description, step = load_params(tmp_path / "checkpoints" / "2")
    assert description == {"stage": "toy", "model": {"width": 3}, "config": "width = 3\n"} and step == 2
    assert json.loads((tmp_path / "description.json").read_text()) == {"stage": "toy", "model": {"width": 3}}
    assert list((tmp_path / "tensorboard").iterdir())


def test_every_checkpoint_has_the_metrics_of_its_step(tmp_path):
    def ask_to_stop(step, run_dir):
        if step == 4 and run_dir.name == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)

    often = run(tmp_path / "often", 6, keep_checkpoints=9).run_dir
    seldom = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        run(seldom, 6, Toy(hook=ask_to_stop), log_every=100, keep_checkpoints=9)
    run(seldom, 6, log_every=100, keep_checkpoints=9)
    assert [line["step"] for line in lines(seldom)] == [4, 6]  # Evaluated: what is saved alone is not written there.
    logged = {line["step"]: line for line in lines(often)}
    saved = {step: read_run(as_path(seldom / "checkpoints" / str(step)))["metrics"] for step in (3, 5, 6)}
    assert complete_steps(seldom / "checkpoints") == sorted(saved)
    for step, metrics in saved.items():
        expected = {name: value for name, value in logged[step].items() if name not in ("step", "stage")}
        assert metrics == expected and {"loss", "grad_norm", "param_digest"} <= metrics.keys()


def test_a_metric_that_no_checkpoint_has_is_said_and_not_again(tmp_path, capsys):
    run(tmp_path, 10, keep_best=KeepBest("evaluaton/size"), checkpoint_every=2)
    said = [line for line in capsys.readouterr().err.splitlines() if "keep_best" in line]
    assert len(said) == 2  # Before and after the first evaluation.
    assert (
        "the metric 'evaluaton/size' (did you mean 'evaluation/size'?), which no checkpoint has: 2, 4 have drawn, "
        in said[1]
    )
    assert said[0].endswith("update_norm, weight. Until one has it, the best is not kept.") and "did you" not in said[0]
    assert complete_steps(tmp_path / "checkpoints") == [8, 10]


def test_evaluations_come_when_they_are_due(tmp_path):
    stage = Toy()
    run(tmp_path, 10, stage, log_every=5)
    assert stage.evaluations == [4, 8, 10]
    assert [(r["step"], "evaluation/size" in r) for r in lines(tmp_path)] == [
        (4, True),
        (5, False),
        (8, True),
        (10, True),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0: expected a whole number of steps, at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_settings_are_checked_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(**{"run_dir": tmp_path / "run", "stage": Toy(), "num_steps": 1} | SETTINGS | settings)
    assert not (tmp_path / "run").exists()


def test_the_metrics_of_a_step_are_fetched_after_the_next_is_dispatched(tmp_path, monkeypatch):
    from clp_jax.training.learner import Learner
    from clp_jax.training.progress import Progress

    events = []
    plain_update, plain_show = Learner.update, Progress.update

    def update(self, state, frozen, batch):
        events.append("dispatch")
        return plain_update(self, state, frozen, batch)

    def show(self, step, loss):
        events.append(f"show {step}")
        return plain_show(self, step, loss)

    monkeypatch.setattr(Learner, "update", update)
    monkeypatch.setattr(Progress, "update", show)
    run(tmp_path, 4, evaluate_every=None, checkpoint_every=None)
    assert events == ["dispatch", "dispatch", "show 1", "dispatch", "show 2", "dispatch", "show 3", "show 4"]


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1] + "/fixtures"]
import toy_runs
def hook(step, run_dir):
    if step == 3:
        print("ready", flush=True)
        import time
        time.sleep(0.2)
toy_runs.run(sys.argv[2], 100000, toy_runs.Toy(hook=hook))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_killed_goes_on(tmp_path, number):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    while not complete_steps(tmp_path / "checkpoints"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == RESTARTABLE
        assert "stopped by SIGTERM" in err and "Traceback" not in err
    step = load_params(tmp_path)[2]
    assert run(tmp_path, step + 2).step == step + 2
