"""What a loop over tokens computes before it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_policies import PROMPTS, tiny_config, varied_params

from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import Dropless, TokenChoice
from clp_jax.nn.stack import cut
from clp_jax.sampling.decoder import CachedDecoder

EXPERTS = MoEConfig(num_experts=2, router=Dropless(1), every=2)


@pytest.mark.parametrize("unroll", [None, 1])
def test_kernels_are_rounded_once_and_nothing_else_is(unroll):
    policy = Policy(
        tiny_config(moe=EXPERTS, dtype="bfloat16", scan_unroll=unroll, num_encoder_layers=1, num_decoder_layers=4)
    )
    params = varied_params(policy)

    def step(rounded):
        model = policy.bind(params)
        weights = model.loop_weights()
        if not rounded:
            (run,) = model.decoder.runs()
            weights = tuple(nnx.state(piece) for piece in (cut(run) if unroll is None else (run,)))
        cache = model.init_cache(model.encode(jnp.asarray(PROMPTS)), max_length=2, num_samples=1)
        return model.decode_step(jnp.full((len(PROMPTS),), 3), cache, weights)[0], weights

    (found, weights), (expected, before) = (jax.jit(step, static_argnums=0)(rounded) for rounded in (True, False))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
    types: dict[tuple, set] = {}
    for state in weights:
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
            kind = next((name for name in names if name in ("kernel", "scale", "embedding")), "other")
            types.setdefault(("router" in names, kind), set()).add(str(leaf.dtype))
    assert types.pop((False, "kernel")) == {"bfloat16"}
    assert types and all(found == {"float32"} for found in types.values()), types
    assert (True, "kernel") in types and (False, "scale") in types
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(before)} == {"float32"}


@pytest.mark.parametrize(
    "config",
    [
        PaLMConfig.llama(
            vocab_size=11, embed_dim=8, mlp_dim=12, num_heads=2, head_dim=4, num_layers=4,
            moe=MoEConfig(num_experts=4, router=Dropless(2), every=2, shared_dim=6),
        ),
        tiny_config(
            num_decoder_layers=4,
            moe=MoEConfig(num_experts=4, router=TokenChoice(2, eval_capacity=4.0, group="row"), every=2, extra_mlp=True),
        ),
    ],
    ids=["a decoder, dropless", "an encoder-decoder, room for all"],
)  # fmt: skip
def test_experts_decode_as_in_the_whole_forward(config):
    """Position by position, where nothing is dropped: within a hundred thousandth of the largest logit."""
    policy = Policy(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 11, (len(PROMPTS), 7)), jnp.int32)

    @jax.jit
    def both(params):
        model = policy.bind(params)
        decoder = CachedDecoder(model)
        first, cache = decoder.start(jnp.asarray(PROMPTS), 7, 1)
        fed = tokens.at[:, 0].set(first)
        _, logits = jax.lax.scan(lambda cache, x: decoder.step(x, cache)[::-1], cache, fed.T)
        return logits.swapaxes(0, 1), model(jnp.asarray(PROMPTS), fed)

    found, whole = both(varied_params(policy))
    assert np.abs(found - whole).max() <= 1e-5 * np.abs(whole).max()
