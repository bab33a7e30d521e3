"""Records of jobs: whole or not at all, in whatever order launchers die."""

import json
import multiprocessing

import pytest
from clp_jax.launch.errors import Damaged, Held, LaunchError
from clp_jax.launch.job import Job, JobRecord, all_records, jobs_directory
from clp_jax.launch.jobs import jobs


def job(name="job", **changes):
    return Job(**{"name": name, "command": ("clp", "train"), "target": "local"} | changes)


def test_a_record_is_read_as_it_was_written(tmp_path):
    made = job(options={"processes": "2"}, run_dir="runs/x", code_version="v", directory="/d", max_failures=7)
    record = JobRecord.create(tmp_path, made, {"a/b.gin": b"X = 1"}, code=b"archive")
    again = JobRecord.load(record.path)
    assert again.job == made and again.code == b"archive"
    assert (again.path / "files" / "a" / "b.gin").read_bytes() == b"X = 1"
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_a_name_is_taken_once(tmp_path):
    JobRecord.create(tmp_path, job())
    with pytest.raises(LaunchError, match="there is a job 'job'"):
        JobRecord.create(tmp_path, job(command=("other",)))
    assert JobRecord.load(tmp_path / "job").job.command == ("clp", "train")
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize("name", ["", "Job", "1a", "a_b", "a-", "a" * 41, "../a", "a b"])
def test_names_that_clusters_refuse(name):
    with pytest.raises(LaunchError, match="expected up to 40 lower-case letters, digits and dashes"):
        job(name)


def test_states_have_attempts_and_survive_a_torn_line(tmp_path):
    record = JobRecord.create(tmp_path, job())
    assert record.state is None and record.resource == "job-1"
    record.append("queued", attempt=1)
    record.append("running", detail="so", step=3)
    with open(record.path / "states.jsonl", "a") as file:
        file.write('{"phase": "succ')
    assert [state.phase for state in record.states] == ["queued", "running"]
    record.append("broken")
    assert [(state.phase, state.attempt) for state in record.states] == [("queued", 1), ("running", 1), ("broken", 1)]
    assert not record.is_over
    record.append("queued", attempt=2)
    assert record.resource == "job-2" and record.attempt_directory.name == "2"


def test_what_a_target_keeps_is_of_the_attempt(tmp_path):
    record = JobRecord.create(tmp_path, job())
    record.keep("port", 7)
    assert record.kept("port") == 7 and record.kept("other") is None
    record.append("queued", attempt=2)
    assert record.kept("port") is None


def _hold(path, ready, done):
    with JobRecord.load(path).lock():
        ready.set()
        done.wait(20)


def test_one_launcher_holds_a_job_until_its_process_ends(tmp_path):
    record = JobRecord.create(tmp_path, job())
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(record.path, ready, done))
    holder.start()
    assert ready.wait(60)
    assert record.is_held
    with pytest.raises(Held, match="another launcher looks after job"), record.lock():
        pass
    holder.kill()
    holder.join()
    assert not record.is_held
    with record.lock():
        assert record.is_held


def test_directories_that_are_no_records(tmp_path):
    with pytest.raises(LaunchError, match="there is no job 'x'"):
        JobRecord.load(tmp_path / "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "job.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(LaunchError, match=r"x/job.json is not the record of a job"):
        JobRecord.load(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "x" / "job.json").unlink()
    with pytest.raises(Damaged, match=r"x is not the record of a job: it has no job.json"):
        JobRecord.load(tmp_path / "x")
    JobRecord.create(tmp_path, job())
    assert [record.job.name for record in all_records(tmp_path, pytest.fail)] == ["job"]
    assert all_records(tmp_path / "absent", pytest.fail) == []


def test_where_records_are(monkeypatch, tmp_path):
    monkeypatch.setenv("CLP_JOBS_DIR", str(tmp_path))
    assert jobs_directory() == tmp_path
    monkeypatch.delenv("CLP_JOBS_DIR")
    monkeypatch.setenv("HOME", "/home/x")
    assert str(jobs_directory()) == "/home/x/.clp/jobs"


def test_a_damaged_record_hides_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLP_JOBS_DIR", str(tmp_path))
    for name in ("a", "b", "c"):
        JobRecord.create(tmp_path, Job(name, ("x",), "local"))
    (tmp_path / "a" / "job.json").write_text("{")
    (tmp_path / "b" / "states.jsonl").write_text("{}\n")
    assert jobs(["list"]) == 0
    found = capsys.readouterr()
    assert [line.split()[:2] for line in found.out.splitlines()[1:]] == [
        ["a", "damaged"],
        ["b", "damaged"],
        ["c", "local"],
    ]
    assert "job.json is not the record of a job" in found.err and "states.jsonl is damaged" in found.err


def test_a_damaged_record_keeps_nobody_from_looking_after_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLP_JOBS_DIR", str(tmp_path))
    for name in ("a", "b", "c"):
        JobRecord.create(tmp_path, Job(name, ("true",), "local", directory=str(tmp_path)))
    (tmp_path / "a" / "job.json").write_text("{")
    (tmp_path / "b" / "states.jsonl").write_text("{}\n")
    assert jobs(["watch", "--look=0.05"]) == 0
    told = capsys.readouterr().err
    assert "job.json is not the record of a job" in told and "states.jsonl is damaged" in told
    assert JobRecord.load(tmp_path / "c").state.phase == "succeeded"


@pytest.mark.parametrize(("name", "value", "least"), [("max_failures", 0, 1), ("max_restarts", -1, 0)])
def test_limits_are_checked(name, value, least):
    with pytest.raises(LaunchError, match=f"--{name} is {value}: expected at least {least}."):
        Job("a", ("x",), "local", **{name: value})
