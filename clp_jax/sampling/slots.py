"""The device's half of continuous batching: rows of a fixed number of slots, filled and emptied one by one."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from clp_jax.array_types import Array, ArrayLike, Bool, Float, Int, Key, UInt32
from clp_jax.partitioning import constrain
from clp_jax.sampling.decoder import Decoder
from clp_jax.sampling.generate import SamplingConfig, has_ended, next_token
from clp_jax.sampling.history import History, align_right


@runtime_checkable
class SlotDecoder(Decoder, Protocol):
    """A decoder whose rows need not start together; a slot holds the ``n`` samples of one prompt."""

    def empty(self, slots: int, prompt_length: int, max_length: int, num_samples: int) -> Any:
        """A state of empty slots, for prompts of `prompt_length` tokens at most; empty rows may step, and yield anything."""

    def insert(self, state: Any, slots: Int[Array, "b"], first_state: Any) -> Any:
        """The state with fresh prompts in some of its slots.

        Args:
            state: of `empty`, at any time after.
            slots: ``int32[b]``; numbers beyond the last slot are prompts to be left out.
            first_state: of `start`, for ``b`` prompts that may be padded to fewer tokens than those of `state`.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Everything that decoding goes on from; ``R`` rows, ``n`` of each slot.

    Attributes:
        prompts: ``int32[R, S]``, padding first.
        first: ``int32[R]`` the token that a row fed first.
        last: ``int32[R]`` the token that it feeds next.
        tokens: ``int32[R, T]`` completions so far, anything behind their length.
        length: ``int32[R]`` tokens written.
        limit: ``int32[R]`` tokens that may be written.
        keys: ``key[R]``.
        state: the decoder's.
    """

    prompts: Int[Array, "R S"]
    first: Int[Array, "R"]
    last: Int[Array, "R"]
    tokens: Int[Array, "R T"]
    length: Int[Array, "R"]
    limit: Int[Array, "R"]
    keys: Key[Array, "R"]
    state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Prompts that go into slots; ``b`` of them. Made on the host.

    Attributes:
        prompts: ``int32[b, S]``, padded to a bucket.
        slots: ``int32[b]``; a number beyond the last slot is no arrival at all.
        seeds: ``uint32[b]``.
        samples: ``int32[b]`` the number of each one's first sample, among those of its request.
        limits: ``int32[b]`` tokens that may be written.
    """

    prompts: Int[ArrayLike, "b S"]
    slots: Int[ArrayLike, "b"]
    seeds: UInt32[ArrayLike, "b"]
    samples: Int[ArrayLike, "b"]
    limits: Int[ArrayLike, "b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """What some steps wrote; on the device or, fetched, on the host.

    Attributes:
        tokens: ``int32[R, k]``, the first `written` of each row.
        log_probs: ``float32[R, k]`` of the tokens under the decoder at temperature 1, unfiltered.
        written: ``int32[R]``.
        active: ``bool[R]`` rows that have not ended.
    """

    tokens: Int[ArrayLike, "R k"]
    log_probs: Float[ArrayLike, "R k"]
    written: Int[ArrayLike, "R"]
    active: Bool[ArrayLike, "R"]


def empty_slots(
    decoder: SlotDecoder, slots: int, prompt_length: int, config: SamplingConfig, num_samples: int
) -> Slots:
    """Slots without prompts.

    Args:
        decoder: what gives the logits.
        slots: prompts at once.
        prompt_length: tokens of a prompt at most.
        config: what is generated; its maximum length holds for all requests.
        num_samples: rows of a slot.
    """
    rows, pad_id = slots * num_samples, decoder.pad_id
    padding, none = (constrain(jnp.full((rows,), value, jnp.int32), "batch") for value in (pad_id, 0))
    prompts, tokens = (jnp.full((rows, length), pad_id, jnp.int32) for length in (prompt_length, config.max_length))
    return Slots(
        prompts=constrain(prompts, "batch", None),
        first=padding,
        last=padding,
        tokens=constrain(tokens, "batch", None),
        length=none,
        limit=none,
        keys=constrain(jax.random.split(jax.random.key(0), rows), "batch"),
        state=decoder.empty(slots, prompt_length, config.max_length, num_samples),
    )


def admit(decoder: SlotDecoder, slots: Slots, arrivals: Arrivals, max_length: int, num_samples: int) -> Slots:
    """Reads prompts and puts them into their slots; pure, one program for each bucket of prompts.

    Args:
        decoder: what gives the logits.
        slots: all of them.
        arrivals: prompts that come in.
        max_length: tokens of a completion at most.
        num_samples: rows of a slot.
    """
    prompts, numbers = jnp.asarray(arrivals.prompts), jnp.asarray(arrivals.slots)
    first, fresh = decoder.start(prompts, max_length, num_samples)
    samples = jnp.arange(num_samples)
    rows = (numbers[:, None] * num_samples + samples[None]).reshape(-1)
    prompts = align_right(prompts, decoder.pad_id)
    missing = slots.prompts.shape[1] - prompts.shape[1]
    prompts = jnp.pad(prompts, ((0, 0), (missing, 0)), constant_values=decoder.pad_id)

    def key(seed, number):
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(number + samples)

    def put(old, new):
        return old.at[rows].set(new, mode="drop")

    return Slots(
        prompts=put(slots.prompts, jnp.repeat(prompts, num_samples, axis=0)),
        first=put(slots.first, first),
        last=put(slots.last, first),
        tokens=slots.tokens,
        length=put(slots.length, jnp.zeros_like(rows)),
        limit=put(slots.limit, jnp.repeat(arrivals.limits, num_samples)),
        keys=put(slots.keys, jax.vmap(key)(arrivals.seeds, arrivals.samples).reshape(-1)),
        state=decoder.insert(slots.state, numbers, fresh),
    )


def advance(
    decoder: SlotDecoder, slots: Slots, active: Bool[Array, "R"], config: SamplingConfig, steps: int
) -> tuple[Slots, Chunk]:
    """Writes up to `steps` tokens in every active row; pure, one program.

    The loop ends when no row is active any more. A row writes what `clp_jax.sampling.generate.generate` would.

    Args:
        decoder: what gives the logits.
        slots: all of them.
        active: ``bool[R]`` rows that write.
        config: strategy, processors, stop sequences.
        steps: tokens of a row at most, ``k``.
    """
    rows, pad_id, before = active.shape[0], decoder.pad_id, slots.length
    numbers = jnp.arange(rows)

    def unfinished(carry):
        i, active, *_ = carry
        return (i < steps) & jnp.any(active)

    def body(carry):
        i, active, slots, tokens, log_probs = carry
        logits, state = decoder.step(slots.last, slots.state)
        history = History(slots.prompts, slots.first, slots.tokens, slots.length, slots.limit, pad_id, decoder.eos_ids)
        chosen, log_prob = next_token(config, logits, slots.keys, history)
        chosen = jnp.where(active, chosen, pad_id)
        # Rows at rest write behind the end of their row, where there is nothing.
        place = jnp.where(active, slots.length, config.max_length)
        length = slots.length + active.astype(jnp.int32)
        written = slots.tokens.at[numbers, place].set(chosen, mode="drop")
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (jnp.zeros_like(i), i))
        log_probs = jax.lax.dynamic_update_slice(log_probs, log_prob[:, None], (jnp.zeros_like(i), i))
        ended = has_ended(written, length, decoder.eos_ids, config.stop, config.min_length) | (length >= slots.limit)
        slots = dataclasses.replace(slots, last=chosen, tokens=written, length=length, state=state)
        return i + 1, active & ~ended, slots, tokens, log_probs

    start = (
        jnp.zeros((), jnp.int32),
        active,
        slots,
        jnp.full((rows, steps), pad_id, jnp.int32),
        jnp.zeros((rows, steps), jnp.float32),
    )
    _, active, slots, tokens, log_probs = jax.lax.while_loop(unfinished, body, start)
    return slots, Chunk(tokens, log_probs, slots.length - before, active)
