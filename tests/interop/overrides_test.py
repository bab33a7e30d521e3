"""Fields that are stated of a checkpoint's policy, those of configurations inside it too, and errors that name the nearest one."""

import dataclasses
import re

import pytest
from tiny_policies import ST_MOE, varied_params

from clp_jax.interop import t5x
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.rope import LinearScaling, Rope
from clp_jax.nn.routing import ExpertChoice, TokenChoice

SIZES = dict(
    vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_encoder_layers=2, num_decoder_layers=2
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The directory of a policy without experts."""
    directory, config = tmp_path_factory.mktemp("plain"), T5Config(**SIZES)
    t5x.write(directory, config, varied_params(Policy(config)), step=0)
    return directory


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nonsense": 5}, "T5Config has no field 'nonsense'; it was to be 5."),
        (
            {"num_decoder_layer": 3},
            "T5Config has no field 'num_decoder_layer' (did you mean num_decoder_layers?); it was to be 3.",
        ),
        ({"num_encoder_layers": "abc"}, "num_encoder_layers is 'abc': expected an integer."),
        ({"mlp_dim": 2.5}, "mlp_dim is 2.5: expected an integer."),
        ({"mlp_dim": True}, "mlp_dim is True: expected an integer."),
        ({"norm_eps": "small"}, "norm_eps is 'small': expected a number."),
        ({"logit_cap": "small"}, "logit_cap is 'small': expected a number or none."),
        ({"tied_head": 3}, "tied_head is 3: expected true or false."),
        ({"activation": 3}, "activation is 3: expected a name."),
        (
            {"rope": 5},
            "rope is 5: expected a Rope or none; it has fields of its own, which are stated by name, as rope.theta=",
        ),
        ({"moe": 5}, "moe is 5: expected a MoEConfig or none; it has fields of its own"),
        (
            {"moe": "MoEConfig"},
            "moe is MoEConfig, which needs num_experts: state it too, as moe.num_experts=VALUE.",
        ),
        (
            {"moe.router.k": 2},
            "T5Config.moe is None, which has no fields, and 'moe.router.k' was to be 2: state it first, as moe=MoEConfig.",
        ),
        (
            {"activation.name": 2},
            "T5Config.activation is 'gelu', which has no fields, and 'activation.name' was to be 2: leave it out.",
        ),
        (
            {"mo.router.k": 2},
            "T5Config has no field 'mo' (did you mean moe?); 'mo.router.k' was to be 2.",
        ),
        (
            {"rope": "Rope", "rope.thata": 5},
            "Rope has no field 'thata' (did you mean theta?); 'rope.thata' was to be 5.",
        ),
        (
            {"rope": "Rope", "rope.base": 5},
            "Rope has no field 'base' (it has theta, scaling, fraction); 'rope.base' was to be 5.",
        ),
        ({"rope": "Rope", "rope.theta": "big"}, "rope.theta is 'big': expected a number."),
        (
            {"rope": "Rope", "rope.scaling.factor": 2},
            "Rope.scaling is None, which has no fields, and 'rope.scaling.factor' was to be 2: state it first, as "
            "rope.scaling=LinearScaling.",
        ),
        ({"eos_ids": "abc"}, "eos_ids is 'abc': expected an integer"),
        ({"num_heads": 0}, "num_heads is 0: expected at least 1."),
        ({"num_encoder_layers": 10**9}, "num_encoder_layers is 1000000000: expected at most 2, as the checkpoint has."),
    ],
    ids=str,
)
def test_overrides_that_can_not_be(plain, overrides, message):
    with pytest.raises(ValueError, match=re.escape(f"overrides: {message}")):
        t5x.open_checkpoint(plain, overrides=overrides).loaded()


def test_overrides_as_they_are_typed(plain):
    typed = {"eos_ids": 2, "norm_eps": 1, "attention_cap": "none", "remat": "full"}
    config = t5x.open_checkpoint(plain, overrides=typed).config
    assert (config.eos_ids, config.norm_eps, config.attention_cap, config.remat) == ((2,), 1.0, None, "full")
    assert type(config.norm_eps) is float


def test_fields_inside_are_stated_by_their_names(tmp_path):
    """A router, and all of what it is made of, as T5X's directories tell nothing of it."""
    config = T5Config(**SIZES, moe=ST_MOE)
    t5x.write(tmp_path, config, varied_params(Policy(config)), step=0)
    typed = {
        "moe.decoder_router": "Dropless",
        "moe.decoder_router.k": 2,
        "moe.router.k": 2,
        "moe.router.group": 64,
        "moe.z_weight": 0,
        "moe.dropout_rate": 0.2,
    }
    found = t5x.open_checkpoint(tmp_path, overrides=typed).config
    router = dataclasses.replace(ST_MOE.router, group=64)
    assert found == dataclasses.replace(config, moe=dataclasses.replace(ST_MOE, router=router))
    # The same of a policy that is stated.
    assert t5x.open_checkpoint(tmp_path, model=config, overrides={"moe.router.group": 64}).config == found
    other = {"moe.router": "ExpertChoice", "moe.decoder_router": "TokenChoice", "moe.decoder_router.renormalize": 1}
    moe = t5x.open_checkpoint(tmp_path, overrides=other).config.moe
    assert (moe.router, moe.decoder_router) == (ExpertChoice(), TokenChoice(renormalize=True))
    with pytest.raises(
        ValueError, match=re.escape("TokenChoice has no field 'train_capcity' (did you mean train_capacity?)")
    ):
        t5x.open_checkpoint(tmp_path, overrides={"moe.router.train_capcity": 2.0})
    with pytest.raises(ValueError, match=re.escape("moe.router.group is 2.5: expected an integer or a name.")):
        t5x.open_checkpoint(tmp_path, overrides={"moe.router.group": 2.5})
    with pytest.raises(ValueError, match="TokenChoice.k is 0"):
        t5x.open_checkpoint(tmp_path, overrides={"moe.router.k": 0})


def test_scaled_positions_are_stated_with_what_they_need(plain):
    typed = {"rope": "Rope", "rope.scaling": "LinearScaling", "rope.scaling.factor": 2, "rope.theta": 500}
    config = t5x.open_checkpoint(plain, overrides=typed).config
    assert config.rope == Rope(theta=500.0, scaling=LinearScaling(2.0)) and type(config.rope.scaling.factor) is float
