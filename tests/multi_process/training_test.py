"""Real processes, two and four: the bits of one process on the same mesh, stopping, going on, being killed."""

import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from groups import start
from same_runs import Comparison, read_notes
from tiny_runs import MODEL

from clp_jax.data.reader import DataSource, prompt_batch, sequence_batch
from clp_jax.processes import FAILURE, HEARTBEAT_SECONDS, RESTARTABLE
from clp_jax.rewards.pairs import Corrupter
from clp_jax.training.checkpoint_manifest import Manifest, parse_place
from clp_jax.training.checkpoint_steps import as_path
from clp_jax.training.metrics import TIMING_METRICS, read_metrics
from clp_jax.training.saved_params import load_params

STEPS = 4
ALL = ("packed", "experts", "policy", "rewards")


def jobs(directory, *names, num_steps=STEPS, **settings):
    return [
        {"name": name, "run_dir": str(directory / name), "num_steps": num_steps, "checkpoint_every": 2} | settings
        for name in names
    ]


def lines(run_dir):
    return [{k: v for k, v in r.items() if k not in TIMING_METRICS} for r in read_metrics(run_dir / "metrics.jsonl")]


def assert_same(run_dir, expected, counts, exact=True):
    """Checkpoints, metrics, and what was read by the processes that they had, one number or several after another."""
    comparison = Comparison(exact)
    comparison.checkpoints(run_dir, expected)
    comparison.metrics(run_dir, expected)
    comparison.batches(notes_of(run_dir, counts), notes_of(expected, [1]))
    assert not comparison.differences, "\n".join(comparison.differences)


def notes_of(run_dir, counts):
    """The files of all processes."""
    return [run_dir.parent / f"{run_dir.name}.notes.{count}.{number}" for count in counts for number in range(count)]


def notes(run_dir, num_processes, number):
    """Position in the data, and the shards of example ids that a process was given there."""
    text = (run_dir.parent / f"{run_dir.name}.notes.{num_processes}.{number}").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["position"], line["rows"]["example_ids"]) for line in lines if "rows" in line]


def consumed(run_dir, num_processes):
    """Example ids by position in the data, put together from what each process was given."""
    found = {}
    for number in range(num_processes):
        for position, shards in notes(run_dir, num_processes, number):
            for first, ids in shards:
                for place, example in enumerate(ids):
                    assert found.setdefault(position + first + place, example) == example
    return found


def expected_ids(home, count):
    data = DataSource(home / "packed", "train", batch_size=8, converter=sequence_batch, seed=3)
    return dict(enumerate(data.example_ids(0, count).tolist()))


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """All jobs in one process of four devices."""
    directory = tmp_path_factory.mktemp("alone")
    start(directory, home, jobs(directory, *ALL), num_processes=1, devices=4).succeed()
    return directory


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """A longer run in one process of four devices."""
    directory = tmp_path_factory.mktemp("undisturbed")
    start(directory, home, jobs(directory, "packed", num_steps=12), num_processes=1, devices=4).succeed()
    return directory / "packed"


@pytest.fixture(scope="module")
def two(home, tmp_path_factory, alone):
    """The same in two processes of two devices; one with its tensor axis across them."""
    directory = tmp_path_factory.mktemp("two")
    made = [*jobs(directory, *ALL), *jobs(directory / "crossed", "packed", crossed=True)]
    group = start(directory, home, made, num_processes=2, devices=2)
    group.succeed()
    return directory


@pytest.mark.parametrize("name", ALL)
def test_two_processes_train_as_one_does(alone, two, name):
    assert_same(two / name, alone / name, [2])


def test_a_tensor_axis_may_cross_processes(alone, two):
    assert_same(two / "crossed" / "packed", alone / "packed", [2])


@pytest.mark.parametrize("name", ["packed", "crossed/packed"])
def test_a_row_that_is_not_finite_skips_the_step_in_all_processes(two, name):
    """The row is the sixth of the third batch: process 1 alone has it, unless the tensor axis crosses processes."""
    found = lines(two / name)
    assert [line["loss"] is None for line in found] == [False, False, True, False]
    assert [line["skipped"] for line in found] == [0, 0, 1, 1]
    digests = [line["param_digest"] for line in found]
    assert digests[2] == digests[1] and len(set(digests)) == 3
    assert (two / "log.0").read_text().count("step 3 is not finite, its update was left out") == 2  # Once for each run.


@pytest.mark.parametrize("name", ["packed", "experts", "crossed/packed"])
def test_each_process_reads_the_rows_of_its_devices(home, two, name):
    assert consumed(two / name, 2) == expected_ids(home, STEPS * 8)
    rows = [
        {
            row
            for _, shards in notes(two / name, 2, number)
            for first, ids in shards
            for row in range(first, first + len(ids))
        }
        for number in range(2)
    ]
    # Where the tensor axis crosses processes both have all rows, otherwise each has its half.
    assert [len(held) for held in rows] == ([8, 8] if "crossed" in name else [4, 4])


def test_pairs_are_read_where_they_are_needed(home, two):
    """A process reads its half of the rows, and those whose summaries they are exchanged with."""
    data = DataSource(home / "prompts", "train", batch_size=8, converter=prompt_batch, seed=3)
    corrupter = Corrupter(("foreign", "swap"), MODEL.pad_id, MODEL.eos_ids, 3)
    for number in range(2):
        noted = [json.loads(line) for line in (two / f"rewards.notes.2.{number}").read_text().splitlines()]
        read = {note["position"]: note["reads"] for note in noted if "reads" in note}
        assert list(read) == [8 * step for step in range(STEPS)]
        for position, found in read.items():
            ids = data.example_ids(position, 8)
            mine = np.arange(4 * number, 4 * number + 4)
            rows = {*mine.tolist(), *corrupter.draw(ids).others[mine].tolist()}
            assert sorted(found) == sorted(ids[list(rows)].tolist())


def test_only_process_0_writes_and_all_keep_quiet_about_it(two):
    events = list((two / "packed" / "tensorboard").iterdir())
    assert len(events) == 1
    assert {"config.gin", "description.json", "metrics.jsonl"} <= {path.name for path in (two / "packed").iterdir()}
    quiet = (two / "log.1").read_text()
    assert "supervised" not in quiet and "Traceback" not in quiet


def test_several_processes_make_steps_again_and_find_a_bit(home, two, tmp_path):
    """Two of each: from the checkpoint before, to the bit; where the run wrote another last bit, all say so and end."""
    shutil.copytree(two / "packed", tmp_path / "packed")
    path = tmp_path / "packed" / "metrics.jsonl"
    wrote = [json.loads(line) for line in path.read_text().splitlines()]
    wrote[3]["grad_norm"] = float(np.nextafter(np.float32(wrote[3]["grad_norm"]), np.float32(np.inf)))
    path.write_text("".join(json.dumps(line) + "\n" for line in wrote))
    again = [
        {
            "name": run_dir.name,
            "run_dir": str(run_dir),
            "replay": STEPS,
            "notes": str(tmp_path / f"{run_dir.name}.again"),
        }
        for run_dir in (two / "policy", tmp_path / "packed")
    ]
    group = start(tmp_path / "replays", home, again, num_processes=2, devices=2)
    assert group.wait(300) == [1, 1], group.text()
    said = [line.removeprefix("replay: ") for line in group.logs[0].read_text().splitlines() if "replay: " in line]
    compared = ", ".join(sorted(lines(two / "policy")[3].keys() - {"step", "stage"}))
    begin = ["from the checkpoint of step 2", "steps 3 to 4 are made again"]
    assert said[:4] == [*begin, *(f"step {n}: the same to the bit: {compared}" for n in (3, 4))]
    assert said[4:6] == begin and said[6].startswith("step 3: the same to the bit: ")
    change = f"  grad_norm: {wrote[3]['grad_norm']} -> {lines(two / 'packed')[3]['grad_norm']}"
    assert "step 4 gave other numbers than the run" in group.text() and change in group.logs[0].read_text()
    assert "replay: " not in group.logs[1].read_text()
    held = [notes_of(two / "policy", [2]), notes_of(tmp_path / "policy.again", [2])]
    first, then = (dict(read_notes(paths)) for paths in held)
    assert then == {place: row for place, row in first.items() if place[0] >= 32}


def wait_until(group, happens, what, seconds=180):
    """Until something happens while all processes run."""
    end = time.monotonic() + seconds
    while not happens():
        codes = [process.poll() for process in group.processes]
        if time.monotonic() > end or any(code is not None for code in codes):
            group.kill()
            raise AssertionError(f"not seen: {what}; exit codes {codes}.\n{group.text()}")
        time.sleep(0.05)


def wait_for_lines(group, run_dir, count):
    """Until the metrics have so many lines."""
    path = run_dir / "metrics.jsonl"
    wait_until(
        group, lambda: path.is_file() and len(path.read_text().splitlines()) >= count, f"{count} lines in {path}"
    )


def test_a_run_that_is_stopped_and_killed_goes_on_with_other_processes(home, alone, undisturbed, tmp_path):
    """SIGTERM to one process stops all at one step; SIGKILL of one ends all; four processes finish the same run.

    They make two others from the beginning: experts that lie on all four of them, and reinforcement learning whose parameters and
    completions do. Another mesh than that of one process of four devices: all numbers are the same to rounding.
    """
    run_dir = tmp_path / "packed"
    made = jobs(tmp_path, "packed", num_steps=12, pause=0.3)

    group = start(tmp_path / "first", home, made, num_processes=2, devices=2)
    wait_for_lines(group, run_dir, 2)
    group.processes[1].send_signal(signal.SIGTERM)
    before = time.monotonic()
    assert group.wait(60) == [RESTARTABLE, RESTARTABLE], group.text()
    assert time.monotonic() - before < 30
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+) of 12", group.text())[1])
    assert stopped == load_params(run_dir)[2] == lines(run_dir)[-1]["step"] < 12

    group = start(tmp_path / "second", home, made, num_processes=2, devices=2)
    wait_for_lines(group, run_dir, stopped + 1)
    group.processes[1].kill()
    before = time.monotonic()
    assert group.wait(60) == [RESTARTABLE, -signal.SIGKILL], group.text()
    assert time.monotonic() - before < 60
    assert f"process 0 of 2: process 1 was lost: no sign of life for {HEARTBEAT_SECONDS} s." in group.text()

    others = jobs(tmp_path / "four", "experts", "policy", crossed=True)
    made = [*jobs(tmp_path, "packed", num_steps=12), *others]
    start(tmp_path / "third", home, made, num_processes=4, devices=2).succeed(1800)
    assert_same(run_dir, undisturbed, [2, 4], exact=False)
    for job in others:
        assert_same(Path(job["run_dir"]), alone / job["name"], [4], exact=False)
    found = consumed(run_dir, 2) | consumed(run_dir, 4)
    assert found == expected_ids(home, 12 * 8)


def test_a_coordinator_that_is_cut_off_is_as_lost_as_one_that_died(home, tmp_path):
    """Nothing closes the connections of a machine that loses its power, and nothing there answers."""
    group = start(tmp_path / "group", home, jobs(tmp_path, "packed", pause=0.5), num_processes=2, devices=2)
    wait_for_lines(group, tmp_path / "packed", 1)
    group.processes[0].send_signal(signal.SIGSTOP)
    before = time.monotonic()
    try:
        assert group.processes[1].wait(60) == RESTARTABLE, group.text()
        assert time.monotonic() - before > HEARTBEAT_SECONDS - 5
        assert "process 1 of 2: process 0, the coordinator, was lost: it does not answer" in group.text()
    finally:
        group.processes[0].send_signal(signal.SIGCONT)
        group.kill()


def test_a_stop_ends_an_evaluation_in_all_processes(home, tmp_path):
    """It is made up for when the run goes on."""
    made = jobs(tmp_path, "packed", num_steps=1, evaluation_seconds=120)
    group = start(tmp_path / "first", home, made, num_processes=2, devices=2)
    wait_until(group, lambda: "evaluates since 1 s" in group.logs[1].read_text(), "evaluates")
    group.processes[1].send_signal(signal.SIGTERM)
    before = time.monotonic()
    assert group.wait(60) == [RESTARTABLE, RESTARTABLE], group.text()
    assert time.monotonic() - before < 30
    assert "stopped by SIGTERM after step 1 of 1" in group.text() and lines(tmp_path / "packed") == []
    start(tmp_path / "second", home, jobs(tmp_path, "packed", num_steps=1), num_processes=2, devices=2).succeed()
    (line,) = lines(tmp_path / "packed")
    assert line["step"] == 1 and {"loss", "evaluation/cross_entropy"} <= line.keys()


def test_a_hang_of_one_process_ends_all_and_all_show_where_they_are(home, two, tmp_path):
    """Process 1 stands still before the third step; process 0 waits for it. Neither's end hides the other's stacks.

    What it runs is compiled by then, which may take longer than the limit.
    """
    made = jobs(tmp_path, "packed", num_steps=6, hang_at=2, hang_in=1, watchdog_seconds=60.0)
    group = start(tmp_path / "first", home, made, num_processes=2, devices=2)
    codes = group.wait(240)
    assert codes == [RESTARTABLE, RESTARTABLE], group.text()
    for number, log in enumerate(group.logs):
        text = log.read_text()
        assert f"process {number} of 2: no progress for 60 s (watchdog_seconds). What every thread is doing:" in text
        assert " in run" in text and f"process {number} of 2: ends; the same command goes on" in text
    assert [" in hang" in log.read_text() for log in group.logs] == [False, True]


def test_a_bit_that_flips_in_one_process_ends_all_with_a_failure_of_the_machine(home, tmp_path):
    made = jobs(tmp_path, "packed", num_steps=6, flip_at=2, flip_in=1, replica_check_every=1)
    group = start(tmp_path / "first", home, made, num_processes=2, devices=2)
    assert group.wait(300) == [FAILURE, FAILURE], group.text()
    said = r"after step 3, copies of rng have different bits: device \d+ of process 1 \(\w+\) against \w+ on 3 others"
    assert re.search(said, group.logs[0].read_text()) and load_params(tmp_path / "packed")[2] == 2


def test_all_processes_leave_a_damaged_checkpoint_and_go_on_from_the_one_before(home, two, tmp_path):
    """What process 0 finds in the files, what process 1 finds there, and what process 1 finds in its arrays."""
    made = [jobs(tmp_path / where, "packed", num_steps=STEPS + 1)[0] for where in ("files0", "files1", "arrays1")]
    steps = [Path(job["run_dir"]) / "checkpoints" / str(STEPS) for job in made]
    for step in steps:
        shutil.copytree(two / "packed", step.parents[1])
    whole = Manifest.read(as_path(steps[0]))
    names = sorted(whole.files)
    for step, name in zip(steps, names[-2:], strict=False):
        data = bytearray((step / name).read_bytes())
        data[-1] ^= 1
        (step / name).write_bytes(data)
    name, array = next((n, a) for n, a in whole.arrays["params"].items() if len(a.shards) > 1)
    wrong = dataclasses.replace(array, shards=array.shards | {max(array.shards, key=_start): "0" * 64})
    arrays = whole.arrays | {"params": whole.arrays["params"] | {name: wrong}}
    dataclasses.replace(whole, arrays=arrays).write(as_path(steps[2]))

    group = start(tmp_path / "group", home, made, num_processes=2, devices=2)
    group.succeed()
    for step, what in zip(steps, (*names[-2:], name), strict=True):
        assert what in (step.parent / f"{STEPS}.damaged.txt").read_text()
        assert group.logs[0].read_text().count(f"checkpoint {step} is damaged: ") == 1
        assert Manifest.read(as_path(step)).arrays == whole.arrays
        again = [{k: v for k, v in line.items() if not k.startswith("evaluation/")} for line in lines(two / "packed")]
        assert lines(step.parents[1])[:STEPS] == again  # Evaluated at the end alone.
    assert "is damaged" not in group.logs[1].read_text()


def _start(place):
    """Where a part of an array begins."""
    return [start for start, _ in parse_place(place)]
