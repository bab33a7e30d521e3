"""The README's section on Flan-T5, followed: its commands as they are typed there, on a tiny checkpoint with random weights."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_lines import clp, lines_of
from safetensors.numpy import load_file
from tiny_policies import varied_params

from clp_jax.array_types import Array, Float, Int, Params
from clp_jax.data.manifest import Manifest
from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.interop import huggingface
from clp_jax.interop.slots import flatten
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.sampling.score import score
from clp_jax.training.metrics import read_metrics
from clp_jax.training.policies import LoadedPolicy, load_policy

README = Path(__file__).parents[2] / "README.md"
TITLE = "Starting from Flan-T5, and leaving with what others load"
WORDS = ("array", "file", "list", "string", "model", "graph", "table", "index", "shape", "path", "a", "of", "the", "to")
PIECES, SENTINELS = 40, 4
STEPS = 3
LENGTHS = {"inputs": 24, "targets": 8}

# As in Flan-T5's files, but for the sizes; the model has rows that no token of the tokenizer has.
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 24,
    "d_kv": 4,
    "d_model": 16,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 8,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": PIECES + SENTINELS + 4,
}
GENERATION = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
TOKENIZER = {
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(SENTINELS)],
    "eos_token": "</s>",
    "extra_ids": SENTINELS,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}
POLICY = T5Config.t5_1_1(
    vocab_size=CONFIG["vocab_size"],
    embed_dim=16,
    mlp_dim=24,
    num_heads=3,
    head_dim=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_buckets=8,
    max_distance=8,
    dropout_rate=0.1,
)

# Makes small what a command does; where things are, and what is done, is the README's.
TRAIN = [f"--gin.NUM_STEPS={STEPS}", "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=4", "--gin.LOG_EVERY=1"]
SMALL = {
    "prepare": [f"--gin.LENGTHS={LENGTHS}"],
    "train": [
        *TRAIN,
        "--gin.LEARNING_RATE=0.03",
        "--gin.MAX_LENGTH=6",
        "--gin.ConditionalPolicy.statistics_prompts=16",
    ],
}


def section() -> str:
    sections = re.split(r"^## ", README.read_text("utf-8"), flags=re.MULTILINE)
    (found,) = [text for text in sections if text.startswith(TITLE)]
    return found


def commands(block: int) -> list[list[str]]:
    """The words after `clp` of a block's commands."""
    text = re.findall(r"```sh\n(.*?)```", section(), flags=re.DOTALL)[block].replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert all(words[0] == "clp" for words in lines)
    return [words[1:] for words in lines]


def write_flan(directory: Path) -> None:
    """A directory as Flan-T5's, with a tokenizer trained here."""
    huggingface.write(directory, POLICY, varied_params(Policy(POLICY)))
    # With words as tokens, samples of random weights differ in how many of their words the document has.
    rng = np.random.default_rng(0)
    texts = ["summarize: ...", *(" ".join(rng.choice(WORDS, 6)) for _ in range(64))]
    train_vocabulary(texts, PIECES, directory / "spiece.model")
    files = {"config": CONFIG, "generation_config": GENERATION, "tokenizer_config": TOKENIZER}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def write_jsonl(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [{"inputs": " ".join(rng.choice(WORDS, 5)), "targets": " ".join(rng.choice(WORDS, 2))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclasses.dataclass(frozen=True)
class Followed:
    """A directory in which the first commands were run, and what each printed by its first word."""

    home: Path
    printed: dict[str, str]

    def path(self, name: str) -> Path:
        return self.home / name

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.home / name / "model.safetensors")

    def run(self) -> LoadedPolicy:
        return load_policy(self.home / "runs" / "flan" / "clp")


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    """Who followed the section to the end of its first commands, and stays there."""
    home = tmp_path_factory.mktemp("flan")
    write_flan(home / "flan-t5-small")
    for seed, (name, count) in enumerate({"train": 24, "validation": 6, "test": 6}.items()):
        write_jsonl(home / f"{name}.jsonl", count, seed)
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for words in commands(0):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                clp(*words, *SMALL.get(words[0], []))
            printed[words[0]] = out.getvalue()
        yield Followed(home, printed)


def test_the_section_says_what_is_tested_here():
    """The places that the tests look at; another command is to have its test, too."""
    assert [words[0] for words in commands(0)] == ["convert", "prepare", "train", "sample", "convert"]
    assert [words[0] for words in commands(1)] == ["score", "sample"]
    first, last = commands(0)[0], commands(0)[-1]
    assert first == ["convert", "hf:flan-t5-small", "clp:runs/flan/start"]
    assert last == ["convert", "clp:runs/flan/clp", "hf:flan-t5-brief", "--weights", "0.2,0.8"]


def test_the_start_is_the_checkpoint_to_the_bit(flan):
    clp("convert", "clp:runs/flan/start", "hf:back")
    before, after = flan.tensors("flan-t5-small"), flan.tensors("back")
    assert before.keys() == after.keys() and "lm_head.weight" in before
    for name, tensor in before.items():
        assert after[name].tobytes() == tensor.tobytes() and after[name].dtype == tensor.dtype, name
    assert json.loads(flan.path("back/config.json").read_text()) == CONFIG


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer_config.json"])
def test_the_tokenizer_goes_through_to_the_byte(flan, name):
    assert flan.path(f"flan-t5-brief/{name}").read_bytes() == flan.path(f"flan-t5-small/{name}").read_bytes()


def test_the_files_around_the_tensors_are_flans(flan):
    assert json.loads(flan.path("flan-t5-brief/config.json").read_text()) == CONFIG
    assert json.loads(flan.path("flan-t5-brief/generation_config.json").read_text()) == GENERATION


def test_the_data_has_the_checkpoints_vocabulary(flan):
    theirs = Vocabulary.load(flan.path("flan-t5-small"))
    assert Manifest.load(flan.path("runs/flan/data")).vocabulary_fingerprint == theirs.fingerprint
    for place in ("runs/flan/data", "runs/flan/clp"):
        assert Vocabulary.load(flan.path(place)).fingerprint == theirs.fingerprint


def test_the_run_starts_at_the_checkpoint_and_learns_both_rewards(flan):
    run = flan.run()
    assert (run.step, run.objectives) == (STEPS, ("coverage", "brevity"))
    assert [line["step"] for line in read_metrics(flan.path("runs/flan/clp/metrics.jsonl"))] == [1, 2, 3]
    start = dict(flatten(huggingface.open_checkpoint(flan.path("flan-t5-small")).loaded().params))
    trained = dict(flatten(run.params))
    for path, leaf in flatten(run.reference):
        np.testing.assert_array_equal(leaf, start[path], err_msg="/".join(path))
    components = [path for path, leaf in trained.items() if leaf.shape == (2, *start[path].shape)]
    assert len(components) == len(start)
    assert not any(np.array_equal(trained[path][0], trained[path][1]) for path in components)


def test_what_leaves_is_the_components_mixed_at_the_weights(flan):
    trained = dict(flatten(flan.run().params))
    clp("convert", "clp:runs/flan/clp", "hf:long", "--weights", "0.8,0.2")
    for name, weights in (("flan-t5-brief", (0.2, 0.8)), ("long", (0.8, 0.2))):
        found = huggingface.open_checkpoint(flan.path(name)).loaded().params
        for path, leaf in flatten(found):
            expected = np.tensordot(np.float32(weights), trained[path], 1)
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg="/".join(path))
    brief, long = flan.tensors("flan-t5-brief"), flan.tensors("long")
    assert not any(np.array_equal(brief[name], long[name]) for name in brief)
    assert "weights coverage 0.2, brevity 0.8." in flan.path("flan-t5-brief/README.md").read_text()


def sampled(flan: Followed, weights: str) -> dict:
    """What is sampled of the README's prompt, with the seed that a single prompt has."""
    words = next(words for words in commands(0) if words[0] == "sample")
    flan.path("prompt.jsonl").write_text(json.dumps({"inputs": words[words.index("--prompt") + 1], "seed": 0}))
    out = flan.path(f"at_{weights}.jsonl")
    clp("sample", "--checkpoint=runs/flan/clp", f"--weights={weights}", "--input=prompt.jsonl", f"--output={out}")
    (line,) = lines_of(out)
    return line


def test_sampling_prints_the_text(flan):
    text = sampled(flan, "0.8,0.2")["text"]
    assert text and flan.printed["sample"].split() == text.split()


@functools.partial(jax.jit, static_argnums=0)
def scored(policy: Policy, params: Params, inputs: Int[Array, "B S"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    return score(policy.bind(params), inputs, tokens)


def log_probs(run: LoadedPolicy, params: Params, text: str, tokens: list[int]) -> np.ndarray:
    """Of a completion's tokens, by ordinary parameters; of one shape for all."""
    prompt = run.vocabulary.encode_prompt(text)
    rows = [ids + [0] * (LENGTHS[name] - len(ids)) for name, ids in (("inputs", prompt), ("targets", tokens))]
    return np.asarray(scored(run.served, params, *(jnp.asarray([row], jnp.int32) for row in rows))[0, : len(tokens)])


def test_the_corners_write_with_a_component_each(flan):
    """Log-probabilities of the samples are those of the weights' own component, and not of the other."""
    run = flan.run()
    components = [jax.tree.map(lambda x, i=i: x[i], run.params) for i in range(2)]
    for own, weights in enumerate(("1,0", "0,1")):
        line = sampled(flan, weights)
        of = [log_probs(run, params, line["inputs"], line["tokens"]) for params in components]
        np.testing.assert_allclose(line["logprobs"], of[own], rtol=1e-4, atol=1e-5)
        assert np.abs(line["logprobs"] - of[1 - own]).max() > 0.01


def test_files_are_answered(flan):
    """The commands on files of requests; pairs are scored by the policy mixed at the weights."""
    rows = lines_of(flan.path("test.jsonl"))[:3]
    flan.path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flan.path("prompts.jsonl").write_text("\n".join(json.dumps({"inputs": row["inputs"]}) for row in rows))
    for words in commands(1):
        clp(*words)
    run = flan.run()
    params = run.steerable().at(run.preference((0.2, 0.8), 0.05))
    for row, line in zip(rows, lines_of(flan.path("scored.jsonl")), strict=True):
        expected = log_probs(run, params, row["inputs"], run.vocabulary.encode_target(row["targets"]))
        np.testing.assert_allclose(line["logprobs"], expected, rtol=1e-4, atol=1e-5)
    assert [line["inputs"] for line in lines_of(flan.path("out.jsonl"))] == [row["inputs"] for row in rows]


def test_finetuning_first(flan):
    (line,) = re.findall(r"`clp (train [^`]*)`", section())
    clp(*shlex.split(line), "--gin.DATA_DIR=runs/flan/data", "--gin.RUN_DIR=runs/flan/sft", *TRAIN)
    tuned, start = load_policy(flan.path("runs/flan/sft")), load_policy(flan.path("runs/flan/start"))
    assert tuned.policy == start.policy and tuned.step == STEPS
    before = dict(flatten(start.params))
    for path, leaf in flatten(tuned.params):
        assert leaf.shape == before[path].shape and not np.array_equal(leaf, before[path]), path


def test_transformers_loads_what_leaves(flan):
    """Its logits are those of the policy mixed at the weights, its tokens those of the run."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    torch = pytest.importorskip("torch", reason="needs the extra `hf`")
    run, place = flan.run(), flan.path("flan-t5-brief")
    prompt = "list of the graph"
    inputs = np.asarray([run.vocabulary.encode_prompt(prompt)], np.int32)
    tokens = np.asarray([[0, *run.vocabulary.encode("a graph")]], np.int32)
    assert transformers.AutoTokenizer.from_pretrained(place)(prompt).input_ids == inputs[0].tolist()
    params = run.steerable().at(run.preference((0.2, 0.8), 0.05))
    ours = jax.jit(lambda params: run.served.bind(params)(jnp.asarray(inputs), jnp.asarray(tokens)))(params)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(place).eval()
    arrays = {"input_ids": inputs, "decoder_input_ids": tokens}
    with torch.no_grad():
        theirs = model(**{name: torch.tensor(x, dtype=torch.long) for name, x in arrays.items()}).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
