"""Encoder-decoders of Hugging Face: T5 (and UL2, Flan-T5), mT5, umT5, Switch."""

from typing import Any

from clp_jax.interop.hf_family import Family
from clp_jax.interop.hf_settings import Settings, activation_name
from clp_jax.models.config import ModelConfig, T5Config

_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def t5_names(mlp: str, *, bias_layer: str) -> dict[str, str]:
    """Tensors of both stacks; `mlp` is the feed-forward block's name, `bias_layer` the layer that holds the positions'."""
    names = {"token_embedder/embedding": "shared.weight", "logits_head/kernel": "lm_head.weight"}
    for stack, blocks in (("encoder", 2), ("decoder", 3)):
        names[f"{stack}/norm/scale"] = f"{stack}.final_layer_norm.weight"
        # A table that the layers share is the first layer's.
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        names[f"{stack}/relpos_bias/embedding"] = f"{stack}.block.{bias_layer}.{bias}"
        places = [("self_attention", "SelfAttention"), ("cross_attention", "EncDecAttention")][: blocks - 1]
        for number, (ours, theirs) in enumerate(places):
            names[f"{stack}/{ours}_norm/scale"] = f"{stack}.block.{{layer}}.layer.{number}.layer_norm.weight"
            for part, letter in _ATTENTION.items():
                names[f"{stack}/{ours}/{part}/kernel"] = (
                    f"{stack}.block.{{layer}}.layer.{number}.{theirs}.{letter}.weight"
                )
        block = f"{stack}.block.{{layer}}.layer.{blocks - 1}"
        names[f"{stack}/mlp_norm/scale"] = f"{block}.layer_norm.weight"
        for part in ("wi", "wi_0", "wi_1", "wo"):
            names[f"{stack}/mlp/{part}/kernel"] = f"{block}.{mlp}.{part}.weight"
            names[f"{stack}/mlp/experts/{part}/kernel"] = f"{block}.{mlp}.experts.expert_{{expert}}.{part}.weight"
        names[f"{stack}/mlp/router/kernel"] = f"{block}.{mlp}.router.classifier.weight"
    return names


def read_sizes(settings: Settings) -> dict[str, Any]:
    """What encoder-decoders share."""
    layers = settings["num_layers"]
    deeper = settings.given("num_decoder_layers")
    key = "decoder_start_token_id"
    start = settings.given(key) if key in settings else settings.generated(key)
    pad = settings["pad_token_id"]
    return {
        "vocab_size": settings["vocab_size"],
        "embed_dim": settings["d_model"],
        "mlp_dim": settings["d_ff"],
        "num_heads": settings["num_heads"],
        "head_dim": settings["d_kv"],
        "num_encoder_layers": layers,
        "num_decoder_layers": layers if deeper is None else deeper,
        "num_buckets": settings["relative_attention_num_buckets"],
        "max_distance": settings["relative_attention_max_distance"],
        "norm_eps": settings["layer_norm_epsilon"],
        "dropout_rate": float(settings["dropout_rate"]),
        "pad_id": settings.pad_id(),
        "eos_ids": settings.eos_ids(),
        "start_id": start if start is not None else pad if pad is not None else 0,
    }


def write_sizes(config: T5Config) -> dict[str, Any]:
    """The keys that encoder-decoders share."""
    eos = config.eos_ids
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        # Transformers has no T5 without them: nothing else can be told.
        "relative_attention_num_buckets": config.num_buckets or T5_DEFAULTS["relative_attention_num_buckets"],
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout_rate,
        "pad_token_id": None if config.pad_id < 0 else config.pad_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "decoder_start_token_id": config.start_id,
        "is_encoder_decoder": True,
    }


def _read_feed_forward(settings: Settings) -> dict[str, Any]:
    kind = settings["feed_forward_proj"]
    gate, _, name = kind.rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"config.json: feed_forward_proj is {kind!r}: expected 'NAME' or 'gated-NAME'.")
    # The one name that means the approximation with a gate, and the exact function without.
    name = "gelu_new" if kind == "gated-gelu" else name
    return {"gated": gate == "gated", "activation": settings.activation(name, "feed_forward_proj")}


def _written_feed_forward(config: ModelConfig) -> str:
    if not config.gated:
        return "gelu_new" if config.activation == "gelu" else activation_name(config.activation)
    if config.activation in ("gelu", "gelu_exact"):
        return "gated-gelu" if config.activation == "gelu" else "gated-gelu_python"
    return f"gated-{activation_name(config.activation)}"


def _read_t5(settings: Settings) -> T5Config:
    # Version 5 always says that embeddings are tied; what 1.1 meant by saying they are not is in another key.
    tied = settings["tie_word_embeddings"] is not False
    said = settings.given("scale_decoder_outputs")
    scaled = tied if said is None else said
    has_head = settings.tensors is not None and "lm_head.weight" in settings.tensors
    own_head = has_head and not scaled if settings.tensors is not None else not tied
    return T5Config(
        **read_sizes(settings),
        **_read_feed_forward(settings),
        tied_head=not own_head,
        scale_tied_head=own_head or scaled,
    )


def _write_t5(config: T5Config) -> dict[str, Any]:
    scaled = config.tied_head and config.scale_tied_head
    return write_sizes(config) | {
        "feed_forward_proj": _written_feed_forward(config),
        "tie_word_embeddings": config.tied_head,
        "scale_decoder_outputs": scaled,
    }


def _read_mt5(settings: Settings) -> T5Config:
    # Never scaled, and a head of its own wherever the file has one.
    own_head = settings["tie_word_embeddings"] is False
    if settings.tensors is not None:
        own_head = "lm_head.weight" in settings.tensors
    return T5Config(
        **read_sizes(settings), **_read_feed_forward(settings), tied_head=not own_head, scale_tied_head=own_head
    )


def _write_mt5(config: T5Config) -> dict[str, Any]:
    return write_sizes(config) | {
        "feed_forward_proj": _written_feed_forward(config),
        "tie_word_embeddings": config.tied_head,
    }


def _read_umt5(settings: Settings) -> T5Config:
    own_head = settings["tie_word_embeddings"] is False
    return T5Config(**read_sizes(settings), **_read_feed_forward(settings), tied_head=not own_head, bias_per_layer=True)


T5_DEFAULTS = {
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Old files of T5 hold a table that nothing reads.
_IGNORED = r"EncDecAttention\.relative_attention_bias\.weight$"

T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    read=_read_t5,
    write=_write_t5,
    names=t5_names("DenseReluDense", bias_layer="0"),
    defaults=T5_DEFAULTS,
    copies=COPIES,
    ignored=_IGNORED,
)
MT5 = Family(
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    read=_read_mt5,
    write=_write_mt5,
    names=T5.names,
    defaults=T5_DEFAULTS | {"feed_forward_proj": "gated-gelu"},
    copies=COPIES,
    ignored=_IGNORED,
)
UMT5 = Family(
    model_type="umt5",
    architecture="UMT5ForConditionalGeneration",
    read=_read_umt5,
    write=_write_mt5,
    names=t5_names("DenseReluDense", bias_layer="{layer}"),
    defaults=T5_DEFAULTS | {"feed_forward_proj": "gated-gelu"},
    copies=COPIES,
    ignored=_IGNORED,
)
