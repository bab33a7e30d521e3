"""Steps made again: the same bits, a flipped bit named, and `clp replay` as it is typed."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import make_data
from toy_runs import SETTINGS, Gradient, Toy, run

from clp_jax.main import main
from clp_jax.replay import ReplayError, replay
from clp_jax.training.guards import GuardError, Guards
from clp_jax.training.metrics import DIGEST_METRICS, read_metrics

OWN = {"loss", "grad_norm", "param_norm", "update_norm", "noise", "drawn", "skipped"} | DIGEST_METRICS


@dataclasses.dataclass(frozen=True)
class Flipped(Toy):
    """One bit of one number of one batch is another one."""

    at: int = 0
    bit: int = 0

    def setup(self, run_dir, seed):
        setup = super().setup(run_dir, seed)
        draw = setup.source.next

        def damaged(state, frozen):
            batch, metrics = draw(state, frozen)
            x = np.array(batch["x"])
            if setup.source.examples // 4 == self.at:
                x.view(np.uint32)[1, 0] ^= np.uint32(1 << self.bit)
            return {"x": jnp.asarray(x)}, metrics

        setup.source.next = damaged
        return setup


def again(run_dir, step, stage=None, **settings):
    return replay(str(run_dir), step=step, training=lambda: SETTINGS | settings | {"stage": stage or Toy()})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    run(path, 10, keep_checkpoints=2)  # Those of steps 9 and 10.
    return path


def test_a_step_is_the_same_again_and_nothing_is_changed(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    compared = again(done, 10)
    assert list(compared) == [10] and set(compared[10]) >= OWN
    said = capsys.readouterr().err
    assert "from the checkpoint of step 9" in said and "step 10: the same to the bit: drawn, grad_digest" in said
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_without_a_checkpoint_before_it_all_steps_are_made_again(done, capsys):
    assert list(again(done, 4)) == [1, 2, 3, 4]
    assert "no checkpoint before step 4: all steps are made again" in capsys.readouterr().err


# Of a product's operand: the last few bits may be rounded away before they reach a digest.
@pytest.mark.parametrize("bit", [8, 12, 22])
def test_a_flipped_bit_is_found(done, bit):
    with pytest.raises(ReplayError, match=r"step 10 gave other numbers[^@]*  grad_digest: \d+ -> \d+\n") as found:
        again(done, 10, Flipped(at=10, bit=bit))
    assert "drawn" not in str(found.value)


def test_a_step_without_metrics_is_refused(done, tmp_path):
    later = "or of a later one, to compare with"
    with pytest.raises(ReplayError, match=f"no metrics of step 12, {later}: it has steps 6, 7, 8, 9, 10 near it"):
        again(done, 12)
    for path, step in ((tmp_path, 1), (done, 0)):
        with pytest.raises(ReplayError, match=f"no metrics of step {step}, {later}: it has"):
            again(path, step)


@pytest.fixture(scope="module")
def seldom(tmp_path_factory):
    """A run whose steps 4, 8 and 10 have lines, and 3, 6, 9 and 10 checkpoints."""
    path = tmp_path_factory.mktemp("seldom") / "run"
    run(path, 10, log_every=100, keep_checkpoints=9)
    return path


def test_a_step_between_those_with_metrics_is_compared_in_the_next_of_them(seldom, capsys):
    assert [line["step"] for line in read_metrics(seldom / "metrics.jsonl")] == [4, 8, 10]
    compared = again(seldom, 5)  # The checkpoint of step 6 has metrics that no line has.
    said = capsys.readouterr().err
    assert list(compared) == [4, 6] and set(compared[6]) >= OWN
    assert "the run wrote no metrics of step 5: it goes on to step 6, the next with metrics, and compares there" in said
    assert "from the checkpoint of step 3\nreplay: steps 4 to 6 are made again\n" in said
    assert list(again(seldom, 7)) == [8] and "goes on to step 8" in capsys.readouterr().err


def test_a_flipped_bit_between_is_found_in_the_next_step_with_metrics(seldom):
    with pytest.raises(ReplayError, match=r"step 8 gave other numbers[^@]*  param_digest: \d+ -> \d+\n"):
        again(seldom, 7, Flipped(at=7, bit=22))


def test_a_damaged_checkpoint_is_passed_over(done, tmp_path, capsys):
    copy = shutil.copytree(done, tmp_path / "copy")
    file = copy / "checkpoints" / "9" / "params" / "_METADATA"
    file.write_bytes(file.read_bytes()[:-1])
    assert list(again(copy, 10)) == list(range(1, 11))
    assert "checkpoint 9 is damaged: params/_METADATA has" in capsys.readouterr().err


def test_the_steps_that_ended_a_run_can_be_made_again(tmp_path):
    bad = Gradient(bad=frozenset({5, 6, 7}))
    with pytest.raises(GuardError, match="steps 5 to 7"):
        run(tmp_path, 10, bad, guards=Guards(patience=3))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    compared = again(
        tmp_path, 7, bad, guards=Guards(patience=3)
    )  # From the checkpoint of step 6, in the middle of them.
    assert list(compared) == [7] and set(compared[7]) >= {"grad_digest", "param_digest", "loss", "non_finite"}
    assert json.loads((tmp_path / "non_finite.json").read_text())["steps"][0]["example_ids"] == [16, 17, 18, 19]


def test_the_command_takes_the_configuration_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "data")
    sizes = {"embed_dim": 8, "mlp_dim": 12, "num_heads": 2, "head_dim": 4, "num_encoder_layers": 1}
    words = [f"--gin.T5Config.t5_1_1.{name}={value}" for name, value in (sizes | {"num_decoder_layers": 1}).items()]
    words += [f"--gin.DATA_DIR={data}", "--gin.VOCAB_SIZE=32", "--gin.RUN_DIR=run", "--gin.BATCH_SIZE=8"]
    words += ["--num_steps=3", "--checkpoint_every=2", "--log_every=1", "--profile_steps=2,2"]
    files = ("models/t5_1_1_tiny.gin", "algorithms/adamw.gin", "runs/supervised.gin")
    # In a process of its own: the profiler ends one in which the compiler for TPUs was used (libtpu 0.0.52).
    command = [sys.executable, "-P", "-m", "clp_jax.main", "train", *[f"--gin_file={name}" for name in files], *words]
    subprocess.run(command, check=True)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert main(["replay", "run", "--step=3"]) == 0
    assert re.search("step 3: the same to the bit: .*cross_entropy.*param_digest", capsys.readouterr().err)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["param_digest"] ^= 1
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert main(["replay", "run", "--step=3"]) == 2
    assert "step 3 gave other numbers than the run" in capsys.readouterr().err
    assert main(["replay", "nowhere", "--step=3"]) == 2
    assert "there is no nowhere/config.gin: give a run directory" in capsys.readouterr().err
