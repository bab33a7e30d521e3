"""All Hugging Face families that are known, and which of them a policy can be written as."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from clp_jax.interop.hf_decoders import GEMMA, GEMMA2, GEMMA3, LLAMA, MISTRAL, QWEN2, QWEN3, shortest
from clp_jax.interop.hf_family import Family
from clp_jax.interop.hf_moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE, SWITCH
from clp_jax.interop.hf_t5 import MT5, T5, UMT5
from clp_jax.models.config import ModelConfig, MoEConfig, PaLMConfig, T5Config
from clp_jax.nn.routing import TokenChoice

# Of `TokenChoice`: they say nothing beside a fixed capacity.
_FACTORS = ("train_capacity", "eval_capacity", "min_capacity", "capacity_times_k")

# Where several can express a policy, the first one is written.
_ENCODER_DECODERS = (T5, UMT5, MT5, SWITCH)
_DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
FAMILIES = {family.model_type: family for family in (*_ENCODER_DECODERS, *_DECODERS)}

# How is computed, not what.
_FREE = {"dropout_rate": 0.0, "dtype": "float32", "param_dtype": "float32", "remat": "none", "scan_unroll": None}


def family_named(model_type: Any) -> Family:
    """The family of a ``model_type``.

    Raises:
        ValueError: when there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        close = difflib.get_close_matches(str(model_type), list(FAMILIES), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"config.json: model_type is {model_type!r}{hint}, which is not supported: expected one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def family_for(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family that a policy is written as.

    Args:
        config: of the policy.
        model_type: to choose this one; None takes the first that can express the policy.

    Raises:
        ValueError: naming the settings that the family, or every family, can't express.
    """
    widths = _widths(config)
    if config.moe is not None and config.moe.dense and len(widths) > 1:
        raise ValueError(
            f"the dense twin has feed-forward blocks of the widths {', '.join(map(str, widths))}: expected one width, as every "
            "Hugging Face family has: keep the policy's own checkpoint."
        )
    _check_capacity(config)
    known = _ENCODER_DECODERS if isinstance(config, T5Config) else _DECODERS
    families = known if model_type is None else (family_named(model_type),)
    lacking: dict[str, list[str]] = {}
    for family in families:
        lacking[family.model_type] = differences(family, config)
        if not lacking[family.model_type]:
            return family
    # What stands in the way everywhere says most; otherwise the nearest family's does.
    everywhere = set.intersection(*(set(names) for names in lacking.values()))
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    names = sorted(everywhere) or lacking[nearest]
    which = "no Hugging Face family can" if everywhere and model_type is None else f"model_type {nearest!r} can't"
    asked = ", ".join(f"{name}={value!r}" for name, value in vars(config).items() if name in names) or names[0]
    raise ValueError(f"{which} express {type(config).__name__} with {asked}: keep the policy's own checkpoint.")


def _check_capacity(config: ModelConfig) -> None:
    """Checks an encoder-decoder's router by itself, as a checkpoint of T5X's does not tell of it.

    Raises:
        ValueError: when experts take a share of the tokens: Switch there gives them a number of rows.
    """
    if not isinstance(config, T5Config) or config.moe is None or config.moe.dense:
        return
    router, others = config.moe.router, config.moe.extra_mlp or config.moe.decoder_router is not None
    if isinstance(router, TokenChoice) and router.k == 1 and router.fixed_capacity is None and not others:
        raise ValueError(
            f"the router's fixed_capacity is None, and its train_capacity {router.train_capacity}: Hugging Face's Switch gives "
            "every expert a fixed number of a row's tokens. State it, as 64 for the published ones: from t5x:, with "
            "--gin_file=models/switch_NAME.gin --gin.convert.model=%MODEL --gin.EXPERT_CAPACITY=64; a run is trained with "
            "--gin.EXPERT_CAPACITY=64, or keeps its own checkpoint."
        )


def differences(family: Family, config: ModelConfig) -> list[str]:
    """Settings that would be others, were a policy written as a family and read again."""
    mine, written = canonical(config), family.write(without_twin(config))
    try:
        again = canonical(family.config(written))
    except ValueError as error:  # Values that the family refuses.
        return [str(error)]
    if type(again) is not type(mine):
        return [type(mine).__name__]
    return [f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) != getattr(again, f.name)]


def same(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configurations compute the same."""
    return canonical(a) == canonical(b)


def canonical(config: ModelConfig) -> ModelConfig:
    """The one of all configurations that compute the same."""
    config = without_twin(config)
    changes: dict[str, Any] = {
        **_FREE,
        "num_kv_heads": config.kv_heads,
        "query_scale": config.attention_scale,
        "scale_tied_head": config.scale_tied_head if config.tied_head else True,
    }
    if not config.num_buckets:
        changes |= {"max_distance": 128, "bias_per_layer": False}
    if config.moe is not None:
        changes |= _canonical_experts(config, config.moe)
    if isinstance(config, PaLMConfig):
        kinds = config.layer_kinds(config.num_layers)
        local = [kind.window is not None for kind in kinds]
        near = next((kind.rope for kind in kinds if kind.window is not None), None)
        far = next((kind.rope for kind in kinds if kind.window is None), near)
        changes |= {
            "window": config.window if any(local) else None,
            "window_pattern": shortest(local) if any(local) else (True,),
            "rope": far,
            "local_rope": None if near == far else near,
        }
    return dataclasses.replace(config, **changes)


def without_twin(config: ModelConfig) -> ModelConfig:
    """The ordinary configuration that a dense twin is, where all its feed-forward blocks have one width."""
    if config.moe is None or not config.moe.dense or len(_widths(config)) > 1:
        return config
    return dataclasses.replace(config, moe=None, mlp_dim=_widths(config)[0])


def _widths(config: ModelConfig) -> list[int]:
    """Of the feed-forward blocks of all layers, each once."""
    if isinstance(config, T5Config):
        encoder = config.layer_kinds(config.num_encoder_layers, causal=False)
        kinds = encoder + config.layer_kinds(config.num_decoder_layers)
    else:
        assert isinstance(config, PaLMConfig)
        kinds = config.layer_kinds(config.num_layers)
    return sorted({kind.mlp_dim for kind in kinds})


def _canonical_experts(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """The experts; what only training knows is left out."""
    width = moe.mlp_dim or config.mlp_dim

    def plain(router: Any) -> Any:
        router = dataclasses.replace(router, jitter=0.0)
        if isinstance(router, TokenChoice) and router.fixed_capacity is not None:
            router = dataclasses.replace(router, **{name: getattr(TokenChoice(), name) for name in _FACTORS})
        return router

    router, decoder = plain(moe.router), plain(moe.decoder_router or moe.router)
    if isinstance(config, PaLMConfig):
        router = decoder
    experts = dataclasses.replace(
        moe,
        router=router,
        decoder_router=None if decoder == router else decoder,
        mlp_dim=width,
        dropout_rate=None,
        balance_weight=0.01,
        balance_by="layer",
        z_weight=0.0,
        dispatch="sort",
    )
    # Nothing is as wide as the policy's own blocks where all are experts.
    return {"moe": experts, "mlp_dim": width if moe.every == 1 and not moe.extra_mlp else config.mlp_dim}


def config_json(
    family: Family,
    config: ModelConfig,
    origin: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of a policy.

    Args:
        family: that it is written as.
        config: of the policy.
        origin: the ``config.json`` that it came with, of the same family: what we don't model is kept.
        generation: the ``generation_config.json`` that it came with.

    Raises:
        ValueError: when the policy changed in a way that can't be said in terms of the origin.
    """
    config = without_twin(config)
    written = family.write(config)
    if origin is None:
        fixed = {"architectures": [family.architecture], "model_type": family.model_type, "use_cache": True}
        return fixed | written | {"torch_dtype": config.param_dtype} | _longest(family, config)
    # The generation's say on the ends of completions stays where it is.
    before = family.write(family.config(origin, generation, family.tensors_of(config)))
    changed = {key: value for key, value in written.items() if key not in before or before[key] != value}
    found = dict(origin) | changed
    if "rope_theta" in changed or "rope_scaling" in changed or "rope_local_base_freq" in changed:
        found.pop("rope_parameters", None)
        found |= {key: written[key] for key in ("rope_theta", "rope_scaling", "rope_local_base_freq") if key in written}
    if not same(family.config(found, generation, family.tensors_of(config)), config):
        lost = differences(family, config)
        raise ValueError(
            f"config.json of the {family.model_type!r} that this policy came from can't be changed to say "
            f"{', '.join(lost) or 'what changed'}: write it without its origin."
        )
    return found


def _longest(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The longest sequence, which nothing in the policy says: as long as stretched positions were made for."""
    if not isinstance(config, PaLMConfig):
        return {}
    scaling = None if config.rope is None else config.rope.scaling
    original = getattr(scaling, "original_length", None)
    stretched = None if original is None or scaling is None else round(original * scaling.factor)
    return {"max_position_embeddings": stretched or family.defaults["max_position_embeddings"]}
