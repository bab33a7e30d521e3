"""Sweeps of a program without a model, in real processes: how many at once, what is done twice, what survives a kill."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from clp_jax.launch import command, renewal, space, sweep_run
from clp_jax.launch.cargo import Cargo
from clp_jax.launch.command import create
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.job import all_records, jobs_directory
from clp_jax.launch.local import Local
from clp_jax.launch.supervisor import advance
from clp_jax.launch.sweep import Search, Sweep
from clp_jax.launch.sweep_run import Settings, SweepDirectory, jobs_of, run_sweep
from clp_jax.launch.targets import find_target

from clp_jax.main import main

from .conftest import until
from .trials import COMMAND, METRICS, QUICK, begun, most_at_once, notes, run

YAML = f"command: {COMMAND} --seconds=0.2\nspace: {{grid: {{A: [1, 2, 3]}}}}\nseeds: 2\nmetrics: {{loss: minimize}}\n"


pytestmark = pytest.mark.usefixtures("empty_directory")


def test_every_trial_runs_once_and_so_many_at_once():
    sweep = Sweep(f"{COMMAND} --together=3", space.grid({"A": [1, 2, 3]}), seeds=2, metrics=METRICS)
    rows = run(sweep, max_concurrent=3)
    assert [row.state for row in rows] == ["succeeded"] * 6
    assert [(row.trial.bindings["A"], row.trial.seed, row.metrics["loss"]) for row in rows] == [
        (str(a), seed, (a - 3) ** 2 + seed) for a in (1, 2, 3) for seed in (0, 1)
    ]
    assert sorted(begun()) == sorted(trial.name for trial in sweep.trials())
    assert most_at_once() == 3
    assert {path.name for path in Path("sweep/trials").iterdir()} == {trial.name for trial in sweep.trials()}
    # Once more, and with a value and a seed more: what is done is not done again.
    run(sweep)
    assert len(begun()) == 6
    grown = Sweep(f"{COMMAND} --together=3", space.grid({"A": [1, 2, 3, 4]}), seeds=3, metrics=METRICS)
    assert len(run(grown, max_concurrent=3)) == 12
    assert len(begun()) == len(set(begun())) == 12
    assert "| 3 | 3 | 1 ± 0.58 |" in Path("sweep/table.md").read_text()


def test_trials_elsewhere_leave_their_metrics_in_a_bucket(world, tmp_path):
    (world.path / "buckets" / "runs").mkdir(parents=True)
    (tmp_path / "mnt").symlink_to(world.path / "buckets" / "runs")
    options = {"topology": "v5e:2x2", "zone": "us-west4-a", "mounts": f"runs={tmp_path}/mnt"}
    settings = Settings(find_target("tpu-vm", options), options, ["train"], max_concurrent=2, patience=QUICK)
    rows = run_sweep(Sweep(COMMAND, space.grid({"A": [1, 2]}), metrics=METRICS), tmp_path / "mnt" / "sweep", settings)
    assert [(row.state, row.metrics["loss"]) for row in rows] == [("succeeded", 4), ("succeeded", 1)]
    assert {record.job.run_dir.rpartition("/")[0] for record in all_records(jobs_directory(), pytest.fail)} == {
        "gs://runs/sweep/trials"
    }
    assert world.state["resources"] == {} and len(world.state["created"]) == 2


def test_one_at_a_time_is_the_default():
    run(Sweep(f"{COMMAND} --seconds=0.1", space.grid({"A": [1, 2]})))
    assert most_at_once() == 1


def test_failed_trials_are_listed_and_tried_again_when_asked():
    Path("broken").write_text("2")
    sweep = Sweep(COMMAND, space.grid({"A": [1, 2, 3]}), metrics=METRICS)
    assert [row.state for row in run(sweep)] == ["succeeded", "failed", "succeeded"]
    assert [row.state for row in run(sweep)] == ["succeeded", "failed", "succeeded"]
    assert len(begun()) == 3
    Path("broken").unlink()
    assert [row.state for row in run(sweep, retry_failed=True)] == ["succeeded"] * 3
    assert len(begun()) == 4


def test_trials_have_the_limits_that_are_typed_and_the_code_of_now_when_tried_again(monkeypatch):
    Path("sweep.yaml").write_text(YAML.replace("0.2", "0").replace("[1, 2, 3]", "[2]").replace("seeds: 2", "seeds: 1"))
    Path("broken").write_text("2")
    words = ["sweep", "--file=sweep.yaml", "local", "--max_restarts=0", "--max_failures", "1"]
    assert main(words) == 1
    (record,) = all_records(Path("jobs"), pytest.fail)
    assert (record.job.max_restarts, record.job.max_failures) == (0, 1)
    Path("broken").unlink()
    monkeypatch.setattr(renewal, "code_version", lambda: "mended")
    assert main([*words[:3], "--retry_failed", "--max_restarts=7"]) == 0
    (record,) = all_records(Path("jobs"), pytest.fail)
    assert (record.job.max_restarts, record.job.max_failures, record.job.code_version) == (7, 3, "mended")


def test_a_damaged_record_hides_no_other_trial(capsys):
    rows = run(Sweep(COMMAND, space.grid({"A": [1, 2]}), metrics=METRICS))
    directory = SweepDirectory.load(Path("sweep"))
    path = jobs_directory() / directory.job_name(rows[0].trial, 0)
    for file in ("states.jsonl", "job.json"):
        (path / file).write_text("{\n")
        capsys.readouterr()
        assert main(["sweep", "report", "sweep"]) == 0
        said = capsys.readouterr()
        assert f"{file} is" in said.err and "1 damaged" in said.err and "| 1 |" in said.out
        assert said.err.count("\n") == 2


def within(seconds, words):
    """The exit code of a command that ends in time."""
    codes = []
    runner = threading.Thread(target=lambda: codes.append(main(words)), daemon=True)
    runner.start()
    runner.join(seconds)
    assert codes, "it did not end"
    return codes[0]


def test_a_damaged_record_ends_its_trial_and_the_sweep(capsys):
    Path("sweep.yaml").write_text(YAML.replace("0.2", "0").replace("[1, 2, 3]", "[2]").replace("seeds: 2", "seeds: 1"))
    words = ["sweep", "--file=sweep.yaml", "local", "--look=0.05"]
    assert main(words) == 0
    (damaged,) = all_records(jobs_directory(), pytest.fail)
    (damaged.path / "states.jsonl").write_text("{\n")
    Path("sweep.yaml").write_text(Path("sweep.yaml").read_text().replace("[2]", "[1, 2, 3]"))
    capsys.readouterr()
    assert within(120, words) == 1
    said = capsys.readouterr()
    assert f"{damaged.job.name}: {damaged.path}/states.jsonl is damaged" in said.err
    assert "1 of 3 trials have damaged records: " in said.err and "Asking again" not in said.err
    rows = SweepDirectory.load(Path("runs/sweeps/sweep")).rows()
    assert sorted(row.state for row in rows) == ["damaged", "succeeded", "succeeded"] and len(begun()) == 3
    # Moved away it is a trial that has not begun.
    shutil.rmtree(damaged.path)
    assert within(120, words) == 0 and len(begun()) == 4


def test_what_is_damaged_while_a_trial_runs_ends_it_and_no_other(capsys):
    Path("sweep.yaml").write_text(
        YAML.replace("0.2", "2").replace("[1, 2, 3]", "[1, 2]").replace("seeds: 2", "seeds: 1")
    )

    def damage():
        until(begun)
        (record,) = [record for record in all_records(jobs_directory(), pytest.fail) if record.state is not None]
        (record.attempt_directory / "worker-0" / "exit").write_text("x")

    saboteur = threading.Thread(target=damage)
    saboteur.start()
    assert within(120, ["sweep", "--file=sweep.yaml", "local", "--look=0.05"]) == 1
    saboteur.join()
    said = capsys.readouterr().err
    assert "worker-0/exit holds 'x': expected an exit code" in said
    assert ": damaged: what runs of it, if anything, runs on, and nobody looks after it" in said
    assert "1 of 2 trials have damaged records" in said
    assert [row.state for row in SweepDirectory.load(Path("runs/sweeps/sweep")).rows()] == ["running", "succeeded"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("here.gin", "X = '0123456789abcdef'", r"the value of \$WANDB_API_KEY stands in here.gin"),
        ("../other.txt", "x", r"\.\./other.txt is not below"),
    ],
)
def test_files_of_later_trials_are_looked_at_before_anything(world, here, monkeypatch, name, text, message):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    Path(name).write_text(text)
    options = {"topology": "v5e:2x2", "zone": "us-west4-a", "mounts": "runs=/mnt/runs"}
    settings = Settings(find_target("tpu-vm", options), options, ["train"])
    sweep = Sweep(COMMAND, [{"FILE": "'none'"}, {"FILE": repr(name)}])
    with pytest.raises(LaunchError, match=message):
        run_sweep(sweep, Path("/mnt/runs/sweep"), settings)
    assert not jobs_directory().exists() and world.calls() == []


def refuses(monkeypatch, what):
    """A compiler for which trials with one binding do not fit; what it was asked."""
    asked = []

    def compile_all(target, job, commands, trial=""):
        asked.append(trial)
        if what in trial:
            raise LaunchError("it does not fit v5e:2x2")

    for module in (command, sweep_run):
        monkeypatch.setattr(module, "check_that_it_fits", compile_all)
    return asked


@pytest.mark.parametrize(
    ("sweep", "message", "asked"),
    [
        (
            Sweep(COMMAND, space.grid({"RATE": [1e-3, 2e-3], "BATCH": [8, 32, 64]}), seeds=2),
            "the trial RATE=0.001 BATCH=64 seed=0: it does not fit v5e:2x2",
            ["", "RATE=0.001 BATCH=32 seed=0 ", "RATE=0.001 BATCH=64 seed=0 "],
        ),
        (
            Sweep(COMMAND, search=Search({"BATCH": space.integers(1, 64)}, 3), metrics=METRICS),
            "the trial BATCH=64: it does not fit v5e:2x2",
            ["", "BATCH=33 ", "BATCH=64 "],
        ),
    ],
)
def test_trials_that_may_need_other_memory_are_compiled_too(world, here, monkeypatch, sweep, message, asked):
    found = refuses(monkeypatch, "BATCH=64")
    (world.path / "buckets" / "runs").mkdir(parents=True)
    options = {"topology": "v5e:2x2", "zone": "us-west4-a", "mounts": "runs=/mnt/runs"}
    settings = Settings(find_target("tpu-vm", options), options, ["train"])
    with pytest.raises(LaunchError, match=f"^{message}"):
        run_sweep(sweep, Path("/mnt/runs/sweep"), settings)
    assert found == asked and not jobs_directory().exists() and not world.state.get("created")


def test_so_many_are_compiled_and_no_more(monkeypatch, capsys):
    found = refuses(monkeypatch, "none")
    options = {"topology": "v5e:2x2", "zone": "us-west4-a"}
    settings = Settings(find_target("tpu-vm", options), options, ["train"])
    sweep = Sweep(COMMAND, space.grid({"BATCH": list(range(10))}), seeds=3)
    directory = SweepDirectory.of(Path("sweep"), sweep)
    new = [(trial, jobs_of(directory, trial, settings)) for trial in sweep.trials()]
    sweep_run._check_that_others_fit(new, settings)
    assert found == [f"BATCH={number} seed=0 " for number in range(1, 8)]
    assert "2 more kinds of trials are not compiled" in capsys.readouterr().err
    sweep_run._check_that_others_fit(new, Settings(Local(), {}, ["train"]))
    assert len(found) == 7


def test_a_metric_that_the_first_trials_lack_is_told_at_once(capsys):
    sweep = Sweep(COMMAND, space.grid({"A": [1, 2, 3]}), metrics={"loss": "minimize", "accuracy": "maximize"})
    run(sweep)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("no trial has accuracy yet: they have step, loss, A.") == 1
    assert lines.index("no trial has accuracy yet: they have step, loss, A.") < len(lines) - 2


def test_commands_after_the_first_wait_for_it_and_are_not_run_without_it():
    Path("broken").write_text("2")
    then = [f"{COMMAND} --run_dir={{run_dir}}"]
    sweep = Sweep(COMMAND, space.grid({"A": [1, 2]}), then=then, metrics=METRICS)
    one, two = run(sweep)
    assert (one.state, one.metrics["hypervolume"], two.state, dict(two.metrics)) == ("succeeded", 1.5, "failed", {})
    assert begun() == [one.trial.name, one.trial.name, two.trial.name]


def test_a_sweep_goes_on_after_its_launcher_was_killed():
    Path("sweep.yaml").write_text(YAML)
    words = ["sweep", "--file", "sweep.yaml", "local", "--dir=sweep", "--max_concurrent=2"]
    program = "import sys\nfrom clp_jax.main import main\nmain(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launcher = subprocess.Popen([sys.executable, "-c", program, *words], env=environment, stderr=subprocess.DEVNULL)
    until(lambda: [what for what, _ in notes() if what == "end"])
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    before = len(begun())
    assert 1 <= before < 6
    assert main(words) == 0
    assert len(begun()) == len(set(begun())) == 6
    assert all(record.state.attempt == 1 for record in all_records(Path("jobs"), pytest.fail))


def begun_before(sweep, options):
    """The first trial of a sweep, begun by a launcher that is gone; its record and its target."""
    target = find_target("local", options)
    directory = SweepDirectory.of(Path("sweep"), sweep)
    directory.write()
    (job,) = jobs_of(directory, sweep.trials()[0], Settings(target, options, ["train"]))
    record = create(directory.jobs, Cargo(job, target.ships_code))
    with record.lock():
        advance(record, target, QUICK)
        advance(record, target, QUICK)
    return record, target


def test_what_was_begun_goes_on_where_it_was_begun(capsys):
    sweep = Sweep(f"{COMMAND} --seconds=0.5", space.grid({"A": [1, 2]}), metrics=METRICS)
    record, _ = begun_before(sweep, {"processes": "1"})
    rows = run(sweep, options={"grace": "9"})
    assert [row.state for row in rows] == ["succeeded"] * 2 and len(begun()) == 2
    assert f"{record.job.name} goes on where it was begun: local --processes=1" in capsys.readouterr().err
    assert [r.job.options for r in all_records(jobs_directory(), pytest.fail) if r.path != record.path] == [
        {"grace": "9"}
    ]


def test_a_call_that_fails_is_made_again_and_ends_nothing(monkeypatch, capsys):
    sweep = Sweep(COMMAND, space.grid({"A": [1, 2]}), metrics=METRICS)
    failures = ["status", "delete"]
    for name in list(failures):
        monkeypatch.setattr(Local, name, _fails_once(name, getattr(Local, name), failures))
    assert [row.state for row in run(sweep)] == ["succeeded"] * 2 and not failures
    assert capsys.readouterr().err.count("permission denied. Asking again.") == 2


def _fails_once(name, call, failures):
    def failing(*arguments):
        if name in failures:
            failures.remove(name)
            raise LaunchError(f"{name}: permission denied.")
        return call(*arguments)

    return failing


def test_a_trial_that_another_launcher_looks_after_is_waited_for(capsys):
    sweep = Sweep(f"{COMMAND} --together=2", space.grid({"A": [1, 2]}), metrics=METRICS)
    record, target = begun_before(sweep, {})
    with record.lock():
        runner = threading.Thread(target=run, args=(sweep,), kwargs={"max_concurrent": 2})
        runner.start()
        until(lambda: len(begun()) == 2)
        until(lambda: advance(record, target, QUICK) and record.is_over and record.kept("deleted"))
    runner.join()
    assert "another launcher looks after it" in capsys.readouterr().err
    assert [row.state for row in SweepDirectory.load(Path("sweep")).rows()] == ["succeeded"] * 2 and len(begun()) == 2


@pytest.mark.parametrize(
    ("sweep", "where"),
    [
        (Sweep(COMMAND, [{"A": 1}, {"A": "0123456789abcdef"}]), "the command"),
        (Sweep(f"{COMMAND} --gin_file=my.gin", [{"A": 1}]), "my.gin"),
        (Sweep(COMMAND, search=Search({"A": space.choice([1, 2, "0123456789abcdef"])}, 1), metrics=METRICS), "the com"),
    ],
)
def test_a_secret_in_any_trial_is_refused_before_anything_is_written(sweep, where, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    Path("my.gin").write_text("A = '0123456789abcdef'\n")
    with pytest.raises(LaunchError, match=rf"the value of \$WANDB_API_KEY stands in {where}"):
        run(sweep)
    assert [path.name for path in Path().iterdir()] == ["my.gin"]


def test_without_optuna_nothing_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"a search needs Optuna: pip install 'clp-jax\[optuna\]'"):
        run(Sweep(COMMAND, search=Search({"A": space.integers(1, 3)}, 3), metrics=METRICS))
    assert not list(Path().iterdir())


def test_a_dry_run_asks_the_target_and_names_what_is_made(capsys):
    Path("sweep.yaml").write_text(YAML.replace("0.2", "0"))
    words = ["sweep", "--file", "sweep.yaml", "--dir=sweep", "--dry_run"]
    assert main([*words, "tpu-vm", "--topology=v5e:2x2", "--zone=us-west4-a"]) == 2
    assert "run directory" in capsys.readouterr().err
    assert main([*words, "local"]) == 0
    out = capsys.readouterr().out
    assert main([*words[:-1], "local"]) == 0
    name = SweepDirectory.load(Path("sweep")).name
    assert f"/{name}-" in out
    # Another sweep in the same place has jobs of its own.
    shutil.rmtree("sweep")
    assert main([*words[:-1], "local"]) == 0
    assert SweepDirectory.load(Path("sweep")).name != name and len(begun()) == 12


def test_the_command_line(capsys):
    Path("sweep.yaml").write_text(YAML.replace("0.2", "0"))
    words = ["sweep", "--file", "sweep.yaml", "local"]
    assert main([*words, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.count(": A=") == 6 and "trial_program.py" in out
    assert not Path("runs").exists() and not Path("jobs").exists()
    assert main([*words, "--dry_run"]) == 0
    assert capsys.readouterr().out == out
    Path("broken").write_text("2")
    assert main(words) == 1
    said = capsys.readouterr()
    assert "2 of 6 trials failed: " in said.err and "--retry_failed" in said.err and "trial: error: A is 2" in said.err
    directory = Path("runs/sweeps/sweep")
    assert said.out.strip() == (directory / "table.md").read_text().strip()
    assert {path.name for path in directory.iterdir() if path.name[0] != "."} == {
        "sweep.json", "trials.jsonl", "trials", "table.md", "table.csv", "parallel.png",
    }  # fmt: skip
    Path("broken").unlink()
    assert main([*words, "--retry_failed"]) == 0
    assert main(["sweep", "report", str(directory), "--metrics=loss:minimize,A:maximize"]) == 0
    assert (directory / "front_loss_A.png").is_file()
    assert (capsys.readouterr().out).count("●") == 1
    assert main(["sweep"]) == 0
    assert main(["sweep", "local", "--help"]) == 0
    assert "--processes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local"], "which file? clp sweep --file=FILE TARGET"),
        (["--file=sweep.yaml"], "which target? clp sweep --file=FILE TARGET"),
        (["--file=none.yaml", "local"], "none.yaml: no such file or directory"),
        (["--file=sweep.yaml", "locla"], "there is no target 'locla'"),
        (["--file=sweep.yaml", "local", "--procesess=2"], "no option --procesess (did you mean processes?)"),
        (["--file=sweep.yaml", "local", "--max_concurrent=0"], "--max_concurrent is 0"),
        (["--file=sweep.yaml", "local", "train"], "what is 'train'? The file says the command"),
        (["--file=sweep.yaml", "local", "--dir=taken"], "taken is there and holds no sweep"),
        (["--file=typo.yaml", "local"], "there is no command 'trian' (did you mean train?)"),
        (["report"], "of which sweep? clp sweep report DIR"),
        (["report", "taken"], "taken holds no sweep"),
        (["report", "taken", "--metrics=loss"], "'loss': expected NAME:minimize or NAME:maximize"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_made(words, message, capsys):
    Path("sweep.yaml").write_text(YAML)
    Path("typo.yaml").write_text("command: trian --gin_file=x.gin\nspace: [{A: 1}]\n")
    Path("taken").mkdir()
    Path("taken/file").write_text("")
    there = set(Path().rglob("*"))
    assert main(["sweep", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("clp sweep: error: ")
    assert set(Path().rglob("*")) == there


def test_a_directory_is_of_one_command_and_one_launcher():
    run(Sweep(COMMAND, [{"A": 1}]))
    with pytest.raises(ValueError, match=r"sweep holds a sweep of other commands"):
        run(Sweep(f"{COMMAND} --more=1", [{"A": 1}]))
    import fcntl

    with open("sweep/.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another launcher runs the sweep in sweep"):
            run(Sweep(COMMAND, [{"A": 1}]))
    (Path("sweep") / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sweep.json is damaged"):
        SweepDirectory.load(Path("sweep"))
