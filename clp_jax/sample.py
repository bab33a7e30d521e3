"""`clp sample`: steers a trained policy by hand, or completes a file of prompts."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clp_jax.models.conditioning import check_alpha
from clp_jax.partitioning import active_sizes
from clp_jax.preferences import Preference, validate_weights
from clp_jax.rewards.protocol import RewardFunction
from clp_jax.sampling.beam_search import BeamConfig
from clp_jax.sampling.decoding import Decoding
from clp_jax.sampling.devices import Devices
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.json_lines import Limits, Line, Skipped, answers, check_prompt, read_lines
from clp_jax.sampling.session import Server, ServingConfig
from clp_jax.sampling.stop_strings import shown_length
from clp_jax.sampling.strategies import Greedy, Sampling
from clp_jax.sampling.text import Completion, Prompt, prompt_tokens
from clp_jax.training.partners import LoadedEnsemble, Partners
from clp_jax.training.policies import LoadedPolicy, load_policy
from clp_jax.training.reranking import RunRewards, most_rewarded

_HELP = """\
Every line is a prompt. Commands:
  /weights 0.2,0.8   the trade-off between the rewards
  /alpha 0.3         the KL weight, for policies conditioned on it
  /samples 3         completions of each prompt
  /temperature 0.7   of the samples; 0 is greedy
  /help              this text
  /quit              the end (so is the end of the input)"""


class Session:
    """A loaded policy and the settings that lines of a terminal may change.

    Args:
        ensemble: the policy, and who decodes along.
        config: how prompts are served.
        seed: of the samples; counts up with every prompt.
        rewards: what completions are worth; None where nobody asks.
        best: whether only the completion that is worth most is returned.
    """

    def __init__(
        self,
        ensemble: LoadedEnsemble,
        config: ServingConfig,
        seed: int,
        rewards: RunRewards | None = None,
        best: bool = False,
    ):
        self.loaded, self.config, self.seed = ensemble.members[0], config, seed
        count = max(1, len(self.loaded.objectives))
        self.weights, self.alpha = np.full(count, 1 / count, np.float32), 0.0
        self._ensemble, self._rewards, self._best = ensemble, rewards, best
        self._servers: dict[ServingConfig, Server] = {}
        self._stream: _Stream | None = None

    @property
    def limits(self) -> Limits:
        """What a prompt may be."""
        config, generation = self.loaded.policy.config, self.config.generation
        completion = None
        if isinstance(generation, SamplingConfig):
            completion = max(1, generation.min_length), generation.max_length
        return Limits(config.vocab_size, self.config.max_prompt, 0, config.pad_id, completion)

    def set_weights(self, weights: Sequence[float]) -> None:
        """Changes the trade-off.

        Raises:
            ValueError: when the weights are not a point of the simplex, or the policy has no rewards.
        """
        names = self.loaded.objectives
        if not names:
            raise ValueError(f"{self.loaded.run_dir} is a supervised policy: it has no rewards to weigh.")
        self.weights = validate_weights(weights, len(names), names)

    def set_alpha(self, alpha: float) -> None:
        """Changes the KL weight.

        Raises:
            ValueError: when it is outside [0, 1], or below what the policy was trained for.
        """
        checked = float(Preference.of([1.0], alpha).alpha)
        check_alpha(self.loaded.conditioning, checked)
        self.alpha = checked

    def change_alpha(self, alpha: float) -> None:
        """`set_alpha`, when a user asks for it.

        Raises:
            ValueError: when the policy is not conditioned on the KL weight, which then changes nothing.
        """
        if getattr(self.loaded.conditioning, "alpha_min", None) is None:
            raise ValueError(f"{self.loaded.run_dir} is not conditioned on alpha: it would change nothing.")
        self.set_alpha(alpha)

    def complete(
        self, prompts: Sequence[Prompt], references: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The number and the completions of every prompt, as soon as they are there.

        Args:
            prompts: token ids and settings.
            references: of each, for rewards that compare with them.
        """
        if self.config not in self._servers:
            loaded = self.loaded
            server = Server(self._ensemble.shape, loaded.conditioning, loaded.vocabulary, self.config, self._show)
            self._servers[self.config] = server
        preference = Preference.of(self.weights, self.alpha)
        server = self._servers[self.config]
        for number, completions in server.complete(self._ensemble.at(preference), preference, prompts):
            if self._rewards is not None:
                reference = "" if references is None else references[number]
                completions = self._rewards.of(prompts[number].tokens, reference, completions)
            yield number, [most_rewarded(completions, self.weights)] if self._best else completions

    def answer(self, prompt: str, console: Console) -> None:
        """Prints the completions of a prompt; a single sample as it is written, where somebody looks on."""
        tokens, was_cut = prompt_tokens(self.loaded.vocabulary, prompt, self.config.max_prompt)
        if was_cut:
            text = f"warning: the prompt is longer than {self.config.max_prompt} tokens, --max_prompt: its end was cut."
            print(text, file=sys.stderr)
        check_prompt(tokens, self.limits)
        single = self.config.num_samples == 1 and isinstance(self.config.generation, SamplingConfig)
        self._stream = _Stream(self.loaded.vocabulary, self.config.stop) if single and console.is_terminal else None
        for _, completions in self.complete([Prompt(tuple(tokens), self.seed)]):
            if self._stream is not None:
                self._stream.end(completions[0].text)
                continue
            for completion in completions:
                # As it is: nothing wrapped, no name of an emoji replaced.
                console.out(completion.text or "(empty)", highlight=False)

    def set_samples(self, number: int) -> None:
        """Changes the number of completions."""
        if isinstance(self.config.generation, BeamConfig):
            raise ValueError(
                "beams return as many completions as the search was made for: start again with --num_samples."
            )
        self.config = dataclasses.replace(self.config, num_samples=max(1, number))

    def set_temperature(self, temperature: float) -> None:
        """Changes the temperature and leaves the rest of how tokens are chosen alone; 0 is greedy."""
        generation = self.config.generation
        if isinstance(generation, BeamConfig):
            raise ValueError("a beam search has no temperature: start again with another --strategy.")
        before = generation.strategy
        strategy: Sampling | Greedy = Greedy()
        if temperature != 0:
            strategy = Sampling(temperature)
            if isinstance(before, Sampling):
                strategy = dataclasses.replace(before, temperature=temperature)
        self.config = dataclasses.replace(self.config, generation=dataclasses.replace(generation, strategy=strategy))

    def describe(self) -> str:
        """The current trade-off in words."""
        if not self.loaded.objectives:
            return "a policy without rewards to weigh"
        pairs = zip(self.loaded.objectives, self.weights, strict=True)
        parts = [f"{name} {weight:.2f}" for name, weight in pairs]
        if getattr(self.loaded.conditioning, "alpha_min", None) is not None:
            parts.append(f"alpha {self.alpha:g}")
        if self.config.num_samples > 1:
            parts.append(f"{self.config.num_samples} samples")
        return ", ".join(parts)

    def _show(self, prompt: int, sample: int, tokens: tuple[int, ...]) -> None:
        if self._stream is not None:
            self._stream.add(tokens)


class _Stream:
    """Shows a completion while it is written: what no later token can change any more."""

    def __init__(self, vocabulary: Any, stops: tuple[str, ...]):
        self._vocabulary, self._stops = vocabulary, stops
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, tokens: tuple[int, ...]) -> None:
        self._tokens += tokens
        text = self._vocabulary.decode(np.asarray(self._tokens))
        self._show(text[: shown_length(text, self._stops)].rstrip("\ufffd"))

    def end(self, text: str) -> None:
        self._show(text or "(empty)")
        print(flush=True)

    def _show(self, text: str) -> None:
        if text.startswith(self._shown):
            print(text[len(self._shown) :], end="", flush=True)
            self._shown = text


def sample(
    *,
    checkpoint: str,
    prompt: str | None = None,
    input: str | None = None,  # noqa: A002 - it is the name of a flag.
    output: str | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    decoding: Decoding = Decoding(),
    partners: Partners = Partners(),
    rewards: Sequence[RewardFunction] = (),
    devices: Devices = Devices(),
    max_prompt: int | None = None,
    batch_size: int | None = None,
    int8: bool = False,
) -> None:
    """Prints completions of a prompt at given reward weights; without a prompt, reads lines and steers between them.

    A line of `input` has ``inputs``, as text or as a list of token ids; a line of `output` has its number, all that
    the line has, ``tokens``, ``text`` and ``logprobs`` (of lists, where there are several samples). Lines keep
    their order; a bad one is reported with its number and left out, and the exit code is 1 then. A line's samples depend on
    its prompt, its number and the seed alone, or on its own ``seed`` instead of the two where it has one. But for beams, a line
    may have its own ``num_samples``, ``max_tokens`` (not above the flag's), and ``stop``: a text, or a list of texts and of
    lists of token ids, which end its completions as those of the flags do.

    Args:
        checkpoint: run directory of a policy, or ``RUN/checkpoints/STEP``.
        prompt: the document; without it, lines are read from the terminal or from a pipe.
        input: JSON lines with ``inputs``, instead of a prompt.
        output: JSON lines with the completions of every line of `input`, in order.
        weights: one for each reward, summing to one; equal by default.
        alpha: KL weight, for policies conditioned on it.
        seed: of the samples.
        decoding: how completions are written.
        partners: other policies that decode along.
        rewards: the reward functions of the run: completions in files have ``rewards``, in the run's order and standardised as
            in training, and ``best_of_n`` returns the one with the highest sum, weighted with `weights`. A line's ``targets``
            are what rewards compare with.
        devices: which of them answer.
        max_prompt: tokens of a prompt at most, by default as many as in training, or 65,536 for a converted policy. A longer
            text of an encoder-decoder is cut before its end of sequence, with a warning; longer prompts of decoders and
            longer lists are errors.
        batch_size: lines of `input` that are completed at once, 32 by default; samples take no more room than there are
            lines. Fewer beams cost as much, so that those of a line do not depend on how many lines there are.
        int8: keeps keys and values in eight bits, which halves the memory of long prompts.

    Raises:
        ValueError: for weights that are not a point of the simplex or do not match the policy, and for settings that
            exclude each other.
        SystemExit: with 1 when all is done, where lines were left out.
    """
    for name, number in (("max_prompt", max_prompt), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: expected at least 1.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: expected a whole number in [0, 2**32).")
    if input is not None and prompt is not None:
        raise ValueError("sample: a prompt and an input were given: expected one of them.")
    if input is None and (output is not None or batch_size is not None):
        given = "output is written" if output is not None else "batch_size is"
        raise ValueError(f"sample: {given} for the lines of an input: give one, or leave it out.")
    if output is not None and Path(output).exists():
        raise ValueError(f"{output} exists: it was not overwritten. Give another output.")
    if rewards and decoding.best is not None and decoding.length_penalty is not None:
        raise ValueError(
            "length_penalty does nothing where rewards say which sample is the best: leave one of them out."
        )
    slots = 1 if input is None else batch_size or 32
    with devices.use(slots):
        ensemble = partners.load(load_policy(checkpoint))
        loaded = ensemble.members[0]
        config, worth = _serving(loaded, decoding, max_prompt, slots, int8), None
        ranked = bool(rewards) and config.best is not None
        if rewards:
            config, worth = dataclasses.replace(config, best=None), RunRewards(loaded, rewards)
        session = Session(ensemble, config, seed, worth, ranked)
        if weights is not None:
            session.set_weights(weights)
        session.set_alpha(alpha)
        if input is not None:
            _complete_file(session, Path(input), output)
        elif prompt is not None:
            session.answer(prompt, Console())
        else:
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr] # A bad line must not end it all.
            talk(session, sys.stdin, Console())


def _serving(loaded: LoadedPolicy, decoding: Decoding, max_prompt: int | None, slots: int, int8: bool) -> ServingConfig:
    """What was asked for, with what the policy says where nothing was."""
    generation = decoding.config(loaded.max_length or 64, loaded.policy.config, loaded.vocabulary)
    return ServingConfig(
        generation=generation,
        num_samples=1 if isinstance(generation, BeamConfig) else decoding.num_samples,
        best=decoding.best,
        stop=tuple(decoding.stop),
        max_prompt=max_prompt or loaded.prompt_length,
        slots=slots,
        int8=int8,
    )


def talk(session: Session, lines: Any, console: Console) -> None:
    """Answers lines until they end; a line that can't be answered is reported and the rest go on.

    Args:
        session: the policy and its settings, which commands change.
        lines: a terminal, or any stream of lines.
        console: where answers go.
    """
    interactive = lines.isatty()
    console.print(
        f"{session.loaded.run_dir}: {session.describe()}. /help lists the commands.", highlight=False, soft_wrap=True
    )
    for line in _read(lines, interactive):
        line = line.strip()
        try:
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                _command(session, line, console)
            elif line:
                session.answer(line, console)
                session.seed = (session.seed + 1) % 2**32
        except ValueError as error:
            console.out(f"error: {error}", style="red", highlight=False)


def _read(lines: Any, interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from lines
        return
    import readline  # noqa: F401 - gives `input` line editing and a history.

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


def _command(session: Session, line: str, console: Console) -> None:
    name, _, argument = line.partition(" ")
    settings: dict[str, Callable[[str], None]] = {
        "/weights": lambda text: session.set_weights(parse_numbers(text)),
        "/alpha": lambda text: session.change_alpha(float(text)),
        "/samples": lambda text: session.set_samples(int(text)),
        "/temperature": lambda text: session.set_temperature(float(text)),
    }
    if name == "/help":
        console.print(_HELP, highlight=False, markup=False)
    elif name in settings:
        settings[name](argument)
        console.print(session.describe(), style="dim", highlight=False)
    else:
        raise ValueError(f"unknown command {name}: /help lists them.")


def parse_numbers(text: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        ValueError: naming what is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} are not numbers separated by commas, such as 0.2,0.8.") from None


def _complete_file(session: Session, source: Path, target: str | None) -> None:
    """Completes every line of a JSONL file; bad lines are reported by number and skipped."""
    skipped = Skipped(source)
    lines = read_lines(source, session.loaded.vocabulary, session.limits, skipped, with_targets=False)
    # Lines before may be left out; files that are to be split bring seeds.
    prompts = [
        Prompt(
            line.inputs,
            (session.seed * 1_000_003 + line.number) % 2**32 if line.seed is None else line.seed,
            line.num_samples,
            line.max_tokens,
            line.stop,
        )
        for line in lines
    ]
    if isinstance(session.config.generation, SamplingConfig):
        share = math.prod(active_sizes("batch"))  # Devices have as many slots each.
        slots = min(session.config.slots, -(-len(lines) // share) * share)
        session.config = dataclasses.replace(session.config, slots=slots)
    with answers(target, skipped) as out:
        out.expect(lines)
        for number, completions in session.complete(prompts, [_reference(line, session) for line in lines]):
            out.put(lines[number], _columns(completions))
    skipped.finish()


def _columns(completions: Sequence[Completion]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        "tokens": [list(c.tokens) for c in completions],
        "text": [c.text for c in completions],
        "logprobs": [list(c.log_probs) for c in completions],
    }
    if completions[0].rewards:
        columns["rewards"] = [list(c.rewards) for c in completions]
    return {name: values[0] if len(completions) == 1 else values for name, values in columns.items()}


def _reference(line: Line, session: Session) -> str:
    """The text of a line's targets, where it has some."""
    targets = line.given.get("targets")
    if isinstance(targets, list) and all(type(i) is int and 0 <= i < session.limits.vocab_size for i in targets):
        return session.loaded.vocabulary.decode(np.asarray(targets, np.int32))
    return targets if isinstance(targets, str) else ""
