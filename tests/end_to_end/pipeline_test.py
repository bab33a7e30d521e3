"""The main job as a user types it, on the user's own data and with a reward of the user's: small, and complete."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from command_lines import clp, refuses

from clp_jax.evaluation.sweep import Sweep
from clp_jax.training.metrics import read_metrics

NOUNS = ("array", "file", "list", "string", "model", "graph", "table", "index", "shape", "path")
VERBS = ("Return", "Copy", "Open", "Close", "Sort", "Read", "Write", "Split", "Join", "Check")
SIZES = {
    "embed_dim": 16,
    "mlp_dim": 32,
    "num_heads": 2,
    "head_dim": 8,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}

REWARDS = """\
from __gin__ import dynamic_registration
from clp_jax.rewards import programmatic
import rewards_of_the_user
REWARDS = [@programmatic.FunctionReward(), @programmatic.Brevity()]
programmatic.FunctionReward.name = 'letters'
programmatic.FunctionReward.function = @rewards_of_the_user.letters
"""


def write_jsonl(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with path.open("w") as lines:
        for _ in range(count):
            verb, noun, other = rng.choice(VERBS), *rng.choice(NOUNS, 2, replace=False)
            record = {
                "inputs": f"{noun} {other}: how to {verb.lower()} it.",
                "targets": f"{verb} the {noun} of the {other}.",
            }
            lines.write(json.dumps(record) + "\n")


MODEL = [f"--gin.T5Config.t5_1_1.{name}={value}" for name, value in SIZES.items()] + ["--gin.VOCAB_SIZE=50"]
STEPS = ["--gin.NUM_STEPS=3", "--gin.BATCH_SIZE=8", "--gin.LOG_EVERY=1"]
DATA = ["--gin.DATA_DIR=data"]
RL = ["--gin_file=rewards.gin", *DATA, *STEPS, "--gin.SFT_DIR=sft", "--gin.MAX_LENGTH=8"]
RL += ["--gin.ConditionalPolicy.statistics_prompts=16"]
EVALUATE = ["evaluate", "--gin_file=runs/evaluate.gin", "--gin_file=rewards.gin", *DATA, "--gin.NUM_PROMPTS=12"]
EVALUATE += ["--batch_size=8", "--resolution=2"]


def train_policy(run_dir: str, example: str, *more: str) -> None:
    clp("train", f"--gin_file=examples/{example}.gin", *RL, f"--gin.RUN_DIR={run_dir}", *more)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with prepared data, a supervised run, a steerable one and two experts, made by commands alone."""
    directory = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    os.chdir(directory)
    try:
        for name, count, seed in (("train", 96, 0), ("validation", 24, 1), ("test", 24, 2)):
            write_jsonl(directory / f"{name}.jsonl", count, seed)
        (directory / "rewards_of_the_user.py").write_text(
            "def letters(prompts, completions, references):\n    return [float(len(text)) for text in completions]\n"
        )
        (directory / "rewards.gin").write_text(REWARDS)
        files = [f"--gin.{split.upper()}_FILE={split}.jsonl" for split in ("train", "validation", "test")]
        lengths = "--gin.LENGTHS={'inputs': 16, 'targets': 12}"
        clp("prepare", "--gin_file=runs/prepare_jsonl.gin", *DATA, *files, lengths, "--gin.VOCAB_SIZE=50")
        clp(
            "train",
            "--gin_file=examples/pydoc_sft.gin",
            *MODEL,
            *DATA,
            *STEPS,
            "--gin.RUN_DIR=sft",
            "--gin.WARMUP_STEPS=1",
        )
        train_policy("full", "pydoc_clp_full")
        for i in range(2):
            weights = f"--gin.WEIGHTS={(1.0 - i, float(i))}"
            train_policy(f"expert_{i}", "pydoc_expert", weights, "--gin.NUM_STEPS=2")
        clp(*EVALUATE, "--gin.RUN_DIR=full")
    finally:
        os.chdir(before)
    return directory


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.chdir(home)


def test_the_front_is_there(home):
    sweep = Sweep.load(home / "full")
    assert sweep.objectives == ("letters", "brevity")
    assert [point.weights for point in sweep.points] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert sweep.num_prompts == 12
    assert len(sweep.examples) == 8
    assert len(read_metrics(home / "full" / "metrics.jsonl")) == 3


def test_raw_rewards_are_the_users_numbers(home):
    sweep = Sweep.load(home / "full")
    mean, std = sweep.reference_mean[0], sweep.reference_std[0]
    for point in sweep.points:
        assert point.raw_rewards["letters"] == pytest.approx(mean + std * point.rewards["letters"].mean, rel=1e-5)


def test_the_same_sweep_is_not_run_again(home, capfd):
    before = (home / "full" / "results.json").stat()
    clp(*EVALUATE, "--gin.RUN_DIR=full")
    assert "nothing to do" in capfd.readouterr().err
    assert (home / "full" / "results.json").stat().st_mtime_ns == before.st_mtime_ns


def test_another_sweep_keeps_the_earlier_one(home, capfd):
    output = "--output=full/other.json"
    clp(*EVALUATE, "--gin.RUN_DIR=full", output)
    clp(*EVALUATE, "--gin.RUN_DIR=full", output, "--seed=1")
    assert "other-1.json" in capfd.readouterr().err
    assert Sweep.load(home / "full" / "other-1.json").settings["seed"] == 0
    assert Sweep.load(home / "full" / "other.json").settings["seed"] == 1


@pytest.mark.parametrize(
    ("method", "paths", "more", "calls"),
    [
        ("soup", ["expert_0", "expert_1"], [], 1),
        ("mod", ["expert_0", "expert_1"], [], 2),
        ("dera", ["expert_0", "expert_1"], ["--alpha_min=0.1", "--gin.ALPHA=0.5"], 3),
        ("dera", ["expert_1"], ["--alpha_min=0.1", "--gin.ALPHA=0.5"], 2),
        ("per_weight", ["expert_0", "expert_1"], ["--gin.evaluate.weights=[(1.0, 0.0), (0.0, 1.0)]"], 1),
    ],
)
def test_baselines(home, method, paths, more, calls):
    output = f"{method}_{len(paths)}.json"
    words = [f"--gin.METHOD={method}", f"--gin.CHECKPOINTS={paths}", f"--output={output}"]
    clp(*EVALUATE, *words, f"--name={method}", *more)
    sweep = Sweep.load(home / output)
    assert (sweep.method, sweep.decode_calls_per_token) == (method, calls)


def test_only_comparable_experts_are_combined(home, capfd):
    settings = ["--gin.WEIGHTS=(0.0, 1.0)", "--gin.NUM_STEPS=1", "--gin.Brevity.limit=3"]
    train_policy("expert_of_others", "pydoc_expert", *settings)
    words = [*EVALUATE, "--gin.CHECKPOINTS=['expert_0', 'expert_of_others']", "--output=none.json"]
    assert "other rewards of the same names" in refuses(capfd, *words, "--gin.METHOD=soup")
    rows = "--gin.evaluate.weights=[(1.0, 0.0), (0.0, 1.0)]"
    assert "other rewards of the same names" in refuses(capfd, *words, "--gin.METHOD=per_weight", rows)
    words[-2] = "--gin.CHECKPOINTS=['expert_1', 'full']"
    assert "full/checkpoints/3 is conditioned" in refuses(capfd, *words, "--gin.METHOD=per_weight", rows)
    assert not (home / "none.json").exists()


def test_realignment_needs_a_kl_weight(capfd):
    words = [*EVALUATE, "--gin.METHOD=dera", "--gin.CHECKPOINTS=['expert_1']", "--alpha_min=0.1", "--output=none.json"]
    assert "alpha is 0" in refuses(capfd, *words, "--gin.ALPHA=0")


def test_a_sweep_makes_the_directory_of_its_output(home):
    clp(*EVALUATE, "--gin.CHECKPOINTS=['expert_0']", "--output=new/place/x.json", "--gin.evaluate.weights=[(1.0, 0.0)]")
    assert Sweep.load(home / "new" / "place" / "x.json").method == "expert_0"


def test_corners_of_soups_and_mixed_logits_are_the_experts(home):
    sweeps = []
    for name, method, paths in (
        ("alone", "checkpoint", "['expert_0']"),
        ("soup_c", "soup", "['expert_0', 'expert_1']"),
        ("mod_c", "mod", "['expert_0', 'expert_1']"),
    ):
        words = [
            f"--gin.METHOD={method}",
            f"--gin.CHECKPOINTS={paths}",
            f"--output={name}.json",
        ]
        clp(*EVALUATE, *words, "--gin.evaluate.weights=[(1.0, 0.0)]")
        sweeps.append(Sweep.load(home / f"{name}.json"))
    texts = [[example.completions for example in sweep.examples] for sweep in sweeps]
    assert texts[0] == texts[1] == texts[2]


def test_report(home, capfd):
    clp("report", "--run_dirs=full,soup_2.json" if (home / "soup_2.json").is_file() else "--run_dirs=full")
    out = capfd.readouterr().out
    page = home / "full" / "report" / "index.html"
    assert "rank correlation" in out
    assert "One document at several weights" in out
    assert page.name in out.replace("\n", "")
    assert "data:image/png;base64," in page.read_text()


def test_sampling_by_hand(home, capfd, monkeypatch):
    words = ["sample", "--checkpoint=full", "--prompt=array file: how to sort it.", "--max_prompt=16"]
    clp(*words, "--weights=0.8,0.2")
    first = capfd.readouterr().out
    clp(*words, "--weights=0.8,0.2")
    assert capfd.readouterr().out == first
    (home / "lines.txt").write_text(
        "/weights 0.2,0.8\nlist path: how to read it.\n/weights 0.5,0.6\n/nonsense\n/quit\nnever\n"
    )
    with (home / "lines.txt").open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        clp("sample", "--checkpoint=full", "--max_prompt=16")
    out = capfd.readouterr().out
    assert "letters 0.20, brevity 0.80" in out
    assert "weights 0.5,0.6 sum to 1.1" in out
    assert "unknown command /nonsense" in out


def test_a_file_of_prompts(home, capfd):
    (home / "prompts.jsonl").write_text('{"inputs": "array file: how to sort it."}\nnot json\n{"inputs": "list"}\n')
    with pytest.raises(SystemExit, match="1"):
        clp("sample", "--checkpoint=full", "--input=prompts.jsonl", "--output=out.jsonl", "--max_prompt=16")
    said = capfd.readouterr().err
    assert "line 2 was skipped" in said and "1 line was skipped; the others have their answers" in said
    lines = [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 3]
    assert all(len(line["tokens"]) == len(line["logprobs"]) for line in lines)


def test_an_experiment_on_one_budget(home, capfd):
    words = ["experiment", "--gin_file=examples/pydoc_experiment.gin", *[w for w in RL if "LOG_EVERY" not in w]]
    words += ["--gin.OUTPUT_DIR=experiment", "--gin.NUM_SEEDS=2", "--gin.NUM_PROMPTS=8", "--gin.NUM_STEPS=2"]
    words += ["--gin.experiment.methods=[@full/experiment.Conditioned(), @experiment.Experts()]"]
    clp(*words)
    table = (home / "experiment" / "experiment.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["full", "soup", "mod"]
    assert (home / "experiment" / "report" / "index.html").is_file()
    content = json.loads((home / "experiment" / "experiment.json").read_text())
    assert set(content["separation"]) == {"full", "soup"}
    # The budget is shared: each of two experts has half of it.
    assert [line["step"] for line in read_metrics(home / "experiment" / "expert_0" / "seed_0" / "metrics.jsonl")] == [1]
    before = (home / "experiment" / "experiment.md").read_text()
    clp(*words)
    assert (home / "experiment" / "experiment.md").read_text() == before
    # Runs of another budget are other runs, even where they are longer; nothing is compared across budgets.
    config = (home / "experiment" / "config.gin").read_text()
    assert "\nNUM_STEPS = 2\n" in config
    alone = ["--gin.experiment.methods=[@full/experiment.Conditioned()]", "--gin.experiment.baseline='full'"]
    assert "budget: 2 -> 1" in refuses(capfd, *words, *alone, "--gin.NUM_STEPS=1")
    assert (home / "experiment" / "config.gin").read_text() == config
    one = [*words, "--gin.NUM_SEEDS=1"]
    clp(*one)
    content = json.loads((home / "experiment" / "experiment.json").read_text(), parse_constant=pytest.fail)
    assert content["summaries"][0]["hypervolume"]["high"] is None
    assert "inf" not in (home / "experiment" / "experiment.md").read_text()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("0.5,0.6", "weights 0.5,0.6 sum to 1.1: expected 1"),
        ("-0.5,1.5", "negative"),
        ("nan,1", "--weights is 'nan,1': expected Sequence[float]"),
        ("0.2,0.3,0.5", "expected 2, one per objective (letters, brevity)"),
    ],
)
def test_weights_that_are_none(weights, message, capfd):
    assert message in refuses(capfd, "sample", "--checkpoint=full", f"--weights={weights}", "--prompt=x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_samples=0", "--prompt=x"], "num_samples is 0: expected at least 1"),
        (["--max_tokens=0", "--prompt=x"], "max_tokens is 0"),
        (["--top_p=0", "--prompt=x"], "Sampling.top_p is 0"),
        (["--alpha=1.5", "--prompt=x"], "alpha"),
        (["--input=missing.jsonl"], "missing.jsonl"),
        (["--input=empty.jsonl"], "empty.jsonl"),
        (["--input=latin.jsonl"], "latin.jsonl"),
        (["--input=prompts.jsonl", "--output=taken.jsonl"], "taken.jsonl exists: it was not overwritten"),
        (["--input=prompts.jsonl", "--prompt=x"], "expected one of them"),
        (["--prompt=x", "--output=new.jsonl"], "output is written for the lines of an input"),
        (["--prompt=x", "--temperature=0", "--top_k=5"], "top_k and top_p do nothing at temperature 0"),
        (["--prompt=x", "--seed=4294967296"], "seed is 4294967296"),
        (["--prompt=Return \udcff it"], "is not UTF-8 at character 7"),
    ],
)
def test_samples_that_can_not_be_made(home, words, message, capfd):
    (home / "empty.jsonl").write_text("")
    (home / "latin.jsonl").write_bytes('{"inputs": "caf\u00e9"}\n'.encode("latin-1"))
    (home / "taken.jsonl").write_text("mine")
    assert message in refuses(capfd, "sample", "--checkpoint=full", *words)
    assert (home / "taken.jsonl").read_text() == "mine"


def test_other_rewards_than_the_runs(capfd):
    words = [w for w in EVALUATE if w != "--gin_file=rewards.gin"]
    message = refuses(capfd, *words, "--gin_file=rewards/rouge_brevity.gin", "--gin.RUN_DIR=full")
    assert "full/checkpoints/3 was trained for letters, brevity; the rewards given are rouge_l, brevity" in message


def test_more_objectives_than_rewards(capfd):
    words = ["train", "--gin_file=examples/pydoc_clp_full.gin", *RL, "--gin.RUN_DIR=three", "--gin.NUM_OBJECTIVES=3"]
    assert "3 weights, but the rewards are 2 objectives" in refuses(capfd, *words)


def test_a_run_directory_of_another_configuration(home, capfd):
    before = (home / "full" / "config.gin").read_text()
    words = ["train", "--gin_file=examples/pydoc_clp_full.gin", *RL, "--gin.RUN_DIR=full", "--gin.LEARNING_RATE=0.5"]
    assert "LEARNING_RATE" in refuses(capfd, *words)
    assert (home / "full" / "config.gin").read_text() == before


def test_a_checkpoint_that_is_no_policy(home, capfd):
    assert "no checkpoint" in refuses(capfd, "sample", "--checkpoint=nowhere", "--prompt=x").lower()
    message = refuses(capfd, *EVALUATE, "--gin.RUN_DIR=sft")
    assert "no rewards (it is supervised)" in message


def test_a_vocabulary_larger_than_the_model(capfd):
    words = [
        "train",
        "--gin_file=examples/pydoc_sft.gin",
        *MODEL,
        *DATA,
        *STEPS,
        "--gin.RUN_DIR=small",
        "--gin.WARMUP_STEPS=1",
    ]
    assert "set vocab_size to at least 50" in refuses(capfd, *words, "--gin.VOCAB_SIZE=30")


def test_data_of_another_vocabulary(home, capfd):
    files = [f"--gin.{split.upper()}_FILE={split}.jsonl" for split in ("train", "validation", "test")]
    lengths = "--gin.LENGTHS={'inputs': 16, 'targets': 12}"
    prepare = ["prepare", "--gin_file=runs/prepare_jsonl.gin", *files, lengths]
    clp(*prepare, "--gin.DATA_DIR=other", "--gin.VOCAB_SIZE=40")
    words = ["train", "--gin_file=examples/pydoc_clp_full.gin", *RL, "--gin.RUN_DIR=mixed", "--gin.DATA_DIR=other"]
    assert "another vocabulary" in refuses(capfd, *words)
    # The directory of data is not prepared over by another request either.
    assert "prepared by another request" in refuses(capfd, *prepare, "--gin.DATA_DIR=data", "--gin.VOCAB_SIZE=40")
