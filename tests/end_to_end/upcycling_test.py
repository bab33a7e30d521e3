"""Experts that start as copies of a dense run's blocks: the commands of docs/models.md as they are typed there, on tiny data."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from command_lines import clp, refuses
from tiny_runs import make_data

from clp_jax.training.metrics import read_metrics
from clp_jax.training.policies import load_policy

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TITLE = "From a dense run to experts"
# Makes small what a command does; where things are, and what is done, is the page's.
SMALL = ["--gin.BATCH_SIZE=8", "--gin.LOG_EVERY=1", "--gin.LEARNING_RATE=0.01", "--gin.WARMUP_STEPS=1"]
SIZES = {"vocab_size": 32, "embed_dim": 16, "mlp_dim": 24, "num_heads": 2, "head_dim": 8}
SMALL += [f"--gin.T5Config.t5_1_1.{name}={size}" for name, size in SIZES.items()]


def commands() -> list[list[str]]:
    """The words after `clp` of the section's commands."""
    sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(TITLE)]
    (block,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[:2] for words in lines] == [["clp", "train"]] * 2
    return [words[1:] for words in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Who followed the first command, and stays there."""
    home = tmp_path_factory.mktemp("home")
    make_data(home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        clp(*commands()[0], *SMALL, "--gin.NUM_STEPS=4")
        yield home


def first_step(run_dir: Path) -> dict[str, float]:
    return read_metrics(run_dir / "metrics.jsonl")[0]


def test_the_first_step_is_the_dense_policys(home):
    dense, sparse = commands()
    clp(*dense, *SMALL, "--gin.NUM_STEPS=1", "--gin.INITIAL_CHECKPOINT=runs/dense", "--gin.RUN_DIR=runs/on")
    clp(*sparse, *SMALL, "--gin.NUM_STEPS=2")
    before, after = (first_step(home / "runs" / name) for name in ("on", "sparse"))
    assert before["cross_entropy"] != first_step(home / "runs" / "dense")["cross_entropy"]
    np.testing.assert_allclose(after["cross_entropy"], before["cross_entropy"], rtol=1e-6)
    balance = 0.01 * after["router/balance_loss"]
    np.testing.assert_allclose(after["loss"], after["cross_entropy"] + balance, rtol=1e-6)

    # Experts are no copies of each other any more, and the run is a policy of its own.
    policy = load_policy(home / "runs" / "sparse")
    kernel = np.asarray(policy.params["encoder"]["layers"]["layer_1"]["mlp"]["experts"]["wo"]["kernel"])
    assert kernel.shape == (1, 8, 24, 16) and np.abs(kernel - kernel[:, :1]).max(axis=(0, 2, 3))[1:].all()


@pytest.mark.parametrize(("words", "same"), [([], False), (["--gin.TokenChoice.renormalize=True"], True)])
def test_switch_starts_there_if_its_gate_is_one(home, words, same, tmp_path):
    words = [*commands()[1][:-1], *SMALL, *words, "--gin.TokenChoice.train_capacity=8.0", "--gin.NUM_STEPS=1"]
    clp(*words, f"--gin.RUN_DIR={tmp_path / 'switch'}")
    clp(*commands()[0], *SMALL, *words[-1:], "--gin.INITIAL_CHECKPOINT=runs/dense", f"--gin.RUN_DIR={tmp_path / 'on'}")
    before, after = (first_step(tmp_path / name) for name in ("on", "switch"))
    assert after["router/dropped"] == 0
    assert (abs(after["cross_entropy"] / before["cross_entropy"] - 1) < 1e-6) == same


def test_what_can_not_be_upcycled_is_told(home, capfd):
    sparse = commands()[1]
    told = refuses(capfd, *sparse, *SMALL, "--gin.UPCYCLE=False", "--gin.RUN_DIR=runs/other")
    assert "its moe is None" in told and "set upcycle=True" in told
    told = refuses(capfd, *sparse, *SMALL, "--gin.MoEConfig.mlp_dim=12", "--gin.RUN_DIR=runs/other")
    assert "experts of width 12 can't be copies of blocks of width 24: set MoEConfig.mlp_dim." in told
