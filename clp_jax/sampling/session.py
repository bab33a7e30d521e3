"""A policy at one preference, serving prompts: continuous batching for samples, search for beams."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Params
from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.models.conditioning import Conditioning
from clp_jax.models.policy import Policy
from clp_jax.preferences import Preference
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.engine import Engine, EngineConfig, Request, Sample
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.json_lines import pad_rows
from clp_jax.sampling.stop_strings import truncate_at
from clp_jax.sampling.text import Completion, alike, bucket

# Gets the number of a prompt, of its sample, and the tokens that were just written.
OnTokens = Callable[[int, int, tuple[int, ...]], None]


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How prompts are served.

    Attributes:
        generation: samples, or a search.
        num_samples: completions of each prompt.
        best: whether only the most probable one of the samples is returned.
        stop: texts that end a completion, and are left out of it.
        max_prompt: tokens of a prompt at most.
        slots: prompts at once.
        int8: whether keys and values are kept in eight bits.
    """

    generation: SamplingConfig | BeamConfig
    num_samples: int = 1
    best: bool = False
    stop: tuple[str, ...] = ()
    max_prompt: int = 512
    slots: int = 32
    int8: bool = False


class Server:
    """Completes prompts; what it compiled serves every preference.

    Args:
        policy: the policy's shape.
        conditioning: how a preference enters.
        vocabulary: turns tokens into text.
        config: how prompts are served.
        on_tokens: called while samples are written; not for beams.
    """

    def __init__(
        self,
        policy: Policy,
        conditioning: Conditioning,
        vocabulary: Vocabulary | TokenIds,
        config: ServingConfig,
        on_tokens: OnTokens = lambda prompt, sample, tokens: None,
    ):
        self.config = config
        self._policy, self._conditioning, self._vocabulary = policy, conditioning, vocabulary
        self._on_tokens = on_tokens
        self._engine: Engine | None = None

    def complete(
        self, params: Params, preference: Preference, prompts: Sequence[tuple[tuple[int, ...], int]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Completes prompts, and yields each one's number and completions as soon as they are there.

        Args:
            params: ordinary parameters, mixed at the preference.
            preference: what conditioning writes into prompts, where it does.
            prompts: token ids, and the seed of each.
        """
        conditioned = [(self._condition(tokens, preference), seed) for tokens, seed in prompts]
        if isinstance(self.config.generation, BeamConfig):
            yield from self._search(params, self.config.generation, [tokens for tokens, _ in conditioned])
        else:
            yield from self._sample(params, self.config.generation, conditioned)

    def _sample(
        self, params: Params, sampling: SamplingConfig, prompts: Sequence[tuple[tuple[int, ...], int]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        engine = self._prepared(params, sampling, max((len(tokens) for tokens, _ in prompts), default=1))
        numbers: dict[int, int] = {}
        written: dict[int, list[int]] = {}

        def on_tokens(number: int, sample: int, tokens: tuple[int, ...]) -> None:
            self._on_tokens(numbers[number], sample, tokens)
            if self.config.stop and self.config.num_samples == 1:
                written.setdefault(number, []).extend(tokens)
                text = self._text(tuple(written[number]))
                if any(stop in text for stop in self.config.stop):
                    engine.cancel(number)

        engine.on_tokens = on_tokens
        for index, (tokens, seed) in enumerate(prompts):
            numbers[engine.submit(Request(tokens, seed=seed, num_samples=self.config.num_samples))] = index
        for result in engine.run():
            completions = [self._completion(sample) for sample in result.samples]
            if self.config.best:
                completions = [max(completions, key=lambda c: float(np.sum(c.log_probs, dtype=np.float64)))]
            yield numbers[result.number], completions

    def _prepared(self, params: Params, sampling: SamplingConfig, longest: int) -> Engine:
        """The engine, made anew where a prompt is longer than all before it."""
        engine = self._engine
        if engine is None or engine.config.buckets[-1] < longest:
            last = bucket(max(longest, min(self.config.max_prompt, 512)))
            buckets = tuple(2**i for i in range(5, last.bit_length()))
            # One prompt is somebody's who looks on: every token is shown as it comes.
            chunk = 1 if self.config.slots == 1 else 8
            config = EngineConfig(
                sampling, buckets, slots=self.config.slots, num_samples=self.config.num_samples, chunk=chunk
            )
            engine = Engine(lambda p: CachedDecoder(self._policy.bind(p), self.config.int8), params, config)
            self._engine = engine
        engine.params = params
        return engine

    @functools.cached_property
    def _beams(self):
        @functools.partial(jax.jit, static_argnames="config")
        def run(params, inputs, config):
            return beam_search(CachedDecoder(self._policy.bind(params), self.config.int8), inputs, config)

        return run

    def _search(
        self, params: Params, config: BeamConfig, prompts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, list[Completion]]]:
        for part in alike([(len(tokens),) for tokens in prompts], self.config.slots):
            # A last batch is filled up: fewer rows would be summed in another order, and a line depend on its neighbours.
            inputs = pad_rows([prompts[i] for i in part], self.config.slots, self._policy.config.pad_id)
            found = self._beams(params, inputs, config).completions
            arrays = [np.asarray(x) for x in (found.tokens, found.log_probs, found.mask)]
            for row, index in enumerate(part):
                rows = range(row * config.num_returned, (row + 1) * config.num_returned)
                lengths = [int(arrays[2][r].sum()) for r in rows]
                samples = [
                    Sample(tuple(arrays[0][r, :n].tolist()), tuple(arrays[1][r, :n].tolist()), "end")
                    for r, n in zip(rows, lengths, strict=True)
                ]
                yield index, [self._completion(sample) for sample in samples]

    def _condition(self, tokens: tuple[int, ...], preference: Preference) -> tuple[int, ...]:
        rows = jax.tree.map(lambda x: jnp.asarray(x)[None], preference)
        found = self._conditioning.condition_inputs(jnp.asarray([tokens], jnp.int32), rows)
        return tuple(np.asarray(found)[0].tolist())

    def _completion(self, sample: Sample) -> Completion:
        """The text before the first stop, and the tokens up to the one that completes the stop."""
        tokens = sample.tokens
        whole = self._text(tokens)
        text = truncate_at(whole, self.config.stop)
        if len(text) < len(whole):
            ends = (
                n for n in range(1, len(tokens) + 1) if any(stop in self._text(tokens[:n]) for stop in self.config.stop)
            )
            tokens = tokens[: next(ends, len(tokens))]
        return Completion(text, tokens, sample.log_probs[: len(tokens)])

    def _text(self, tokens: tuple[int, ...]) -> str:
        return self._vocabulary.decode(np.asarray(tokens, np.int32)) if tokens else ""
