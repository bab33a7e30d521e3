"""Parity with what transformers computed (`make_huggingface_golden.py`), where torch is not installed too."""

import dataclasses
from pathlib import Path

import huggingface_results
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clp_jax.interop import huggingface
from clp_jax.models.policy import Policy
from clp_jax.sampling.beam_policies import PowerPenalty
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder

RECORD = dict(np.load(Path(__file__).parents[1] / "fixtures" / "huggingface_golden.npz"))
NAMES = sorted({name.partition("/")[0] for name in RECORD if "/" in name})


def _part(prefix):
    return {key.removeprefix(prefix): value for key, value in RECORD.items() if key.startswith(prefix)}


@pytest.fixture(params=NAMES)
def recorded(request, tmp_path):
    """The name of a model, its directory as transformers wrote it, and one with its gradient for weights."""
    name = request.param
    for what, directory in (("tensors", tmp_path / "in"), ("gradient", tmp_path / "gradient")):
        directory.mkdir()
        save_file(huggingface_results.unpacked(**_part(f"{name}/{what}/")), directory / "model.safetensors")
        for file in ("config", "generation_config"):
            (directory / f"{file}.json").write_bytes(RECORD[f"{name}/{file}"].tobytes())
    return name, tmp_path


def test_logits_loss_gradients_auxiliary_losses_and_greedy_completions(recorded):
    name, directory = recorded
    imported = huggingface.open_checkpoint(directory / "in").loaded()
    batch = huggingface_results.training_batch(*(RECORD[rows] for rows in ("inputs", "decoder_inputs", "targets")))
    expected = {what: value for what, value in _part(f"{name}/").items() if what in huggingface_results.RESULTS}
    expected["gradient"] = huggingface.open_checkpoint(directory / "gradient").loaded().params
    huggingface_results.check(huggingface_results.compute(Policy(imported.config), imported.params, batch), expected)


def test_beams(recorded):
    name, directory = recorded
    imported, inputs, beams = (
        huggingface.open_checkpoint(directory / "in").loaded(),
        jnp.asarray(RECORD["inputs"]),
        RECORD[f"{name}/beams"],
    )
    ending = Policy(dataclasses.replace(imported.config, eos_ids=tuple(RECORD["ends"].tolist())))
    number, penalty = len(beams) // len(inputs), PowerPenalty(float(RECORD["length_penalty"]))
    config = BeamConfig(beams.shape[1], number, number, length_penalty=penalty)
    inputs = jnp.where(inputs != 0, inputs, ending.config.pad_id)

    @jax.jit
    def search(params):
        return beam_search(CachedDecoder(ending.bind(params)), inputs, config)

    found = search(jax.tree.map(jnp.asarray, imported.params))
    np.testing.assert_array_equal(jnp.where(found.completions.mask > 0, found.completions.tokens, 0), beams)
    np.testing.assert_allclose(found.scores, RECORD[f"{name}/scores"], rtol=1e-5)


def test_written_back_it_is_what_it_was(recorded):
    name, tmp_path = recorded
    imported, tensors = (
        huggingface.open_checkpoint(tmp_path / "in").loaded(),
        load_file(tmp_path / "in" / "model.safetensors"),
    )
    huggingface.write(
        tmp_path / "out", imported.config, imported.params, origin=imported.origin, files=imported.text_files
    )
    for file in ("config", "generation_config"):
        text = (tmp_path / "out" / f"{file}.json").read_bytes()
        assert text == RECORD[f"{name}/{file}"].tobytes()
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(again) == sorted(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value)
