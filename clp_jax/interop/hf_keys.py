"""What the keys of a Hugging Face ``config.json`` hold, so that a wrong value is told by its key and never met later."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """Values that a key may have.

    Attributes:
        expected: in words.
        holds: whether a value is one.
    """

    expected: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.holds(value))


_COUNT = Kind("a whole number of at least 1", lambda value: type(value) is int and value >= 1)
_WHOLE = Kind("a whole number of at least 0", lambda value: type(value) is int and value >= 0)
_POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
_NUMBER = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_RATE = Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_SWITCH = Kind("true or false", lambda value: type(value) is bool)
_NAME = Kind("a name", lambda value: isinstance(value, str))
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
# Some say that there is no padding by a token that there is not.
_TOKEN = Kind("a token's number, or null", lambda value: value is None or (type(value) is int and value >= -1))
_TOKENS = Kind(
    "a token's number, a list of them, or null",
    lambda value: (
        all(type(token) is int and token >= 0 for token in (value if isinstance(value, list) else [value]))
        or value is None
    ),
)

_BUCKETS = Kind("an even number of at least 4", lambda value: type(value) is int and value >= 4 and value % 2 == 0)

_OF_ALL = {
    _BUCKETS: ("relative_attention_num_buckets",),
    _COUNT: (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "_sliding_window_pattern"),
        *("d_model", "d_ff", "d_kv", "num_layers", "num_heads"),
        "relative_attention_max_distance",
        *("num_experts", "num_local_experts", "num_experts_per_tok", "expert_capacity", "decoder_sparse_step"),
        "moe_intermediate_size",
    ),
    _or_null(_COUNT): (
        *("num_key_value_heads", "head_dim", "num_decoder_layers"),
        *("sliding_window_pattern", "original_max_position_embeddings"),
    ),
    _WHOLE: (
        *("num_sparse_encoder_layers", "num_sparse_decoder_layers"),
        *("shared_expert_intermediate_size", "max_window_layers"),
    ),
    _or_null(_WHOLE): ("sliding_window",),
    _POSITIVE: ("rms_norm_eps", "layer_norm_epsilon", "query_pre_attn_scalar"),
    _or_null(_POSITIVE): (
        *("rope_theta", "rope_local_base_freq"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
        *("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    _NUMBER: ("router_jitter_noise", "router_aux_loss_coef", "router_z_loss_coef"),
    _RATE: ("dropout_rate",),
    _SWITCH: (
        *("attention_bias", "mlp_bias", "qkv_bias"),
        *("use_sliding_window", "norm_topk_prob", "scale_decoder_outputs"),
    ),
    _or_null(_SWITCH): ("tie_word_embeddings",),
    _NAME: ("model_type", "hidden_act", "dense_act_fn", "feed_forward_proj"),
    _or_null(_NAME): ("hidden_activation",),
    _or_null(_NAMES): ("layer_types",),
    _or_null(_OBJECT): ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention"),
    _TOKEN: ("pad_token_id", "bos_token_id", "decoder_start_token_id"),
    _TOKENS: ("eos_token_id",),
}
KINDS = {key: kind for kind, keys in _OF_ALL.items() for key in keys}


def checked(key: str, value: Any, inside: str = "", file: str = "config.json") -> Any:
    """A key's value.

    Args:
        key: that we read.
        value: that it has.
        inside: the object that the key is in; empty for the file itself.
        file: for messages.

    Raises:
        ValueError: naming the key, its value, and what is expected.
    """
    kind = KINDS[key]
    if not kind.holds(value):
        name = f"{inside}.{key}" if inside else key
        raise ValueError(f"{file}: {name} is {value!r}: expected {kind.expected}.")
    return value
