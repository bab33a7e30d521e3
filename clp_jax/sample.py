"""`clp sample`: steers a trained policy by hand."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from clp_jax.models.conditioning import check_alpha
from clp_jax.preferences import Preference, validate_weights
from clp_jax.sampling.generate import SamplingConfig
from clp_jax.sampling.steering import Steerable
from clp_jax.sampling.strategies import Greedy, Sampling
from clp_jax.sampling.text import Completion, complete, encode_prompts
from clp_jax.training.policies import LoadedPolicy, load_policy

_HELP = """\
Every line is a prompt. Commands:
  /weights 0.2,0.8   the trade-off between the rewards
  /alpha 0.3         the KL weight, for policies conditioned on it
  /samples 3         completions of each prompt
  /temperature 0.7   of the samples; 0 is greedy
  /help              this text
  /quit              the end (so is the end of the input)"""


@dataclasses.dataclass
class Session:
    """A loaded policy and the settings that lines of a terminal may change.

    Attributes:
        loaded: the policy.
        steerable: it, ready to generate.
        weights: of the rewards.
        alpha: KL weight.
        num_samples: completions of each prompt.
        config: what to generate.
        max_prompt: tokens of a prompt at most.
        seed: of the samples; counts up with every prompt.
    """

    loaded: LoadedPolicy
    steerable: Steerable
    weights: np.ndarray
    alpha: float
    num_samples: int
    config: SamplingConfig
    max_prompt: int
    seed: int

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

    def complete(self, prompts: Sequence[str]) -> tuple[list[list[Completion]], list[int]]:
        """Completions of prompts, and the numbers of the prompts that were too long and were cut."""
        inputs, cut = encode_prompts(self.loaded.vocabulary, prompts, self.max_prompt)
        preference = Preference.of(self.weights, self.alpha)
        key = jax.random.key(self.seed)
        found = complete(self.steerable, self.loaded.vocabulary, inputs, preference, key, self.config, self.num_samples)
        return found, cut

    def set_temperature(self, temperature: float) -> None:
        """Changes the temperature and leaves the rest of how tokens are chosen alone; 0 is greedy."""
        before = self.config.strategy
        if temperature == 0 or not isinstance(before, Sampling):
            strategy = _strategy(temperature, 0, 1.0)
        else:
            strategy = dataclasses.replace(before, temperature=temperature)
        self.config = dataclasses.replace(self.config, strategy=strategy)

    def describe(self) -> str:
        """The current trade-off in words."""
        if not self.loaded.objectives:
            return "a supervised policy"
        pairs = zip(self.loaded.objectives, self.weights, strict=True)
        parts = [f"{name} {weight:.2f}" for name, weight in pairs]
        if getattr(self.loaded.conditioning, "alpha_min", None) is not None:
            parts.append(f"alpha {self.alpha:g}")
        if self.num_samples > 1:
            parts.append(f"{self.num_samples} samples")
        return ", ".join(parts)


def sample(
    *,
    checkpoint: str,
    prompt: str | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = 0.05,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    max_prompt: int | None = None,
    seed: int = 0,
    input: str | None = None,  # noqa: A002 - it is the name of a flag.
    output: str | None = None,
) -> None:
    """Prints completions of a prompt at given reward weights; without a prompt, reads lines and steers between them.

    Args:
        checkpoint: run directory of a policy, or ``RUN/checkpoints/STEP``.
        prompt: the document; without it, lines are read from the terminal or from a pipe.
        weights: one for each reward, summing to one; equal by default.
        alpha: KL weight, for policies conditioned on it.
        num_samples: completions of each prompt.
        temperature: of the samples; 0 is greedy.
        top_k: keeps the k most probable tokens; 0 keeps all.
        top_p: keeps the most probable tokens that reach this probability; 1 keeps all.
        max_tokens: of a completion; by default that of training.
        max_prompt: tokens of a prompt, by default as many as in training; longer ones lose their end, and a warning says
            so.
        seed: of the samples.
        input: JSON lines with ``inputs``, instead of a prompt.
        output: JSON lines with ``text``, ``tokens`` and ``logprobs`` of every line of `input`, in order.

    Raises:
        ValueError: for weights that are not a point of the simplex or do not match the policy, and for settings that
            exclude each other.
    """
    for name, number in (("num_samples", num_samples), ("max_tokens", max_tokens), ("max_prompt", max_prompt)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: expected at least 1.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: expected a whole number in [0, 2**32).")
    if input is not None and prompt is not None:
        raise ValueError("sample: a prompt and an input were given: expected one of them.")
    if output is not None and input is None:
        raise ValueError("sample: output is written for the lines of an input: give one, or redirect what is printed.")
    if temperature == 0 and (top_k, top_p) != (0, 1.0):
        raise ValueError("sample: top_k and top_p do nothing at temperature 0, which is greedy: leave them out.")
    if output is not None and Path(output).exists():
        raise ValueError(f"{output} exists: it was not overwritten. Give another output.")
    loaded = load_policy(checkpoint)
    count = max(1, len(loaded.objectives))
    session = Session(
        loaded=loaded,
        steerable=loaded.steerable(),
        weights=np.full(count, 1 / count, np.float32),
        alpha=alpha,
        num_samples=num_samples,
        config=SamplingConfig(max_tokens or loaded.max_length or 64, _strategy(temperature, top_k, top_p)),
        max_prompt=max_prompt or loaded.prompt_length,
        seed=seed,
    )
    if weights is not None:
        session.set_weights(weights)
    session.set_alpha(alpha)
    if input is not None:
        _complete_file(session, Path(input), Path(output) if output else None)
    elif prompt is not None:
        _answer(session, prompt, Console())
    else:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr] # A bad line must not end it all.
        talk(session, sys.stdin, Console())


def _strategy(temperature: float, top_k: int, top_p: float) -> Sampling | Greedy:
    return Greedy() if temperature == 0 else Sampling(temperature, top_k, top_p)


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
                _answer(session, line, console)
                session.seed += 1
        except ValueError as error:
            console.print(f"error: {error}", style="red", highlight=False, markup=False)


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
        "/samples": lambda text: setattr(session, "num_samples", max(1, int(text))),
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


def _answer(session: Session, prompt: str, console: Console) -> None:
    found, cut = session.complete([prompt])
    if cut:
        print(f"warning: the prompt is longer than {session.max_prompt} tokens: its end was cut.", file=sys.stderr)
    for completion in found[0]:
        console.print(completion.text or "(empty)", highlight=False, markup=False)


def _complete_file(session: Session, source: Path, target: Path | None, batch_size: int = 32) -> None:
    """Completes every line of a JSONL file; bad lines are reported by number and skipped."""
    records = []
    for number, raw in enumerate(source.read_bytes().splitlines(), start=1):
        try:
            text = json.loads(raw.decode("utf-8"))["inputs"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError("inputs is not text")
            records.append((number, text))
        except (ValueError, KeyError, TypeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else getattr(error, "msg", error)
            print(f"warning: {source}, line {number} was skipped: {what}", file=sys.stderr)
    if not records:
        raise ValueError(f'{source} holds no prompts: expected one JSON object a line, with "inputs".')
    out = target.open("x", encoding="utf-8") if target else sys.stdout
    try:
        for start in range(0, len(records), batch_size):
            part = records[start : start + batch_size]
            # A last batch is filled up, so that one program serves all.
            texts = [text for _, text in part] + [part[-1][1]] * (batch_size - len(part))
            found, cut = session.complete(texts)
            for index in (i for i in cut if i < len(part)):
                print(f"warning: {source}, line {part[index][0]}: the prompt was cut.", file=sys.stderr)
            for (number, text), completions in zip(part, found, strict=False):
                out.write(json.dumps(_line(number, text, completions)) + "\n")
            session.seed += 1
    finally:
        if target:
            out.close()


def _line(number: int, text: str, completions: Sequence[Completion]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {
        "text": [c.text for c in completions],
        "tokens": [list(c.tokens) for c in completions],
        "logprobs": [list(c.log_probs) for c in completions],
    }
    single = len(completions) == 1
    return {"line": number, "inputs": text} | {k: v[0] if single else v for k, v in columns.items()}
