"""A short form of `benchmarks/chaos.py`: reinforcement learning is killed three times, and nothing is lost."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import chaos
import numpy as np
from same_runs import Comparison


def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(tmp_path, capsys):
    """It goes on with one process, with two, and with one again, from the middle of a rollout or of a checkpoint."""
    words = ["--kills=3", "--stages=policy", "--processes=1-2", "--steps=8", "--every=2", "--seed=1"]
    code = chaos.main([*words, f"--directory={tmp_path}", f"--json={tmp_path}/found.json"])
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and not any(run["failures"] for run in found["runs"]), told
    kills = [kill for run in found["runs"] for kill in run["kills"]]
    assert len(kills) == 3 and all(kill["went_on_from"] == kill["kept"] for kill in kills), told
    assert any(kill["went_on_with"] != kill["count"] for kill in kills), told
    assert "| in all | 3 |" in told
    assert_differences_are_found(*sorted(tmp_path.glob("*-policy-*"))[:2])


def assert_differences_are_found(calm, run):
    """A last bit, and a row, that are another."""
    path = calm / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["loss"] = float(np.nextafter(np.float64(lines[4]["loss"]), 9))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (notes,) = calm.glob("life0.notes.1.0")
    notes.write_text(notes.read_text().replace('"tokens": [[0, [[', '"tokens": [[0, [[9', 1))
    comparison = Comparison(exact=True)
    comparison.metrics(calm / "run", calm / "run")
    assert not comparison.differences
    comparison.metrics(run / "run", calm / "run")
    assert any(text.startswith("loss in metrics of step 5 is ") for text in comparison.differences)
    comparison = Comparison(exact=True)
    comparison.batches(sorted(run.glob("life*.notes.*")), [notes])
    assert len(comparison.differences) >= 1 and comparison.differences[0].startswith("row (0, ")
