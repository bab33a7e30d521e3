"""Parts of a layer that no published checkpoint at hand has, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clp_jax.models.config import MoEConfig, PaLMConfig
from clp_jax.models.layer import Layer, View
from clp_jax.nn.attention import look
from clp_jax.nn.routing import Dropless
from clp_jax.nn.visibility import Places

RNG = np.random.default_rng(0)


def test_a_dense_block_follows_the_experts():
    """ST-MoE, arXiv 2202.08906, appendix: behind the experts' residual, with a norm and a residual of its own."""
    config = PaLMConfig(
        vocab_size=11,
        embed_dim=6,
        mlp_dim=10,
        num_heads=2,
        head_dim=4,
        num_layers=1,
        rope=None,
        moe=MoEConfig(num_experts=2, router=Dropless(1), mlp_dim=7, extra_mlp=True),
    )
    (kind,) = config.layer_kinds(1)
    layer = Layer(config, kind, nnx.Rngs(0), causal=True, cross=False)
    layer.extra_mlp_norm.scale[...] = jnp.asarray(1 + 0.3 * RNG.normal(size=6), jnp.float32)
    x = jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state, x):
        places = Places(jnp.arange(5)[None], jnp.ones((2, 5), jnp.int32))
        view = View(look(config.pattern(kind, causal=True), places, places), None, None)
        return nnx.merge(graph, state)(x, view, jnp.ones((2, 5), bool))[0]

    def kernel(part):
        return np.asarray(getattr(layer.extra_mlp, part).kernel[...], np.float64)

    whole, (wi_0, wi_1, wo) = run(state, x), map(kernel, ("wi_0", "wi_1", "wo"))
    assert wi_0.shape == (6, 10)
    layer.extra_mlp.wo.kernel[...] = jnp.zeros((10, 6))
    experts = np.asarray(run(nnx.state(layer), x), np.float64)
    normed = experts / np.sqrt(np.mean(experts**2, -1, keepdims=True) + config.norm_eps)
    normed = normed * np.asarray(layer.extra_mlp_norm.scale[...], np.float64)
    gate = normed @ wi_0
    expected = experts + (gate / (1 + np.exp(-gate)) * (normed @ wi_1)) @ wo
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
