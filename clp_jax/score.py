"""`clp score`: the log-probabilities of given completions."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.sampling.devices import Devices
from clp_jax.sampling.json_lines import Limits, Skipped, answers, batches, pad_rows, read_lines
from clp_jax.sampling.score import score as score_tokens
from clp_jax.training.policies import load_policy


def score(
    *,
    checkpoint: str,
    input: str,  # noqa: A002 - it is the name of a flag.
    output: str | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = 0.05,
    max_prompt: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    devices: Devices = Devices(),
) -> None:
    """Writes the log-probability of every target token of every line, and their sum.

    A line has ``inputs`` and ``targets``, as text or as lists of token ids; a line of the output has its number, all that the
    line has, ``logprobs`` and ``total``. Texts become what the policy reads and writes: targets end with an end of sequence.
    Lists are taken as they are. A score depends on its line alone: experts with a capacity share it within a line, also where
    batches shared it in training. Lines keep their order; a bad one is reported with its number and left out, and the
    exit code is 1 then.

    Args:
        checkpoint: run directory of a policy, or ``RUN/checkpoints/STEP``.
        input: JSON lines.
        output: a new file of JSON lines; printed by default.
        weights: of the rewards, summing to one, for a steerable policy; equal by default.
        alpha: KL weight, for policies conditioned on it.
        max_prompt: tokens of a prompt at most, by default as many as in training, or 65,536 for a converted policy. A longer
            text of an encoder-decoder is cut before its end of sequence, with a warning; longer prompts of decoders and
            longer lists are bad lines.
        max_tokens: tokens of a target at most, 65,536 by default.
        batch_size: lines scored together; fewer cost as much, so that a score does not depend on how many lines there are.
        devices: which of them score.

    Raises:
        ValueError: for weights that are not a point of the simplex, an output that exists, or an input without a good line.
        SystemExit: with 1 when all is done, where lines were left out.
    """
    for name, number in (("max_prompt", max_prompt), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: expected at least 1.")
    if output is not None and Path(output).exists():
        raise ValueError(f"{output} exists: it was not overwritten. Give another output.")
    with devices.use(batch_size):
        loaded = load_policy(checkpoint)
        preference = loaded.preference(weights, alpha)
        pad_id = loaded.policy.config.pad_id
        limits = Limits(
            vocab_size=loaded.policy.config.vocab_size,
            inputs=max_prompt or loaded.prompt_length,
            targets=max_tokens or 2**16,
            pad_id=pad_id,
        )
        skipped = Skipped(Path(input))
        lines = read_lines(Path(input), loaded.vocabulary, limits, skipped, with_targets=True)

        @functools.partial(jax.jit)
        def run(params, reference, inputs, tokens, mask, preference):
            model = loaded.served.bind(loaded.conditioning.mix(params, reference, preference))
            rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (inputs.shape[0], *x.shape)), preference)
            return score_tokens(model, loaded.conditioning.condition_inputs(inputs, rows), tokens, mask)

        with answers(output, skipped) as out:
            out.expect(lines)
            for batch in batches(lines, batch_size):
                targets = [line.targets or () for line in batch]
                # Always as many rows: with fewer, sums are taken in another order.
                tokens = pad_rows(targets, batch_size, 0)
                lengths = np.asarray([len(row) for row in targets] + [0] * (batch_size - len(batch)))
                mask = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.float32)
                inputs = pad_rows([line.inputs for line in batch], batch_size, pad_id)
                found = np.asarray(run(loaded.params, loaded.reference, inputs, tokens, mask, preference))
                for row, line in zip(found, batch, strict=False):
                    log_probs = row[: len(line.targets or ())]
                    total = float(log_probs.astype(np.float64).sum())
                    out.put(line, {"logprobs": [float(x) for x in log_probs], "total": total})
    skipped.finish()
