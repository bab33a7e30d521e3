"""Two real processes and a run in an object store: nothing on a disk is shared, and one is stopped and goes on."""

import json

from groups import start
from object_stores import running

from clp_jax.interop.object_store import StorePath
from clp_jax.training.checkpoint_steps import complete_steps, unfinished_steps
from clp_jax.training.metrics import TIMING_METRICS


def job(place, notes, num_steps):
    return {
        "name": "policy",
        "run_dir": str(place),
        "notes": str(notes),
        "num_steps": num_steps,
        "checkpoint_every": 2,
    }


def lines(text):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_METRICS} for line in text.splitlines()]


def test_two_processes_save_and_go_on_without_a_shared_disk(home, tmp_path):
    bucket = StorePath.parse(running("gs")) / tmp_path.name
    for place, steps in ((bucket / "parts", (2, 4)), (tmp_path / "whole", (4,))):
        for number, num_steps in enumerate(steps):
            logs = tmp_path / f"{place.name}.{number}"
            made = [job(place, tmp_path / place.name, num_steps)]
            # What a host has below its own TMPDIR, no other sees.
            start(logs, home, made, num_processes=2, devices=2).succeed()
    parts, whole = bucket / "parts", tmp_path / "whole"
    assert complete_steps(parts / "checkpoints") == complete_steps(whole / "checkpoints") == [2, 4]
    assert unfinished_steps(parts / "checkpoints") == []
    found, wanted = (
        json.loads((at / "checkpoints" / "4" / "manifest.json").read_text())["manifest"] for at in (parts, whole)
    )
    assert found["processes"] == 2 and found["arrays"] == wanted["arrays"]  # The SHA-256 of every shard.
    assert any(len(array["shards"]) > 1 for array in found["arrays"]["params"].values())
    now, then = (lines((at / "metrics.jsonl").read_text()) for at in (parts, whole))
    assert [line["step"] for line in now] == [line["step"] for line in then] == [1, 2, 3, 4]
    assert [line["param_digest"] for line in now] == [line["param_digest"] for line in then]
    reference, same = (at / "reference" / "manifest.json" for at in (parts, whole))
    assert json.loads(reference.read_text())["manifest"]["arrays"] == json.loads(same.read_text())["manifest"]["arrays"]
