"""`clp train` as it is typed, on another mesh than the run began with: it says so, goes on to the end, and agrees to rounding."""

import shutil

import pytest
from same_runs import Comparison
from tiny_runs import make_packed

from clp_jax.main import main
from clp_jax.training.metrics import read_metrics

FILES = ("models/t5_1_1_tiny.gin", "algorithms/adamw.gin", "runs/supervised.gin")
SIZES = {"embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "head_dim": 4, "num_encoder_layers": 1, "num_decoder_layers": 1}


def train(data, run_dir, layout, num_steps, *words):
    """The exit code. A large epsilon: where gradients are rounding alone, AdamW would make whole steps of it."""
    given = [f"--gin_file={name}" for name in (*FILES, f"sharding/{layout}.gin")]
    given += [f"--gin.T5Config.t5_1_1.{name}={value}" for name, value in SIZES.items()]
    given += [f"--gin.{name}" for name in (f"DATA_DIR={data}", "VOCAB_SIZE=32", f"RUN_DIR={run_dir}", "BATCH_SIZE=16")]
    given += ["--gin.AdamW.epsilon=1.0", f"--num_steps={num_steps}", "--checkpoint_every=2", "--log_every=1"]
    return main(["train", *given, *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The data; a run of four steps in one layout, and its first two."""
    home = tmp_path_factory.mktemp("runs")
    data = make_packed(home / "data")
    assert train(data, home / "half", "data_parallel", 2) == 0
    shutil.copytree(home / "half", home / "calm")
    assert train(data, home / "calm", "data_parallel", 4) == 0
    return home


def test_a_run_goes_on_under_other_rules(runs, capsys):
    run_dir = shutil.copytree(runs / "half", runs / "moved")
    words = ("--accumulation=2", "--gin.REMAT='full'")
    assert train(runs / "data", run_dir, "fsdp_tensor", 4, *words) == 0
    said = capsys.readouterr().err
    for line in (
        "going on in another layout (old -> new):",
        "  DATA: -1 -> unset",
        "  TENSOR: unset -> 2",
        "  REMAT: 'none' -> 'full'",
        "  clp_jax.train.train.accumulation: 1 -> 2",
        "From here on the numbers are those of the old layout but for rounding, not to the bit.",
        "going on from step 2",
    ):
        assert line in said
    comparison = Comparison(exact=False)
    comparison.checkpoints(run_dir, runs / "calm")
    comparison.metrics(run_dir, runs / "calm")
    assert not comparison.differences, "\n".join(comparison.differences)
    assert comparison.largest > 0  # It was another mesh.
    digests = [
        [line["grad_digest"] for line in read_metrics(path / "metrics.jsonl")] for path in (run_dir, runs / "calm")
    ]
    assert digests[0][:2] == digests[1][:2] and digests[0][2] != digests[1][2]
    assert train(runs / "data", run_dir, "fsdp_tensor", 4, *words) == 0
    assert "another layout" not in capsys.readouterr().err


def test_another_computation_is_refused_all_the_same(runs, capsys):
    run_dir = shutil.copytree(runs / "half", runs / "other")
    before = (run_dir / "config.gin").read_text()
    assert train(runs / "data", run_dir, "fsdp", 4, "--gin.SEED=1") == 2
    said = capsys.readouterr().err
    assert "holds a run of another configuration (old -> new):\n  SEED: 0 -> 1\nNothing" in said
    assert (run_dir / "config.gin").read_text() == before
