"""Speed and memory of generation with a cache, beside Hugging Face's torch T5 and Llama.

    python benchmarks/decode.py --size small

Both generate the same number of tokens for the same prompts; an end of sequence stops neither. "torch, products alone"
reads the prompts and multiplies the rows of every token with the weights, in torch, and does nothing else: a decoder
whose products are as fast as torch's gains at most `generate`'s time over that. "prompts alone" is JAX reading them, before the
first token.
"""

import argparse
import functools
import math
from typing import Any

import jax
from measure import (
    SHAPES,
    Shape,
    decoder_only,
    finished,
    mebibytes,
    medians,
    num_bytes,
    parse_arguments,
    peak_bytes,
    random_tokens,
    report,
    torch_device,
    torch_llama,
    torch_t5,
)

from clp_jax.data.vocabulary import EOS_ID
from clp_jax.host_rows import place_active
from clp_jax.models.policy import Policy
from clp_jax.partitioning import active_sizes, constrain
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.devices import Devices
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.strategies import Greedy, Sampling

BATCH_SIZE = 32
NUM_SAMPLES = 4
SHARED, BEAMS = "sampling, 4 of a prompt", "4 beams"
READING, PRODUCTS = "prompts alone", "torch, products alone"
PROMPTS = {"sampling": BATCH_SIZE, "greedy": BATCH_SIZE, SHARED: BATCH_SIZE // 4, BEAMS: BATCH_SIZE // 4}


class Endless(CachedDecoder):
    """Never ends, so that every row is as long as it may be."""

    def step(self, tokens: Any, state: Any) -> tuple[Any, Any]:
        """Logits without the end of sequence."""
        logits, state = super().step(tokens, state)
        return logits.at[:, EOS_ID].set(-1e9), state


def main() -> None:
    """Measures, and prints."""
    arguments = parse_arguments(__doc__ or "", shares=True)
    with Devices().use(min(PROMPTS.values())):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Both kinds of policy, on the devices that share their rows."""
    shape = SHAPES[arguments.size]
    policy, other = Policy(shape.model), Policy(decoder_only(shape.model))
    kinds = {
        "": (policy, functools.partial(torch_t5, shape.model, arguments.threads)),
        ", decoder-only": (other, functools.partial(torch_llama, other.config, arguments.threads)),
    }
    figures: dict[str, Any] = {}
    for kind, (measured, torch_model) in kinds.items():
        rows, found = measure(measured, shape, torch_model(), arguments)
        figures = {**figures, "decoder_only": found} if figures else found
        sizes = f"{BATCH_SIZE} rows, {shape.inputs} tokens in, {shape.targets} out"
        where = f"{jax.default_backend()}, devices: {math.prod(active_sizes('batch'))}"
        report(f"{arguments.size}{kind}: {sizes}, {where}", rows, figures, arguments.json)


def measure(
    policy: Policy, shape: Shape, torch_model: Any, arguments: argparse.Namespace
) -> tuple[list[tuple[str, str]], dict]:
    """Rows to print and figures to write, of one policy."""
    params = place_active(policy.init(jax.random.key(0)), policy.logical_axes())
    prompts = random_tokens(BATCH_SIZE, shape.inputs, shape.model.vocab_size, seed=0)
    runs = {
        "sampling": sampled(policy, Sampling(), shape.targets, 1),
        "greedy": sampled(policy, Greedy(), shape.targets, 1),
        # The same rows in all: fewer prompts with more samples each share their encoding and its keys.
        SHARED: sampled(policy, Sampling(), shape.targets, NUM_SAMPLES),
        BEAMS: searched(policy, shape.targets, NUM_SAMPLES),
    }
    given = {name: place_active(prompts[:count], ("batch", None)) for name, count in PROMPTS.items()}
    key = jax.random.key(1)
    programs: dict[str, Any] = {
        name: lambda run=run, x=given[name]: jax.block_until_ready(run(params, x, key)) for name, run in runs.items()
    }
    start = jax.jit(functools.partial(started, policy, shape.targets))
    programs[READING] = lambda: jax.block_until_ready(start(params, given["greedy"]))
    if torch_model is not None:
        programs |= torch_programs(torch_model, shape, prompts)

    times = medians(programs, arguments.repeats, arguments.clock)
    tokens = BATCH_SIZE * shape.targets
    rows = [(name, f"{seconds * 1e3:8.1f} ms   {tokens / seconds:10,.0f} tokens/s") for name, seconds in times.items()]
    ratios = {
        f"{name} / torch generate": times[f"torch {name}"] / times[name] for name in runs if f"torch {name}" in times
    }
    if PRODUCTS in times:
        for name in (READING, PRODUCTS):
            ratios[f"{name} / torch generate"] = times["torch greedy"] / times[name]
    rows += [(name, f"{value:8.2f}") for name, value in ratios.items()]
    memory = {
        "parameters": num_bytes(params),
        "cache": cache_bytes(policy, params, given["greedy"], shape.targets),
        "cache, int8": cache_bytes(policy, params, given["greedy"], shape.targets, int8=True),
        "program, temporary": peak_bytes(runs["sampling"].lower(params, given["sampling"], key).compile()),
    }
    rows += [(name, mebibytes(count)) for name, count in memory.items()]
    compiled = {name: run._cache_size() for name, run in runs.items()}
    rows.append(("programs compiled for each", ", ".join(map(str, compiled.values()))))
    return rows, {"seconds": times, "ratios": ratios, "bytes": memory, "compile_count": compiled}


def sampled(policy: Policy, strategy: Any, length: int, num_samples: int) -> Any:
    """Generation as a jitted program of parameters, prompts and a key."""
    config = SamplingConfig(length, strategy)

    @jax.jit
    def run(params: Any, inputs: Any, key: Any) -> Any:
        keys = row_keys(key, BATCH_SIZE)
        return generate(Endless(policy.bind(params)), inputs, keys=keys, config=config, num_samples=num_samples).tokens

    return run


def searched(policy: Policy, length: int, num_beams: int) -> Any:
    """Beam search as a jitted program of the same arguments."""
    config = BeamConfig(length, num_beams)

    @jax.jit
    def run(params: Any, inputs: Any, key: Any) -> Any:
        del key
        return beam_search(Endless(policy.bind(params)), inputs, config).completions.tokens

    return run


def started(policy: Policy, length: int, params: Any, inputs: Any, *, int8: bool = False) -> Any:
    """What generation starts from: the prompts, read."""
    return CachedDecoder(policy.bind(params), int8=int8).start(constrain(inputs, "batch", None), length, 1)[1]


def cache_bytes(policy: Policy, params: Any, inputs: Any, length: int, *, int8: bool = False) -> int:
    """Bytes that generation remembers, from shapes alone."""

    return num_bytes(jax.eval_shape(functools.partial(started, policy, length, int8=int8), params, inputs))


def torch_programs(model: Any, shape: Shape, prompts: Any) -> dict[str, Any]:
    """The same by `generate`, with its cache."""
    import torch

    model.eval()

    def program(name: str, **settings: Any) -> Any:
        x = torch.from_numpy(prompts[: PROMPTS[name]]).long().to(torch_device())
        length = {"max_new_tokens": shape.targets, "min_new_tokens": shape.targets}
        return finished(lambda: model.generate(x, attention_mask=torch.ones_like(x), **length, **settings))

    return {
        "torch sampling": program("sampling", do_sample=True, top_k=0),
        "torch greedy": program("greedy", do_sample=False),
        f"torch {SHARED}": program(SHARED, do_sample=True, top_k=0, num_return_sequences=NUM_SAMPLES),
        f"torch {BEAMS}": program(BEAMS, do_sample=False, num_beams=NUM_SAMPLES),
        PRODUCTS: finished(torch_products(model, shape, torch.from_numpy(prompts).long().to(torch_device()))),
    }


def torch_products(model: Any, shape: Shape, prompts: Any) -> Any:
    """Reading the prompts, and products of the weights with the rows of every token, without attention or a choice."""
    import torch

    # Keys and values of the prompts are made when those are read.
    once = [name for name, _ in model.named_modules() if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))]

    def len_of(name: str) -> int:
        return prompts.numel() if name in once else BATCH_SIZE

    layers = [
        (layer, prompts.new_zeros((len_of(name), layer.in_features), dtype=torch.float32), name in once)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.startswith("encoder.")
    ]
    is_t5 = hasattr(model, "encoder")

    @torch.no_grad()
    def run() -> None:
        if is_t5:
            model.encoder(prompts)
        else:
            model(prompts, logits_to_keep=1)
        for layer, rows, is_once in layers:
            for _ in range(1 if is_once else shape.targets - (not is_t5)):
                layer(rows)

    return run


if __name__ == "__main__":
    main()
