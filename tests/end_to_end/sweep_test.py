"""A pipeline prepares data and trains a policy, a sweep tries learning rates over seeds: real commands in processes of their own."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from clp_jax.main import main

SIZES = {
    "embed_dim": 16, "mlp_dim": 32, "num_heads": 2, "head_dim": 8, "num_encoder_layers": 1, "num_decoder_layers": 1,
}  # fmt: skip
WORDS = [
    "Return",
    "Copy",
    "Open",
    "Sort",
    "array",
    "file",
    "list",
    "string",
    "model",
    "graph",
    "table",
    "index",
    "path",
]
TRAIN = " ".join(
    [
        "train --gin_file=examples/pydoc_sft.gin --gin.DATA_DIR=data --gin.NUM_STEPS=2 --gin.WARMUP_STEPS=1",
        "--gin.BATCH_SIZE=8 --gin.LOG_EVERY=1 --gin.VOCAB_SIZE=40",
        *[f"--gin.T5Config.t5_1_1.{name}={value}" for name, value in SIZES.items()],
    ]
)
PIPELINE = f"""
name: tiny
stages:
  - name: prepare
    command: >
      prepare --gin_file=runs/prepare_jsonl.gin --gin.DATA_DIR=data --gin.VOCAB_SIZE=40
      --gin.TRAIN_FILE=lines.jsonl --gin.VALIDATION_FILE=lines.jsonl --gin.TEST_FILE=lines.jsonl
      "--gin.LENGTHS={{'inputs': 16, 'targets': 12}}"
    outputs: [data]
  - name: sft
    command: {TRAIN} --gin.RUN_DIR=sft
    needs: [prepare]
    outputs: [sft]
  - name: sample
    command: sample --checkpoint=sft --input=prompts.jsonl --output=sft/out.jsonl --max_prompt=16 --max_tokens=4
    needs: [sft]
    outputs: [sft/out.jsonl]
"""
SWEEP = f"""
command: {TRAIN}
space:
  grid:
    LEARNING_RATE: [1e-3, 1e-2, 1e-1]
seeds: 2
metrics:
  evaluation/cross_entropy: minimize
  grad_norm: minimize
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with text, the files of a pipeline and of a sweep, and what the pipeline made."""
    directory = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"inputs": " ".join(rng.choice(WORDS, 5)), "targets": " ".join(rng.choice(WORDS, 3))}) + "\n"
        for _ in range(64)
    ]
    (directory / "lines.jsonl").write_text("".join(lines))
    (directory / "prompts.jsonl").write_text(lines[0])
    (directory / "tiny.yaml").write_text(PIPELINE)
    (directory / "sweep.yaml").write_text(SWEEP)
    before = Path.cwd()
    os.chdir(directory)
    try:
        assert main(["pipeline", "tiny.yaml"]) == 0
    finally:
        os.chdir(before)
    return directory


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("CLP_JOBS_DIR", str(home / "jobs"))


def test_a_pipeline_of_real_commands_runs_once(capfd):
    assert json.loads(Path("sft/out.jsonl").read_text())["line"] == 1
    times = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}
    capfd.readouterr()
    assert main(["pipeline", "tiny.yaml"]) == 0
    assert capfd.readouterr().err.splitlines() == [
        f"{name}: nothing to do: {output}"
        for name, output in (("prepare", "data"), ("sft", "sft"), ("sample", "sft/out.jsonl"))
    ]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_six_trials_give_a_table_and_plots(capfd):
    assert main(["sweep", "--file", "sweep.yaml", "local", "--max_concurrent=2"]) == 0
    directory = Path("runs/sweeps/sweep")
    rows = list(csv.DictReader((directory / "table.csv").read_text().splitlines()))
    assert [(row["LEARNING_RATE"], row["seed"], row["state"]) for row in rows] == [
        (rate, seed, "succeeded") for rate in ("0.001", "0.01", "0.1") for seed in "01"
    ]
    for row in rows:
        run_dir = directory / "trials" / row["trial"]
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert float(row["evaluation/cross_entropy"]) == last["evaluation/cross_entropy"]
        assert f"LEARNING_RATE = {row['LEARNING_RATE']}\n" in (run_dir / "config.gin").read_text()
    # Other seeds are other runs, and so are other learning rates.
    assert len({row["evaluation/cross_entropy"] for row in rows}) == 6
    table = (directory / "table.md").read_text()
    assert table.splitlines()[2] == (
        "| LEARNING_RATE | seeds | evaluation/cross_entropy (lower is better) | grad_norm (lower is better) | front |"
    )
    assert capfd.readouterr().out == table + "\n"
    for name in ("parallel", "front_evaluation_cross_entropy_grad_norm"):
        assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_a_binding_that_does_not_exist(home, capfd):
    Path("slip.yaml").write_text(SWEEP.replace("LEARNING_RATE", "LERNING_RATE"))
    assert main(["sweep", "--file=slip.yaml", "local"]) == 2
    assert "nothing here uses a macro LERNING_RATE (did you mean LEARNING_RATE?)" in capfd.readouterr().err
    assert not (home / "runs" / "sweeps" / "slip").exists()
