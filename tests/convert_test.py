"""`clp convert`, `score` and `sample` over the formats: what goes in comes out, and the same policy is in all of them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizers
from command_lines import clp, lines_of, refuses
from safetensors.numpy import load_file
from stored_checkpoints import stored_as
from tiny_policies import varied_params

from clp_jax.data.vocabulary import Vocabulary, train_vocabulary
from clp_jax.interop import huggingface, safetensors_files
from clp_jax.interop.slots import flatten, unflatten
from clp_jax.main import main
from clp_jax.models.conditioning import PREDICATES, ParameterConditioning
from clp_jax.models.config import PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.models.serialization import to_json
from clp_jax.preferences import Preference
from clp_jax.rewards.normalisation import RewardStatistics
from clp_jax.training.saved_params import save_params
from clp_jax.training.streamed_params import open_params, write_params

SIZES = dict(vocab_size=31, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
POLICIES = {
    "t5": T5Config.t5_1_1(**SIZES, num_encoder_layers=1, num_decoder_layers=1),
    "llama": PaLMConfig.llama(**SIZES, num_layers=2, num_kv_heads=1, eos_ids=(2,), start_id=1, pad_id=-1),
}
# Of this one, types are all that is looked at; `convert_families_test.py` has all families.
FAMILIES = POLICIES | {"gemma": PaLMConfig.gemma(**SIZES, num_layers=2, num_kv_heads=1)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the policies as Hugging Face has them."""
    home = tmp_path_factory.mktemp("convert")
    for name, config in FAMILIES.items():
        huggingface.write(home / name, config, varied_params(Policy(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in POLICIES:
            assert main(["convert", f"hf:{name}", f"clp:run_{name}"]) == 0
        yield home


@pytest.mark.parametrize("name", POLICIES)
def test_there_and_back_is_the_same_to_the_bit(home, name):
    clp("convert", f"clp:run_{name}", f"hf:back_{name}")
    first, second = (load_file(home / directory / "model.safetensors") for directory in (name, f"back_{name}"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert json.loads((home / f"back_{name}/config.json").read_text()) == json.loads(
        (home / f"{name}/config.json").read_text()
    )
    card = (home / f"back_{name}" / "README.md").read_text()
    assert f"Hugging Face checkpoint `{name}`" in card and f"clp convert clp:run_{name} hf:back_{name}" in card


STORED = {
    "bfloat16": ("llama", lambda name: "bfloat16", "bfloat16"),
    "float16_but_wo": ("t5", lambda name: "float32" if ".wo." in name else "float16", "float16"),
    "wider_than_told": ("llama", lambda name: "float32", "bfloat16"),
    "narrower_than_told": ("gemma", lambda name: "bfloat16" if "mlp" in name else "float16", "float32"),
}


@pytest.mark.parametrize("case", STORED)
def test_every_tensor_keeps_its_type_there_and_back(home, case):
    """And what tells of ends: generation_config.json comes back where there is no tokenizer."""
    name, dtype_of, told = STORED[case]
    source = home / f"stored_{case}"
    stored_as(home / name, source, dtype_of, told)
    ends = json.dumps({"eos_token_id": [2, 7], "temperature": 0.6}, indent=2, sort_keys=True) + "\n"
    (source / "generation_config.json").write_text(ends)
    clp("convert", f"hf:{source}", f"clp:run_stored_{case}")
    clp("convert", f"clp:run_stored_{case}", f"hf:back_stored_{case}")
    clp("convert", f"hf:{source}", f"hf:direct_stored_{case}")
    for back in (home / f"back_stored_{case}", home / f"direct_stored_{case}"):
        for file in ("model.safetensors", "config.json", "generation_config.json"):
            assert (back / file).read_bytes() == (source / file).read_bytes(), (back, file)
        assert huggingface.open_checkpoint(back).config.eos_ids == (2, 7)


def test_what_was_trained_since_is_not_rounded(home):
    """float32 values that bfloat16 has not, whatever the policy came from; asked for, they are rounded."""
    stored_as(home / "llama", home / "first", lambda name: "bfloat16", "bfloat16")
    clp("convert", "hf:first", "clp:run_first")
    params, description, _ = open_params(home / "run_first")
    trained = unflatten({path: leaf.read() + np.float32(1e-5) for path, leaf in flatten(params)})
    write_params(home / "run_trained/checkpoints/3", trained, description, 3)
    clp("convert", "clp:run_trained", "hf:trained")
    clp("convert", "clp:run_trained", "hf:rounded", "--dtype=bfloat16")
    assert "`clp convert clp:run_trained hf:rounded --dtype=bfloat16`" in (home / "rounded" / "README.md").read_text()
    exact = huggingface.open_checkpoint(home / "trained").loaded()
    for path, leaf in flatten(trained):
        np.testing.assert_array_equal(dict(flatten(exact.params))[path], leaf)
    for place, dtype in (("trained", "float32"), ("rounded", "bfloat16")):
        assert {array.dtype.name for array in safetensors_files.read(home / place).values()} == {dtype}
        told = json.loads((home / place / "config.json").read_text())
        assert told == json.loads((home / "first" / "config.json").read_text()) | {"torch_dtype": dtype}


def test_what_transformers_saves_in_half_comes_back(home):
    """It keeps some tensors of a T5 in float32."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    import torch

    model = transformers.T5ForConditionalGeneration.from_pretrained(home / "t5", dtype=torch.float16)
    model.save_pretrained(home / "half")
    types = {array.dtype.name for array in safetensors_files.read(home / "half").values()}
    assert types == {"float16", "float32"}
    clp("convert", "hf:half", "clp:run_half")
    clp("convert", "clp:run_half", "hf:back_half")
    for file in ("model.safetensors", "generation_config.json"):
        assert (home / "back_half" / file).read_bytes() == (home / "half" / file).read_bytes()
    back, first = (json.loads((home / name / "config.json").read_text()) for name in ("back_half", "half"))
    assert back == first


@pytest.mark.parametrize("kind", ["t5", "t5_of_a_decoder", "llama", "gemma", "json"])
def test_an_exported_policys_tokenizer_is_found(home, kind):
    """A tokenizer given as one file: `AutoTokenizer` reads prompts of the written directory as the policy does."""
    sizes = SIZES | {"vocab_size": tiny_tokenizers.SIZE}
    decoder = PaLMConfig.gemma if kind == "gemma" else PaLMConfig.llama
    encoder_decoder = T5Config.t5_1_1(**sizes, num_encoder_layers=1, num_decoder_layers=1)
    config = encoder_decoder if kind in ("t5", "json") else decoder(**sizes, num_layers=1)
    source = home / f"bare_{kind}"
    huggingface.write(source, config, varied_params(Policy(config)))
    if kind == "json":
        model = home / "unigram.json"
        tiny_tokenizers.unigram().save(str(model))
        tiny_tokenizers.write_json(home / "tokenizer_config.json", {"eos_token": "</s>", "pad_token": "<pad>"})
    elif kind in tiny_tokenizers.SENTENCEPIECE:
        model = tiny_tokenizers.sentencepiece_directory(home / f"files_{kind}", kind) / "tokenizer.model"
    else:
        model = home / f"{kind}.model"
        train_vocabulary(tiny_tokenizers.TEXTS, 68, model)
    written = home / f"out_{kind}"
    clp("convert", f"hf:{source}", f"hf:{written}", f"--vocabulary={model}")
    name = {"json": "tokenizer.json", "llama": "tokenizer.model", "gemma": "tokenizer.model"}.get(kind, "spiece.model")
    assert (written / name).read_bytes() == model.read_bytes()
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    ours, theirs = Vocabulary.load(model), transformers.AutoTokenizer.from_pretrained(written)
    for text in tiny_tokenizers.TEXTS:
        assert theirs(text).input_ids == ours.encode_prompt(text)
    again = Vocabulary.load(written)
    assert [again.encode_prompt(text) for text in tiny_tokenizers.TEXTS] == [
        ours.encode_prompt(text) for text in tiny_tokenizers.TEXTS
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_sampled_scores_as_it_was_sampled(home, name):
    """Lines in any order, of several lengths, with bad ones between them."""
    prompts = [[3, 4, 5], [9] * 40, [7], [8, 9]]
    rows = [json.dumps({"inputs": prompt}) for prompt in prompts]
    (home / "prompts.jsonl").write_text("\n".join([*rows[:2], "{}", *rows[2:]]))
    out = home / f"samples_{name}.jsonl"
    with pytest.raises(SystemExit, match="1"):
        clp(
            "sample",
            f"--checkpoint=run_{name}",
            "--input=prompts.jsonl",
            f"--output={out}",
            "--max_tokens=6",
            "--seed=3",
        )
    samples = lines_of(out)
    assert [line["line"] for line in samples] == [1, 2, 4, 5] and [line["inputs"] for line in samples] == prompts
    (home / "again.jsonl").write_text(
        "\n".join(json.dumps({"inputs": s["inputs"], "targets": s["tokens"]}) for s in samples)
    )
    scored = home / f"scored_{name}.jsonl"
    clp("score", f"--checkpoint=run_{name}", "--input=again.jsonl", f"--output={scored}", "--batch_size=2")
    for line, sample in zip(lines_of(scored), samples, strict=True):
        np.testing.assert_allclose(line["logprobs"], sample["logprobs"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(line["total"], sum(line["logprobs"]), rtol=1e-6)
    # A line's samples do not depend on the lines around it.
    (home / "alone.jsonl").write_text("\n\n\n" + rows[2])
    alone = home / f"alone_{name}.jsonl"
    clp("sample", f"--checkpoint=run_{name}", "--input=alone.jsonl", f"--output={alone}", "--max_tokens=6", "--seed=3")
    assert lines_of(alone)[0]["tokens"] == samples[2]["tokens"]


@pytest.mark.parametrize("strategy", ["beam", "best_of_n"])
def test_strategies(home, strategy):
    (home / "one.jsonl").write_text('{"inputs": [3, 4, 5]}')
    out = home / f"{strategy}.jsonl"
    words = ["sample", "--checkpoint=run_llama", "--input=one.jsonl", f"--output={out}", "--max_tokens=5"]
    clp(*words, f"--strategy={strategy}", "--num_samples=2")
    (line,) = lines_of(out)
    assert np.ndim(line["text"]) == (1 if strategy == "beam" else 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf:t5", "clp:run_t5"], "run_t5 exists: it was not overwritten"),
        (["t5", "clp:new"], "source is 't5': expected hf:DIR, t5x:DIR, clp:DIR"),
        (["hf:t5", "torch:new"], "target is 'torch:new': expected hf:DIR"),
        (["hf:nowhere", "clp:new"], "nowhere/config.json does not exist"),
        (["hf:t5", "clp:new", "--weights=1,0"], "the source must be clp:RUN_DIR"),
        (["clp:run_t5", "hf:new", "--weights=1,0"], "has no rewards to weigh"),
        (["clp:run_llama", "t5x:new"], "T5X checkpoints hold encoder-decoders, not PaLMConfig"),
        (["hf:t5", "clp:new", "--optimizer"], "Hugging Face's checkpoints hold no optimizer's state"),
        (["hf:pickled", "clp:new"], "pytorch_model.bin"),
        (["hf:t5", "clp:new", "--dtype=float16"], "dtype is 'float16': expected one of float32, bfloat16 for clp"),
        (["hf:t5", "hf:new", "--vocabulary=nothere.model"], "no vocabulary at nothere.model"),
        (["hf:t5", "t5x:new", "--vocabulary=nothere.model"], "no vocabulary at nothere.model"),
        (["hf:t5", "clp:new", "--vocabulary=nothere.model"], "no vocabulary at nothere.model"),
        (["hf:t5", "hf:new", "--vocabulary=t5"], "no vocabulary at t5"),
        (["hf:t5", "hf:new", "--vocabulary=t5/config.json"], "config.json is not a tokenizer of Hugging Face's"),
        (["hf:t5", "t5x:new", "--vocabulary=t5/model.safetensors"], "model.safetensors is not a SentencePiece model"),
        (["hf:t5", "hf:new", "--vocabulary=large.model"], "large.model has 68 tokens: expected at most the 31"),
        (["hf:t5", "t5x:new", "--step=3"], "step says nothing about hf to t5x"),
        (["clp:run_t5", "hf:new", "--scanned"], "scanned says nothing about clp to hf"),
        (["hf:t5"], "convert still needs --target=VALUE.\n"),
        (["hf:t5/model.pt", "clp:new"], "model.pt is a pickle, which runs code when it is opened"),
        (["clp:run_t5", "t5x:new", "--layout=foo"], "layout is 'foo': expected one of legacy, orbax"),
        (["clp:run_t5", "hf:new", "--max_shard_gb=0"], "max_shard_gb is 0.0: expected a positive number"),
        (["hf:t5", "clp:new", "--overrides=nonsense=5"], "overrides: T5Config has no field 'nonsense'"),
        (["hf:llama", "clp:new", "--overrides=num_layers=abc"], "num_layers is 'abc': expected an integer."),
        (["hf:llama", "clp:new", "--overrides=num_heads=0"], "PaLMConfig.num_heads is 0: expected at least 1."),
        (
            ["hf:t5", "clp:new", "--gin_file=models/t5_1_1_tiny.gin", "--gin.convert.model=%MODEL"],
            "model says nothing about hf",
        ),
        (["hf:t5", "t5x:new", "--overrides=logit_cap=3.0"], "T5X can't express T5Config with logit_cap=3.0"),
        (["hf:t5", "clp:new", "more"], "what is 'more'?"),
    ],
)
def test_what_can_not_be_converted(home, words, message, capfd):
    if "hf:pickled" in words and not (home / "pickled").exists():
        (home / "pickled").mkdir()
        shutil.copyfile(home / "t5" / "config.json", home / "pickled" / "config.json")
        (home / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    if "--vocabulary=large.model" in words:
        train_vocabulary(tiny_tokenizers.TEXTS, 68, home / "large.model")
    assert message in refuses(capfd, "convert", *words)
    assert not (home / "new").exists()


@pytest.mark.parametrize("subset", ["full", "attention"])
def test_a_conditioned_policy_is_exported_at_weights(home, subset):
    """Every parameter is the closed form of the mixture, and transformers computes with it what the policy does."""
    policy, weights = Policy(POLICIES["t5"]), (0.25, 0.75)
    first, second, shared = (varied_params(policy, seed) for seed in (1, 2, 3))
    ours = {path: [leaf for _, leaf in others] for path, others in zip_leaves(shared, first, second).items()}
    chosen = PREDICATES[subset]
    copies = {path: np.stack(leaves[1:]) if chosen(path) else np.asarray(leaves[0]) for path, leaves in ours.items()}
    mixed = {
        path: np.tensordot(np.float32(weights), leaf, 1) if chosen(path) else leaf for path, leaf in copies.items()
    }
    write_conditioned(home / f"run_{subset}", policy, ParameterConditioning(subset, 2), unflatten(copies), shared)
    clp("convert", f"clp:run_{subset}", f"hf:at_{subset}", "--weights=0.25,0.75")
    found = huggingface.open_checkpoint(home / f"at_{subset}").loaded()
    assert found.config == policy.config
    for path, leaf in flatten(found.params):
        np.testing.assert_allclose(leaf, mixed[path], rtol=1e-6, atol=1e-7, err_msg="/".join(path))
    assert "Mixed at the reward weights a 0.25, b 0.75." in (home / f"at_{subset}" / "README.md").read_text()
    transformers = pytest.importorskip("transformers")
    import torch

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(home / f"at_{subset}").eval()
    inputs, tokens = np.asarray([[3, 4, 5, 1]], np.int32), np.asarray([[0, 6, 7]], np.int32)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(inputs), decoder_input_ids=torch.tensor(tokens)).logits.numpy()
    logits = policy.bind(jax.tree.map(jnp.asarray, unflatten(mixed)))(jnp.asarray(inputs), jnp.asarray(tokens))
    np.testing.assert_allclose(logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("subset", "alpha_min"), [("full", 0.1), ("attention", 0.1), ("logits", None)])
def test_one_array_at_a_time_is_mixed_as_all_are(home, subset, alpha_min):
    """To the bit, with the reference as a component too: also of arrays that have no copies."""
    policy, conditioning = Policy(POLICIES["t5"]), ParameterConditioning(subset, 2, alpha_min)
    first, second, reference = (varied_params(policy, seed) for seed in (1, 2, 3))
    both = {path: [leaf for _, leaf in leaves] for path, leaves in zip_leaves(first, second).items()}
    chosen = PREDICATES[subset]
    copies = unflatten({path: np.stack(leaves) if chosen(path) else leaves[0] for path, leaves in both.items()})
    run = f"run_mixed_{subset}"
    write_conditioned(home / run, policy, conditioning, copies, reference)
    clp("convert", f"clp:{run}", f"hf:mixed_{subset}", "--weights=0.25,0.75", "--alpha=0.3")
    preference = Preference.of(np.float32([0.25, 0.75]), 0.3)
    expected = dict(flatten(jax.jit(conditioning.mix)(copies, reference, preference)))
    for path, leaf in flatten(huggingface.open_checkpoint(home / f"mixed_{subset}").loaded().params):
        np.testing.assert_array_equal(leaf, expected[path], err_msg="/".join(path))
    card = (home / f"mixed_{subset}" / "README.md").read_text()
    assert f"weights a 0.25, b 0.75{' and the KL weight 0.3' if alpha_min else ''}.\n" in card
    assert f"`clp convert clp:{run} hf:mixed_{subset} --weights=0.25,0.75`" in card


def zip_leaves(*trees):
    """Leaves of equal trees by path."""
    flat = [flatten(tree) for tree in trees]
    return {leaves[0][0]: leaves for leaves in zip(*flat, strict=True)}


def write_conditioned(place: Path, policy: Policy, conditioning: ParameterConditioning, params, reference) -> None:
    """What training of a conditioned policy leaves."""
    description = {
        "stage": "clp",
        "model": to_json(policy.config),
        "conditioning": to_json(conditioning),
        "rewards": ["a", "b"],
        "reward_fingerprints": {},
        "prompt_length": 8,
        "max_length": 8,
        "vocabulary": None,
    }
    save_params(place / "checkpoints" / "1", {"policy": params}, description, step=1)
    save_params(place / "reference", reference, description)
    RewardStatistics(("a", "b"), (0.0, 0.0), (1.0, 1.0), 4).save(place)


def test_text_needs_a_tokenizer(home, capfd):
    (home / "text.jsonl").write_text('{"inputs": "text", "targets": [3]}\n{"inputs": [3], "targets": [4]}')
    with pytest.raises(SystemExit, match="1"):
        clp("score", "--checkpoint=run_t5", "--input=text.jsonl")
    out = capfd.readouterr()
    assert "line 1 was skipped: this policy has no tokenizer" in out.err and json.loads(out.out)["line"] == 2
