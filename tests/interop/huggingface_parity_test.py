"""Parity with transformers: tiny torch models of every family, saved by it and read by us; and written back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
pytest.importorskip("transformers", reason="the parity reference needs the extra `hf` (transformers)")

import torch_models
from torch_models import CASES, COMPLETION

from clp_jax.interop import huggingface
from clp_jax.models.policy import Policy
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.strategies import Greedy


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    """The directory of a model, that of its gradient, a batch, and what torch made of it."""
    directory = tmp_path_factory.mktemp("saved") / request.param
    model, batch = torch_models.make(request.param), torch_models.rows()
    torch_models.save(model, directory / "model")
    results = torch_models.compute(model, batch)
    if hasattr(model.config, "router_aux_loss_coef"):
        results["auxiliary"] = torch_models.auxiliary(model, batch)
    torch_models.save_gradient(model, directory / "gradient")
    return directory, batch, results


def test_logits_loss_gradients_and_greedy_completions(saved):
    directory, batch, expected = saved
    imported = huggingface.read(directory / "model")
    policy = Policy(imported.config)

    def auxiliary(params):
        """Losses of the routers, with means over layers taken first, as they are there."""
        bound, first = policy.bind(params), jnp.asarray(batch.inputs[:1])
        encoded = bound.encode(first if hasattr(bound, "encoder") else first[:, :0])
        decoded = bound.decode(jnp.asarray(batch.decoder_inputs[:1]), encoded)
        routing = {"encoder": encoded.routing, "decoder": decoded.routing}
        if hasattr(bound, "encoder"):
            routing["decoder"] = decoded.routing[len(encoded.routing) :]
        found = {}
        for stack, statistics in routing.items():
            shares = jnp.concatenate([each.choice_share for each in statistics]).mean(0)
            probabilities = jnp.concatenate([each.mean_probability for each in statistics]).mean(0)
            found[f"{stack}_aux_loss"] = len(shares) * (shares * probabilities).sum()
            found[f"{stack}_z_loss"] = jnp.concatenate([each.z_loss for each in statistics]).mean()
        return found

    def loss(params):
        logits = policy.bind(params)(jnp.asarray(batch.inputs), jnp.asarray(batch.decoder_inputs))
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, jnp.asarray(batch.targets)[..., None], axis=-1)
        return -chosen.sum(), logits

    @jax.jit
    def run(params):
        (total, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        config = SamplingConfig(max_length=COMPLETION, strategy=Greedy())
        keys = row_keys(jax.random.key(0), len(batch.inputs))
        greedy = generate(CachedDecoder(policy.bind(params)), jnp.asarray(batch.inputs), keys=keys, config=config)
        losses = auxiliary(params) if imported.config.moe is not None else {}
        return total, logits, gradient, greedy.tokens, losses

    total, logits, gradient, greedy, losses = run(jax.tree.map(jnp.asarray, imported.params))
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, expected["loss"], rtol=1e-5)
    if directory.name != "switch_dropping":  # Token by token every expert has room, in the whole it has not.
        np.testing.assert_array_equal(greedy, expected["greedy"])

    for name, value in expected.get("auxiliary", {}).items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5, err_msg=name)

    def check(path, ours, theirs):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))

    theirs = huggingface.read(directory / "gradient").params
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs)) > 1e-3
    jax.tree_util.tree_map_with_path(check, gradient, theirs)


def test_written_back_it_is_what_it_was(saved, tmp_path):
    directory, _, _ = saved
    imported = huggingface.read(directory / "model")
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
    imported = huggingface.read(directory / "model")
    huggingface.write(tmp_path / "out", imported.config, imported.params)
    logits = torch_models.load_and_compute(tmp_path / "out", batch)
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["t5", "gemma2_rest"])
def test_bfloat16_errs_no_more_than_torch(case, tmp_path):
    batch, model = torch_models.rows(), torch_models.make(case)
    with torch.no_grad():
        for parameter in model.parameters():  # What bfloat16 holds, so that the weights are the same everywhere.
            parameter.copy_(parameter.bfloat16().float())
    exact = torch_models.compute(model, batch)["logits"]
    torch_models.save(model.bfloat16(), tmp_path)
    theirs = torch_models.load_and_compute(tmp_path, batch, "bfloat16")

    imported = huggingface.read(tmp_path, dtype="bfloat16", overrides={"dtype": "bfloat16"})
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(imported.params)} == {"bfloat16"}
    policy = Policy(imported.config)
    run = jax.jit(lambda params, *rows: policy.bind(params)(*rows))
    ours = run(jax.tree.map(jnp.asarray, imported.params), batch.inputs, batch.decoder_inputs)

    def error(logits):
        return np.sqrt(np.mean((np.asarray(logits) - exact) ** 2)) / exact.std()

    # Both round each operation to eight bits, in different orders: half a unit of 2^-7 is far more than float32 errs.
    # Twice theirs leaves room for the orders, and none for an operation in a type that is too short.
    assert 2**-12 < error(ours) <= 2 * error(theirs) < 2**-4
