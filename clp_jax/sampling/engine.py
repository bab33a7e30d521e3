"""Continuous batching: requests of any length share a fixed number of slots, and leave as soon as they are done.

Prompts are read by one program for each bucket of lengths, tokens written by one program in all, a few steps at a time;
between chunks the host hands out tokens and refills slots. A completion is the one that `clp_jax.sampling.generate.generate`
makes for the same seed (`request_keys`), whenever it arrives and whoever shares the batch.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from clp_jax.partitioning import active_mesh
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.processors import check_sequences
from clp_jax.sampling.slots import Arrivals, SlotDecoder, admit, advance, empty_slots

# Gets the number of a request, of a sample, and the tokens that were just written.
OnTokens: TypeAlias = Callable[[int, int, tuple[int, ...]], None]
Reason: TypeAlias = Literal["end", "stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The sizes of an engine; each is compiled in.

    Attributes:
        sampling: what is generated; its maximum length is the most that a request may ask for.
        buckets: lengths that prompts are padded to, ascending; the last is the longest prompt.
        slots: prompts at once.
        num_samples: rows of a slot; a request with more samples takes several slots.
        chunk: steps between two visits of the host; 1 hands out every token at once.
        prefill: prompts that are read together, where they share a bucket. The program reads as many whatever there are, so
            that a completion does not depend on who came with it.
    """

    sampling: SamplingConfig
    buckets: tuple[int, ...]
    slots: int = 8
    num_samples: int = 1
    chunk: int = 8
    prefill: int = 1

    def __post_init__(self):
        if not isinstance(self.sampling, SamplingConfig):
            raise TypeError(
                f"EngineConfig.sampling is a {type(self.sampling).__name__}: expected a SamplingConfig. A beam search ends for "
                "all beams of a prompt at once, and has no slots: call beam_search, or give a Server either of them."
            )
        for name in ("slots", "num_samples", "chunk", "prefill"):
            if getattr(self, name) < 1:
                raise ValueError(f"EngineConfig.{name} is {getattr(self, name)}: expected at least 1.")
        if not self.buckets or self.buckets[0] < 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"EngineConfig.buckets is {self.buckets}: expected ascending lengths of at least 1.")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to complete.

    Attributes:
        prompt: token ids, without padding.
        seed: decides the samples, with their numbers; 0 to 2^32 - 1.
        num_samples: completions.
        max_tokens: of a completion at most; the engine's maximum where not given.
        stop: sequences of token ids that end a completion, besides the engine's own.
    """

    prompt: tuple[int, ...]
    seed: int = 0
    num_samples: int = 1
    max_tokens: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Request.seed is {self.seed}: expected 0 to 2^32 - 1.")
        if self.num_samples < 1:
            raise ValueError(f"Request.num_samples is {self.num_samples}: expected at least 1.")
        check_sequences("Request.stop", self.stop)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        tokens: up to and including the end.
        log_probs: of the tokens under the decoder at temperature 1, unfiltered.
        reason: why it ended: an end of sequence, a stop sequence, its maximum length, or it was cancelled.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    reason: Reason


@dataclasses.dataclass(frozen=True)
class Result:
    """A request that is done.

    Attributes:
        number: what `Engine.submit` returned.
        request: as submitted.
        samples: its completions, in the order of their numbers.
    """

    number: int
    request: Request
    samples: tuple[Sample, ...]


@dataclasses.dataclass
class _Row:
    """A sample under way; it ends when it has a reason."""

    number: int
    sample: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    reason: Reason | None = None


@dataclasses.dataclass(frozen=True)
class _Ticket:
    """The samples of a request that share a slot."""

    request: Request
    rows: tuple[_Row, ...]

    @property
    def is_active(self) -> bool:
        return any(row.reason is None for row in self.rows)


class Engine:
    """Serves requests; one thread calls it. Inside `clp_jax.partitioning.use_mesh` the mesh's devices share the slots out.

    Args:
        bind: makes the decoder from parameters, inside the compiled programs.
        params: the parameters. They may be replaced between two steps, and requests under way go on with the new ones.
        config: the sizes.
        on_tokens: called with the new tokens of each sample after every chunk; those of a sample come in order. It may submit
            and cancel requests.
    """

    def __init__(
        self,
        bind: Callable[[Any], SlotDecoder],
        params: Any,
        config: EngineConfig,
        on_tokens: OnTokens = lambda number, sample, tokens: None,
    ):
        self.params, self.config, self.on_tokens = params, config, on_tokens
        self._waiting: collections.deque[_Ticket] = collections.deque()
        self._slots: list[_Ticket | None] = [None] * config.slots
        self._requests: dict[int, tuple[Request, tuple[_Row, ...]]] = {}
        self._submitted = 0
        # Requests with a sample that has ended since the last results.
        self._ended: set[int] = set()
        ids: list[tuple[int, tuple[int, ...]]] = []

        @jax.jit
        def empty(params):
            decoder = bind(params)
            ids.append((decoder.pad_id, decoder.eos_ids))
            return empty_slots(decoder, config.slots, config.buckets[-1], config.sampling, config.num_samples)

        self._device = empty(params)
        places = [x.sharding for x in jax.tree.leaves(self._device)]

        def settled(slots):
            """Slots stay on their devices: programs would be compiled again for others."""
            if active_mesh() is None:
                return slots
            structure: Any = jax.tree.structure(slots)
            leaves = jax.tree.leaves(slots)
            return structure.unflatten(map(jax.lax.with_sharding_constraint, leaves, places))

        @functools.partial(jax.jit, donate_argnums=1)
        def fill(params, slots, arrivals):
            return settled(admit(bind(params), slots, arrivals, config.sampling.max_length, config.num_samples))

        @functools.partial(jax.jit, donate_argnums=1)
        def decode(params, slots, active):
            slots, chunk = advance(bind(params), slots, active, config.sampling, config.chunk)
            return settled(slots), chunk

        self._fill, self._decode = fill, decode
        self._pad_id, self._eos_ids = ids[0]

    def submit(self, request: Request) -> int:
        """Queues a request, and returns the number that its tokens and its result carry.

        Raises:
            ValueError: for a prompt that no bucket holds, is empty or padded, or for more tokens than the engine's maximum.
        """
        longest, most = self.config.buckets[-1], self.config.sampling.max_length
        if not 1 <= len(request.prompt) <= longest:
            raise ValueError(
                f"the prompt has {len(request.prompt)} tokens: expected 1 to {longest}, the longest of the buckets; "
                "cut it or give the engine a longer one."
            )
        if request.prompt[-1] == self._pad_id:  # Inside a prompt, conditioning may leave places empty.
            raise ValueError(f"the prompt ends with the padding token {self._pad_id}: expected no padding.")
        if request.max_tokens is not None and not 1 <= request.max_tokens <= most:
            raise ValueError(f"Request.max_tokens is {request.max_tokens}: expected 1 to the engine's maximum, {most}.")
        number, n = self._submitted, self.config.num_samples
        self._submitted += 1
        rows = tuple(_Row(number, sample) for sample in range(request.num_samples))
        self._requests[number] = request, rows
        self._waiting.extend(_Ticket(request, rows[i : i + n]) for i in range(0, len(rows), n))
        return number

    def cancel(self, number: int, sample: int | None = None) -> None:
        """Ends a request's samples as they are, or one of them; the result comes with a step. One that is done stays done.

        Args:
            number: of the request.
            sample: its number among the samples; None for all.
        """
        for row in self._requests[number][1] if number in self._requests else ():
            if sample in (None, row.sample):
                row.reason = row.reason or "cancelled"
                self._ended.add(number)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is under way."""
        return not self._requests

    def step(self) -> list[Result]:
        """Fills free slots, writes one chunk, hands out its tokens, and returns the requests that are done."""
        self._admit_waiting()
        if any(self._slots):
            self._write_chunk()
        results = []
        for number in sorted(self._ended):
            request, rows = self._requests[number]
            samples = tuple(Sample(tuple(r.tokens), tuple(r.log_probs), r.reason) for r in rows if r.reason is not None)
            if len(samples) == len(rows):
                results.append(Result(number, request, samples))
                del self._requests[number]
        self._ended.clear()
        return results

    def run(self) -> Iterator[Result]:
        """Steps until every request is done, and yields results as soon as they are ready."""
        while not self.is_idle:
            yield from self.step()

    def _admit_waiting(self) -> None:
        self._slots = [ticket if ticket is not None and ticket.is_active else None for ticket in self._slots]
        self._waiting = collections.deque(ticket for ticket in self._waiting if ticket.is_active)
        free = collections.deque(slot for slot, ticket in enumerate(self._slots) if ticket is None)
        while free and self._waiting:
            # The first that waits comes in now, with those behind it that can be read along.
            bucket = self._bucket(self._waiting[0])
            alike = (ticket for ticket in self._waiting if self._bucket(ticket) == bucket)
            tickets = list(itertools.islice(alike, min(len(free), self.config.prefill)))
            for ticket in tickets:
                self._waiting.remove(ticket)
            slots = [free.popleft() for _ in tickets]
            for slot, ticket in zip(slots, tickets, strict=True):
                self._slots[slot] = ticket
            self._device = self._fill(self.params, self._device, self._arrivals(bucket, slots, tickets))

    def _bucket(self, ticket: _Ticket) -> int:
        return next(bucket for bucket in self.config.buckets if bucket >= len(ticket.request.prompt))

    def _arrivals(self, bucket: int, slots: list[int], tickets: list[_Ticket]) -> Arrivals:
        """What the program reads: always `prefill` prompts, of which some may go into no slot."""
        size = self.config.prefill
        prompts = np.full((size, bucket), self._pad_id, np.int32)
        numbers = np.full((size,), self.config.slots, np.int32)
        seeds, samples, limits = np.zeros((size,), np.uint32), np.zeros((size,), np.int32), np.ones((size,), np.int32)
        for i in range(size):
            # A prompt of nothing but padding might have no meaning to the decoder.
            request = tickets[min(i, len(tickets) - 1)].request
            prompts[i, : len(request.prompt)] = request.prompt
        for i, (slot, ticket) in enumerate(zip(slots, tickets, strict=True)):
            numbers[i], seeds[i], samples[i] = slot, ticket.request.seed, ticket.rows[0].sample
            limits[i] = ticket.request.max_tokens or self.config.sampling.max_length
        return Arrivals(prompts, numbers, seeds, samples, limits)

    def _write_chunk(self) -> None:
        n = self.config.num_samples
        active = np.zeros((self.config.slots * n,), bool)
        rows: list[tuple[int, Request, _Row]] = []
        for slot, ticket in enumerate(self._slots):
            if ticket is not None:
                rows += [(slot * n + i, ticket.request, row) for i, row in enumerate(ticket.rows) if row.reason is None]
        active[[place for place, _, _ in rows]] = True
        self._device, chunk = self._decode(self.params, self._device, active)
        chunk = jax.device_get(chunk)
        for place, request, row in sorted(rows, key=lambda item: (item[2].number, item[2].sample)):
            # A callback may have cancelled it meanwhile.
            if row.reason is None:
                count = int(chunk.written[place])
                tokens = chunk.tokens[place, :count].tolist()
                log_probs = chunk.log_probs[place, :count].tolist()
                self._hand_out(request, row, tokens, log_probs, not chunk.active[place])

    def _hand_out(self, request: Request, row: _Row, tokens: list[int], log_probs: list[float], ended: bool) -> None:
        """Adds a chunk's tokens to a sample, up to where it stops."""
        sampling, before = self.config.sampling, len(row.tokens)
        for token, log_prob in zip(tokens, log_probs, strict=True):
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            stops = (*sampling.stop, *request.stop)
            found = any(tuple(row.tokens[-len(stop) :]) == stop for stop in stops)
            if token in self._eos_ids:
                row.reason = "end"
            elif found and len(row.tokens) >= sampling.min_length:
                row.reason = "stop"
            if row.reason is not None:
                break
        if ended and row.reason is None:
            row.reason = "length"
        if row.reason is not None:
            self._ended.add(row.number)
        if len(row.tokens) > before:
            self.on_tokens(row.number, row.sample, tuple(row.tokens[before:]))
