"""A short form of `benchmarks/chaos.py`: runs are killed, go on with other processes, and nothing is lost."""

import json

import chaos
import numpy as np
from same_runs import Comparison


def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(tmp_path, capsys):
    """It goes on from the middle of a rollout or of a checkpoint, to the bit."""
    words = ["--kills=3", "--stages=policy", "--processes=1", "--steps=8", "--every=2", "--seed=1"]
    code = chaos.main([*words, f"--directory={tmp_path}", f"--json={tmp_path}/found.json"])
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and not any(run["failures"] for run in found["runs"]), told
    kills = [kill for run in found["runs"] for kill in run["kills"]]
    assert len(kills) == 3 and all(kill["went_on_from"] == kill["kept"] for kill in kills), told
    assert "| in all | 3 |" in told
    assert_a_difference_is_found(next(tmp_path.glob("0-policy-1")), tmp_path / "other")


def assert_a_difference_is_found(calm, other):
    """The last bit of one number, and a token of one row."""
    other.mkdir()
    lines = [json.loads(line) for line in (calm / "run" / "metrics.jsonl").read_text().splitlines()]
    lines[4]["loss"] = float(np.nextafter(lines[4]["loss"], np.inf))
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = Comparison(exact=True)
    metrics.metrics(other, calm / "run")
    assert len(metrics.differences) == 1 and metrics.differences[0].startswith("loss in metrics of step 5 is ")
    notes = calm / "life0.notes.1.0"
    (other / "notes").write_text(notes.read_text().replace('/tokens": [[0, [[', '/tokens": [[0, [[9', 1))
    batches = Comparison(exact=True)
    batches.batches([other / "notes"], [notes])
    assert len(batches.differences) == 1 and batches.differences[0].startswith(
        "row (0, 'rollout/tokens', 0) of a batch is"
    )
