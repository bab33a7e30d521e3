"""Parity with transformers: tiny torch models of every family, saved by it and read by us; and written back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
pytest.importorskip("transformers", reason="the parity reference needs the extra `hf` (transformers)")

import huggingface_results
import torch_models
from tiny_policies import varied_params
from torch_cases import CASES, PAD

from clp_jax.interop import huggingface
from clp_jax.models.config import MoEConfig, T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import TokenChoice
from clp_jax.training.supervised import SupervisedLoss


def target_logits(policy, params, batch):
    """As `torch_models.target_logits`."""
    logits = jax.jit(lambda params, *rows: policy.bind(params)(*rows))(params, batch.inputs, batch.decoder_inputs)
    return np.where((batch.targets != PAD)[..., None], logits, 0)


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """The directory of a model, that of its gradient, a batch, and what torch made of it."""
    directory = tmp_path_factory.mktemp("saved") / request.param
    model, batch = torch_models.make(request.param), torch_models.rows()
    torch_models.save(model, directory / "model")
    results = torch_models.compute(model, batch)
    torch_models.save_gradient(model, directory / "gradient")
    return directory, batch, results


def test_logits_loss_gradients_and_greedy_completions(saved):
    directory, batch, expected = saved
    imported = huggingface.open_checkpoint(directory / "model").loaded()
    rows = huggingface_results.training_batch(batch.inputs, batch.decoder_inputs, batch.targets)
    found = huggingface_results.compute(Policy(imported.config), imported.params, rows)
    huggingface_results.check(
        found, expected | {"gradient": huggingface.open_checkpoint(directory / "gradient").loaded().params}
    )


@pytest.mark.parametrize("case", ["switch", "switch_dropping"])
def test_switch_is_trained_as_transformers_trains_it(case, tmp_path):
    """The loss that the model itself returns, router losses and their weights included, of rows without padding, which it counts."""
    model, batch = torch_models.make(case), torch_models.rows()
    rng = np.random.default_rng(1)
    inputs, targets = (
        rng.integers(3, torch_models.VOCAB, x.shape).astype(np.int32) for x in (batch.inputs, batch.targets)
    )
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    torch_models.save(model, tmp_path / "model")
    rows = {"input_ids": inputs, "decoder_input_ids": shifted, "labels": targets}
    loss = model(
        **{name: torch.tensor(x, dtype=torch.long) for name, x in rows.items()}, output_router_logits=True
    ).loss
    loss.backward()
    torch_models.save_gradient(model, tmp_path / "gradient")

    imported = huggingface.open_checkpoint(tmp_path / "model").loaded()
    assert imported.config.moe.balance_by == "stack"
    rows = huggingface_results.training_batch(inputs, shifted, targets)

    @jax.jit
    @jax.value_and_grad
    def ours(params, config=imported.config):
        return SupervisedLoss(Policy(config)).sums(params, rows, None)[0] / targets.size

    value, gradient = ours(jax.tree.map(jnp.asarray, imported.params))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    expected = huggingface.open_checkpoint(tmp_path / "gradient").loaded().params
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


def test_written_back_it_is_what_it_was(saved, tmp_path):
    directory, _, _ = saved
    imported = huggingface.open_checkpoint(directory / "model").loaded()
    huggingface.write(
        tmp_path / "out", imported.config, imported.params, origin=imported.origin, files=imported.text_files
    )
    names = sorted(path.name for path in (directory / "model").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        before, after = ((folder / name).read_bytes() for folder in (directory / "model", tmp_path / "out"))
        if name.endswith(".json"):
            assert json.loads(before) == json.loads(after)
        else:
            assert before == after


def test_transformers_loads_what_is_written_without_an_origin(saved, tmp_path):
    directory, batch, expected = saved
    imported = huggingface.open_checkpoint(directory / "model").loaded()
    huggingface.write(tmp_path / "out", imported.config, imported.params)
    logits = torch_models.load_and_compute(tmp_path / "out", batch)
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-6, atol=1e-6)


def test_an_untied_switch_is_one_there_too(tmp_path):
    """Its stacks then have embeddings of their own in transformers: the one that we have is written for each, and comes back."""
    batch, sizes = torch_models.rows(), dict(vocab_size=29, embed_dim=12, mlp_dim=20, num_heads=3, head_dim=8)
    experts = MoEConfig(num_experts=3, router=TokenChoice(fixed_capacity=6), every=2)
    depths = dict(num_encoder_layers=2, num_decoder_layers=2)
    config = T5Config.t5_1_0(**sizes, **depths, tied_head=False, moe=experts)
    policy, params = Policy(config), varied_params(Policy(config))
    huggingface.write(tmp_path / "out", config, params)
    theirs = torch_models.load_and_compute(tmp_path / "out", batch)
    ours = target_logits(policy, params, batch)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    again = huggingface.open_checkpoint(tmp_path / "out").loaded()
    huggingface.write(tmp_path / "back", again.config, again.params, origin=again.origin)
    first, second = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("out", "back"))
    assert first == second


@pytest.mark.parametrize("case", ["t5", "gemma2_rest"])
def test_bfloat16_errs_no_more_than_torch(case, tmp_path):
    batch, model = torch_models.rows(), torch_models.make(case)
    with torch.no_grad():
        for parameter in model.parameters():  # What bfloat16 holds, so that the weights are the same everywhere.
            parameter.copy_(parameter.bfloat16().float())
    exact = torch_models.compute(model, batch)["logits"]
    torch_models.save(model.bfloat16(), tmp_path)
    theirs = torch_models.load_and_compute(tmp_path, batch, "bfloat16")

    imported = huggingface.open_checkpoint(tmp_path, dtype="bfloat16", overrides={"dtype": "bfloat16"}).loaded()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(imported.params)} == {"bfloat16"}
    ours = target_logits(Policy(imported.config), jax.tree.map(jnp.asarray, imported.params), batch)
    tokens = batch.targets != PAD

    def error(logits):
        return np.sqrt(np.mean((np.asarray(logits) - exact)[tokens] ** 2)) / exact[tokens].std()

    # Both round each operation to eight bits, in different orders: half a unit of 2^-7 is far more than float32 errs.
    # Twice theirs leaves room for the orders, and none for an operation in a type that is too short.
    assert 2**-12 < error(ours) <= 2 * error(theirs) < 2**-4
