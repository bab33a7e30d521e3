"""What a user asks of decoding, in words that other tools know too, as what the engine and the search take."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from clp_jax.data.vocabulary import TokenIds, Vocabulary
from clp_jax.models.config import ModelConfig, PaLMConfig
from clp_jax.sampling.beam_policies import (
    CurrentBound,
    FirstFinished,
    LengthPenalty,
    PowerPenalty,
    ReachableBound,
    Stopping,
)
from clp_jax.sampling.beam_search import BeamConfig, t5x_beam_config
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.history import Before
from clp_jax.sampling.processors import (
    BannedSequences,
    ForcedFirst,
    ForcedLast,
    LogitProcessor,
    NoRepeatNGram,
    OccurrencePenalty,
    RepetitionPenalty,
)
from clp_jax.sampling.stop_strings import Texts
from clp_jax.sampling.strategies import Greedy, Sampling

# What only some strategies have a use for.
_USERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), ("sample", "best_of_n")),
    **dict.fromkeys(("num_beams", "num_groups", "diversity_penalty", "beam_rules"), ("beam",)),
    **dict.fromkeys(("early_stopping", "patience"), ("beam",)),
    "length_penalty": ("beam", "best_of_n"),
}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are written; None is what nobody asked for.

    Attributes:
        strategy: ``sample``, ``greedy``, ``beam`` (search) or ``best_of_n`` (of `num_samples` samples, the most probable, or
            where `rewards` are given, the one with the highest).
        num_samples: completions of each prompt; for ``best_of_n`` those that are compared.
        max_tokens: of a completion; by default that of training with rewards, 64 for any other policy.
        min_tokens: of a completion before its end.
        temperature: of the samples, 1 by default; 0 is greedy.
        top_k: samples: keeps the k most probable tokens; 0 keeps all.
        top_p: samples: keeps the most probable tokens that reach this probability; 1 keeps all.
        min_p: samples: keeps tokens at least this fraction as probable as the most probable one; 0 keeps all.
        num_beams: of a beam search, at least `num_samples`; 4 by default.
        num_groups: beams: groups of equal size that are to differ (diverse beam search).
        diversity_penalty: beams: taken off a token's log-probability for each beam of an earlier group that has just
            written it.
        length_penalty: a beam's log-probability, or that of one of ``best_of_n``, is divided by its length to this power; 1 by
            default for beams and 0 for ``best_of_n``, which leaves the log-probability as it is.
        beam_rules: whose conventions a search has: those of ``transformers``, the default, or of ``t5x``: a beam that
            `max_tokens` cuts counts only where none has ended, the search ends when no beam can be kept any more, and a
            log-probability is divided by ((5 + length) / 6) to the power of `length_penalty`, 0.6 by default.
        early_stopping: beams: a prompt's search ends when `num_beams` have finished; without it, when no beam under way would
            be kept if it ended now, and with ``=never`` when none can be kept any more.
        patience: beams: with early_stopping, it ends when this many times `num_beams` have finished; 1 by default.
        repetition_penalty: divides the odds of tokens that were written already (CTRL), those of the prompt included where
            a policy has no encoder; 1 changes nothing.
        presence_penalty: taken off the logits of tokens that were written already.
        frequency_penalty: taken off the logits of a token for each time that it was written.
        no_repeat_ngram: no sequence of as many tokens is written twice, nor out of a prompt where a policy has no encoder; 0
            allows all.
        banned: texts that are not written in the tokens that the vocabulary makes of them, at the start of a word or
            inside one; typed as those of `stop`.
        banned_ids: token ids that are never written.
        forced_first: id of the token that completions begin with.
        forced_last: a completion that reaches `max_tokens` ends there with an end of sequence.
        stop: texts that end a completion, and are left out of it, but not for ``beam``; each is taken as it is typed, and the
            flag may be repeated. A list in JSON gives several at once, and its escapes are read.
        stop_ids: token ids that end a completion, and are left out of its text.
    """

    strategy: Literal["sample", "greedy", "beam", "best_of_n"] = "sample"
    num_samples: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    num_beams: int | None = None
    num_groups: int | None = None
    diversity_penalty: float | None = None
    length_penalty: float | None = None
    beam_rules: Literal["transformers", "t5x"] | None = None
    early_stopping: bool | Literal["never"] | None = None
    patience: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    banned: Texts = ()
    banned_ids: Sequence[int] = ()
    forced_first: int | None = None
    forced_last: bool = False
    stop: Texts = ()
    stop_ids: Sequence[int] = ()

    def __post_init__(self):
        for name, number in (("num_samples", self.num_samples), ("max_tokens", self.max_tokens)):
            if number is not None and not 1 <= number < 2**31:
                raise ValueError(f"{name} is {number}: expected at least 1, and less than 2**31.")
        if self.strategy == "best_of_n" and self.num_samples == 1:
            raise ValueError(
                "num_samples is 1 with strategy=best_of_n: expected at least 2, of which the best is returned."
            )
        if self.no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram is {self.no_repeat_ngram}: expected 0, which allows all, or more.")
        for name, texts in (("stop", self.stop), ("banned", self.banned)):
            if isinstance(texts, str) or not all(texts):
                raise ValueError(
                    f"{name} is {texts!r}: expected texts of one character at least; an empty one is everywhere."
                )
        useless = [n for n, users in _USERS.items() if getattr(self, n) is not None and self.strategy not in users]
        if useless:
            raise ValueError(f"{_do_nothing(useless)} with strategy={self.strategy}: {_leave(useless)}.")
        if self.strategy == "beam":
            self._check_search()
        if self.temperature == 0 and any(x is not None for x in (self.top_k, self.top_p, self.min_p)):
            raise ValueError("top_k and top_p do nothing at temperature 0, which is greedy: leave them out.")

    def _check_search(self) -> None:
        beams, groups = 4 if self.num_beams is None else self.num_beams, self.num_groups or 1
        if self.stop:
            raise ValueError(
                "stop does not go with strategy=beam, whose beams are ranked by their tokens before there is a text: give "
                "stop_ids, or another strategy."
            )
        if beams < self.num_samples:
            raise ValueError(f"num_beams is {beams}: expected at least num_samples, {self.num_samples}.")
        if (self.num_groups is not None and self.num_groups < 1) or beams % groups:
            raise ValueError(f"num_groups is {self.num_groups}: expected a divisor of num_beams, {beams}.")
        if self.diversity_penalty is not None and (groups == 1 or self.diversity_penalty < 0):
            raise ValueError(
                f"diversity_penalty is {self.diversity_penalty:g} for num_groups {groups}: expected 0 or more, and two "
                "groups at least."
            )
        if self.beam_rules == "t5x" and self.early_stopping is not None:
            raise ValueError(
                "early_stopping does nothing with beam_rules=t5x, which have one way to end: leave it out."
            )
        if self.patience is not None and (self.early_stopping is not True or not self.patience > 0):
            raise ValueError(
                f"patience is {self.patience:g}: expected a positive number, and early_stopping, whose end it puts off."
            )

    def config(
        self, max_tokens: int, model: ModelConfig, vocabulary: Vocabulary | TokenIds
    ) -> SamplingConfig | BeamConfig:
        """What generates it: by a search, or token by token.

        Args:
            max_tokens: of a completion, where the user says nothing.
            model: of the policy.
            vocabulary: of the policy.

        Raises:
            ValueError: for what this policy can't be asked.
        """
        length = self.max_tokens or max_tokens
        if not 0 <= self.min_tokens <= length:
            raise ValueError(f"min_tokens is {self.min_tokens}: expected 0 to max_tokens, {length}.")
        ids = [("banned_ids", i) for i in self.banned_ids] + [("stop_ids", i) for i in self.stop_ids]
        for name, token in [*ids, *([] if self.forced_first is None else [("forced_first", self.forced_first)])]:
            if not 0 <= token < model.vocab_size:
                raise ValueError(f"{name} has the token id {token}: expected 0 to {model.vocab_size - 1}.")
        rules: dict[str, Any] = {
            "max_length": length,
            "min_length": self.min_tokens,
            "processors": tuple(self._processors(model, vocabulary)),
            "stop": tuple((token,) for token in self.stop_ids),
        }
        if self.strategy != "beam":
            return SamplingConfig(strategy=self._chosen(), **rules)
        rules |= {
            "num_beams": self.num_beams or 4,
            "num_returned": self.num_samples,
            "num_groups": self.num_groups or 1,
            "diversity": self.diversity_penalty or 0.0,
        }
        if self.beam_rules == "t5x":
            alpha = 0.6 if self.length_penalty is None else self.length_penalty
            return dataclasses.replace(t5x_beam_config(length, alpha=alpha), **rules)
        penalty = PowerPenalty(1.0 if self.length_penalty is None else self.length_penalty)
        return BeamConfig(length_penalty=penalty, stopping=self._stopping(), **rules)

    @property
    def best(self) -> LengthPenalty | None:
        """What ranks the samples of a prompt, of which one is returned; None where all are."""
        return PowerPenalty(self.length_penalty or 0.0) if self.strategy == "best_of_n" else None

    def _chosen(self) -> Sampling | Greedy:
        if self.strategy == "greedy" or self.temperature == 0:
            return Greedy()
        given = {n: getattr(self, n) for n in ("temperature", "top_k", "top_p", "min_p")}
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def _stopping(self) -> Stopping:
        if self.early_stopping == "never":
            return ReachableBound()
        return FirstFinished(self.patience or 1.0) if self.early_stopping else CurrentBound()

    def _processors(self, model: ModelConfig, vocabulary: Vocabulary | TokenIds) -> Iterator[LogitProcessor]:
        """What changes logits; as in transformers, what the decoder reads has occurred: the prompt, or the start token."""
        before: Before = "prompt" if isinstance(model, PaLMConfig) else "start"
        if self.repetition_penalty != 1:
            yield RepetitionPenalty(self.repetition_penalty, before)
        if self.presence_penalty or self.frequency_penalty:
            yield OccurrencePenalty(self.presence_penalty, self.frequency_penalty)
        if self.no_repeat_ngram:
            yield NoRepeatNGram(self.no_repeat_ngram, before)
        banned: list[tuple[int, ...]] = [(token,) for token in self.banned_ids]
        for text in self.banned:
            # Vocabularies have other tokens at the start of a word.
            spelled = [tuple(vocabulary.encode(text)), tuple(vocabulary.encode(f" {text}"))]
            if not all(spelled):
                raise ValueError(f"banned has {text!r}: the vocabulary has no token for it.")
            banned += spelled
        if banned:
            yield BannedSequences(tuple(dict.fromkeys(banned)), before)
        if self.forced_first is not None:
            yield ForcedFirst(self.forced_first)
        if self.forced_last:
            yield ForcedLast()


def _do_nothing(names: Sequence[str]) -> str:
    return f"{names[0]} does nothing" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} do nothing"


def _leave(names: Sequence[str]) -> str:
    return "leave it out" if len(names) == 1 else "leave them out"
