"""`clp convert` from and to T5X: what T5X wrote comes back to the bit, and is the policy that it was."""

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from command_lines import clp, lines_of, refuses
from safetensors.numpy import load_file
from stored_checkpoints import stored_as
from tiny_policies import varied_params

from clp_jax.interop import huggingface, safetensors_files, t5x, t5x_files
from clp_jax.interop.arrays import Source
from clp_jax.interop.slots import flatten
from clp_jax.models.config import MoEConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import TokenChoice
from clp_jax.training.policies import load_policy

FIXTURES = Path(__file__).parent / "fixtures"
RECORD = np.load(FIXTURES / "t5x_policy.npz")
SIZES = dict(vocab_size=31, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
POLICY = T5Config.t5_1_1(**SIZES, num_encoder_layers=1, num_decoder_layers=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with T5X's checkpoint in all its forms, and a policy as Hugging Face has it."""
    home = tmp_path_factory.mktemp("convert")
    huggingface.write(home / "t5", POLICY, varied_params(Policy(POLICY)))
    with tarfile.open(FIXTURES / "t5x_nano.tar.xz") as archive:
        archive.extractall(home / "t5x", filter="data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home


def legacy(home: Path, form: str = "legacy") -> Path:
    (found,) = (home / "t5x").rglob(f"{form}/checkpoint_2")
    return found


def decompressed(directory: Path) -> dict[str, bytes]:
    """Files by name: what their gzip holds, where they are chunks."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for name, data in files.items()}


@pytest.mark.parametrize("form", ["legacy", "legacy_bf16", "legacy_chunked", "orbax"])
def test_t5x_there_and_back_with_its_optimizer(home, form):
    """To the bit, in the types of the source, which none of the commands names."""
    source = legacy(home, form)
    clp("convert", f"t5x:{source}", f"clp:run_{form}", "--optimizer")
    clp("convert", f"clp:run_{form}", f"t5x:back_{form}", "--optimizer")
    clp("convert", f"t5x:{source}", f"t5x:direct_{form}", "--optimizer")
    first = t5x_files.read(source)
    for back in (home / f"back_{form}" / "checkpoint_2", home / f"direct_{form}" / "checkpoint_2"):
        again = t5x_files.read(back)
        for name in ("parameters", "slots"):
            theirs, ours = getattr(first, name), getattr(again, name)
            assert {key: array.spec for key, array in theirs.items()} == {
                key: array.spec for key, array in ours.items()
            }
            assert all(ours[key].read().tobytes() == array.read().tobytes() for key, array in theirs.items())
        if form in ("legacy", "legacy_bf16"):
            assert decompressed(back) == decompressed(source)


def test_types_go_from_format_to_format(home):
    """bfloat16 where all of the source is, and what came of it holds; types by the tensor have no meaning there."""

    def types(directory: str) -> set[str]:
        read = safetensors_files.read if (home / directory / "config.json").exists() else stored_in_t5x
        return {array.dtype.name for array in read(home / directory).values()}

    stored_as(home / "t5", home / "narrow", lambda name: "bfloat16", "bfloat16")
    clp("convert", "hf:narrow", "t5x:narrow_t5x")
    clp("convert", "hf:narrow", "clp:run_narrow")
    clp("convert", "clp:run_narrow", "t5x:narrow_run")
    clp("convert", "t5x:narrow_t5x", "hf:narrow_back")
    assert all(types(place) == {"bfloat16"} for place in ("narrow_t5x", "narrow_run", "narrow_back"))
    assert json.loads((home / "narrow_back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    first, back = (load_file(home / name / "model.safetensors") for name in ("narrow", "narrow_back"))
    assert all(np.array_equal(first[key], back[key]) for key in first)
    stored_as(home / "t5", home / "mixed", lambda name: "float32" if ".wo." in name else "bfloat16", "bfloat16")
    clp("convert", "hf:mixed", "t5x:mixed_t5x")
    assert types("mixed_t5x") == {"float32"}


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers_lie_where_they_are_wanted(home, axis, capfd):
    """And come back so: layers with a table of positions each are scanned, unasked."""
    config = T5Config.t5_1_1(**SIZES, num_encoder_layers=3, num_decoder_layers=2, bias_per_layer=True)
    name = f"scanned_{axis}"
    huggingface.write(home / name, config, varied_params(Policy(config)))
    asked = ["--scan_axis=0"] if axis == 0 else []
    clp("convert", f"hf:{name}", f"t5x:{name}_t5x", *asked)
    clp("convert", f"t5x:{name}_t5x", f"clp:{name}_run")
    clp("convert", f"clp:{name}_run", f"t5x:{name}_back")
    clp("convert", f"clp:{name}_run", f"hf:{name}_hf")
    wanted = decompressed(home / f"{name}_t5x" / "checkpoint_0")
    kernel = t5x_files.read(home / f"{name}_t5x").parameters["encoder/encoder/mlp/wi_0/kernel"]
    assert kernel.shape == ((3, 8, 12) if axis == 0 else (8, 3, 12))
    assert decompressed(home / f"{name}_back" / "checkpoint_0") == wanted
    first, back = (load_file(home / place / "model.safetensors") for place in (name, f"{name}_hf"))
    assert first.keys() == back.keys() and all(np.array_equal(first[key], back[key]) for key in first)
    told = refuses(capfd, "convert", f"t5x:{name}_t5x", "clp:new", f"--scan_axis={1 - axis}")
    assert f"expected layers along axis {1 - axis}" in told and f"--scan_axis={axis}" in told
    assert "such a policy is written with --scanned" in refuses(
        capfd, "convert", f"hf:{name}", "t5x:new", "--noscanned"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hf:t5", "t5x:new", "--scanned"], "such a policy is written without --scanned"),
        (["hf:t5", "t5x:new", "--scan_axis=2"], "scan_axis is 2: expected 0 or 1."),
        (["hf:t5", "t5x:new", "--noscanned", "--scan_axis=1"], "scan_axis is 1, and scanned is false: leave one"),
        (["hf:t5", "clp:new", "--scan_axis=1"], "scan_axis says nothing about hf to clp"),
        (
            ["t5x:LEGACY", "clp:new", "--scan_axis=1"],
            "scan_axis is 1: the checkpoint's layers are not scanned, leave it",
        ),
    ],
)
def test_layouts_that_can_not_be(home, words, message, capfd):
    assert message in refuses(capfd, "convert", *(word.replace("LEGACY", str(legacy(home))) for word in words))
    assert not (home / "new").exists()


def test_a_switch_goes_on_to_hugging_face_with_a_capacity(home, capfd):
    config = T5Config.t5_1_0(
        **SIZES, num_encoder_layers=2, num_decoder_layers=2, moe=MoEConfig(num_experts=8, router=TokenChoice(), every=2)
    )
    t5x.write(home / "switch_t5x", config, varied_params(Policy(config)), step=0)
    told = refuses(capfd, "convert", "t5x:switch_t5x", "hf:switch_hf")
    flags = ["--gin.convert.model=%MODEL", "--gin.EXPERT_CAPACITY=64"]
    assert "the router's fixed_capacity is None" in told and " ".join(flags) in told and len(told) < 600
    sizes = SIZES | dict(num_encoder_layers=2, num_decoder_layers=2)
    given = [f"--gin.T5Config.t5_1_0.{name}={value}" for name, value in sizes.items() if name != "vocab_size"]
    gin = ["--gin_file=models/switch_base_8.gin", *flags, "--gin.VOCAB_SIZE=31", *given]
    clp("convert", "t5x:switch_t5x", "hf:switch_hf", *gin)
    values = json.loads((home / "switch_hf" / "config.json").read_text())
    assert (values["model_type"], values["expert_capacity"]) == ("switch_transformers", 64)
    again = huggingface.open_checkpoint(home / "switch_hf").loaded()
    for path, leaf in flatten(varied_params(Policy(config))):
        np.testing.assert_array_equal(dict(flatten(again.params))[path], leaf)


def stored_in_t5x(directory: Path) -> Source:
    return t5x_files.read(directory).parameters


def test_scores_are_t5xs(home):
    clp("convert", f"t5x:{legacy(home)}", "clp:run_scores")
    tokens, targets = RECORD["batch/encoder_input_tokens"], RECORD["batch/decoder_target_tokens"]
    weights = RECORD["batch/decoder_loss_weights"]
    rows = [
        {"inputs": [int(t) for t in row if t], "targets": [int(t) for t, w in zip(target, weight, strict=True) if w]}
        for row, target, weight in zip(tokens, targets, weights, strict=True)
    ]
    (home / "golden.jsonl").write_text("\n".join(map(json.dumps, rows)))
    clp("score", "--checkpoint=run_scores", "--input=golden.jsonl", "--output=scored.jsonl")
    found = lines_of(home / "scored.jsonl")
    np.testing.assert_allclose([line["total"] for line in found], RECORD["score_batch"], rtol=1e-6)
    assert [len(line["logprobs"]) for line in found] == [len(row["targets"]) for row in rows]
    clp(
        *["sample", "--checkpoint=run_scores", "--input=golden.jsonl", "--output=greedy.jsonl", "--strategy=greedy"],
        "--max_tokens=16",
    )
    assert [line["tokens"] for line in lines_of(home / "greedy.jsonl")] == RECORD["greedy/tokens"].tolist()


def test_fields_may_be_overridden_and_types_chosen(home):
    clp(
        "convert",
        f"t5x:{legacy(home)}",
        "clp:run_override",
        "--overrides=dropout_rate=0.25,remat=full",
        "--dtype=bfloat16",
    )
    config = load_policy("run_override").policy.config
    assert (config.dropout_rate, config.remat, config.param_dtype) == (0.25, "full", "bfloat16")


def test_what_t5xs_directories_do_not_say_is_told(home, capfd):
    words = ["--overrides=activation=silu,eos_ids=2"]
    clp("convert", f"t5x:{legacy(home)}", "clp:run_told", *words)
    assumed = capfd.readouterr().out
    assert "assumed, as T5X's directories don't say it: norm_eps=1e-06, max_distance=128, dropout_rate=0.0." in assumed
    clp("convert", "clp:run_told", "t5x:told")
    line = "T5X's directories don't say activation=silu, eos_ids=2: read it with --overrides activation=silu,eos_ids=2."
    card = (home / "told" / "README.md").read_text()
    assert f"t5x:told: {line}" in capfd.readouterr().out and line in card
    # How it was read counts for what it is now.
    assert f"clp convert t5x:{legacy(home)} clp:run_told --overrides=activation=silu,eos_ids=2" in card
    clp("convert", "t5x:told", "clp:run_told_again", *words)
    assert load_policy("run_told_again").policy.config == load_policy("run_told").policy.config


def test_scanned_experts_there_and_back_with_their_router_stated(home, capfd):
    depths = dict(num_encoder_layers=4, num_decoder_layers=2, bias_per_layer=True)
    experts = MoEConfig(num_experts=3, router=TokenChoice(k=2, min_capacity=4, group=64), every=2, z_weight=1e-3)
    config = T5Config.t5_1_1(**SIZES, **depths, moe=experts)
    t5x.write(home / "blocks", config, varied_params(Policy(config)), step=5)
    words = ["--overrides=moe.router.k=2,moe.router.group=64"]
    clp("convert", "t5x:blocks", "clp:run_blocks", *words)
    assert "moe.balance_weight=0.01, moe.z_weight=0.001. To change it: --overrides" in capfd.readouterr().out
    assert load_policy("run_blocks").policy.config == config
    clp("convert", "clp:run_blocks", "t5x:blocks_back")
    line = "T5X's directories don't say moe.router.k=2, moe.router.group=64: read it with --overrides moe.router.k=2,"
    assert line + "moe.router.group=64." in capfd.readouterr().out
    before, after = (home / place / "checkpoint_5" for place in ("blocks", "blocks_back"))
    assert decompressed(after) == decompressed(before)
    message = refuses(capfd, "convert", "t5x:blocks", "clp:new", "--overrides=moe.router.train_capcity=2.0")
    assert "TokenChoice has no field 'train_capcity' (did you mean train_capacity?)" in message


def test_a_gin_file_states_a_t5x_policy(home, capfd):
    sizes = dict(embed_dim=16, mlp_dim=32, num_heads=2, head_dim=8)
    gin = ["--gin_file=models/t5_1_1_tiny.gin", "--gin.convert.model=%MODEL", "--gin.DROPOUT_RATE=0.1"]
    gin += [f"--gin.T5Config.t5_1_1.{name}={value}" for name, value in sizes.items()]
    assert "'decoder/logits_dense/kernel' has shape (16, 64), expected (16, 2048)" in refuses(
        capfd, "convert", f"t5x:{legacy(home)}", "clp:new", *gin
    )
    clp("convert", f"t5x:{legacy(home)}", "clp:run_stated", *gin, "--gin.VOCAB_SIZE=64")
    assert "assumed" not in capfd.readouterr().out
    depth = dict(num_encoder_layers=2, num_decoder_layers=2)
    assert load_policy("run_stated").policy.config == T5Config(vocab_size=64, **sizes, **depth, dropout_rate=0.1)
