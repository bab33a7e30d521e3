"""What policies are made of: one space of settings for every family, each of which is a point in it."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx

from clp_jax.models.serialization import serializable
from clp_jax.nn.mlp import ACTIVATIONS
from clp_jax.nn.moe import check_dispatch
from clp_jax.nn.remat import REMAT_POLICIES
from clp_jax.nn.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice
from clp_jax.nn.visibility import Buckets, Pattern

if TYPE_CHECKING:
    from clp_jax.models.palm import PaLM
    from clp_jax.models.t5 import T5

_DTYPES = ("float32", "bfloat16")
_ROUTERS = (TokenChoice, ExpertChoice, Dropless)

for _plain in (Rope, LinearScaling, Llama3Scaling, YarnScaling, *_ROUTERS):
    serializable(_plain)


@serializable
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Layers whose feed-forward block is a mixture of experts.

    Attributes:
        num_experts: ``E``.
        router: how tokens find experts: `TokenChoice` (Switch, GShard, ST-MoE), `ExpertChoice` or `Dropless`.
        decoder_router: the decoder's, where it differs (expert choice is for encoders only).
        every: layer ``i`` is sparse iff ``i mod every = every - 1``.
        mlp_dim: width of an expert; None takes the model's.
        dropout_rate: inside the experts, in ``[0, 1)``; None takes the model's.
        shared_dim: width of a shared expert that sees every token; 0 for none.
        shared_gate: whether a sigmoid gate scales the shared expert (Qwen2-MoE).
        extra_mlp: a dense block, with its own norm and residual, after each sparse one (ST-MoE); where blocks follow each
            other, with norms before them alone.
        balance_weight: of the load-balance loss.
        balance_by: what that loss takes the experts' shares of: every ``"layer"``, for a mean of its losses (Switch,
            arXiv 2101.03961; GShard); the layers of a ``"stack"`` together, for a sum over encoder and decoder of that and of
            the z-loss (Switch as transformers trains it); or the ``"model"``, all sparse layers together (Mixtral and Qwen-MoE
            as transformers trains them). Together, one layer's favourites may make up for another's. Shares are of each group
            of tokens, those of the model of all.
        z_weight: of the router z-loss.
        dispatch: how tokens get to their experts and back: ``"sort"`` gathers rows; ``"einsum"`` multiplies by 0 and 1
            (GShard, arXiv 2006.16668), which costs more and is what sorting is tested against; not with `Dropless`.
        dense: the twin that costs the same: every sparse block becomes a dense one as wide as what a token visits on average
            in training, at most (`TokenChoice.experts_per_token`): ``min(k, capacity)`` experts, and what sees all tokens.
    """

    num_experts: int
    router: TokenChoice | ExpertChoice | Dropless = TokenChoice()
    decoder_router: TokenChoice | ExpertChoice | Dropless | None = None
    every: int = 1
    mlp_dim: int | None = None
    dropout_rate: float | None = None
    shared_dim: int = 0
    shared_gate: bool = False
    extra_mlp: bool = False
    balance_weight: float = 0.01
    balance_by: str = "layer"
    z_weight: float = 0.0
    dispatch: str = "sort"
    dense: bool = False

    def __post_init__(self):
        for name, least in (
            ("num_experts", 1),
            ("every", 1),
            ("mlp_dim", 1),
            ("shared_dim", 0),
            ("balance_weight", 0),
            ("z_weight", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"MoEConfig.{name} is {value}: expected at least {least}.")
        if self.dropout_rate is not None and not 0 <= self.dropout_rate < 1:
            raise ValueError(f"MoEConfig.dropout_rate is {self.dropout_rate}: expected a number in [0, 1).")
        if self.balance_by not in ("layer", "stack", "model"):
            raise ValueError(f"MoEConfig.balance_by is {self.balance_by!r}: expected 'layer', 'stack' or 'model'.")
        for name in ("router", "decoder_router"):
            router = getattr(self, name)
            if router is not None and not isinstance(router, _ROUTERS):
                raise ValueError(
                    f"MoEConfig.{name} is {router!r}: expected one of {', '.join(kind.__name__ for kind in _ROUTERS)}."
                )
            if router is not None:
                check_dispatch(self.dispatch, router)

    def router_of(self, causal: bool) -> TokenChoice | ExpertChoice | Dropless:
        """The router of a stack: a causal one may have its own."""
        return self.decoder_router if causal and self.decoder_router is not None else self.router


def _by_row(router: TokenChoice | ExpertChoice | Dropless) -> TokenChoice | ExpertChoice | Dropless:
    return router if isinstance(router, Dropless) else dataclasses.replace(router, group="row")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of a stack.

    Attributes:
        window: of its attention; None sees everything.
        rope: rotary positions, or None.
        sparse: whether its feed-forward block is a mixture of experts.
        mlp_dim: width of its dense feed-forward block.
    """

    window: int | None
    rope: Rope | None
    sparse: bool
    mlp_dim: int


def period_of(kinds: Sequence[LayerKind]) -> int:
    """The length of the shortest pattern that repeats through all layers, the last time perhaps cut short."""
    return next(
        size for size in range(1, len(kinds) + 1) if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )


@serializable
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What encoder-decoder and decoder-only policies share.

    Attributes:
        vocab_size: ``V``, at least the tokenizer's.
        embed_dim: ``D``.
        mlp_dim: ``F``.
        num_heads: ``N``.
        head_dim: ``H``; need not be ``D / N``.
        num_kv_heads: ``G``, divides ``N``: 1 is multi-query, None is one for each query head.
        query_scale: multiplies the attention logits; None is ``H**-0.5``. T5's 1 stands in its query's initialisation.
        attention_cap: attention logits become ``cap·tanh(logits / cap)`` (Gemma 2); None leaves them alone.
        qk_norm: RMS norms of every head's queries and keys (Qwen 3, Gemma 3).
        qkv_bias: biases of query, key and value.
        out_bias: a bias of the attention's output.
        mlp_bias: biases of the feed-forward block; experts have none.
        num_buckets: buckets of T5's relative position bias; 0 for none.
        max_distance: distances from here on share a bucket; more than half of `num_buckets`.
        bias_per_layer: whether every layer has a bias of its own (T5X's scalable T5) or a stack shares one.
        rope: rotary positions; None for none.
        local_rope: of the layers with a window, where it differs.
        window: keys at this distance or further are hidden; None hides none.
        window_pattern: which layers have the window, repeated through the stack: ``(True, False)`` alternates local and
            global ones.
        parallel_block: attention and feed-forward beside each other behind one norm (PaLM), not one after the other.
        pre_norm: norms before attention, to an encoder too, and feed-forward.
        post_norm: norms of what they return, before the residual (Gemma 2 and 3).
        norm_eps: of the RMS norms.
        norm_offset: whether scales are stored less 1 (Gemma).
        activation: a key of `clp_jax.nn.mlp.ACTIVATIONS`.
        gated: whether the feed-forward block has a gate (GeGLU, SwiGLU) or not.
        moe: layers with experts; None for none.
        scale_embeddings: whether embedded tokens are multiplied by ``D**0.5`` (Gemma).
        tied_head: whether the head is the embedding.
        scale_tied_head: whether states are multiplied by ``D**-0.5`` before a tied head (T5, PaLM).
        logit_cap: logits become ``cap·tanh(logits / cap)`` (Gemma 2); None leaves them alone.
        dropout_rate: in ``[0, 1)``.
        pad_id: fills prompts and completions; -1 where no token can (padding must be told from tokens).
        eos_ids: tokens that end a completion.
        start_id: fed first: by encoder-decoders always, by decoders where there is no prompt.
        dtype: of activations, ``"float32"`` or ``"bfloat16"``; softmax, norms and logits are float32 always.
        param_dtype: of parameters.
        remat: what the backward pass recomputes: ``"none"``, ``"minimal"`` (keeps products with parameters, and what kernels
            of attention return), ``"offload"`` (keeps them in the host's memory; a CPU has no other) or ``"full"``.
        scan_unroll: periods of layers in one iteration of the loop over them; None unrolls shallow stacks altogether.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    query_scale: float | None = None
    attention_cap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    num_buckets: int = 0
    max_distance: int = 128
    bias_per_layer: bool = False
    rope: Rope | None = None
    local_rope: Rope | None = None
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    parallel_block: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    norm_eps: float = 1e-6
    norm_offset: bool = False
    activation: str = "gelu"
    gated: bool = True
    moe: MoEConfig | None = None
    scale_embeddings: bool = False
    tied_head: bool = False
    scale_tied_head: bool = True
    logit_cap: float | None = None
    dropout_rate: float = 0.0
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (1,)
    start_id: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "window_pattern", tuple(self.window_pattern))
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        sizes = (
            "vocab_size",
            "embed_dim",
            "mlp_dim",
            "num_heads",
            "head_dim",
            "num_kv_heads",
            "max_distance",
            "window",
        )
        for name in (*sizes, "scan_unroll", *self.depths()):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise self._error(name, "at least 1")
        if self.num_heads % self.kv_heads:
            raise self._error("num_kv_heads", f"a divisor of num_heads={self.num_heads}")
        if self.num_buckets and (self.num_buckets < 4 or self.num_buckets % 2):
            raise self._error("num_buckets", "an even number, at least 4, or 0 for no position bias")
        # Causal stacks have as many exact buckets; bidirectional ones half of them.
        if self.num_buckets and self.max_distance <= self.num_buckets // 2:
            raise self._error(
                "max_distance",
                f"more than {self.num_buckets // 2}, the distances with a bucket of their own of num_buckets="
                f"{self.num_buckets}",
            )
        if not 0 <= self.dropout_rate < 1:
            raise self._error("dropout_rate", "a number in [0, 1)")
        for name in ("query_scale", "attention_cap", "logit_cap", "norm_eps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise self._error(name, "a positive number")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.check(self.head_dim)
        if not (self.pre_norm or self.post_norm):
            raise self._error("pre_norm", "norms before or after each block: set pre_norm or post_norm")
        if not self.window_pattern:
            raise self._error("window_pattern", "at least one layer")
        if not self.eos_ids or not all(0 <= token < self.vocab_size for token in self.eos_ids):
            raise self._error("eos_ids", "one or more token ids of the vocabulary")
        choices = (("activation", tuple(ACTIVATIONS)), ("remat", tuple(REMAT_POLICIES)))
        for name, known in (*choices, ("dtype", _DTYPES), ("param_dtype", _DTYPES)):
            value = getattr(self, name)
            if value not in known:
                close = difflib.get_close_matches(str(value), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ValueError(
                    f"{type(self).__name__}.{name} is {value!r}{hint}: expected one of {', '.join(known)}."
                )
        self._check_experts()

    @property
    def kv_heads(self) -> int:
        """``G``."""
        return self.num_kv_heads or self.num_heads

    @property
    def attention_scale(self) -> float:
        """What multiplies the attention logits."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def is_stochastic(self) -> bool:
        """Whether training differs from evaluation: by dropout, or by what routers do."""
        return self.dropout_rate > 0 or (self.moe is not None and not self.moe.dense)

    @property
    def shares_room(self) -> bool:
        """Whether tokens of a group compete for experts' room, those of packed examples too, which don't see each other."""
        if self.moe is None or self.moe.dense:
            return False
        return not all(isinstance(router, Dropless | None) for router in (self.moe.router, self.moe.decoder_router))

    def routed_by_row(self) -> "ModelConfig":
        """The same with experts that share their room within a row alone: what is said of one depends on no other."""
        if self.moe is None:
            return self
        decoder_router = self.moe.decoder_router and _by_row(self.moe.decoder_router)
        moe = dataclasses.replace(self.moe, router=_by_row(self.moe.router), decoder_router=decoder_router)
        return dataclasses.replace(self, moe=moe)

    def pattern(self, kind: LayerKind, *, causal: bool) -> Pattern:
        """How self-attention of one layer sees."""
        buckets = Buckets(self.num_buckets, self.max_distance, not causal) if self.num_buckets else None
        return Pattern(causal, kind.window, self.attention_scale, self.attention_cap, buckets)

    def layer_kinds(self, num_layers: int, *, causal: bool = True) -> tuple[LayerKind, ...]:
        """The layers of a stack, first to last; a causal one may have a router of its own."""
        kinds = []
        for layer in range(num_layers):
            moe = self.moe
            local = self.window is not None and self.window_pattern[layer % len(self.window_pattern)]
            chosen = moe is not None and layer % moe.every == moe.every - 1
            kinds.append(
                LayerKind(
                    window=self.window if local else None,
                    rope=self.local_rope if local and self.local_rope is not None else self.rope,
                    sparse=moe is not None and chosen and not moe.dense,
                    mlp_dim=self._twin_dim(causal) if moe is not None and chosen and moe.dense else self.mlp_dim,
                )
            )
        return tuple(kinds)

    def _twin_dim(self, causal: bool) -> int:
        moe = self.moe
        assert moe is not None
        width = round((moe.mlp_dim or self.mlp_dim) * moe.router_of(causal).experts_per_token)
        return width + moe.shared_dim + (self.mlp_dim if moe.extra_mlp else 0)

    def _check_experts(self) -> None:
        """Refuses what a layer with experts would leave out."""
        moe = self.moe
        if moe is None:
            return
        if self.mlp_bias and not moe.dense:
            raise self._error("mlp_bias", "False beside experts, which have no biases")
        for name, expected in (("parallel_block", False), ("pre_norm", True), ("post_norm", False)):
            if moe.extra_mlp and getattr(self, name) is not expected:
                raise ValueError(
                    f"MoEConfig.extra_mlp is True with {name}={not expected}: expected {name}={expected}, as in ST-MoE, whose "
                    "blocks follow each other behind a norm each. Set it, or extra_mlp=False."
                )

    def depths(self) -> tuple[str, ...]:
        """The fields that number the layers of a stack."""
        return tuple(
            f.name for f in dataclasses.fields(self) if f.name.startswith("num_") and f.name.endswith("layers")
        )

    def _error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}: expected {expected}.")


@serializable
@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """An encoder-decoder policy (T5, arXiv 1910.10683); the defaults are T5 1.1's.

    Attributes:
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
    """

    num_encoder_layers: int
    num_decoder_layers: int
    query_scale: float | None = 1.0
    num_buckets: int = 32

    def __post_init__(self):
        if self.parallel_block:
            raise self._error(
                "parallel_block",
                "False: the decoder's attention to the encoder stands between the two blocks. Use PaLMConfig for parallel ones",
            )
        super().__post_init__()
        if self.moe is not None and not self.moe.dense:
            for causal in (False, True):
                self.moe.router_of(causal).check(causal, self.moe.num_experts)

    @classmethod
    def t5_1_0(cls, **sizes) -> "T5Config":
        """T5 1.0: ReLU, no gate, tied head."""
        preset: dict[str, Any] = {"activation": "relu", "gated": False, "tied_head": True}
        return cls(**preset | sizes)

    @classmethod
    def t5_1_1(cls, **sizes) -> "T5Config":
        """T5 1.1: gated GELU, a head of its own."""
        preset: dict[str, Any] = {"activation": "gelu", "gated": True, "tied_head": False}
        return cls(**preset | sizes)

    def build(self, rngs: nnx.Rngs) -> "T5":
        """A freshly initialised module."""
        from clp_jax.models.t5 import T5  # The module needs this class to be defined.

        return T5(self, rngs=rngs)


@serializable
@dataclasses.dataclass(frozen=True, kw_only=True)
class PaLMConfig(ModelConfig):
    """A decoder-only policy; the defaults are PaLM's (arXiv 2204.02311, section 2), in sequence and with all heads.

    Attributes:
        num_layers: ``L``.
        prefix_lm: whether the tokens of a prompt see each other in both directions.
    """

    num_layers: int
    rope: Rope | None = Rope()
    activation: str = "silu"
    tied_head: bool = True
    prefix_lm: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.moe is not None and not self.moe.dense:
            self.moe.router_of(True).check(True, self.moe.num_experts)

    @classmethod
    def palm(cls, **sizes) -> "PaLMConfig":
        """PaLM: parallel blocks, multi-query attention, SwiGLU, rotary positions, tied embeddings."""
        preset: dict[str, Any] = {"parallel_block": True, "num_kv_heads": 1}
        return cls(**preset | sizes)

    @classmethod
    def llama(cls, **sizes) -> "PaLMConfig":
        """Llama, Mistral, Mixtral and Qwen: blocks in sequence, a head of its own, epsilon 1e-5."""
        preset: dict[str, Any] = {"tied_head": False, "scale_tied_head": False, "norm_eps": 1e-5}
        return cls(**preset | sizes)

    @classmethod
    def gemma(cls, **sizes) -> "PaLMConfig":
        """Gemma: GeGLU, norms stored less 1, scaled embeddings that are the head too."""
        preset: dict[str, Any] = {
            "activation": "gelu",
            "norm_offset": True,
            "scale_embeddings": True,
            "scale_tied_head": False,
        }
        return cls(**preset | sizes)

    def build(self, rngs: nnx.Rngs) -> "PaLM":
        """A freshly initialised module."""
        from clp_jax.models.palm import PaLM  # The module needs this class to be defined.

        return PaLM(self, rngs=rngs)
