"""Directories of Hugging Face: shards, types, tied and repeated tensors, larger models, what is carried along, what is refused."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_policies import varied_params

from clp_jax.interop import huggingface
from clp_jax.interop.hf_families import FAMILIES
from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.rope import Rope
from clp_jax.nn.routing import Dropless, TokenChoice

LLAMA = PaLMConfig(
    vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=3, scale_tied_head=False, num_kv_heads=1
)
GEMMA3 = PaLMConfig.gemma(
    vocab_size=11,
    embed_dim=8,
    mlp_dim=12,
    num_heads=2,
    head_dim=4,
    num_layers=5,
    qk_norm=True,
    post_norm=True,
    window=2,
    window_pattern=(True, True, False),
    local_rope=Rope(50.0),
)
T5 = T5Config.t5_1_0(
    vocab_size=11,
    embed_dim=8,
    mlp_dim=12,
    num_heads=2,
    head_dim=4,
    num_buckets=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
)


def params_of(config):
    return jax.tree.map(np.asarray, varied_params(Policy(config)))


@pytest.fixture
def llama(tmp_path):
    """A directory, and the parameters in it."""
    params = params_of(LLAMA)
    huggingface.write(tmp_path / "llama", LLAMA, params)
    return tmp_path / "llama", params


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def change(directory, **tensors):
    """Rewrites a file with some tensors replaced, or, where None, left out; names have __ for dots."""
    path = directory / "model.safetensors"
    found = load_file(path)
    for name, value in tensors.items():
        found.pop(name.replace("__", "."), None)
        if value is not None:
            found[name.replace("__", ".")] = value
    save_file(found, path)


@pytest.mark.parametrize("config", [LLAMA, GEMMA3, T5], ids=["llama", "gemma3", "t5"])
def test_a_fresh_policy_comes_back(tmp_path, config):
    params = params_of(config)
    huggingface.write(tmp_path / "out", config, params, card="# Card\n")
    again = huggingface.open_checkpoint(tmp_path / "out").loaded()
    assert_equal(again.params, params)
    assert huggingface.is_unchanged(config, again.origin)
    assert (tmp_path / "out" / "README.md").read_text() == "# Card\n"
    assert again.text_files == ()


def test_each_layer_is_where_it_belongs(tmp_path):
    params = params_of(GEMMA3)
    huggingface.write(tmp_path / "out", GEMMA3, params)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    decoder = params["decoder"]
    # Periods of three layers, and two that fill none.
    for layer, tree, index in [
        (0, decoder["layers"]["layer_0"], 0),
        (2, decoder["layers"]["layer_2"], 0),
        (3, decoder["rest"]["layer_0"], 0),
        (4, decoder["rest"]["layer_1"], 0),
    ]:
        name = f"model.layers.{layer}"
        np.testing.assert_array_equal(stored[f"{name}.mlp.gate_proj.weight"], tree["mlp"]["wi_0"]["kernel"][index].T)
        np.testing.assert_array_equal(
            stored[f"{name}.pre_feedforward_layernorm.weight"], tree["mlp_norm"]["scale"][index]
        )


def test_shards_and_types(tmp_path, llama):
    _, params = llama
    huggingface.write(tmp_path / "out", LLAMA, params, dtype="bfloat16", max_shard_bytes=500)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    for dtype in ("bfloat16", "float32"):
        again = huggingface.open_checkpoint(tmp_path / "out", dtype=dtype, overrides={"remat": "full"}).loaded()
        assert again.config.param_dtype == dtype
        assert again.config.remat == "full"
        assert {leaf.dtype.name for leaf in jax.tree.leaves(again.params)} == {dtype}
        assert_equal(again.params, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), rounded))
    # The origin says which type is written, wherever the parameters were in between.
    huggingface.write(tmp_path / "back", again.config, again.params, origin=again.origin)
    assert {value.dtype.name for value in load_file(tmp_path / "back" / "model.safetensors").values()} == {"bfloat16"}


def test_files_of_the_text_are_carried(tmp_path, llama):
    directory, _ = llama
    contents = {"tokenizer.model": b"\x00\xff", "tokenizer_config.json": b"{ }", "chat_template.jinja": b"{{x}}\r\n"}
    generation = {"eos_token_id": [1, 5], "temperature": 0.5}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    (directory / "training_args.bin").write_bytes(b"not ours")
    again = huggingface.open_checkpoint(directory).loaded()
    assert again.config.eos_ids == (1, 5)
    huggingface.write(tmp_path / "out", again.config, again.params, origin=again.origin, files=again.text_files)
    for name, content in contents.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "out" / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_tied_tensors_may_be_there_twice(tmp_path, llama):
    directory, params = llama
    embedding = params["token_embedder"]["embedding"]
    change(
        directory, lm_head__weight=embedding, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32)
    )
    again = huggingface.open_checkpoint(directory).loaded()
    assert_equal(again.params, params)
    huggingface.write(tmp_path / "back", again.config, again.params, origin=again.origin)
    assert "lm_head.weight" in load_file(tmp_path / "back" / "model.safetensors")
    change(directory, lm_head__weight=embedding + 1)
    with pytest.raises(
        ValueError, match="'lm_head.weight' differs from 'model.embed_tokens.weight', which it should repeat"
    ):
        huggingface.open_checkpoint(directory).loaded()


def test_the_text_part_of_a_model_of_images(tmp_path):
    params = params_of(GEMMA3)
    huggingface.write(tmp_path / "text", GEMMA3, params)
    values = json.loads((tmp_path / "text" / "config.json").read_text())
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    for prefix in ("language_model.model.", "model.language_model."):  # Of older and newer versions.
        directory = tmp_path / prefix
        directory.mkdir()
        renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        save_file(renamed | {"vision_tower.patch.weight": np.ones(3)}, directory / "model.safetensors")
        whole = {"model_type": "gemma3", "text_config": values, "vision_config": {"hidden_size": 3}}
        (directory / "config.json").write_text(json.dumps(whole))
        again = huggingface.open_checkpoint(directory).loaded()
        assert_equal(again.params, params)
        assert again.left_out == ("vision_tower.patch.weight",)
        assert again.origin["model_type"] == "gemma3_text"
        huggingface.write(tmp_path / f"{prefix}out", again.config, again.params, origin=again.origin)
        assert_equal(load_file(tmp_path / f"{prefix}out" / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model__norm__weight": None},
            "lacks 1 of 29 tensors: model.norm.weight. Is the configuration another model's",
        ),
        (
            {"model__layers__3__x__weight": np.ones(2)},
            "has 1 tensors that its configuration does not tell of: model.layers.3.x",
        ),
        ({"model__norm__weight": np.ones(9)}, r"'model.norm.weight' has shape \(9,\), expected \(8,\)"),
        (
            {"model__norm__weight": np.ones(8, np.int8)},
            "'model.norm.weight' is of int8, expected floating-point numbers",
        ),
    ],
)
def test_wrong_tensors_are_named(llama, tensors, message):
    directory, _ = llama
    change(directory, **tensors)
    with pytest.raises(ValueError, match=message):
        huggingface.open_checkpoint(directory).loaded()


SIZES = dict(vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4)
SPARSE = {
    "mixtral": PaLMConfig.llama(**SIZES, num_layers=2, moe=MoEConfig(num_experts=3, router=Dropless(k=2))),
    "switch": T5Config.t5_1_0(
        **SIZES,
        num_encoder_layers=2,
        num_decoder_layers=2,
        moe=MoEConfig(num_experts=3, router=TokenChoice(fixed_capacity=4), every=2),
    ),
}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", "num_hidden_layers vocab_size hidden_size intermediate_size num_attention_heads head_dim"),
        ("gemma3", "num_hidden_layers num_key_value_heads"),
        ("t5", "num_layers num_decoder_layers d_model d_ff d_kv num_heads relative_attention_num_buckets vocab_size"),
        ("mixtral", "num_hidden_layers num_local_experts intermediate_size"),
        ("switch", "num_layers num_experts d_ff"),
    ],
)
def test_sizes_that_the_file_can_not_hold(tmp_path, kind, keys):
    """Told in a line, before anything is made of them."""
    config = {"llama": LLAMA, "gemma3": GEMMA3, "t5": T5}.get(kind) or SPARSE[kind]
    huggingface.write(tmp_path / "in", config, params_of(config))
    path = tmp_path / "in" / "config.json"
    values = json.loads(path.read_text())
    for key in keys.split():
        for size in (10**9, 10**18):
            path.write_text(json.dumps(values | {key: size}))
            with pytest.raises(ValueError, match=r"^[^\n]*00000000[^\n]*$"):
                huggingface.open_checkpoint(tmp_path / "in")
    path.write_text(json.dumps(values))
    for name in config.depths():
        with pytest.raises(ValueError, match=rf"{name} is 1000000000: expected at most [0-9]+, the tensors that there"):
            huggingface.open_checkpoint(tmp_path / "in", overrides={name: 10**9})


def test_experts_and_layers_that_the_file_can_not_hold_together(tmp_path):
    config = SPARSE["mixtral"]
    huggingface.write(tmp_path / "in", config, params_of(config))
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 20, "num_hidden_layers": 20}))
    with pytest.raises(ValueError, match="there are 400 experts in all layers, and 35 tensors: expected fewer"):
        huggingface.open_checkpoint(tmp_path / "in")


def test_wrong_directories(tmp_path, llama):
    directory, params = llama
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        huggingface.open_checkpoint(tmp_path).loaded()
    with pytest.raises(ValueError, match="exists: nothing is overwritten"):
        huggingface.write(directory, LLAMA, params)
    with pytest.raises(ValueError, match="dtype is 'int4': expected one of float32"):
        huggingface.write(tmp_path / "new", LLAMA, params, dtype="int4")
    with pytest.raises(ValueError, match="parameter .* is unknown"):
        huggingface.write(tmp_path / "new", LLAMA, params | {"more": np.ones(1)})
    (directory / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds a list: expected an object"):
        huggingface.open_checkpoint(directory).loaded()
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json can't be read"):
        huggingface.open_checkpoint(directory).loaded()
    assert not (tmp_path / "new").exists()


def test_a_policy_that_another_checkpoint_became(tmp_path, llama):
    directory, _ = llama
    origin = huggingface.open_checkpoint(directory).origin
    origin["config"] |= {"max_position_embeddings": 77, "initializer_range": 0.5}
    # Trained on with a longer vocabulary: what we don't model is kept.
    config = PaLMConfig(**{**vars(LLAMA), "vocab_size": 16, "num_layers": 1})
    huggingface.write(tmp_path / "out", config, params_of(config), origin=origin)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values == origin["config"] | {"vocab_size": 16, "num_hidden_layers": 1}
    other = PaLMConfig(**{**vars(config), "qk_norm": True})
    with pytest.raises(ValueError, match="model_type 'llama' can't express PaLMConfig with qk_norm=True"):
        huggingface.write(tmp_path / "other", other, params_of(other), origin=origin)


def test_every_parameter_has_one_tensor():
    for name, family in FAMILIES.items():
        assert len(set(family.names.values())) == len(family.names), name


def test_one_tensor_at_a_time(tmp_path):
    config = PaLMConfig(**{**vars(LLAMA), "embed_dim": 1024, "mlp_dim": 2048, "vocab_size": 64})
    params = params_of(config)
    huggingface.write(tmp_path / "out", config, params)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 1024 * 2048 * 4
    assert whole > 9 * largest

    def peak(work):
        tracemalloc.start()
        work()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # Names, links and the shapes of the policy take what they take in a policy of the same layers.
    huggingface.write(tmp_path / "tiny", LLAMA, params_of(LLAMA))
    overhead = peak(lambda: huggingface.open_checkpoint(tmp_path / "tiny").loaded())
    assert peak(lambda: huggingface.open_checkpoint(tmp_path / "out").loaded()) < whole + 1.2 * largest + overhead
    assert (
        peak(lambda: huggingface.open_checkpoint(tmp_path / "out", dtype="bfloat16").loaded())
        < whole / 2 + 1.2 * largest + overhead
    )
    assert peak(lambda: huggingface.write(tmp_path / "again", config, params)) < 2.2 * largest + overhead
