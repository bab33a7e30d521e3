"""Pipelines of a program without a model, in real processes: what runs again, and what does not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from clp_jax.launch import pipeline_run, renewal
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import all_records
from clp_jax.launch.local import Local
from clp_jax.launch.pipeline import Stage
from clp_jax.launch.stage_job import StageJob, stage_job
from clp_jax.launch.supervisor import Patience
from clp_jax.launch.targets import find_target

from clp_jax.main import main

from .conftest import QUICK, until

PROGRAM = Path(__file__).parents[1] / "fixtures" / "stage_program.py"
RUN = f"{sys.executable} {PROGRAM}"
ONE = "- {name: one, command: RUN out/one a.txt MORE, outputs: [out/one]}\n"
TWO = "- {name: two, command: RUN out/two out/one, needs: [one], inputs: [b.txt], outputs: [out/two]}\n"
THREE = "- {name: three, command: RUN out/three a.txt MORE, outputs: [out/three]}\n"


@pytest.fixture(autouse=True)
def _home(empty_directory):
    Path("a.txt").write_text("a")
    Path("b.txt").write_text("b")
    write(TWO, ONE)


def write(*stages, more=""):
    Path("p.yaml").write_text("name: toy\nstages:\n" + "".join(stages).replace("RUN", RUN).replace("MORE", more))


def run(*words):
    """Runs the pipeline; its exit code, and which stages began."""
    Path("notes").write_text("")
    code = main(["pipeline", "p.yaml", *words])
    return code, [line.split("/")[1] for line in notes() if line.startswith("begin")]


def notes():
    return Path("notes").read_text().splitlines() if Path("notes").is_file() else []


def test_stages_run_once_in_order(capfd):
    assert run() == (0, ["one", "two"])
    assert Path("out/two").read_text() == "a"
    assert "made out/one" in capfd.readouterr().out
    assert run() == (0, [])
    assert "one: nothing to do: out/one" in capfd.readouterr().err
    assert not list(Path().rglob("*.old*"))


def test_what_has_changed_runs_again_and_only_that(capfd):
    run()
    os.utime("a.txt", (1, 1))
    assert run() == (0, [])
    Path("b.txt").write_text("c")
    assert run() == (0, ["two"])
    assert "two: b.txt has changed" in capfd.readouterr().err
    Path("a.txt").write_text("aa")
    assert run() == (0, ["one", "two"])
    # What was there before is kept.
    assert (Path("out/one").read_text(), Path("out/one.old-1").read_text()) == ("aa", "a")
    assert {path.name for path in Path("out").iterdir()} == {"one", "one.old-1", "two", "two.old-1", "two.old-2"}
    Path("out/two").unlink()
    assert run() == (0, ["two"])
    Path("out/one").write_text("mine")
    assert run() == (0, ["two"])
    assert Path("out/two").read_text() == "mine"
    write(TWO, ONE, more="--together=1")
    # The command of one has changed, and what it makes is as it was before mine.
    assert run() == (0, ["one", "two"])
    assert "its command has changed" in capfd.readouterr().err


def test_the_same_outputs_end_the_changes(capfd):
    run()
    write(TWO, ONE, more="--together=1")
    assert run() == (0, ["one"])


def test_a_dry_run_tells_why_and_makes_nothing(capsys):
    assert run("--dry_run") == (0, [])
    assert capsys.readouterr().out.splitlines()[::2] == [
        "one: would run: it has not run here before", "two: would run: one would run",
    ]  # fmt: skip
    assert not Path("runs").exists() and not Path("out").exists()
    run()
    Path("b.txt").write_text("c")
    capsys.readouterr()
    assert run("--dry_run") == (0, [])
    assert capsys.readouterr().out.splitlines()[:2] == ["one: nothing to do", "two: would run: b.txt has changed"]


def test_chosen_stages_and_what_they_need():
    write(ONE, TWO, THREE)
    assert run("--stages=two") == (0, ["one", "two"])
    assert run() == (0, ["three"])


def test_a_stage_that_fails_ends_the_pipeline_and_goes_on_in_place(capfd):
    Path("broken").write_text("")
    assert run() == (1, ["one"])
    said = capfd.readouterr().err
    assert "one: failed: exit code 3" in said and "toy: one failed; the same command goes on from there" in said
    Path("broken").unlink()
    assert run() == (0, ["one", "two"])
    assert not list(Path().rglob("*.old*"))


def test_an_output_that_is_not_there_after_all(capfd):
    Path("forgetful").write_text("")
    assert run() == (1, ["one"])
    assert "one: failed: it ended well, but left no out/one" in capfd.readouterr().err


def test_independent_stages_run_at_once_when_asked(capfd):
    write(ONE, THREE, more="--together=2")
    assert run("--max_concurrent=2")[0] == 0
    assert [line.split()[0] for line in notes()] == ["begin", "begin", "end", "end"]
    assert "[one] made out/one" in capfd.readouterr().err
    write(ONE, THREE)
    assert run()[0] == 0
    assert [line.split()[0] for line in notes()] == ["begin", "end"] * 2


def launcher(*words):
    program = "import sys\nfrom clp_jax.main import main\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-c", program, "pipeline", "p.yaml", *words], env=environment, stderr=subprocess.DEVNULL
    )


def test_killed_in_the_middle_it_waits_for_what_it_left_running(capfd):
    write(TWO, ONE, more="--until=go")
    process = launcher()
    until(notes)
    process.kill()
    process.wait()
    threading.Timer(5.0, Path("go").touch).start()
    assert main(["pipeline", "p.yaml"]) == 0
    assert "one: it still runs, begun by a pipeline that is gone: waiting for it" in capfd.readouterr().err
    # Never two at a time: the second look at one begins when the first has ended.
    assert [line.split()[0] for line in notes()] == ["begin", "end"] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_ends_its_stage(number):
    write(TWO, ONE, more="--until=never")
    process = launcher()
    until(notes)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    write(TWO, ONE)
    assert run() == (0, ["one", "two"])


def test_a_second_pipeline_does_not_run(capfd):
    write(ONE, more="--until=go")
    process = launcher()
    until(notes)
    assert main(["pipeline", "p.yaml"]) == 2
    assert "another process runs this pipeline in runs/toy/pipeline: wait for it." in capfd.readouterr().err
    Path("go").touch()
    assert process.wait(timeout=60) == 0


def test_a_stage_on_a_target(capfd):
    write(ONE, TWO.replace("inputs:", "target: local, inputs:"))
    assert run() == (0, ["one", "two"])
    assert "succeeded" in capfd.readouterr().err
    assert run() == (0, [])
    Path("out/two").unlink()
    # The same making again is the same job, once more.
    assert run() == (0, ["two"])
    assert len(list(Path("jobs").iterdir())) == 1
    Path("broken").write_text("")
    Path("b.txt").write_text("c")


def test_a_stage_says_how_often_it_may_fail_and_is_tried_again_with_the_code_of_now(monkeypatch):
    write(ONE.replace("}", ", target: local --max_failures=1 --max_restarts=0}"))
    Path("broken").write_text("")
    assert run() == (1, ["one"])
    (record,) = all_records(Path("jobs"), pytest.fail)
    assert (record.job.max_restarts, record.job.max_failures, record.job.options) == (0, 1, {})
    Path("broken").unlink()
    write(ONE.replace("}", ", target: local --max_failures=2}"))
    monkeypatch.setattr(renewal, "code_version", lambda: "mended")
    assert run() == (0, ["one"])
    (record,) = all_records(Path("jobs"), pytest.fail)
    assert (record.job.max_failures, record.job.code_version) == (2, "mended")


def test_a_stage_elsewhere_leaves_its_outputs_in_a_bucket_and_has_its_inputs(world, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pipeline_run, "patience_for", lambda target: QUICK)
    monkeypatch.chdir(world.path / "here")
    (world.path / "buckets" / "runs").mkdir(parents=True)
    Path("table.csv").write_text("x")
    # A word that is not the file's name, and an output that is not seen from here.
    program = json.dumps("assert open('table' + '.csv').read() == 'x'")
    target = f"tpu-vm --topology=v5e:2x2 --zone=us-west4-a --mounts=runs={tmp_path}/none"
    stage = (
        f"- {{name: far, command: [python3, -c, {program}], inputs: [table.csv], outputs: [{tmp_path}/none/run], "
        f"target: {target}}}\n"
    )
    write(stage)
    assert main(["pipeline", "p.yaml", "--dry_run"]) == 0
    assert "  # with the command goes: table.csv (1 bytes)" in capfd.readouterr().out.splitlines()
    assert main(["pipeline", "p.yaml"]) == 0
    assert len(world.state["created"]) == 1
    assert main(["pipeline", "p.yaml"]) == 0
    assert "far: nothing to do" in capfd.readouterr().err and len(world.state["created"]) == 1
    # It is known before anything runs, and another path is another output.
    Path("table.csv").write_text("changed")
    for words in ([], ["--dry_run"]):
        assert main(["pipeline", "p.yaml", *words]) == 2
        assert "none/run was made of other things: give it another path." in capfd.readouterr().err
    write(stage.replace("none/run", "none/other"))
    assert main(["pipeline", "p.yaml", "--dry_run"]) == 0
    assert "far: would run: table.csv has changed" in capfd.readouterr().out
    assert len(world.state["created"]) == 1


def test_outputs_that_would_end_with_their_workers_are_refused(capfd):
    write(ONE.replace("}", ", target: tpu-vm --topology=v5e:2x2 --zone=us-west4-a}"))
    for words in ([], ["--dry_run"]):
        assert run(*words) == (2, [])
        assert "stage one: its output out/one would be on workers that end with the job" in capfd.readouterr().err


@pytest.mark.parametrize("text", ['{"a": 3}', "[]", '{"one": {"command": [], "config": ""}}', "{"])
def test_a_damaged_memory_is_one_line(text, capfd):
    Path("runs/toy/pipeline").mkdir(parents=True)
    Path("runs/toy/pipeline/stages.json").write_text(text)
    assert run() == (2, [])
    said = capfd.readouterr().err
    assert "stages.json is damaged: remove it" in said and said.count("\n") == 1


def test_a_stage_goes_on_where_it_was_begun(capfd):
    write(ONE.replace("}", ", target: local}"), more="--until=go")
    process = launcher()
    until(notes)
    process.kill()
    process.wait()
    write(ONE.replace("}", ", target: local --grace=9}"), more="--until=go")
    threading.Timer(3.0, Path("go").touch).start()
    assert main(["pipeline", "p.yaml"]) == 0
    assert [line.split()[0] for line in notes()] == ["begin", "end"] and len(list(Path("jobs").iterdir())) == 1
    assert "goes on where it was begun: local" in capfd.readouterr().err
    # What is over is another job on another target.
    Path("out/one").unlink()
    assert run() == (0, ["one"])
    assert sorted(record.job.options.get("grace", "") for record in all_records(Path("jobs"), pytest.fail)) == ["", "9"]


def test_a_call_that_fails_is_made_again_and_another_launcher_is_waited_for(capfd, monkeypatch):
    target = find_target("local", {})
    stage = Stage("one", (sys.executable, str(PROGRAM), "out/one", "a.txt", "--until=go"), ("out/one",))
    job = stage_job("toy", dataclasses.replace(stage, target=("local",)), "made")
    patience = Patience(look=1e-9)
    first = StageJob(job, target, patience)
    for _ in range(2):
        assert first.poll() is None
    second = StageJob(job, target, patience)
    assert second.poll() is None
    assert "another launcher looks after it. Asking again." in capfd.readouterr().err
    Path("go").touch()
    until(lambda: first.poll() == "")
    assert second.poll() == ""
    third = StageJob(job, target, patience)
    with monkeypatch.context() as patch:
        patch.setattr(Local, "submit", refuse)
        patch.setattr(Local, "status", refuse)
        for _ in range(3):
            assert third.poll() is None
    assert "permission denied. Asking again." in capfd.readouterr().err
    until(lambda: third.poll() == "")


def test_a_damaged_record_is_a_failed_stage(capfd):
    write(ONE.replace("}", ", target: local --max_failures=1}"))
    Path("broken").write_text("")
    assert run() == (1, ["one"])
    (record,) = all_records(Path("jobs"), pytest.fail)
    (record.path / "states.jsonl").write_text("{\n")
    Path("broken").unlink()
    capfd.readouterr()
    assert run() == (1, [])
    assert f"one: failed: {record.path.absolute()}/states.jsonl is damaged" in capfd.readouterr().err


def test_a_record_that_is_damaged_while_its_stage_runs_ends_it(capfd):
    write(ONE.replace("}", ", target: local}"), more="--until=go")
    codes = []
    runner = threading.Thread(target=lambda: codes.append(main(["pipeline", "p.yaml"])), daemon=True)
    runner.start()
    until(notes)
    (record,) = all_records(Path("jobs"), pytest.fail)
    (record.path / "states.jsonl").write_text("{\n")
    runner.join(60)
    Path("go").touch()
    assert codes == [1]
    assert f"one: failed: the record {record.path.absolute()} is damaged, and nobody" in capfd.readouterr().err


def test_an_input_that_vanishes_is_a_failed_stage_and_what_runs_ends_well(capfd):
    write(ONE, THREE.replace("outputs", "inputs: [out/one/more], outputs"), more="--together=1")
    Path("notes").write_text("")
    # It would be below what stage one makes, but stage three does not say that it needs it.
    assert main(["pipeline", "p.yaml", "--max_concurrent=2"]) == 1
    said = capfd.readouterr().err
    assert "three: failed: stage three: its input out/one/more is not there" in said and "three failed" in said
    assert [line.split()[0] for line in notes()] == ["begin", "end"]
    assert '"done": true' in Path("runs/toy/pipeline/stages.json").read_text()


def test_an_input_that_no_stage_makes_is_missed_before_any_stage(capfd):
    write(ONE, TWO.replace("b.txt", "none.txt"))
    assert run() == (2, [])
    assert capfd.readouterr().err == "clp pipeline: error: stage two: its input none.txt is not there.\n"


def test_nobody_is_asked_about_what_is_done(capfd, monkeypatch):
    write(ONE.replace("}", ", target: local}"), TWO)
    assert run() == (0, ["one", "two"])
    monkeypatch.setattr(Local, "check_access", refuse)
    Path("b.txt").write_text("c")
    assert run() == (0, ["two"])
    Path("out/one").unlink()
    with pytest.raises(LaunchError, match=r"permission denied"):
        run()
    write(ONE.replace("}", ", target: locla}"))
    assert run("--dry_run") == (2, [])
    assert "stage one: there is no target 'locla'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        (ONE.replace("MORE", "--key=0123456789abcdef"), "the command"),
        (ONE.replace("MORE", "--gin_file=my.gin").replace("}", ", target: local}"), "my.gin"),
    ],
)
def test_a_secret_is_refused_before_anything_is_written(stage, where, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    Path("my.gin").write_text("A = '0123456789abcdef'\n")
    write(THREE, stage)
    assert run() == (2, [])
    assert f"the value of $WANDB_API_KEY stands in {where}" in capfd.readouterr().err
    assert not Path("runs").exists() and not Path("jobs").exists()


def refuse(*arguments):
    raise LaunchError("permission denied.")


def test_directories_are_inputs_but_not_what_others_leave_in_them():
    inside = "- {name: inside, command: RUN out/dir/inside a.txt, needs: [all], outputs: [out/dir/inside]}\n"
    whole = "- {name: all, command: RUN out/dir/all a.txt, outputs: [out/dir]}\n"
    last = "- {name: last, command: RUN out/last a.txt, needs: [all], outputs: [out/last]}\n"
    write(whole, inside, last)
    assert run() == (0, ["dir", "dir", "last"])
    assert run() == (0, [])
    Path("out/dir/more").write_text("x")
    assert run() == (0, ["dir", "last"])


@pytest.mark.parametrize(
    ("words", "stages", "message"),
    [
        (["--max_concurrent=0"], ONE, "--max_concurrent is 0"),
        (["--stages=tow"], ONE, "there is no stage 'tow'"),
        (["more"], ONE, "what is 'more'? clp pipeline FILE"),
        (["--stagse=one"], ONE, "no option --stagse (did you mean stages?)"),
        ([], ONE.replace("}", ", target: locla}"), "stage one: there is no target 'locla'"),
        ([], ONE.replace("}", ", target: local --x=1}"), "stage one: clp launch local has no option --x"),
        ([], ONE.replace("}", ", inputs: [none.txt]}"), "stage one: its input none.txt is not there"),
        (
            [],
            "- {name: one, command: train --gin_file=examples/pydoc_sft.gin --gin.NUM_STEP=1, outputs: [x]}\n",
            "stage one: --gin.NUM_STEP: nothing here uses a macro NUM_STEP (did you mean NUM_STEPS?)",
        ),
    ],
)
def test_mistakes_are_one_line_before_any_stage_runs(words, stages, message, capfd):
    write(stages)
    code, began = run(*words)
    said = capfd.readouterr().err
    assert (code, began) == (2, [])
    assert message in said and said.count("\n") == 1
    assert not Path("out").exists()
