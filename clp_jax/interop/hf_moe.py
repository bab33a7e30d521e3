"""Families of Hugging Face with experts: Switch, Mixtral, Qwen 2 and 3 MoE."""

from collections.abc import Mapping
from typing import Any

from clp_jax.interop.hf_decoders import (
    DEFAULTS,
    IGNORED,
    QWEN,
    names,
    read_common,
    read_windows,
    write_common,
    write_qwen_windows,
)
from clp_jax.interop.hf_family import Family
from clp_jax.interop.hf_settings import Settings, activation_name
from clp_jax.interop.hf_t5 import COPIES, T5_DEFAULTS, read_sizes, t5_names, write_sizes
from clp_jax.models.config import ModelConfig, MoEConfig, PaLMConfig, T5Config
from clp_jax.nn.routing import Dropless, TokenChoice

_LAYER = "model.layers.{layer}"


def _expert_names(block: str, gate: str, experts: Mapping[str, str]) -> dict[str, str]:
    """Tensors of a router and its experts; `experts` maps our kernels to the tensors of one of them."""
    found = {"decoder/mlp/router/kernel": f"{_LAYER}.{block}.{gate}.weight"}
    for ours, theirs in experts.items():
        found[f"decoder/mlp/experts/{ours}/kernel"] = f"{_LAYER}.{block}.experts.{{expert}}.{theirs}.weight"
    return found


def _shared_names() -> dict[str, str]:
    found = {"decoder/mlp/shared_gate/kernel": f"{_LAYER}.mlp.shared_expert_gate.weight"}
    for ours, theirs in _PROJECTIONS.items():
        found[f"decoder/mlp/shared/{ours}/kernel"] = f"{_LAYER}.mlp.shared_expert.{theirs}.weight"
    return found


def _experts(config: ModelConfig) -> MoEConfig:
    """The experts of a policy; where there are none, some that tell the policies apart."""
    return config.moe or MoEConfig(num_experts=1)


def _dropless(config: PaLMConfig) -> Dropless:
    """The router of a policy; where it is of another kind, one that tells the policies apart."""
    router = _experts(config).router_of(causal=True)
    return router if isinstance(router, Dropless) else Dropless(k=1)


def _read_mixtral(settings: Settings) -> PaLMConfig:
    router = Dropless(
        k=settings["num_experts_per_tok"], renormalize=True, jitter=float(settings["router_jitter_noise"])
    )
    moe = MoEConfig(
        num_experts=settings["num_local_experts"],
        router=router,
        balance_weight=settings["router_aux_loss_coef"],
        balance_by="model",
    )
    return PaLMConfig(**read_common(settings, window=settings["sliding_window"], moe=moe))


def _write_mixtral(config: PaLMConfig) -> dict[str, Any]:
    moe, router = _experts(config), _dropless(config)
    return write_common(config) | {
        "intermediate_size": moe.mlp_dim or config.mlp_dim,
        "sliding_window": config.window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "router_jitter_noise": router.jitter,
        "router_aux_loss_coef": moe.balance_weight,
    }


def _read_qwen_moe(settings: Settings, num_experts: int, shared_dim: int) -> MoEConfig:
    settings.refuse(mlp_only_layers=(None, []))
    return MoEConfig(
        num_experts=num_experts,
        router=Dropless(k=settings["num_experts_per_tok"], renormalize=settings["norm_topk_prob"]),
        every=settings["decoder_sparse_step"],
        mlp_dim=settings["moe_intermediate_size"],
        shared_dim=shared_dim,
        shared_gate=shared_dim > 0,
        balance_weight=settings["router_aux_loss_coef"],
        balance_by="model",
    )


def _write_qwen_moe(config: PaLMConfig) -> dict[str, Any]:
    moe, router = _experts(config), _dropless(config)
    return write_common(config) | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": moe.every,
        "moe_intermediate_size": moe.mlp_dim or config.mlp_dim,
        "router_aux_loss_coef": moe.balance_weight,
        "mlp_only_layers": [],
    }


def _read_qwen2_moe(settings: Settings) -> PaLMConfig:
    moe = _read_qwen_moe(settings, settings["num_experts"], settings["shared_expert_intermediate_size"])
    windows: dict[str, Any] = {"window": None}
    if settings["use_sliding_window"]:
        layers, last = settings["num_hidden_layers"], settings["max_window_layers"]
        windows = read_windows(settings, [layer % 2 == 0 and layer < last for layer in range(layers)])
    return PaLMConfig(**read_common(settings, qkv_bias=settings["qkv_bias"], moe=moe, **windows))


def _write_qwen2_moe(config: PaLMConfig) -> dict[str, Any]:
    written = _write_qwen_moe(config) | write_qwen_windows(config)
    return written | {"shared_expert_intermediate_size": _experts(config).shared_dim, "qkv_bias": config.qkv_bias}


def _read_qwen3_moe(settings: Settings) -> PaLMConfig:
    # The key has two names.
    key = "num_experts" if "num_experts" in settings else "num_local_experts"
    moe, bias = _read_qwen_moe(settings, settings[key], 0), settings["attention_bias"]
    window = settings["sliding_window"] if settings["use_sliding_window"] else None
    return PaLMConfig(
        **read_common(settings, qk_norm=True, qkv_bias=bias, out_bias=bias, window=window or None, moe=moe)
    )


def _write_qwen3_moe(config: PaLMConfig) -> dict[str, Any]:
    has_window = config.window is not None
    return _write_qwen_moe(config) | {
        "use_sliding_window": has_window,
        "sliding_window": config.window,
        "attention_bias": config.qkv_bias,
    }


def _sparse(layers: int, num_sparse: int) -> list[int]:
    """Switch's sparse layers, as transformers finds them."""
    step = layers // num_sparse if num_sparse > 0 else layers
    return [layer for layer in range(layers) if step == 1 or (step > 0 and layer % step == 1)]


def _every(settings: Settings, depths: Mapping[str, int]) -> int:
    """``every`` of the layers that are sparse.

    Raises:
        ValueError: when there is none that fits both stacks.
    """
    wanted = {stack: _sparse(layers, settings[f"num_sparse_{stack}_layers"]) for stack, layers in depths.items()}
    for every in range(1, max(depths.values()) + 1):
        if all(wanted[stack] == list(range(every - 1, layers, every)) for stack, layers in depths.items()):
            return every
    raise ValueError(
        f"config.json: the sparse layers are {wanted}, counted from 0: expected every n-th one of both stacks, the n-th first."
    )


def _read_switch(settings: Settings) -> T5Config:
    settings.refuse(router_bias=(False, None), batch_prioritized_routing=(False, None), router_dtype=("float32", None))
    sizes = read_sizes(settings)
    depths = {"encoder": sizes["num_encoder_layers"], "decoder": sizes["num_decoder_layers"]}
    router = TokenChoice(
        k=1, fixed_capacity=settings["expert_capacity"], group="row", jitter=float(settings["router_jitter_noise"])
    )
    moe = MoEConfig(
        num_experts=settings["num_experts"],
        router=router,
        every=_every(settings, depths),
        balance_weight=settings["router_aux_loss_coef"],
        balance_by="stack",
        z_weight=settings["router_z_loss_coef"],
    )
    activation = settings.activation(settings["dense_act_fn"], "dense_act_fn")
    return T5Config(
        **sizes, gated=False, activation=activation, tied_head=settings["tie_word_embeddings"] is not False, moe=moe
    )


def _write_switch(config: T5Config) -> dict[str, Any]:
    moe = _experts(config)
    router = moe.router if isinstance(moe.router, TokenChoice) else TokenChoice()
    found = write_sizes(config) | {
        "dense_act_fn": activation_name(config.activation),
        "tie_word_embeddings": config.tied_head,
        "num_experts": moe.num_experts,
        "expert_capacity": router.fixed_capacity or 1,
        "router_jitter_noise": router.jitter,
        "router_aux_loss_coef": moe.balance_weight,
        "router_z_loss_coef": moe.z_weight,
        "router_bias": False,
    }
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        found[f"num_sparse_{stack}_layers"] = layers // moe.every
    return found


_PROJECTIONS = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    names() | _expert_names("block_sparse_moe", "gate", {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}),
    DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.001,
        "max_position_embeddings": 131072,
    },
    ignored=IGNORED,
)
_QWEN_MOE = QWEN | {
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "router_aux_loss_coef": 0.001,
    "qkv_bias": True,
}
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read_qwen2_moe,
    _write_qwen2_moe,
    names() | _expert_names("mlp", "gate", _PROJECTIONS) | _shared_names(),
    _QWEN_MOE | {"num_experts_per_tok": 4, "num_experts": 60},
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3_moe,
    _write_qwen3_moe,
    names() | _expert_names("mlp", "gate", _PROJECTIONS),
    _QWEN_MOE | {"num_experts_per_tok": 8, "num_local_experts": 128},
)
SWITCH = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    _read_switch,
    _write_switch,
    t5_names("mlp", bias_layer="0"),
    T5_DEFAULTS
    | {
        "num_sparse_encoder_layers": 3,
        "num_sparse_decoder_layers": 3,
        "dense_act_fn": "relu",
        "expert_capacity": 64,
        "num_experts": 8,
        "router_jitter_noise": 0.01,
        "router_aux_loss_coef": 0.001,
        "router_z_loss_coef": 0.001,
    },
    copies=COPIES,
    untied_copies=True,
)
