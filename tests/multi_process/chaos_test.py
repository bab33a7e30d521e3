"""A short form of `benchmarks/chaos.py`: runs are killed, go on with other processes, and nothing is lost."""

import json

import chaos
import numpy as np
from same_runs import Comparison

# Of one process while a batch is made, and while a checkpoint is written; of one of two, and of both.
SEED = 2984


def test_runs_that_are_killed_are_the_undisturbed_ones_with_other_processes(home, tmp_path, capsys):
    """Packed examples and reinforcement learning go on in two processes and in one again, to the bit."""
    (tmp_path / "home").symlink_to(home)
    words = ["--kills=4", "--stages=packed,policy", "--processes=1-2", "--steps=8", "--every=2", f"--seed={SEED}"]
    code = chaos.main([*words, f"--directory={tmp_path}", f"--json={tmp_path}/found.json"])
    told = capsys.readouterr().out
    outcomes = chaos.Outcome.read(str(tmp_path / "found.json"))
    assert code == 0 and not any(outcome.failures for outcome in outcomes), told
    assert [outcome.run for outcome in outcomes] == ["packed, 1-2", "policy, 1-2"] and all(o.exact for o in outcomes)
    for outcome in outcomes:
        assert [(kill.count, kill.went_on_with) for kill in outcome.kills] == [(1, 2), (2, 1)], told
        assert all(kill.went_on_from == kill.kept for kill in outcome.kills), told
    found = {moment for outcome in outcomes for kill in outcome.kills for moment in kill.found}
    assert found >= {"save", "rollout"}, told
    assert "| in all | 4 |" in told and told.count("| the same bits |") == 2
    assert_a_difference_is_found(next(tmp_path.glob("*-policy-1")), tmp_path / "other")


def assert_a_difference_is_found(calm, other):
    """The last bit of one number, and a token of one row."""
    other.mkdir()
    lines = [json.loads(line) for line in (calm / "run" / "metrics.jsonl").read_text().splitlines()]
    lines[4]["loss"] = float(np.nextafter(lines[4]["loss"], np.inf))
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = Comparison(exact=True)
    metrics.metrics(other, calm / "run")
    assert len(metrics.differences) == 1 and metrics.differences[0].startswith("loss in metrics of step 5 is ")
    assert_rounding_is_of_what_a_metric_is_made_of(calm, other)
    notes = calm / "life0.notes.1.0"
    (other / "notes").write_text(notes.read_text().replace('/tokens": [[0, [[', '/tokens": [[0, [[9', 1))
    batches = Comparison(exact=True)
    batches.batches([other / "notes"], [notes])
    assert len(batches.differences) == 1 and batches.differences[0].startswith(
        "row (0, 'rollout/tokens', 0) of a batch is"
    )


def assert_rounding_is_of_what_a_metric_is_made_of(calm, other):
    """A KL of 0.01 is the difference of log-probabilities of several nats: their last bits are another, and no more."""
    for share, found in ((0.9e-6, 0), (1.1e-6, 1)):
        lines = [json.loads(line) for line in (calm / "run" / "metrics.jsonl").read_text().splitlines()]
        lines[4]["kl"] += share * lines[4]["length"]
        lines[5]["grad_norm"] *= 1 + share
        (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = Comparison(exact=False)
        metrics.metrics(other, calm / "run")
        assert len(metrics.differences) == 2 * found
