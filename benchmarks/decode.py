"""Speed and memory of generation with a cache, beside Hugging Face's torch T5.

    python benchmarks/decode.py --size small

Both generate the same number of tokens for the same prompts; an end of sequence stops neither.
"""

from typing import Any

import jax
import jax.numpy as jnp
from measure import SHAPES, mebibytes, medians, num_bytes, parse_arguments, peak_bytes, random_tokens, report, torch_t5

from clp_jax.data.vocabulary import EOS_ID
from clp_jax.models.policy import Policy
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.strategies import Greedy, Sampling

BATCH_SIZE = 32


class Endless(CachedDecoder):
    """Never ends, so that every row is as long as it may be."""

    def step(self, tokens: Any, state: Any) -> tuple[Any, Any]:
        """Logits without the end of sequence."""
        logits, state = super().step(tokens, state)
        return logits.at[:, EOS_ID].set(-1e9), state


def main() -> None:
    """Measures, and prints."""
    arguments = parse_arguments(__doc__ or "")
    shape = SHAPES[arguments.size]
    policy = Policy(shape.model)
    params = policy.init(jax.random.key(0))
    prompts = random_tokens(BATCH_SIZE, shape.inputs, shape.model.vocab_size, seed=0)

    def program(strategy: Any, num_samples: int) -> Any:
        config = SamplingConfig(shape.targets, strategy)

        @jax.jit
        def run(params: Any, inputs: Any, key: Any) -> Any:
            # The same rows in all: fewer prompts with more samples each share their encoding and its keys.
            keys = row_keys(key, BATCH_SIZE)
            decoder = Endless(policy.bind(params))
            return generate(decoder, inputs, keys=keys, config=config, num_samples=num_samples).tokens

        return run

    runs = {
        "sampling": program(Sampling(), 1),
        "greedy": program(Greedy(), 1),
        "sampling, 4 of a prompt": program(Sampling(), 4),
    }
    given = {name: jnp.asarray(prompts[: BATCH_SIZE // (4 if "4" in name else 1)]) for name in runs}
    programs: dict[str, Any] = {
        name: lambda run=run, x=given[name]: jax.block_until_ready(run(params, x, jax.random.key(1)))
        for name, run in runs.items()
    }
    programs |= torch_programs(shape, prompts, arguments.threads)

    times = medians(programs, arguments.repeats)
    tokens = BATCH_SIZE * shape.targets
    rows = [(name, f"{seconds * 1e3:8.1f} ms   {tokens / seconds:10,.0f} tokens/s") for name, seconds in times.items()]
    ratios = {
        f"{name} / torch generate": times[f"torch {name}"] / times[name] for name in runs if f"torch {name}" in times
    }
    rows += [(name, f"{value:8.2f}") for name, value in ratios.items()]
    cache = jax.eval_shape(
        lambda p, x: CachedDecoder(policy.bind(p)).start(x, shape.targets, 1)[1], params, given["greedy"]
    )
    key = jax.random.key(1)
    memory = {
        "parameters": num_bytes(params),
        "cache": num_bytes(cache),
        "program, temporary": peak_bytes(runs["sampling"].lower(params, given["sampling"], key).compile()),
    }
    rows += [(name, mebibytes(count)) for name, count in memory.items()]
    compiled = {name: run._cache_size() for name, run in runs.items()}
    rows.append(("programs compiled for each", ", ".join(map(str, compiled.values()))))
    title = (
        f"{arguments.size}: {BATCH_SIZE} rows, {shape.inputs} tokens in, {shape.targets} out, {jax.default_backend()}"
    )
    figures = {"seconds": times, "ratios": ratios, "bytes": memory, "compile_count": compiled}
    report(title, rows, figures, arguments.json)


def torch_programs(shape: Any, prompts: Any, threads: int) -> dict[str, Any]:
    """The same by `generate`, with its cache."""
    model = torch_t5(shape.model, threads)
    if model is None:
        return {}
    import torch

    model.eval()
    x = torch.from_numpy(prompts).long()
    length = {"max_new_tokens": shape.targets, "min_new_tokens": shape.targets, "attention_mask": torch.ones_like(x)}
    shared = length | {"attention_mask": torch.ones_like(x[: BATCH_SIZE // 4])}
    return {
        "torch sampling": lambda: model.generate(x, do_sample=True, top_k=0, **length),
        "torch greedy": lambda: model.generate(x, do_sample=False, **length),
        "torch sampling, 4 of a prompt": lambda: model.generate(
            x[: BATCH_SIZE // 4], do_sample=True, top_k=0, num_return_sequences=4, **shared
        ),
    }


if __name__ == "__main__":
    main()
