"""The layer against Hugging Face's Switch, Mixtral and Qwen2-MoE blocks and their auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.moe import MoE
from clp_jax.nn.routing import Dropless, TokenChoice

torch = pytest.importorskip("torch", reason="parity needs the extra `hf`")
pytest.importorskip("transformers", reason="parity needs the extra `hf`")

from transformers import MixtralConfig, Qwen2MoeConfig, SwitchTransformersConfig
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen
from transformers.models.switch_transformers import modeling_switch_transformers as switch

B, T, D, F, E = 3, 11, 8, 12, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D)).astype(np.float32)
COTANGENT = RNG.normal(size=(B, T, D)).astype(np.float32)
MASK = RNG.random((B, T)) < 0.75


def _draw(module, seed=0):
    """Random weights, as large as in a trained layer, so that experts overflow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, 0.5, generator=generator)
    return module.eval()


def _theirs(module):
    x = torch.tensor(X, requires_grad=True)
    y = module(x)
    (y * torch.tensor(COTANGENT)).sum().backward()
    return y.detach().numpy(), x.grad.numpy()


def _moe(router, kernels: dict, **settings) -> MoE:
    moe = MoE(nnx.Rngs(0), D, F, E, router=router, dropout_rate=0.0, dtype=jnp.dtype("float32"), **settings)
    state = nnx.to_flat_state(nnx.state(moe))
    assert {"/".join(map(str, path)) for path, _ in state} == set(kernels)
    for path, variable in state:
        value = jnp.asarray(kernels["/".join(map(str, path))].detach().numpy())
        assert variable.shape == value.shape
        variable[...] = value
    return moe


@jax.jit
def _ours(moe_state, x, mask):
    y, transposed, statistics = jax.vjp(lambda x: nnx.merge(*moe_state)(x, mask), x, has_aux=True)
    return y, transposed(jnp.asarray(COTANGENT))[0], statistics


def _compare(moe, module):
    y, of_x, statistics = _ours(nnx.split(moe), jnp.asarray(X), jnp.ones((B, T), bool))
    expected, of_x_expected = _theirs(module)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_x, of_x_expected, rtol=1e-4, atol=1e-4)
    return statistics


def _stacked(experts, name):
    return torch.stack([getattr(experts[f"expert_{e}"], name).weight.T for e in range(E)])


def test_switch():
    config = SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=E, expert_capacity=3, dropout_rate=0.0)
    module = _draw(switch.SwitchTransformersSparseMLP(config))
    kernels = {"router/kernel": module.router.classifier.weight.T}
    kernels |= {f"experts/{name}/kernel": _stacked(module.experts, name) for name in ("wi", "wo")}
    moe = _moe(TokenChoice(1, fixed_capacity=3), kernels, activation="relu", gated=False)
    statistics = _compare(moe, module)

    kept, _, logits = module.router(torch.tensor(X))
    probs = torch.softmax(logits, -1)
    balance = switch.load_balancing_loss_func(probs, probs.argmax(-1))
    np.testing.assert_allclose(statistics.balance_loss, balance.item(), rtol=1e-5)
    np.testing.assert_allclose(statistics.z_loss, switch.router_z_loss_func(logits).item(), rtol=1e-5)
    np.testing.assert_allclose(statistics.load, (kept.sum((0, 1)) / kept.sum()).numpy(), rtol=1e-6)
    np.testing.assert_allclose(statistics.dropped, 1 - kept.sum().item() / (B * T), rtol=1e-5)
    assert float(statistics.dropped) > 0.05


def _packed(experts) -> dict:
    """Kernels of experts whose two ways in are one tensor."""
    gate, up = experts.gate_up_proj.transpose(1, 2).chunk(2, -1)
    ways = {"wi_0": gate, "wi_1": up, "wo": experts.down_proj.transpose(1, 2)}
    return {f"experts/{name}/kernel": kernel for name, kernel in ways.items()}


def test_mixtral():
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, hidden_act="gelu_pytorch_tanh"
    )
    config._experts_implementation = "eager"
    module = _draw(mixtral.MixtralSparseMoeBlock(config))
    kernels = {"router/kernel": module.gate.weight.T} | _packed(module.experts)
    moe = _moe(Dropless(2), kernels, activation="gelu", gated=True)
    statistics = _compare(moe, module)

    logits = module.gate(torch.tensor(X))[0]
    balance = mixtral.load_balancing_loss_func((logits,), E, 2)
    np.testing.assert_allclose(statistics.balance_loss, balance.item(), rtol=1e-5)
    masked = _ours(nnx.split(moe), jnp.asarray(X), jnp.asarray(MASK))[2]
    balance = mixtral.load_balancing_loss_func((logits,), E, 2, torch.tensor(MASK))
    np.testing.assert_allclose(masked.balance_loss, balance.item(), rtol=1e-5)
    assert abs(float(masked.balance_loss) - float(statistics.balance_loss)) > 1e-3


@pytest.mark.parametrize("renormalize", [False, True])
def test_qwen_with_a_shared_expert(renormalize):
    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=10,
        num_experts=E,
        num_experts_per_tok=3,
        norm_topk_prob=renormalize,
        hidden_act="gelu_pytorch_tanh",
    )
    config._experts_implementation = "eager"
    module = _draw(qwen.Qwen2MoeSparseMoeBlock(config))
    shared = {
        "wi_0": module.shared_expert.gate_proj,
        "wi_1": module.shared_expert.up_proj,
        "wo": module.shared_expert.down_proj,
    }
    kernels = {
        "router/kernel": module.gate.weight.T,
        "shared_gate/kernel": module.shared_expert_gate.weight.T,
        **{f"shared/{name}/kernel": layer.weight.T for name, layer in shared.items()},
        **_packed(module.experts),
    }
    router = Dropless(3, renormalize=renormalize)
    _compare(_moe(router, kernels, activation="gelu", gated=True, shared_dim=10, shared_gate=True), module)
