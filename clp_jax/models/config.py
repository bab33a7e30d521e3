"""What a policy is made of."""

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

from flax import nnx

from clp_jax.models.serialization import serializable
from clp_jax.nn.mlp import ACTIVATIONS
from clp_jax.nn.stack import REMAT_POLICIES

if TYPE_CHECKING:
    from clp_jax.models.t5 import T5

_DTYPES = ("float32", "bfloat16")


@serializable
@dataclasses.dataclass(frozen=True)
class T5Config:
    """An encoder-decoder policy (T5, arXiv 1910.10683); the defaults are T5 1.1's.

    Attributes:
        vocab_size: ``V``, at least the tokenizer's.
        embed_dim: ``D``.
        mlp_dim: ``F``.
        num_heads: ``N``.
        head_dim: ``H``; need not be ``D / N``.
        num_encoder_layers: layers of the encoder.
        num_decoder_layers: layers of the decoder.
        activation: ``"gelu"`` (tanh approximation) or ``"relu"``.
        gated: whether the feed-forward block has a gate (1.1) or not (1.0).
        tied_head: whether the head is the embedding, with states scaled by ``D**-0.5`` (1.0), or its own layer (1.1).
        dropout_rate: in ``[0, 1)``.
        num_buckets: relative position buckets of each stack.
        max_distance: distances from here on share a bucket.
        norm_eps: of the RMS norms.
        dtype: of activations, ``"float32"`` or ``"bfloat16"``; softmax, norms and logits are float32 always.
        param_dtype: of parameters.
        remat: what the backward pass recomputes: ``"none"``, ``"minimal"`` (keeps matrix products) or ``"full"``.
        scan_unroll: layers in one iteration of the loop over layers; None unrolls stacks of up to 4 altogether.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    activation: str = "gelu"
    gated: bool = True
    tied_head: bool = False
    dropout_rate: float = 0.0
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "mlp_dim", "num_heads", "head_dim", "num_encoder_layers")
        for name in (*sizes, "num_decoder_layers", "max_distance", "scan_unroll"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"T5Config.{name} is {getattr(self, name)}: expected at least 1.")
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise ValueError(f"T5Config.num_buckets is {self.num_buckets}: expected an even number, at least 4.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"T5Config.dropout_rate is {self.dropout_rate}: expected a number in [0, 1).")
        for name, known in (
            ("activation", tuple(ACTIVATIONS)),
            ("remat", tuple(REMAT_POLICIES)),
            ("dtype", _DTYPES),
            ("param_dtype", _DTYPES),
        ):
            _check_choice(name, getattr(self, name), known)

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


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"T5Config.{name} is {value!r}{hint}: expected one of {', '.join(known)}.")
