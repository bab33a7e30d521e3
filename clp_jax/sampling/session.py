"""A policy at one preference, serving prompts: continuous batching for samples, search for beams."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Params
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.models.conditioning import Conditioning
from clp_jax.partitioning import active_sizes
from clp_jax.preferences import Preference
from clp_jax.sampling.beam_policies import LengthPenalty
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.engine import Engine, EngineConfig, Request, Sample
from clp_jax.sampling.ensemble import Ensemble
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.json_lines import pad_rows
from clp_jax.sampling.memory import explained, size_of
from clp_jax.sampling.slots import SlotDecoder, empty_slots
from clp_jax.sampling.stop_strings import truncate_at
from clp_jax.sampling.text import Completion, Prompt, alike, bucket

# Gets the number of a prompt, of its sample, and the tokens that were just written.
OnTokens = Callable[[int, int, tuple[int, ...]], None]

# Prompts that are read together. Slots become free a few at a time, and a program reads as many whatever there are.
PREFILL = 4


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How prompts are served.

    Attributes:
        generation: samples, or a search.
        num_samples: completions of each prompt.
        best: of the samples of a prompt, the one is returned whose log-probability, divided by this, is the highest; None
            returns all.
        stop: texts that end a sample, and are left out of it; a search ranks tokens before there is a text.
        max_prompt: tokens of a prompt at most.
        slots: prompts at once.
        chunk: tokens of a sample that are handed out together: steps between two visits of the host, each of which costs time.
            None is 1 for a single slot, where somebody looks on, and 8 for more.
        int8: whether keys and values are kept in eight bits.
    """

    generation: SamplingConfig | BeamConfig
    num_samples: int = 1
    best: LengthPenalty | None = None
    stop: tuple[str, ...] = ()
    max_prompt: int = 512
    slots: int = 32
    chunk: int | None = None
    int8: bool = False

    def __post_init__(self):
        if self.stop and isinstance(self.generation, BeamConfig):
            raise ValueError(
                f"ServingConfig.stop is {self.stop!r} for a search: expected sequences in BeamConfig.stop."
            )


class Server:
    """Completes prompts; what it compiled serves every preference.

    Args:
        ensemble: the policy's shape, and those of policies that decode along.
        conditioning: how a preference enters.
        vocabulary: turns tokens into text.
        config: how prompts are served.
        on_tokens: called with the tokens of a sample in their order, up to `ServingConfig.chunk` of them as soon as those are
            written, and with all of a beam's when its search has ended: no token of a beam is final before.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        conditioning: Conditioning,
        vocabulary: Vocabulary | TokenIds,
        config: ServingConfig,
        on_tokens: OnTokens = lambda prompt, sample, tokens: None,
    ):
        self.config = config
        self._ensemble, self._conditioning, self._vocabulary = ensemble, conditioning, vocabulary
        self._on_tokens = on_tokens
        self._engine: Engine | None = None
        # Bytes of what decoding remembers on a device, by the longest prompt.
        self._sizes: dict[int, int] = {}

    def complete(
        self, params: tuple[Params, ...], preference: Preference, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Completes prompts, and yields each one's number and completions as soon as they are there.

        Args:
            params: ordinary parameters of each policy, mixed at the preference.
            preference: what conditioning writes into prompts, where it does.
            prompts: none of which asks for more tokens than the generation has.

        Raises:
            ValueError: where keys and values do not fit into memory, and for wishes of prompts that a search can't grant.
        """
        conditioned = [dataclasses.replace(p, tokens=self._condition(p.tokens, preference)) for p in prompts]
        if isinstance(self.config.generation, BeamConfig):
            if any(prompt.has_wishes for prompt in prompts):
                raise ValueError(
                    "a search completes all prompts alike: expected no num_samples, max_tokens or stop of a prompt."
                )
            yield from self._search(params, self.config.generation, [prompt.tokens for prompt in conditioned])
        else:
            yield from self._sample(params, self.config.generation, conditioned)

    def _sample(
        self, params: tuple[Params, ...], sampling: SamplingConfig, prompts: Sequence[Prompt]
    ) -> Iterator[tuple[int, list[Completion]]]:
        engine = self._prepared(params, sampling, max((len(prompt.tokens) for prompt in prompts), default=1))
        # Where this does not come to its end, nothing can go on with the engine's requests and arrays.
        self._engine = None
        numbers: dict[int, int] = {}
        written: dict[tuple[int, int], list[int]] = {}

        def on_tokens(number: int, sample: int, tokens: tuple[int, ...]) -> None:
            self._on_tokens(numbers[number], sample, tokens)
            if texts := self._stop_texts(prompts[numbers[number]]):
                so_far = written.setdefault((number, sample), [])
                so_far.extend(tokens)
                text = self._text(tuple(so_far))
                if any(stop in text for stop in texts):
                    engine.cancel(number, sample)

        engine.on_tokens = on_tokens
        for index, prompt in enumerate(prompts):
            number = self.config.num_samples if prompt.num_samples is None else prompt.num_samples
            ids = tuple(stop for stop in prompt.stop if not isinstance(stop, str))
            numbers[engine.submit(Request(prompt.tokens, prompt.seed, number, prompt.max_tokens, ids))] = index
        with self._fitting(engine.config.buckets[-1]):
            for result in engine.run():
                index = numbers[result.number]
                stop, texts = (*sampling.stop, *result.request.stop), self._stop_texts(prompts[index])
                completions = [self._completion(sample, stop, texts) for sample in result.samples]
                yield index, completions if self.config.best is None else [most_probable(completions, self.config.best)]
        self._engine = engine

    def _prepared(self, params: tuple[Params, ...], sampling: SamplingConfig, longest: int) -> Engine:
        """The engine, made anew where a prompt is longer than all before it."""
        engine = self._engine
        if engine is None or engine.config.buckets[-1] < longest:
            slots, num_samples = self.config.slots, self.config.num_samples
            last = bucket(max(longest, min(self.config.max_prompt, 512)))
            buckets = tuple(2**i for i in range(5, last.bit_length()))
            # One prompt is somebody's who looks on: every token is shown as it comes.
            chunk = self.config.chunk if self.config.chunk is not None else 1 if slots == 1 else 8
            replicas = math.prod(active_sizes("batch"))
            config = EngineConfig(
                sampling, buckets, slots, num_samples, chunk, prefill=min(slots, max(PREFILL, replicas))
            )
            shapes = jax.eval_shape(lambda p: empty_slots(self._bind(p), slots, last, sampling, num_samples), params)
            self._sizes[last] = size_of(shapes) // replicas
            with self._fitting(last):
                engine = Engine(self._bind, params, config)
        engine.params = params
        return engine

    def _bind(self, params: tuple[Params, ...]) -> SlotDecoder:
        return self._ensemble.bind(params, self.config.int8)

    def _fitting(self, longest: int) -> contextlib.AbstractContextManager[None]:
        config, generation = self.config, self.config.generation
        rows = generation.num_beams if isinstance(generation, BeamConfig) else config.num_samples
        what = "num_beams" if isinstance(generation, BeamConfig) else "num_samples"
        return explained(
            self._sizes[longest],
            f"max_tokens is {generation.max_length}, prompts have up to {longest} tokens (max_prompt), batch_size is "
            f"{config.slots}, {what} {rows}: give smaller ones{'' if config.int8 else ', or int8'}.",
        )

    @functools.cached_property
    def _beams(self):
        @functools.partial(jax.jit, static_argnames="config")
        def run(params, inputs, config):
            return beam_search(self._bind(params), inputs, config)

        return run

    def _search(
        self, params: tuple[Params, ...], config: BeamConfig, prompts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        for part in alike([(len(tokens),) for tokens in prompts], self.config.slots):
            # A last batch is filled up: fewer rows would be summed in another order, and a line depend on its neighbours.
            inputs = pad_rows([prompts[i] for i in part], self.config.slots, self._ensemble.pad_id)
            longest = inputs.shape[1]
            if longest not in self._sizes:
                start = functools.partial(self._start, config)
                self._sizes[longest] = size_of(jax.eval_shape(start, params, inputs)) // math.prod(
                    active_sizes("batch")
                )
            with self._fitting(longest):
                found = self._beams(params, inputs, config).completions
                arrays = [np.asarray(x) for x in (found.tokens, found.log_probs, found.mask)]
            for row, index in enumerate(part):
                rows = range(row * config.num_returned, (row + 1) * config.num_returned)
                lengths = [int(arrays[2][r].sum()) for r in rows]
                samples = [
                    Sample(tuple(arrays[0][r, :n].tolist()), tuple(arrays[1][r, :n].tolist()), "end")
                    for r, n in zip(rows, lengths, strict=True)
                ]
                for number, sample in enumerate(samples):
                    self._on_tokens(index, number, sample.tokens)
                yield index, [self._completion(sample, config.stop) for sample in samples]

    def _start(self, config: BeamConfig, params: tuple[Params, ...], inputs: Array) -> Any:
        return self._bind(params).start(inputs, config.max_length, config.num_beams)

    def _condition(self, tokens: tuple[int, ...], preference: Preference) -> tuple[int, ...]:
        rows = jax.tree.map(lambda x: jnp.asarray(x)[None], preference)
        found = self._conditioning.condition_inputs(jnp.asarray([tokens], jnp.int32), rows)
        return tuple(np.asarray(found)[0].tolist())

    def _stop_texts(self, prompt: Prompt) -> tuple[str, ...]:
        return *self.config.stop, *(stop for stop in prompt.stop if isinstance(stop, str))

    def _completion(self, sample: Sample, stop: tuple[tuple[int, ...], ...], texts: tuple[str, ...] = ()) -> Completion:
        """The text before the first stop, and the tokens up to the one that completes the stop."""
        tokens = sample.tokens
        ends = [len(sequence) for sequence in stop if tokens[-len(sequence) :] == sequence]
        whole = self._text(tokens[: len(tokens) - max(ends, default=0)])
        text = truncate_at(whole, texts)
        if len(text) < len(whole):
            complete = (n for n in range(1, len(tokens) + 1) if any(stop in self._text(tokens[:n]) for stop in texts))
            tokens = tokens[: next(complete, len(tokens))]
        return Completion(text, tokens, sample.log_probs[: len(tokens)])

    def _text(self, tokens: tuple[int, ...]) -> str:
        return self._vocabulary.decode(np.asarray(tokens, np.int32)) if tokens else ""


def most_probable(completions: Sequence[Completion], penalty: LengthPenalty) -> Completion:
    """The first of the completions whose log-probability, divided by the penalty of its length, is the highest."""

    def score(completion: Completion) -> float:
        total = float(np.sum(completion.log_probs, dtype=np.float64)) / float(penalty(len(completion.tokens)))
        return -np.inf if np.isnan(total) else total

    return max(completions, key=score)
