"""What generation asks of a policy: a state to start from, and the logits after one more token."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, Float, Int
from clp_jax.models.incremental import empty_slots, insert
from clp_jax.nn.kv_cache import LayerCache, constrain_cache


@runtime_checkable
class Decoder(Protocol):
    """Decodes ``R = B·n`` rows, ``n`` samples of each prompt, prompt-major."""

    @property
    def pad_id(self) -> int:
        """Fills completions behind their end."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""

    def start(self, inputs: Int[Array, "B S"], max_length: int, num_samples: int) -> tuple[Int[Array, "R"], Any]:
        """Reads the prompts; returns the token that every row feeds first, and the state."""

    def step(self, tokens: Int[Array, "R"], state: Any) -> tuple[Float[Array, "R V"], Any]:
        """Float32 logits of the next token of every row, and the new state."""

    def select(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """The state in which row ``r`` goes on from where row ``rows[r]`` was; both are samples of one prompt."""


@dataclasses.dataclass(frozen=True)
class CachedDecoder:
    """A policy that decodes with its key/value cache.

    Attributes:
        model: a bound policy.
        int8: whether keys and values are kept in eight bits.
        weights: the model's `loop_weights`; made here, before any loop.
    """

    model: Any
    int8: bool = False
    weights: Any = None

    def __post_init__(self):
        if self.weights is None:
            object.__setattr__(self, "weights", self.model.loop_weights())

    @property
    def pad_id(self) -> int:
        """See `Decoder`."""
        return self.model.config.pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See `Decoder`."""
        return self.model.config.eos_ids

    def start(self, inputs: Int[Array, "B S"], max_length: int, num_samples: int) -> tuple[Int[Array, "R"], Any]:
        """Reads the prompts once, and keeps the keys that their samples share."""
        encoded = self.model.encode(inputs)
        state = self.model.init_cache(encoded, max_length=max_length, num_samples=num_samples, int8=self.int8)
        return jnp.repeat(self.model.first_tokens(encoded), num_samples), state

    def step(self, tokens: Int[Array, "R"], state: Any) -> tuple[Float[Array, "R V"], Any]:
        """See `Decoder`."""
        hidden, state = self.model.decode_step(tokens, state, self.weights)
        return self.model.logits(hidden), state

    def select(self, state: Any, rows: Int[Array, "R"]) -> Any:
        """See `Decoder`."""
        prompts = state.prompts.segments.shape[0]
        samples = (rows % (len(rows) // prompts)).reshape(prompts, -1)
        stacks = tuple(tuple(_select_samples(layer, samples) for layer in stack) for stack in state.stacks)
        return dataclasses.replace(state, stacks=stacks)

    def empty(self, slots: int, prompt_length: int, max_length: int, num_samples: int) -> Any:
        """See `clp_jax.sampling.slots.SlotDecoder`."""
        padding = jnp.full((slots, prompt_length), self.pad_id, jnp.int32)
        return constrain_cache(empty_slots(self.start(padding, max_length, num_samples)[1]))

    def insert(self, state: Any, slots: Int[Array, "b"], first_state: Any) -> Any:
        """See `clp_jax.sampling.slots.SlotDecoder`."""
        return insert(state, slots, first_state)


def _select_samples(layer: LayerCache, samples: Int[Array, "B n"]) -> LayerCache:
    """Prompt by prompt: where devices share the prompts out, nothing leaves one."""

    def select(x: Array) -> Array:
        lead = x.ndim - 4
        take = jax.vmap(lambda rows, numbers: rows[numbers])
        for _ in range(lead):
            take = jax.vmap(take, in_axes=(0, None))
        return take(x.reshape(*x.shape[:lead], *samples.shape, *x.shape[lead + 1 :]), samples).reshape(x.shape)

    keys, values = jax.tree.map(select, (layer.keys, layer.values))
    return dataclasses.replace(layer, keys=keys, values=values)
