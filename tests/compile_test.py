"""`clp compile` from gin files to its report, on one tiny step; and outlines against what stages really build."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clp_jax.compilation.topology import Topology
from clp_jax.compile import Job
from clp_jax.compile import compile as compile_entry
from clp_jax.gin_utils.configuration import configure
from clp_jax.main import main
from clp_jax.models.config import PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.train import train as train_entry
from clp_jax.training.optimizers import AdamW
from clp_jax.training.schedules import Constant
from clp_jax.training.stage import DataShape
from clp_jax.training.supervised import Supervised

FILES = ("models/t5_1_1_tiny.gin", "algorithms/adamw.gin", "runs/supervised.gin", "sharding/fsdp.gin")
SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1, "embed_dim": 128, "mlp_dim": 256, "head_dim": 32}
BINDINGS = [f"--gin.t5_1_1.{name}={value}" for name, value in SIZES.items()]


def clp_compile(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-m", "clp_jax.main", "compile", *[f"--gin_file={name}" for name in FILES], *BINDINGS]
    command += ["--topology=v5e:2x2", "--inputs=64", "--targets=32", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=folder)


def test_a_step_is_compiled_and_reported(tmp_path):
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra `aot`")
    output = tmp_path / "here" / "report.json"
    done = clp_compile(tmp_path, "--gin.BATCH_SIZE=8", f"--output={output}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    for words in ("HBM of a device", "estimated MFU", "tokens/s/chip", "all-gather", "fsdp 4", "largest buffers"):
        assert words in done.stdout
    report = json.loads(output.read_text())
    model = T5Config.t5_1_1(vocab_size=2048, num_heads=4, **SIZES)
    assert report["parameters"] == Policy(model).num_params()
    assert (report["chips"], report["mesh"], report["topology"]) == (4, {"fsdp": 4}, "v5e:2x2")
    (update,) = report["programs"]
    assert update["name"] == "update" and update["tokens"] == 8 * (64 + 32)
    assert update["memory"]["fits"] and update["memory"]["arguments"] > 3 * 4 * report["parameters"] / 4
    assert 0 < update["mfu"] < 1
    assert 0.5 < update["executed_flops"] / update["model_flops"] < 2
    assert update["seconds"] == pytest.approx(
        update["compute_seconds"] + update["exposed_seconds"] + update["copy_seconds"]
    )
    assert {"fsdp"} == {axis for item in update["exchanges"] for axis in item["axes"]}
    assert any("nn/linear.py" in source for source, _ in update["slowest"])


def test_a_search_in_which_nothing_fits_ends_with_1_and_its_report(tmp_path):
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra `aot`")
    output = tmp_path / "report.json"
    tried = ("--search", "--layouts=sharding/fsdp.gin", "--remats=none", "--batches=4194304,8388608")
    done = clp_compile(tmp_path, *tried, f"--output={output}")
    assert (done.returncode, done.stderr) == (1, "")
    for words in ("nothing fits; the closest is", "does not fit", "lower BATCH_SIZE"):
        assert words in done.stdout
    found = json.loads(output.read_text())
    assert not found["fits"] and found["recommended"] == {
        "layout": "sharding/fsdp.gin",
        "remat": "none",
        "batch": 4194304,
    }
    (only,) = found["tried"]  # A larger batch of what does not fit is not even tried.
    assert only["report"]["programs"][0]["memory"]["needed"] > only["report"]["programs"][0]["memory"]["limit"]


def test_what_the_compiler_refuses_is_one_line_and_one_trial(tmp_path):
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra `aot`")
    done = clp_compile(tmp_path, "--gin.BATCH_SIZE=8", "--options=nonsense=1", "--search", "--output=report.json",
                       "--layouts=sharding/fsdp.gin", "--remats=none,full", "--batches=8")  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "clp compile: error: nothing could be compiled: the compiler refuses the program update: " in done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert [(trial["remat"], "nonsense" in trial["refused"]) for trial in found["tried"]] == [
        ("none", True),
        ("full", True),
    ]


@pytest.mark.parametrize("words", [(), ("--search",)])
def test_a_report_that_can_not_be_written_is_said_first(tmp_path, words, capsys):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    given = ["compile", *[f"--gin_file={name}" for name in FILES], *BINDINGS, "--topology=v5e:2x2", *words]
    for output in ("file/report.json", "folder"):
        assert main([*given, f"--output={tmp_path / output}"]) == 2
        said = capsys.readouterr()
        assert f"clp compile: error: the report can't be written to {tmp_path / output}: " in said.err and not said.out
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5p:4x4"], "slices of v5p have 3 dimensions"),
        (["--topology=v5e:2x2", "--gin.BATCH=8"], "nothing here uses a macro BATCH"),
        ([], "still needs --topology=VALUE"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["compile", *[f"--gin_file={name}" for name in FILES], *words]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_program_is_named():
    stage = Supervised(T5Config.t5_1_1(vocab_size=40, num_heads=2, **SIZES), "", batch_size=4)
    job = Job.of({"stage": stage, "optimizer": AdamW(Constant(1e-3)), "num_steps": 1})
    with pytest.raises(ValueError, match="names 'rollout': this stage has update"):
        job.report(Topology.parse("v5e:2x2"), DataShape(4, 4), ["rollout"])


def test_a_stage_without_a_model_says_so():
    with pytest.raises(ValueError, match="give the model itself"):
        Supervised(None, "", initial_checkpoint="run").outline(DataShape(4, 4))
    palm = PaLMConfig(vocab_size=40, embed_dim=8, mlp_dim=16, num_heads=2, head_dim=4, num_layers=1)
    outline = Supervised(None, "", initial_checkpoint="run").outline(DataShape(4, 4, palm))
    assert outline.tokens_per_batch == 64 * 8


def test_what_train_is_given_is_built_when_it_is_asked_for():
    found = configure(
        compile_entry, gin_files=FILES, arguments={"topology": "v5e:2x2"}, borrowed={"training": train_entry}
    ).build()
    assert found["topology"] == "v5e:2x2"
    training = found["training"]()
    # Directories that nobody gave are nothing to compile.
    assert (training["run_dir"], training["stage"].data_dir) == ("", "")
    assert training["stage"].batch_size == 64
    again = found["training"](["sharding/fsdp_tensor.gin"], ["TENSOR=1", "BATCH_SIZE=8", "REMAT='full'"])
    assert (again["stage"].batch_size, again["stage"].model.remat) == (8, "full")
    assert again["rules"] != training["rules"]
    # A layout behind another takes its place.
    for name in ("data_parallel", "expert", "tensor_parallel", "fsdp"):
        other = found["training"]([f"sharding/{name}.gin"], ["TENSOR=1"] if name == "tensor_parallel" else [])
        assert other["mesh"].size == 1
