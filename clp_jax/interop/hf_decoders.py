"""Decoder-only families of Hugging Face: Llama, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3."""

from collections.abc import Sequence
from typing import Any

from clp_jax.interop.hf_family import Family
from clp_jax.interop.hf_keys import checked
from clp_jax.interop.hf_settings import Settings, activation_name, read_rope, unsupported, write_scaling
from clp_jax.models.config import PaLMConfig
from clp_jax.nn.rope import Rope

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_LAYER = "model.layers.{layer}"


def names(*, post_norms: bool = False) -> dict[str, str]:
    """Tensors of every decoder-only family; Gemma 2 and 3 have norms behind the blocks too, and name them otherwise."""
    found = {
        "token_embedder/embedding": "model.embed_tokens.weight",
        "logits_head/kernel": "lm_head.weight",
        "decoder/norm/scale": "model.norm.weight",
        "decoder/self_attention_norm/scale": f"{_LAYER}.input_layernorm.weight",
        "decoder/mlp_norm/scale": f"{_LAYER}.post_attention_layernorm.weight",
        "decoder/self_attention/query_norm/scale": f"{_LAYER}.self_attn.q_norm.weight",
        "decoder/self_attention/key_norm/scale": f"{_LAYER}.self_attn.k_norm.weight",
    }
    parts = {
        "self_attention/query": "q",
        "self_attention/key": "k",
        "self_attention/value": "v",
        "self_attention/out": "o",
    }
    parts = {ours: f"self_attn.{theirs}_proj" for ours, theirs in parts.items()}
    parts |= {"mlp/wi_0": "mlp.gate_proj", "mlp/wi_1": "mlp.up_proj", "mlp/wo": "mlp.down_proj"}
    for ours, theirs in parts.items():
        found[f"decoder/{ours}/kernel"] = f"{_LAYER}.{theirs}.weight"
        found[f"decoder/{ours}/bias"] = f"{_LAYER}.{theirs}.bias"
    if post_norms:
        found |= {
            "decoder/self_attention_post_norm/scale": f"{_LAYER}.post_attention_layernorm.weight",
            "decoder/mlp_norm/scale": f"{_LAYER}.pre_feedforward_layernorm.weight",
            "decoder/mlp_post_norm/scale": f"{_LAYER}.post_feedforward_layernorm.weight",
        }
    return found


def read_common(settings: Settings, **more: Any) -> dict[str, Any]:
    """What every decoder-only family shares; `more` goes before it."""
    settings.refuse(use_bidirectional_attention=(None, False), partial_rotary_factor=(None, 1.0))
    heads, size = settings["num_attention_heads"], settings["hidden_size"]
    groups, bos, pad = settings["num_key_value_heads"], settings["bos_token_id"], settings["pad_token_id"]
    start = bos if bos is not None else pad if pad is not None and pad >= 0 else settings.eos_ids()[0]
    common = {
        "vocab_size": settings["vocab_size"],
        "embed_dim": size,
        "mlp_dim": settings["intermediate_size"],
        "num_layers": settings["num_hidden_layers"],
        "num_heads": heads,
        "head_dim": settings["head_dim"] or size // heads,
        "num_kv_heads": None if groups == heads else groups,
        "norm_eps": settings["rms_norm_eps"],
        "tied_head": bool(settings["tie_word_embeddings"]),
        "scale_tied_head": False,
        "pad_id": settings.pad_id(),
        "eos_ids": settings.eos_ids(),
        "start_id": start,
    }
    if "activation" not in more:
        common["activation"] = settings.activation(settings["hidden_act"], "hidden_act")
    if "rope" not in more:
        common["rope"] = plain_rope(settings)
    return common | more


def write_common(config: PaLMConfig) -> dict[str, Any]:
    """The keys that every decoder-only family shares."""
    eos, rope = config.eos_ids, config.rope
    is_told = config.start_id == (eos[0] if config.pad_id < 0 else config.pad_id)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": None if rope is None else rope.theta,
        "rope_scaling": None if rope is None else write_scaling(rope),
        "pad_token_id": None if config.pad_id < 0 else config.pad_id,
        # Told by the padding or the end where it is one of them: a padding that is the beginning could not be told apart.
        "bos_token_id": None if is_told else config.start_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
    }


def plain_rope(settings: Settings) -> Rope:
    """The positions of families whose layers all have the same."""
    key = "rope_parameters" if settings.given("rope_parameters") else "rope_scaling"
    theta = settings["rope_theta"] or settings.defaults["rope_theta"]
    return read_rope(settings.given(key) or {}, theta, settings, key)


def read_windows(settings: Settings, default: Sequence[bool]) -> dict[str, Any]:
    """Which layers see a window.

    Args:
        settings: with ``sliding_window``, and perhaps ``layer_types``.
        default: of every layer, without ``layer_types``.
    """
    types = settings.given("layer_types")
    local = list(default)
    if types is not None:
        for kind in types:
            if kind not in (_LOCAL, _GLOBAL):
                raise unsupported("layer_types", kind, (_LOCAL, _GLOBAL))
        local = [kind == _LOCAL for kind in types]
    layers, window = settings["num_hidden_layers"], settings["sliding_window"]
    if len(local) != layers:
        raise ValueError(f"config.json: layer_types has {len(local)} layers, num_hidden_layers is {layers}.")
    if not window or not any(local):
        return {"window": None}
    return {"window": window, "window_pattern": shortest(local)}


def shortest(local: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest pattern that repeats through all layers, the last time perhaps cut short."""
    sizes = range(1, len(local) + 1)
    return next(tuple(local[:size]) for size in sizes if all(local[i] == local[i % size] for i in range(len(local))))


def locals_of(config: PaLMConfig) -> list[bool]:
    """Which layers have a window."""
    return [kind.window is not None for kind in config.layer_kinds(config.num_layers)]


def write_windows(config: PaLMConfig, unused: int | None = None) -> dict[str, Any]:
    """The keys of windows where layers may differ; `unused` is the window where no layer has one."""
    return {
        "sliding_window": config.window or unused,
        "layer_types": [_LOCAL if local else _GLOBAL for local in locals_of(config)],
    }


def _read_llama(settings: Settings) -> PaLMConfig:
    bias = settings["attention_bias"]
    return PaLMConfig(**read_common(settings, qkv_bias=bias, out_bias=bias, mlp_bias=settings["mlp_bias"]))


def _write_llama(config: PaLMConfig) -> dict[str, Any]:
    return write_common(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(settings: Settings) -> PaLMConfig:
    return PaLMConfig(**read_common(settings, window=settings["sliding_window"]))


def _write_mistral(config: PaLMConfig) -> dict[str, Any]:
    return write_common(config) | {"sliding_window": config.window}


def qwen_windows(settings: Settings) -> dict[str, Any]:
    """Qwen's first `max_window_layers` layers see everything, where the others have a window at all."""
    if not settings["use_sliding_window"]:
        return {"window": None}
    layers = settings["num_hidden_layers"]
    return read_windows(settings, [layer >= settings["max_window_layers"] for layer in range(layers)])


def write_qwen_windows(config: PaLMConfig) -> dict[str, Any]:
    """The keys of `qwen_windows`."""
    local = locals_of(config)
    full = local.index(True) if any(local) else len(local)
    return write_windows(config) | {"use_sliding_window": any(local), "max_window_layers": full}


def _read_qwen2(settings: Settings) -> PaLMConfig:
    return PaLMConfig(**read_common(settings, qkv_bias=True, **qwen_windows(settings)))


def _write_qwen2(config: PaLMConfig) -> dict[str, Any]:
    return write_common(config) | write_qwen_windows(config)


def _read_qwen3(settings: Settings) -> PaLMConfig:
    bias = settings["attention_bias"]
    return PaLMConfig(**read_common(settings, qk_norm=True, qkv_bias=bias, out_bias=bias, **qwen_windows(settings)))


def _write_qwen3(config: PaLMConfig) -> dict[str, Any]:
    return write_common(config) | write_qwen_windows(config) | {"attention_bias": config.qkv_bias}


def _gemma(settings: Settings, **more: Any) -> dict[str, Any]:
    """What all Gemmas share."""
    key = "hidden_activation" if settings.given("hidden_activation") else "hidden_act"
    # The first releases say "gelu" and mean the approximation.
    name = "gelu_pytorch_tanh" if settings[key] == "gelu" else settings[key]
    bias = settings["attention_bias"]
    shared = {"norm_offset": True, "scale_embeddings": True, "qkv_bias": bias, "out_bias": bias}
    return read_common(settings, activation=settings.activation(name, key), **shared, **more)


def _write_gemma(config: PaLMConfig) -> dict[str, Any]:
    written = write_common(config)
    name = written["hidden_act"]
    return written | {"hidden_activation": name, "attention_bias": config.qkv_bias}


def _gemma2(settings: Settings, pattern: int) -> dict[str, Any]:
    layers = settings["num_hidden_layers"]
    return {
        "post_norm": True,
        "query_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "logit_cap": settings["final_logit_softcapping"],
        **read_windows(settings, [(layer + 1) % pattern != 0 for layer in range(layers)]),
    }


def _read_gemma2(settings: Settings) -> PaLMConfig:
    cap = settings["attn_logit_softcapping"]
    return PaLMConfig(**_gemma(settings, attention_cap=cap, **_gemma2(settings, 2)))


def _write_gemma2(config: PaLMConfig) -> dict[str, Any]:
    return _write_gemma(config) | {
        # Transformers insists on a whole number; other scales can't be told.
        "query_pre_attn_scalar": max(1, round(config.attention_scale**-2)),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        **write_windows(config, unused=_GEMMA_WINDOW),
    }


def _read_gemma3(settings: Settings) -> PaLMConfig:
    settings.refuse(attn_logit_softcapping=(None,))
    given = settings.given("rope_parameters") or {}
    if _GLOBAL in given or _LOCAL in given:
        key = "rope_parameters"
        everywhere, local = (checked(kind, given.get(kind), key) or {} for kind in (_GLOBAL, _LOCAL))
    else:
        everywhere, local = settings.given("rope_scaling") or given, {}
    theta, near_theta = (settings[k] or settings.defaults[k] for k in ("rope_theta", "rope_local_base_freq"))
    rope, near = read_rope(everywhere, theta, settings), read_rope(local, near_theta, settings)
    pattern = settings.given("sliding_window_pattern") or settings["_sliding_window_pattern"]
    return PaLMConfig(**_gemma(settings, qk_norm=True, rope=rope, local_rope=near, **_gemma2(settings, pattern)))


def _write_gemma3(config: PaLMConfig) -> dict[str, Any]:
    near = config.local_rope or config.rope
    written = _write_gemma2(config) | {"rope_local_base_freq": None if near is None else near.theta}
    return {key: value for key, value in written.items() if key != "attn_logit_softcapping"}


DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
}
QWEN = DEFAULTS | {
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}
_GEMMA = DEFAULTS | {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "max_position_embeddings": 8192,
}
# Transformers insists on a window even where all layers see everything.
_GEMMA_WINDOW = 4096
# Old files hold the frequencies of rotary positions.
IGNORED = r"rotary_emb\.inv_freq$"

LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, names(), DEFAULTS, ignored=IGNORED)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _read_mistral,
    _write_mistral,
    names(),
    DEFAULTS | {"sliding_window": 4096, "max_position_embeddings": 131072},
    ignored=IGNORED,
)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, names(), QWEN, ignored=IGNORED)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, names(), QWEN | {"head_dim": 128})
GEMMA = Family("gemma", "GemmaForCausalLM", lambda s: PaLMConfig(**_gemma(s)), _write_gemma, names(), _GEMMA)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    _read_gemma2,
    _write_gemma2,
    names(post_norms=True),
    _GEMMA
    | {
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": _GEMMA_WINDOW,
    },
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _read_gemma3,
    _write_gemma3,
    names(post_norms=True),
    _GEMMA
    | {
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": None,
        "sliding_window": _GEMMA_WINDOW,
        "_sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
    },
)
