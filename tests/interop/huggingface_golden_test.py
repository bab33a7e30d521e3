"""Parity with what transformers computed (`make_huggingface_golden.py`), where torch is not installed too."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clp_jax.interop import huggingface
from clp_jax.models.policy import Policy
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.strategies import Greedy

RECORD = dict(np.load(Path(__file__).parents[1] / "fixtures" / "huggingface_golden.npz"))
NAMES = sorted({name.partition("/")[0] for name in RECORD if "/" in name})


@pytest.mark.parametrize("name", NAMES)
def test_logits_completions_and_the_way_back(name, tmp_path):
    prefix = f"{name}/tensors/"
    tensors = {key.removeprefix(prefix): value for key, value in RECORD.items() if key.startswith(prefix)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    for file in ("config", "generation_config"):
        (tmp_path / "in" / f"{file}.json").write_bytes(RECORD[f"{name}/{file}"].tobytes())
    imported = huggingface.read(tmp_path / "in")
    policy, inputs, greedy = Policy(imported.config), jnp.asarray(RECORD["inputs"]), RECORD[f"{name}/greedy"]

    beams = RECORD.get(f"{name}/beams")  # Of one model of a family.
    ending = Policy(dataclasses.replace(imported.config, eos_ids=tuple(RECORD["ends"].tolist())))

    @jax.jit
    def run(params):
        bound = policy.bind(params)
        config = SamplingConfig(max_length=greedy.shape[1], strategy=Greedy())
        keys = row_keys(jax.random.key(0), len(inputs))
        written = generate(CachedDecoder(bound), inputs, keys=keys, config=config)
        found = None
        if beams is not None:
            number = len(beams) // len(inputs)
            found = beam_search(CachedDecoder(ending.bind(params)), inputs, BeamConfig(beams.shape[1], number, number))
        return bound(inputs, jnp.asarray(RECORD["decoder_inputs"])), written.tokens, found

    logits, written, found = run(jax.tree.map(jnp.asarray, imported.params))
    np.testing.assert_allclose(logits, RECORD[f"{name}/logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(written, greedy)
    if beams is not None:
        np.testing.assert_array_equal(found.completions.tokens, beams)
        np.testing.assert_allclose(found.scores, RECORD[f"{name}/scores"], rtol=1e-5)

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
