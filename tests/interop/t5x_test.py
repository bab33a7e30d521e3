"""T5X checkpoints as policies: the forms that T5X wrote, scanned layers, experts, optimizer state, and the way back."""

import dataclasses
import re
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_policies import ST_MOE, varied_params

from clp_jax.interop import t5x, t5x_files, t5x_settings
from clp_jax.interop.hf_families import canonical
from clp_jax.interop.slots import flatten
from clp_jax.models.config import MoEConfig, PaLMConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import TokenChoice
from clp_jax.training.optimizers import Adafactor

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORD = dict(np.load(FIXTURES / "t5x_policy.npz"))
SIZES = dict(
    vocab_size=11,
    embed_dim=8,
    mlp_dim=12,
    num_heads=2,
    head_dim=4,
    num_buckets=8,
    num_encoder_layers=2,
    num_decoder_layers=3,
)


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    with tarfile.open(FIXTURES / "t5x_nano.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds."""
    checkpoint = t5x_files.read(path)
    found = {f"target/{name}": array.read() for name, array in checkpoint.parameters.items()}
    return found | {f"slots/{name}": array.read() for name, array in checkpoint.slots.items()}


def assert_equal(a, b):
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("form", ["legacy", "legacy_bf16", "legacy_chunked", "orbax", "mtf"])
def test_what_t5x_wrote_is_the_policy_that_it_trained(nano, form):
    imported = t5x.open_checkpoint(nano / form, optimizer=form != "mtf").loaded()
    assert imported.config == T5Config(
        vocab_size=64, embed_dim=16, mlp_dim=32, num_heads=2, head_dim=8, num_encoder_layers=2, num_decoder_layers=2
    )
    assert imported.step == 2
    query = imported.params["decoder"]["layers"]["cross_attention"]["query"]["kernel"]
    expected = RECORD["target/decoder/layers_1/encoder_decoder_attention/query/kernel"]
    rounded = expected.astype("bfloat16").astype(np.float32) if form == "legacy_bf16" else expected
    np.testing.assert_array_equal(query[1], rounded)
    Policy(imported.config).bind(imported.params)


@pytest.mark.parametrize("form", ["legacy", "legacy_bf16", "legacy_chunked", "orbax"])
def test_written_back_it_is_what_it_was(nano, tmp_path, form):
    imported = t5x.open_checkpoint(nano / form, optimizer=True).loaded()
    written = t5x.write(
        tmp_path,
        imported.config,
        imported.params,
        step=imported.step,
        slots=imported.slots,
        origin=imported.origin,
    )
    assert written == tmp_path / "checkpoint_2"
    assert_equal(arrays(nano / form), arrays(tmp_path))


def test_the_optimizer_goes_on_where_t5x_stopped(nano):
    imported = t5x.open_checkpoint(nano / "legacy", optimizer=True).loaded()
    policy = Policy(imported.config)
    state = jax.eval_shape(Adafactor().build(policy.logical_axes()).init, imported.params)[1]
    for kind in ("v_row", "v_col", "v"):
        ours, theirs = getattr(state, kind), getattr(imported.slots, kind)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), ours, theirs)
    assert imported.slots.count == 2
    np.testing.assert_array_equal(
        imported.slots.v["encoder"]["layers"]["mlp"]["wi_0"]["kernel"][1],
        t5x_files.read(nano / "legacy").slots["encoder/layers_1/mlp/wi_0/kernel/v"].read(),
    )


def test_factored_slots_keep_their_places(tmp_path):
    config = T5Config(**SIZES | dict(embed_dim=128, mlp_dim=130, num_encoder_layers=1, num_decoder_layers=2))
    policy = Policy(config)
    state = jax.eval_shape(Adafactor().build(policy.logical_axes()).init, policy.abstract())[1]
    rng = np.random.default_rng(0)
    used = lambda x: np.zeros(1, np.float32) if x.shape == (1,) else rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    slots = t5x.AdafactorSlots(7, *(jax.tree.map(used, getattr(state, kind)) for kind in ("v_row", "v_col", "v")))
    params = jax.tree.map(np.asarray, varied_params(policy))
    t5x.write(tmp_path, config, params, step=7, slots=slots)
    stored = t5x_files.read(tmp_path).slots
    name = "decoder/layers_1/mlp/wo/kernel"  # [130, 128]: rows are as long as the smaller dimension.
    assert [stored[f"{name}/{kind}"].shape for kind in ("v_row", "v_col", "v", "m")] == [(128,), (130,), (1,), (1,)]
    again = t5x.open_checkpoint(tmp_path, optimizer=True).loaded()
    assert again.slots.count == 7
    for kind in ("v_row", "v_col", "v"):
        jax.tree.map(np.testing.assert_array_equal, getattr(again.slots, kind), getattr(slots, kind))
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


EXPERTS = MoEConfig(num_experts=3, router=TokenChoice(k=1, min_capacity=4), every=2, mlp_dim=6, z_weight=1e-3)


@pytest.mark.parametrize("least", [1, 128], ids=["factored", "whole"])
@pytest.mark.parametrize(
    ("changes", "scan_axis"),
    [
        (dict(bias_per_layer=True), 1),
        (dict(bias_per_layer=True, mlp_dim=6), 0),
        (dict(moe=EXPERTS), None),
        (dict(bias_per_layer=True, num_decoder_layers=4, moe=EXPERTS), 1),
    ],
    ids=["scanned", "scanned_first", "experts", "scanned_blocks"],
)
def test_slots_of_stacked_parameters_are_t5xs(tmp_path, changes, scan_axis, least):
    """Slots are means of second moments that are known, over what T5X and we average."""
    config = T5Config(**SIZES | changes)
    policy = Policy(config)
    axes, rng = policy.logical_axes(), np.random.default_rng(0)
    moments = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), policy.abstract())
    state = jax.eval_shape(Adafactor(min_dim_to_factor=least).build(axes).init, policy.abstract())[1]

    def mean(moment, slot):
        if slot.shape == (1,):
            return np.zeros(1, np.float32)
        averaged = tuple(d for d, (n, whole) in enumerate(zip(slot.shape, moment.shape, strict=True)) if n != whole)
        return (moment**2).mean(averaged, keepdims=True)

    kinds = [jax.tree.map(mean, moments, getattr(state, kind)) for kind in ("v_row", "v_col", "v")]
    slots = t5x.AdafactorSlots(1, *kinds)
    params, scanned = varied_params(policy), scan_axis is not None
    t5x.write(tmp_path, config, params, step=1, slots=slots, layout=t5x.Layout(scan_axis=scan_axis))
    again = t5x.open_checkpoint(tmp_path, scan_axis=scan_axis, optimizer=True).loaded()
    for kind, expected in zip(("v_row", "v_col", "v"), kinds, strict=True):
        jax.tree.map(np.testing.assert_array_equal, getattr(again.slots, kind), expected)
    # The row is the model's dimension, the column the other one, of each layer or expert by itself.
    sparse = config.moe is not None
    name = "decoder/decoder" + ("/subblock_1" if sparse else "") if scanned else "decoder/layers_1"
    name += "/mlp/expert" if sparse else "/mlp"
    stored = t5x_files.read(tmp_path).slots
    ours = moments["decoder"]["layers"]
    ours = ours["layer_1"]["mlp"]["experts"] if sparse else ours["mlp"]
    for part, model_axis in (("wi_0", -2), ("wo", -1)):
        square = ours[part]["kernel"] ** 2 if scanned else ours[part]["kernel"][0] ** 2
        if least > 8:
            np.testing.assert_allclose(
                stored[f"{name}/{part}/kernel/v"].read(), np.moveaxis(square, 0, scan_axis or 0), rtol=1e-6
            )
            assert stored[f"{name}/{part}/kernel/v_row"].shape == (1,)
            continue
        for kind, averaged in (("v_row", -3 - model_axis), ("v_col", model_axis)):
            found = stored[f"{name}/{part}/kernel/{kind}"].read()
            np.testing.assert_allclose(found, _kept_places(square, averaged, scan_axis), rtol=1e-6)


def _kept_places(square, averaged, scan_axis):
    """The mean over one of the last two dimensions, of a tensor with layers where T5X has them."""
    theirs = square if scan_axis is None else np.moveaxis(square, 0, scan_axis)
    axes = list(range(square.ndim))
    if scan_axis is not None:
        axes.insert(scan_axis, axes.pop(0))
    return theirs.mean(axes.index(square.ndim + averaged))


@pytest.mark.parametrize(
    ("changes", "scan_axis"),
    [
        ({}, None),
        (dict(tied_head=True, gated=False, activation="relu"), None),
        (dict(bias_per_layer=True), 1),
        (dict(bias_per_layer=True, tied_head=True), 0),
        (dict(moe=MoEConfig(num_experts=3, router=TokenChoice(k=1, min_capacity=4), every=2, z_weight=1e-3)), None),
        (
            dict(
                moe=MoEConfig(
                    num_experts=2, router=TokenChoice(min_capacity=4), mlp_dim=10, extra_mlp=True, z_weight=1e-3
                )
            ),
            None,
        ),
        (dict(bias_per_layer=True, num_decoder_layers=4, moe=EXPERTS), 1),
        (dict(bias_per_layer=True, num_decoder_layers=1, moe=EXPERTS), 0),
        (dict(bias_per_layer=True, moe=dataclasses.replace(EXPERTS, every=1, mlp_dim=None)), 1),
    ],
    ids=[
        "1.1",
        "1.0",
        "scanned",
        "scanned_first",
        "experts",
        "st_moe",
        "scanned_blocks",
        "dense_decoder",
        "all_sparse",
    ],
)
def test_every_layout_comes_back(tmp_path, changes, scan_axis):
    config = T5Config(**SIZES | changes)
    params = jax.tree.map(np.asarray, varied_params(Policy(config)))
    t5x.write(tmp_path, config, params, step=3, layout=t5x.Layout(scan_axis=scan_axis), card="# Card\n")
    # The axis is found by the model's width.
    again = t5x.open_checkpoint(tmp_path).loaded()
    assert again.config == config
    types = {"dtype": "float32", "dtypes": {}}
    assert again.origin == {"format": "t5x", "form": "legacy", "step": 3, "scan_axis": scan_axis} | types
    assert_equal(dict(flatten_names(again.params)), dict(flatten_names(params)))
    assert (tmp_path / "README.md").read_text() == "# Card\n"
    t5x.write(tmp_path / "back", again.config, again.params, step=3, origin=again.origin)
    assert_equal(arrays(tmp_path / "checkpoint_3"), arrays(tmp_path / "back"))
    # Names and shapes as T5X has them.
    stored = {name: array.shape for name, array in t5x_files.read(tmp_path).parameters.items()}
    if config.moe is not None and scan_axis is not None:
        check_blocks(config, scan_axis, stored, t5x_files.read(tmp_path).parameters, params)
    elif scan_axis == 1:
        assert stored["decoder/decoder/mlp/wi_0/kernel"] == (8, 3, 12)
        assert stored["encoder/encoder/pre_attention_layer_norm/scale"] == (8, 2)
        assert stored["encoder/encoder/relpos_bias/rel_embedding"] == (2, 2, 8)
        scanned = t5x_files.read(tmp_path).parameters["decoder/decoder/mlp/wi_0/kernel"].read()
        np.testing.assert_array_equal(scanned[:, 2], params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"][2])
    elif config.moe is not None:
        sparse = "encoder/layers_1/mlp"
        assert stored[f"{sparse}/expert/wi_0/kernel"] == (config.moe.num_experts, 8, config.moe.mlp_dim or 12)
        assert stored[f"{sparse}/router/router_weights/w/kernel"] == (8, config.moe.num_experts)


def check_blocks(config, scan_axis, stored, source, params):
    """Names and shapes as flaxformer's own test of scanned experts has them: `test_scan_architecture`, moe_architecture_test.py."""
    every, depth = config.moe.every, config.num_encoder_layers // config.moe.every
    places = {name.split("/")[2] for name in stored if name.startswith("encoder/encoder/")}
    assert places == {f"subblock_{place}" for place in range(every)}
    assert not [name for name in stored if re.search(r"layers_|encoder/relpos_bias", name) and "subblock" not in name]

    def stacked(*shape):
        return (*shape[:scan_axis], depth, *shape[scan_axis:])

    sparse = f"encoder/encoder/subblock_{every - 1}"
    assert stored[f"{sparse}/attention/query/kernel"] == stacked(8, 8)
    assert stored[f"{sparse}/mlp/expert/wi_0/kernel"] == stacked(3, 8, config.moe.mlp_dim or 12)
    assert stored[f"{sparse}/mlp/expert/wo/kernel"] == stacked(3, config.moe.mlp_dim or 12, 8)
    assert stored[f"{sparse}/mlp/router/router_weights/w/kernel"] == stacked(8, 3)
    assert stored[f"{sparse}/pre_mlp_layer_norm/scale"] == stacked(8)
    assert stored[f"{sparse}/relpos_bias/rel_embedding"] == stacked(2, 8)
    dense = every > 1
    assert ("encoder/encoder/subblock_0/mlp/wi_0/kernel" in stored) == dense
    # Blocks follow each other: of the last block, the last layer is the stack's last.
    ours = params["encoder"]["layers"]["layer_1"] if dense else params["encoder"]["layers"]
    theirs = np.moveaxis(source[f"{sparse}/mlp/expert/wi_0/kernel"].read(), scan_axis, 0)
    np.testing.assert_array_equal(theirs, ours["mlp"]["experts"]["wi_0"]["kernel"])
    if config.num_decoder_layers < every:
        assert stored["decoder/decoder/subblock_0/mlp/wi_0/kernel"] == (1, 8, 12)


def flatten_names(tree):
    return {"/".join(path): leaf for path, leaf in flatten(tree)}.items()


def test_a_stated_policy_is_what_is_read(tmp_path):
    """Of experts' routers nothing is in the tree: two for each token are read as one, unless the policy is stated."""
    config = T5Config(**SIZES, moe=ST_MOE, activation="silu", dropout_rate=0.1)
    t5x.write(tmp_path, config, varied_params(Policy(config)), step=0)
    assumed = t5x.open_checkpoint(tmp_path).config
    assert (assumed.moe.router, assumed.moe.decoder_router) == (TokenChoice(k=1, min_capacity=4), None)
    stated = t5x.open_checkpoint(tmp_path, model=config).loaded()
    assert stated.config == config
    jax.tree.map(np.testing.assert_array_equal, stated.params, varied_params(Policy(config)))
    assert t5x.open_checkpoint(tmp_path, model=config, overrides={"dropout_rate": 0}).config.dropout_rate == 0.0
    wrong = [
        (
            T5Config(**SIZES | dict(vocab_size=12), moe=ST_MOE),
            r"'decoder/logits_dense/kernel' has shape \(8, 11\), expected \(8, 12\)",
        ),
        (
            T5Config(**SIZES),
            r"lacks 6 of \d+ tensors: .*layers_1/mlp/w",
        ),
        (
            PaLMConfig.llama(vocab_size=4, embed_dim=4, mlp_dim=4, num_heads=1, head_dim=4, num_layers=1),
            "not PaLMConfig",
        ),
    ]
    for other, message in wrong:
        with pytest.raises(ValueError, match=message):
            t5x.open_checkpoint(tmp_path, model=other).loaded()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        (dict(activation="silu", norm_eps=1e-5), dict(activation="silu", norm_eps=1e-5)),
        (dict(tied_head=True, gated=False, activation="gelu"), dict(activation="gelu")),
        (
            dict(dropout_rate=0.1, max_distance=64, eos_ids=(2, 3)),
            dict(max_distance=64, dropout_rate=0.1, eos_ids=(2, 3)),
        ),
        (
            dict(moe=ST_MOE),
            {
                "moe.router.k": 2,
                "moe.decoder_router": "Dropless",
                "moe.dropout_rate": 0.2,
                "moe.z_weight": 0.0,
            },
        ),
        (dict(moe=EXPERTS), {}),
        (dict(num_kv_heads=2, dtype="bfloat16", remat="full", scale_tied_head=False), {}),
    ],
    ids=["1.1", "ul2", "1.0", "task", "st_moe", "switch", "free"],
)
def test_what_a_directory_does_not_say_is_what_reading_it_needs(tmp_path, changes, expected):
    config = T5Config(**SIZES | changes)
    found = t5x_settings.untold(config, None)
    assert found == expected
    t5x.write(tmp_path, config, varied_params(Policy(config)), step=0)
    again = t5x.open_checkpoint(tmp_path, overrides=found).config
    assert canonical(again) == canonical(config) and again.dropout_rate == config.dropout_rate


@pytest.mark.parametrize(
    "changes",
    [
        dict(logit_cap=3.0),
        dict(attention_cap=3.0),
        dict(query_scale=0.3),
        dict(scale_embeddings=True),
        dict(tied_head=True, scale_tied_head=False),
        dict(norm_offset=True),
        dict(window=2),
        dict(pad_id=3),
        dict(num_kv_heads=1),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_t5x_does_not_compute_is_not_written(tmp_path, changes):
    config = T5Config(**SIZES | changes)
    name = list(changes)[-1]
    with pytest.raises(ValueError, match=rf"T5X can't express T5Config with .*{name}={changes[name]}"):
        t5x.write(tmp_path, config, varied_params(Policy(config)), step=0)
    assert not list(tmp_path.iterdir())


def test_what_can_not_be(nano, tmp_path):
    config = T5Config(**SIZES)
    params = varied_params(Policy(config))
    with pytest.raises(ValueError, match="bias_per_layer is False: T5X's scanned layers"):
        t5x.write(tmp_path, config, params, step=0, layout=t5x.Layout(scan_axis=1))
    partial = T5Config(**SIZES, bias_per_layer=True, moe=EXPERTS)
    with pytest.raises(
        ValueError, match="num_decoder_layers is 3, with experts in one of 2 layers: T5X scans whole blocks of 2"
    ):
        t5x.write(tmp_path, partial, varied_params(Policy(partial)), step=0)
    with pytest.raises(ValueError, match="hold encoder-decoders, not PaLMConfig"):
        t5x.write(
            tmp_path,
            PaLMConfig(vocab_size=4, embed_dim=4, mlp_dim=4, num_heads=1, head_dim=4, num_layers=1),
            {},
            step=0,
        )
    with pytest.raises(
        ValueError,
        match="T5X has no tensors for the parameters decoder/cross_attention/key/bias, decoder/cross_attention/query",
    ):
        biased = T5Config(**SIZES, qkv_bias=True)
        t5x.write(tmp_path, biased, varied_params(Policy(biased)), step=0)
    with pytest.raises(ValueError, match="expected a multiple of num_heads=3"):
        t5x.open_checkpoint(nano / "legacy", overrides={"num_heads": 3}).loaded()
    with pytest.raises(ValueError, match="parameter .* is missing"):
        t5x.write(tmp_path, config, {"encoder": params["encoder"]}, step=0)
    with pytest.raises(ValueError, match="T5Config.activation is 'glu'"):
        t5x.open_checkpoint(nano / "legacy", overrides={"activation": "glu"}).loaded()
    assert not list(tmp_path.iterdir())
