"""What a supervisor does next, for every way an attempt may go, against a target that a test moves by hand."""

import dataclasses

import pytest
from clp_jax.launch import supervisor
from clp_jax.launch.errors import Damaged, LaunchError
from clp_jax.launch.exit_codes import may_restart, verdict
from clp_jax.launch.job import Job, JobRecord
from clp_jax.launch.jobs import jobs
from clp_jax.launch.supervisor import Patience, Sight, Watch, advance, describe, ends_without_progress, retry, supervise
from clp_jax.launch.target import Status, Target, Unavailable, Unreachable

NOW = Patience(look=0.01, first_wait=0.0)


@dataclasses.dataclass
class Place:
    """A target that has what a test puts there.

    Attributes:
        there: how each attempt stands, by resource.
        done: what was asked, in order.
        raises: raised by the next call of a name.
    """

    there: dict = dataclasses.field(default_factory=dict)
    done: list = dataclasses.field(default_factory=list)
    raises: dict = dataclasses.field(default_factory=dict)
    name = "place"
    ships_code = None

    def _do(self, what, record):
        self.done.append((what, record.resource))
        if what in self.raises:
            raise self.raises.pop(what)

    def compile_options(self):
        return None

    def check(self, cargo):
        pass

    def check_access(self, job):
        pass

    def submit(self, record):
        self._do("submit", record)
        self.there.setdefault(record.resource, Status("queued"))

    def start(self, record):
        self._do("start", record)
        self.there[record.resource] = Status("running")

    def status(self, record):
        if "status" in self.raises:
            raise self.raises.pop("status")
        return self.there.get(record.resource, Status("gone"))

    def logs(self, record, lines=None, follow=False):
        yield from [f"[0] line {i}" for i in range(30)][-(lines or 30) :]

    def stop(self, record):
        self._do("stop", record)

    def delete(self, record):
        self._do("delete", record)
        self.there.pop(record.resource, None)

    def dry_run(self, record):
        return []


@pytest.fixture
def record(tmp_path):
    job = Job("job", ("x",), "place", run_dir=str(tmp_path / "run"), max_failures=3, max_restarts=5)
    return JobRecord.create(tmp_path / "jobs", job)


def move(record, place, phase, **status):
    place.there[record.resource] = Status(phase, **status)
    return advance(record, place, NOW)


def checkpoint(record, step):
    (record.path.parents[1] / "run" / "checkpoints" / str(step)).mkdir(parents=True)


def test_the_place_is_a_target():
    assert isinstance(Place(), Target)


def test_each_look_does_one_thing(record):
    place = Place()
    assert advance(record, place, NOW).phase == "queued" and place.done == []
    assert advance(record, place, NOW).phase == "queued" and place.done == [("submit", "job-1")]
    assert move(record, place, "starting").phase == "running" and place.done[-1] == ("start", "job-1")
    assert move(record, place, "succeeded").phase == "succeeded"
    assert place.done[-1] == ("start", "job-1")
    advance(record, place, NOW)
    advance(record, place, NOW)
    assert place.done == [("submit", "job-1"), ("start", "job-1"), ("delete", "job-1")]


@pytest.mark.parametrize("phase", ["preempted", "gone"])
def test_what_is_taken_away_is_deleted_and_begun_again(record, phase):
    place = Place()
    for _ in range(2):
        advance(record, place, NOW)
    move(record, place, "running")
    checkpoint(record, 40)
    ended = move(record, place, phase)
    assert (ended.phase, ended.step) == ("preempted", 40)
    assert advance(record, place, NOW).attempt == 2
    advance(record, place, NOW)
    assert place.done == [("submit", "job-1"), ("delete", "job-1"), ("submit", "job-2")]


def test_preemptions_have_no_limit(record):
    place = Place()
    for _ in range(40):
        while record.state is None or record.state.phase != "queued" or record.resource not in place.there:
            advance(record, place, NOW)
        move(record, place, "preempted")
    assert record.state.phase == "preempted"


def fail(record, place, code=134):
    while record.state is None or record.state.phase != "queued" or record.resource not in place.there:
        advance(record, place, NOW)
    return move(record, place, "failed", code=code, detail=f"exit code {code}")


def test_a_crash_loop_stops_with_the_last_lines(record):
    place = Place()
    assert [fail(record, place).phase for _ in range(3)] == ["broken", "broken", "failed"]
    head, *lines = record.state.detail.split("\n")
    assert head == "3 failures without a new checkpoint, the last: exit code 134. The last lines:"
    assert lines == [f"[0] line {i}" for i in range(10, 30)]
    advance(record, place, NOW)
    assert place.there == {} and place.done.count(("delete", "job-3")) == 1


def test_a_new_checkpoint_begins_the_count_again(record):
    place = Place()
    fail(record, place)
    fail(record, place)
    checkpoint(record, 10)
    assert fail(record, place).phase == "broken"
    fail(record, place)
    assert fail(record, place).phase == "broken"
    assert fail(record, place).phase == "failed"
    assert record.state.detail.startswith("5 restarts are all") or record.state.detail.startswith("3 failures")


def test_restarts_have_a_limit_even_with_progress(record):
    place = Place()
    for step in range(1, 6):
        checkpoint(record, step)
        assert fail(record, place).phase == "broken"
    checkpoint(record, 6)
    assert fail(record, place).phase == "failed"
    assert record.state.detail.startswith("5 restarts are all that --max_restarts allows; the last: exit code 134")


@pytest.mark.parametrize(
    ("run_dir", "options"),
    [("gs://bucket/run", {}), ("s3://bucket/run", {}), ("/absent/disk/run", {"shared_disk": "/absent/disk"})],
)
def test_what_nobody_can_see_is_no_crash_loop_and_has_an_end(tmp_path, monkeypatch, run_dir, options):
    monkeypatch.setenv("PATH", str(tmp_path))  # No gcloud.
    job = Job("job", ("x",), "place", options, run_dir=run_dir, max_failures=3, max_restarts=5)
    record, place = JobRecord.create(tmp_path / "jobs", job), Place()
    assert [fail(record, place).phase for _ in range(6)] == ["broken"] * 5 + ["failed"]
    assert record.state.detail.startswith("5 restarts are all that --max_restarts allows")


def test_preemptions_between_failures_are_no_progress():
    from clp_jax.launch.job import State

    states = [State("broken", 1, 0.0), State("preempted", 2, 0.0), State("broken", 3, 0.0)]
    assert ends_without_progress(states, ("broken",)) == 2
    assert ends_without_progress(states) == 3
    assert ends_without_progress([*states, State("preempted", 4, 0.0, step=5)]) == 0
    assert ends_without_progress([*states, State("retried", 4, 0.0)]) == 0


@pytest.mark.parametrize("code", [1, 2, 126, 127, 130])
def test_what_fails_again_is_not_tried_again(record, code):
    assert fail(record, Place(), code).phase == "failed"
    assert record.attempt == 1


def test_waits_double_up_to_a_limit(record, monkeypatch):
    patience = Patience(first_wait=10.0, longest_wait=60.0)
    assert [patience.wait(n) for n in (0, 1, 2, 3, 4, 99)] == [10.0, 10.0, 20.0, 40.0, 60.0, 60.0]
    place = Place()
    fail(record, place)
    ended = record.state.time
    times = iter([ended + 9.9, ended + 10.0])
    monkeypatch.setattr(supervisor.time, "time", lambda: next(times, ended + 10.0))
    assert advance(record, place, patience).phase == "broken"
    assert advance(record, place, patience).phase == "queued"


def test_no_room_is_asked_again_and_refusals_are_final(record):
    place = Place(raises={"submit": Unavailable("no room")})
    advance(record, place, NOW)
    assert advance(record, place, NOW).phase == "preempted"
    place.raises["submit"] = LaunchError("quota")
    advance(record, place, NOW)
    assert advance(record, place, NOW).phase == "failed"
    assert record.state.detail == "quota"


def test_a_start_that_is_refused_again_and_again_gives_back_what_is_rented(record):
    place = Place()
    for _ in range(2):
        advance(record, place, NOW)
    for _ in range(2):
        place.raises["start"] = LaunchError("permission denied")
        with pytest.raises(LaunchError, match="permission denied"):
            move(record, place, "starting")
    place.raises["start"] = LaunchError("permission denied")
    assert move(record, place, "starting").phase == "failed"
    assert record.state.detail == "the command could not be begun, 3 times: permission denied"
    advance(record, place, NOW)
    assert place.there == {} and place.done[-1] == ("delete", "job-1")


def test_silence_changes_nothing(record):
    place = Place()
    for name in ("submit", "status"):
        place.raises[name] = Unreachable("silence")
        with pytest.raises(Unreachable):
            for _ in range(3):
                advance(record, place, NOW)
        assert record.state.phase == "queued" and record.attempt == 1


def test_a_deletion_that_fails_is_repeated_before_the_next_attempt(record):
    place = Place()
    fail(record, place)
    place.raises["delete"] = Unreachable("silence")
    with pytest.raises(Unreachable):
        advance(record, place, NOW)
    assert record.attempt == 1
    advance(record, place, NOW)
    assert place.done[-2:] == [("delete", "job-1"), ("delete", "job-1")] and record.attempt == 2


def test_stopping_before_between_and_during(record):
    place = Place()
    fail(record, place)
    record.stop_request.touch()
    assert advance(record, place, NOW).phase == "stopped"
    retry(record)
    assert not record.stop_request.exists()
    advance(record, place, NOW)
    advance(record, place, NOW)
    move(record, place, "running")
    record.stop_request.touch()
    assert advance(record, place, NOW).phase == "stopped"
    assert place.done[-1] == ("stop", "job-2")
    advance(record, place, NOW)
    assert place.there == {}


def test_a_retry_has_all_its_attempts_again(record):
    place = Place()
    for _ in range(3):
        fail(record, place)
    retry(record)
    assert [fail(record, place).phase for _ in range(3)] == ["broken", "broken", "failed"]
    assert record.attempt == 6


def test_what_succeeded_is_not_retried(record):
    place = Place()
    advance(record, place, NOW)
    advance(record, place, NOW)
    move(record, place, "succeeded")
    with pytest.raises(LaunchError, match="job has succeeded: there is nothing to retry"):
        retry(record)


def test_errors_do_not_end_the_supervision_of_others(tmp_path, capsys):
    records = [JobRecord.create(tmp_path, Job(name, ("x",), "place")) for name in ("a", "b")]

    class Moody(Place):
        """Succeeds when it has refused once."""

        def status(self, record):
            if ("refused", record.resource) not in self.done:
                self.done.append(("refused", record.resource))
                raise LaunchError("credentials have expired.")
            return Status("succeeded")

    assert [state.phase for state in supervise(records, [Moody(), Moody()], NOW)] == ["succeeded", "succeeded"]
    assert "a: credentials have expired. Asking again." in capsys.readouterr().err


def test_one_line_about_a_job(record):
    assert describe(record) == "job: not begun"
    record.append("broken", attempt=2, detail="why", step=7)
    assert describe(record) == "job: broken (attempt 2), checkpoint 7: why"


@pytest.mark.parametrize(
    ("codes", "phase", "code"),
    [
        ([None, None], "running", None),
        ([0, None], "running", None),
        ([0, 0], "succeeded", None),
        ([None, 3], "failed", 3),
        ([75, 137], "failed", 137),
        ([75, 75], "failed", 75),
        ([75, 134, 2], "failed", 2),
    ],
)
def test_the_exit_codes_of_all_workers_together(codes, phase, code):
    found = verdict(codes)
    assert (found.phase, found.code) == (phase, code)


def test_which_codes_may_do_better():
    assert [may_restart(code) for code in (75, 134, 137, 143, None)] == [True] * 5
    assert [may_restart(code) for code in (1, 2, 126, 127, 130)] == [False] * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["logs", "x", "--lines=-1"], "--lines is -1: expected at least 0."),
        (["watch", "--look=-1"], "--look is -1: expected seconds, more than 0."),
        (["watch", "--look=nan"], "--look is nan: expected seconds, more than 0."),
    ],
)
def test_numbers_are_checked_before_anything(words, message):
    with pytest.raises(LaunchError) as error:
        jobs(words)
    assert str(error.value) == message


def test_a_run_that_saves_and_asks_again_has_no_limit(record):
    """`max_restarts` is 5."""
    place = Place()
    for step in range(1, 9):
        checkpoint(record, step)
        assert fail(record, place, code=75).phase == "broken"
    # It asks, but has nothing new to show.
    assert [fail(record, place, code=75).phase for _ in range(3)] == ["broken", "broken", "failed"]


def test_of_a_run_that_nobody_knows_its_word_counts(tmp_path):
    unknown = JobRecord.create(tmp_path / "jobs", Job("job", ("x",), "place", max_failures=2, max_restarts=4))
    place = Place()
    assert [fail(unknown, place, code=75).phase for _ in range(5)] == ["broken"] * 4 + ["failed"]
    assert "4 restarts are all that --max_restarts allows" in unknown.state.detail


class Odd(Place):
    """Whose lines can't be had, and which first answers with what nobody expects."""

    def logs(self, record, lines=None, follow=False):
        raise LaunchError("no lines")


def test_nothing_that_goes_wrong_leaves_the_others_alone(record, tmp_path, capsys):
    other = JobRecord.create(tmp_path / "jobs", Job("other", ("x",), "place"))
    place, odd = Place(), Odd()
    for each, where in ((record, place), (other, odd)):
        advance(each, where, NOW)
        where.there["job-1" if each is record else "other-1"] = Status("succeeded")
    odd.raises["status"] = RuntimeError("what nobody expects")
    place.raises["status"] = OSError(28, "No space left on device")
    ends = supervise([record, other], [place, odd], NOW)
    assert [end.phase for end in ends] == ["succeeded", "succeeded"]
    told = capsys.readouterr().err
    assert "other: RuntimeError: what nobody expects. Asking again." in told
    assert "job: OSError: [Errno 28] No space left on device. Asking again." in told


def test_a_damaged_record_is_told_and_looked_at_again(record, tmp_path, monkeypatch, capsys):
    place, other = Place(), JobRecord.create(tmp_path / "jobs", Job("other", ("x",), "place"))
    for each in (record, other):
        advance(each, place, NOW)
        place.there[each.resource] = Status("succeeded")
    damaged = other.attempt_directory / "deleted.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            damaged.unlink()

    monkeypatch.setattr(supervisor.time, "sleep", nap)
    assert [end.phase for end in supervise([record, other], [place, place], NOW)] == ["succeeded", "succeeded"]
    assert f"{damaged} is damaged" in capsys.readouterr().err


def test_a_watch_tells_what_goes_wrong_once_and_asks_again(record, capsys):
    place, errors = Place(), [LaunchError("no room."), LaunchError("no room."), ValueError("odd"), Damaged("torn")]

    def hold():
        if errors:
            raise errors.pop(0)
        return record, place

    watch = Watch("job", hold, NOW)
    assert [watch.look() for _ in range(4)] == [Sight(), Sight(), Sight(), Sight(is_damaged=True)]
    assert capsys.readouterr().err.splitlines() == [
        "job: no room. Asking again.",
        "job: ValueError: odd. Asking again.",
        "job: torn",
    ]
    watch.look()
    sight = watch.look()
    assert (sight.state.phase, sight.is_done) == ("queued", False)
    place.there["job-1"] = Status("succeeded")
    watch.look()
    assert watch.look().is_done and capsys.readouterr().err.splitlines() == ["job: queued", "job: succeeded"]


def test_lines_that_can_not_be_had_keep_no_job_from_ending(record):
    place = Odd()
    assert fail(record, place, code=2).phase == "failed" and record.state.detail == "exit code 2"


def test_a_clock_that_goes_back_is_not_waited_for(record, monkeypatch):
    place, patient = Place(), Patience(look=0.01, first_wait=100.0)
    fail(record, place)
    advance(record, place, patient)
    assert advance(record, place, patient).phase == "broken"
    now = supervisor.time.time()
    monkeypatch.setattr(supervisor.time, "time", lambda: now - 7200)
    assert advance(record, place, patient).phase == "queued"
