"""Speed and memory of a training step: supervised, plain policy gradient and full-CLP, beside Hugging Face's torch T5.

python benchmarks/train_step.py --size small
"""

from typing import Any

import jax
import jax.numpy as jnp
from measure import SHAPES, mebibytes, medians, num_bytes, parse_arguments, peak_bytes, random_tokens, report, torch_t5

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.objectives.losses import token_cross_entropy
from clp_jax.preferences import Preference
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import AdamW

COMPONENTS = 3


def main() -> None:
    """Measures, and prints."""
    arguments = parse_arguments(__doc__ or "")
    shape = SHAPES[arguments.size]
    policy = Policy(shape.model)
    params = jax.jit(lambda key: policy.init(key))(jax.random.key(0))
    inputs = random_tokens(shape.batch_size, shape.inputs, shape.model.vocab_size, seed=0)
    targets = random_tokens(shape.batch_size, shape.targets, shape.model.vocab_size, seed=1)
    batch = (jnp.asarray(inputs), jnp.asarray(targets))

    programs: dict[str, Any] = {}
    step, learner, state = supervised_step(policy, params, batch)
    programs["supervised step"] = step
    plain, mixed, expanded = gradients(policy, params, batch)
    programs["gradient"] = lambda: jax.block_until_ready(plain(params))
    programs["gradient, full-CLP"] = lambda: jax.block_until_ready(mixed(expanded))
    theirs = torch_step(shape, inputs, targets, arguments.threads)
    if theirs is not None:
        programs["torch step"] = theirs

    times = medians(programs, arguments.repeats)
    tokens = shape.batch_size * (shape.inputs + shape.targets)
    rows = [(name, f"{seconds * 1e3:8.1f} ms   {tokens / seconds:10,.0f} tokens/s") for name, seconds in times.items()]
    ratios = {"full-CLP gradient / plain": times["gradient, full-CLP"] / times["gradient"]}
    if theirs is not None:
        ratios["throughput / torch eager"] = times["torch step"] / times["supervised step"]
    rows += [(name, f"{value:8.2f}") for name, value in ratios.items()]
    memory = {
        "parameters": num_bytes(params),
        f"parameters, {COMPONENTS} components": num_bytes(expanded),
        "optimizer state": num_bytes(state.opt_state),
        "gradient, temporary": peak_bytes(plain.lower(params).compile()),
        "gradient, full-CLP, temporary": peak_bytes(mixed.lower(expanded).compile()),
    }
    rows += [(name, mebibytes(count)) for name, count in memory.items()]
    rows.append(("programs compiled for the step", str(learner.compile_count)))
    figures = {"seconds": times, "ratios": ratios, "bytes": memory, "compile_count": learner.compile_count}
    tokens = f"{shape.batch_size} x ({shape.inputs} + {shape.targets}) tokens"
    title = f"{arguments.size}: {policy.num_params():,} parameters, {tokens}"
    report(f"{title}, {jax.default_backend()}", rows, figures, arguments.json)


def loss_of(policy: Policy, params: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Summed token loss, and the tokens."""
    inputs, targets = batch
    decoder_inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    logits = policy.bind(params)(inputs, decoder_inputs)
    loss, weight, _ = token_cross_entropy(logits, targets, jnp.ones(targets.shape, jnp.float32))
    return loss, weight


def supervised_step(policy: Policy, params: Any, batch: Any) -> tuple[Any, Learner, Any]:
    """A whole update through the learner that every stage uses; the state is given away and taken back each time."""

    def loss_fn(params, frozen, batch, key):
        loss, weight = loss_of(policy, params, batch)
        return loss, weight, {}

    learner = Learner(loss_fn, AdamW(1e-4), logical_axes=policy.logical_axes())
    state = learner.init_state(jax.tree.map(jnp.copy, params), 0)
    kept = {"state": state}

    def step() -> None:
        kept["state"], metrics = learner.update(kept["state"], None, batch)
        jax.block_until_ready(metrics)

    return step, learner, state_shapes(state)


def state_shapes(state: Any) -> Any:
    """Shapes of a state whose arrays will be donated."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, state)


def gradients(policy: Policy, params: Any, batch: Any) -> tuple[Any, Any, Any]:
    """The gradient of the plain loss and of the loss at mixed parameters: what conditioning costs beyond the optimizer."""
    conditioning = ParameterConditioning("full", COMPONENTS)
    expanded = conditioning.expand(params)
    preference = Preference.of([1 / COMPONENTS] * COMPONENTS, 0.1)

    def plain(params: Any) -> jax.Array:
        return loss_of(policy, params, batch)[0]

    def mixed(expanded: Any) -> jax.Array:
        return plain(conditioning.mix(expanded, params, preference))

    return jax.jit(jax.grad(plain)), jax.jit(jax.grad(mixed)), expanded


def torch_step(shape: Any, inputs: Any, targets: Any, threads: int) -> Any:
    """The same update in torch, eager."""
    model = torch_t5(shape.model, threads)
    if model is None:
        return None
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    x, y = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=x, labels=y).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
