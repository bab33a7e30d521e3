"""Reward models start from a policy's encoder, and say what became of the rest."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_runs import MODEL, first_params, make_data, make_supervised

from clp_jax.training.reward_models import RewardModel
from clp_jax.training.saved_params import load_params


def test_the_encoder_is_the_policys_and_the_head_is_new(tmp_path, capsys):
    data, sft = make_data(tmp_path / "data"), make_supervised(tmp_path / "sft", tmp_path / "data")
    stage = RewardModel("preference", str(data), MODEL, "preference", ("foreign",), str(sft))
    params = first_params(stage.setup(tmp_path / "run", 0))
    fresh = first_params(dataclasses.replace(stage, initial_checkpoint=None).setup(tmp_path / "run", 0))
    policy = load_params(sft)[0]
    loaded = ("token_embedder", "encoder")
    for name in params:
        jax.tree.map(np.testing.assert_array_equal, params[name], (policy if name in loaded else fresh)[name])
    assert set(params) > set(loaded)
    said = capsys.readouterr().err
    assert f"{sft}, step 1: loaded " in said and "; initialised " in said and "; ignored " in said and "decoder" in said
    wider = dataclasses.replace(stage, trunk=dataclasses.replace(MODEL, mlp_dim=2 * MODEL.mlp_dim))
    with pytest.raises(ValueError, match=r"parameter 'encoder/.*' has shape .* in the checkpoint, this model's has"):
        wider.setup(tmp_path / "run", 0)
