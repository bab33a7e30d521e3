"""Decoders made of other decoders, of whatever shapes, that share a vocabulary: weighted products, and contrastive decoding.

`clp_jax.sampling.logit_mixing.MixtureDecoder` mixes policies of one shape in one batched call; these call each decoder.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Bool, Float, Int
from clp_jax.sampling.decoder import Decoder
from clp_jax.sampling.logit_mixing import mix_log_probs
from clp_jax.sampling.slots import SlotDecoder

# A log-probability that no policy gives to a token by itself.
_FLOOR = -1e3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Joint:
    """The states of several decoders; rows that have fed nothing yet feed each decoder's own first token."""

    fresh: Bool[Array, "R"]
    firsts: tuple[Int[Array, "R"], ...]
    states: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Together:
    """Runs decoders side by side."""

    decoders: tuple[Decoder, ...]

    def __post_init__(self):
        ids = {(decoder.pad_id, tuple(decoder.eos_ids)) for decoder in self.decoders}
        if len(ids) != 1:
            raise ValueError(
                f"the decoders' padding and end tokens are {sorted(ids)}: expected the same of all, one decoder at least; "
                "only policies that share a vocabulary can be mixed."
            )

    def start(self, inputs: Array, max_length: int, num_samples: int) -> tuple[Array, _Joint]:
        firsts, states = zip(*(d.start(inputs, max_length, num_samples) for d in self.decoders), strict=True)
        return firsts[0], _Joint(jnp.ones(firsts[0].shape, bool), firsts, states)

    def step(self, tokens: Array, state: _Joint) -> tuple[Array, _Joint]:
        """Log-probabilities of each decoder, ``[M, R, V]``."""
        out, states = [], []
        for decoder, first, own in zip(self.decoders, state.firsts, state.states, strict=True):
            logits, own = decoder.step(jnp.where(state.fresh, first, tokens), own)
            out.append(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))
            states.append(own)
        if len({x.shape for x in out}) != 1:
            sizes = [x.shape[-1] for x in out]
            raise ValueError(f"the decoders' vocabularies have {sizes} tokens: expected one size; mix policies of one.")
        fresh = jnp.zeros_like(state.fresh)
        return jnp.stack(out), dataclasses.replace(state, fresh=fresh, states=tuple(states))

    def select(self, state: _Joint, rows: Array) -> _Joint:
        states = tuple(d.select(own, rows) for d, own in zip(self.decoders, state.states, strict=True))
        # What else a row has is the same for all samples of a prompt.
        return dataclasses.replace(state, states=states)

    def empty(self, slots: int, prompt_length: int, max_length: int, num_samples: int) -> _Joint:
        rows = slots * num_samples
        firsts = tuple(jnp.full((rows,), d.pad_id, jnp.int32) for d in self.decoders)
        states = tuple(d.empty(slots, prompt_length, max_length, num_samples) for d in self._slot_decoders())
        return _Joint(jnp.ones((rows,), bool), firsts, states)

    def insert(self, state: _Joint, slots: Array, first_state: _Joint) -> _Joint:
        num_samples = first_state.fresh.shape[0] // slots.shape[0]
        rows = (slots[:, None] * num_samples + jnp.arange(num_samples)[None]).reshape(-1)

        def put(old: Array, new: Array) -> Array:
            return old.at[rows].set(new, mode="drop")

        return _Joint(
            fresh=put(state.fresh, first_state.fresh),
            firsts=tuple(map(put, state.firsts, first_state.firsts)),
            states=tuple(
                d.insert(old, slots, new)
                for d, old, new in zip(self._slot_decoders(), state.states, first_state.states, strict=True)
            ),
        )

    def _slot_decoders(self) -> tuple[SlotDecoder, ...]:
        for decoder in self.decoders:
            if not isinstance(decoder, SlotDecoder):
                raise TypeError(f"{type(decoder).__name__} has no slots: expected decoders with `empty` and `insert`.")
        return self.decoders  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, eq=False)
class ProductDecoder:
    """Mixes decoders token by token: ``logits = Σ_m c_m log π_m`` (MOD, arXiv 2406.18853; DeRa, arXiv 2402.02992).

    Attributes:
        decoders: ``M`` of them, sharing a vocabulary, padding and ends.
        coefficients: ``float[M]``; a coefficient of exactly 0 takes its decoder out, ``-inf`` logits included.
    """

    decoders: tuple[Decoder, ...]
    coefficients: Float[Array, "M"]

    def __post_init__(self):
        if self.coefficients.shape != (len(self.decoders),):
            raise ValueError(
                f"ProductDecoder.coefficients has shape {self.coefficients.shape}: expected one for each of the "
                f"{len(self.decoders)} decoders."
            )
        _Together(self.decoders)

    @property
    def pad_id(self) -> int:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self.decoders[0].pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self.decoders[0].eos_ids

    def start(self, inputs: Int[Array, "B S"], max_length: int, num_samples: int) -> tuple[Int[Array, "R"], Any]:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return _Together(self.decoders).start(inputs, max_length, num_samples)

    def step(self, tokens: Int[Array, "R"], state: Any) -> tuple[Float[Array, "R V"], Any]:
        """The mixed logits, not normalised."""
        log_probs, state = _Together(self.decoders).step(tokens, state)
        return mix_log_probs(log_probs, self.coefficients), state

    def select(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return _Together(self.decoders).select(state, rows)

    def empty(self, slots: int, prompt_length: int, max_length: int, num_samples: int) -> Any:
        """See `clp_jax.sampling.slots.SlotDecoder`."""
        return _Together(self.decoders).empty(slots, prompt_length, max_length, num_samples)

    def insert(self, state: Any, slots: Int[Array, "b"], first_state: Any) -> Any:
        """See `clp_jax.sampling.slots.SlotDecoder`."""
        return _Together(self.decoders).insert(state, slots, first_state)


@dataclasses.dataclass(frozen=True, eq=False)
class ContrastiveDecoder:
    """Contrastive decoding (arXiv 2210.15097, equations 2 and 3): what an expert likes better than an amateur.

        logits = log π_expert - c·log π_amateur    where π_expert >= a·max π_expert, else -inf

    Attributes:
        expert: the policy to follow.
        amateur: a weaker one, sharing its vocabulary, padding and ends.
        plausibility: ``a``, in (0, 1]; 1 is greedy, less lets the amateur say more. The paper's 0.1.
        strength: ``c``, at least 0; the paper's 1.
        amateur_temperature: the amateur's logits are divided by it; positive. The paper's 0.5 or 1.
    """

    expert: Decoder
    amateur: Decoder
    plausibility: float = 0.1
    strength: float = 1.0
    amateur_temperature: float = 1.0

    def __post_init__(self):
        if not 0 < self.plausibility <= 1:
            raise ValueError(f"ContrastiveDecoder.plausibility is {self.plausibility}: expected a number in (0, 1].")
        if not self.strength >= 0:
            raise ValueError(f"ContrastiveDecoder.strength is {self.strength}: expected 0 or more.")
        if not self.amateur_temperature > 0:
            raise ValueError(
                f"ContrastiveDecoder.amateur_temperature is {self.amateur_temperature}: expected a positive number."
            )
        self._both()

    @property
    def pad_id(self) -> int:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self.expert.pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self.expert.eos_ids

    def start(self, inputs: Int[Array, "B S"], max_length: int, num_samples: int) -> tuple[Int[Array, "R"], Any]:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self._both().start(inputs, max_length, num_samples)

    def step(self, tokens: Int[Array, "R"], state: Any) -> tuple[Float[Array, "R V"], Any]:
        """The contrasted logits, not normalised."""
        log_probs, state = self._both().step(tokens, state)
        return self.contrast(log_probs[0], log_probs[1]), state

    def contrast(self, expert: Float[Array, "R V"], amateur: Float[Array, "R V"]) -> Float[Array, "R V"]:
        """The logits from both policies' log-probabilities."""
        amateur = jax.nn.log_softmax(amateur / self.amateur_temperature, axis=-1)
        plausible = expert >= jnp.max(expert, axis=-1, keepdims=True) + jnp.log(self.plausibility)
        # What the amateur rules out wins, and the expert chooses among several such tokens: infinities would not let it.
        amateur = jnp.maximum(amateur, _FLOOR)
        return jnp.where(plausible, expert - self.strength * amateur, -jnp.inf)

    def select(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """See `clp_jax.sampling.decoder.Decoder`."""
        return self._both().select(state, rows)

    def empty(self, slots: int, prompt_length: int, max_length: int, num_samples: int) -> Any:
        """See `clp_jax.sampling.slots.SlotDecoder`."""
        return self._both().empty(slots, prompt_length, max_length, num_samples)

    def insert(self, state: Any, slots: Int[Array, "b"], first_state: Any) -> Any:
        """See `clp_jax.sampling.slots.SlotDecoder`."""
        return self._both().insert(state, slots, first_state)

    def _both(self) -> _Together:
        return _Together((self.expert, self.amateur))
