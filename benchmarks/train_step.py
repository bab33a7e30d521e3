"""Speed and memory of a training step: plain, and conditioned on a preference (full-CLP), beside Hugging Face's torch T5.

What guards and digests cost is the step against one that has none.

python benchmarks/train_step.py --size small
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from measure import (
    SHAPES,
    finished,
    mebibytes,
    medians,
    num_bytes,
    parse_arguments,
    peak_bytes,
    random_tokens,
    report,
    torch_device,
    torch_t5,
)

from clp_jax.models.conditioning import ParameterConditioning
from clp_jax.models.policy import Policy
from clp_jax.nn.vocabulary_loss import chunked_token_statistics
from clp_jax.preferences import Preference
from clp_jax.training.guards import Guards, GuardState
from clp_jax.training.learner import Learner
from clp_jax.training.metrics import DIGEST_METRICS
from clp_jax.training.optimizers import AdamW

COMPONENTS = 3
PLAIN, CLP, BARE = "step", "full-CLP step", "step without guards and digests"


def main() -> None:
    """Measures, and prints."""
    arguments = parse_arguments(__doc__ or "")
    shape = SHAPES[arguments.size]
    policy = Policy(shape.model)
    params = jax.jit(lambda key: policy.init(key))(jax.random.key(0))
    conditioning = ParameterConditioning("full", COMPONENTS)
    expanded = conditioning.expand(params)
    preference = Preference.of([1 / COMPONENTS] * COMPONENTS, 0.1)
    inputs = random_tokens(shape.batch_size, shape.inputs, shape.model.vocab_size, seed=0)
    targets = random_tokens(shape.batch_size, shape.targets, shape.model.vocab_size, seed=1)
    batch = (jnp.asarray(inputs), jnp.asarray(targets))

    def plain(params: Any, batch: Any) -> Any:
        return loss_of(policy, params, batch)

    def mixed(expanded: Any, batch: Any) -> Any:
        return loss_of(policy, conditioning.mix(expanded, params, preference), batch)

    axes = policy.logical_axes()
    expanded_axes = conditioning.logical_axes(axes)
    steps = {
        PLAIN: Step(plain, params, axes, batch=batch),
        CLP: Step(mixed, expanded, expanded_axes, batch=batch),
        BARE: Step(plain, params, axes, batch=batch, learner=Bare, guards=NoGuards()),
        f"{PLAIN}, optimizer alone": Step(given, params, axes, frozen=params),
        f"{CLP}, optimizer alone": Step(given, expanded, expanded_axes, frozen=expanded),
    }
    programs: dict[str, Any] = dict(steps)
    theirs = torch_step(shape, inputs, targets, arguments.threads)
    if theirs is not None:
        programs["torch step"] = theirs

    times = medians(programs, arguments.repeats, arguments.clock)
    tokens = shape.batch_size * (shape.inputs + shape.targets)
    rows = [(name, f"{seconds * 1e3:8.1f} ms   {tokens / seconds:10,.0f} tokens/s") for name, seconds in times.items()]
    own = {name: times[name] - times[f"{name}, optimizer alone"] for name in (PLAIN, CLP)}
    ratios = {
        f"{CLP} / {PLAIN}": times[CLP] / times[PLAIN],
        f"{CLP} / {PLAIN}, without the optimizer": own[CLP] / own[PLAIN],
        f"{PLAIN} / {BARE}": times[PLAIN] / times[BARE],
    }
    if theirs is not None:
        ratios["throughput / torch eager"] = times["torch step"] / times[PLAIN]
    rows += [(name, f"{value:8.2f}") for name, value in ratios.items()]
    memory = {
        "parameters": num_bytes(params),
        f"parameters, {COMPONENTS} components": num_bytes(expanded),
        "optimizer state": num_bytes(steps[PLAIN].state.opt_state),
        "gradient, temporary": peak_bytes(compiled_gradient(plain, params, batch)),
        "gradient, full-CLP, temporary": peak_bytes(compiled_gradient(mixed, expanded, batch)),
    }
    rows += [(name, mebibytes(count)) for name, count in memory.items()]
    compiled = {name: step.learner.compile_count for name, step in steps.items()}
    rows.append(("programs compiled for each step", ", ".join(map(str, compiled.values()))))
    figures = {"seconds": times, "ratios": ratios, "bytes": memory, "compile_count": compiled}
    tokens = f"{shape.batch_size} x ({shape.inputs} + {shape.targets}) tokens"
    title = f"{arguments.size}: {policy.num_params():,} parameters, {tokens}"
    report(f"{title}, {jax.default_backend()}", rows, figures, arguments.json)


def loss_of(policy: Policy, params: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Summed token loss, and the tokens."""
    inputs, targets = batch
    decoder_inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    model = policy.bind(params)
    decoded = model.decode(decoder_inputs, model.encode(inputs))
    found = chunked_token_statistics(decoded.hidden, model.logits, targets)
    loss, weight = -found.log_probs.sum(), jnp.asarray(targets.size, jnp.float32)
    return loss, weight


def given(params: Any, gradient: Any) -> tuple[jax.Array, jax.Array]:
    """A loss whose gradient is known: what is left of the step is the optimizer."""
    return sum((jnp.vdot(g, p) for g, p in zip(*map(jax.tree.leaves, (gradient, params)), strict=True)), 0.0), 1.0


class Step:
    """A whole update through the learner that every stage uses; the state is given away and taken back each time."""

    def __init__(
        self,
        loss: Any,
        params: Any,
        axes: Any,
        *,
        batch: Any = None,
        frozen: Any = None,
        learner: type[Learner] = Learner,
        guards: Guards = Guards(),
    ):
        def loss_fn(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
            return (*loss(params, frozen if batch is None else batch), {})

        self.learner = learner(loss_fn, AdamW(1e-4), logical_axes=axes, guards=guards)
        self.state = self.learner.init_state(jax.tree.map(jnp.copy, params), 0)
        self.frozen = self.learner.place_frozen({} if frozen is None else frozen)
        self.batch = batch

    def __call__(self) -> None:
        self.state, metrics = self.learner.update(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))


@dataclasses.dataclass(frozen=True)
class NoGuards(Guards):
    """Makes every update; a constant, which the compiler leaves out."""

    def judge(self, state: GuardState, loss: Any, grad_norm: Any, weight: Any) -> tuple[jax.Array, GuardState]:
        return jnp.ones((), bool), state


class Bare(Learner):
    """Asks for no digests, so that the compiler leaves them out."""

    def _update(self, state: Any, frozen: Any, batch: Any) -> Any:
        state, metrics = super()._update(state, frozen, batch)
        return state, {name: value for name, value in metrics.items() if name not in DIGEST_METRICS}


def compiled_gradient(loss: Any, params: Any, batch: Any) -> Any:
    """The gradient as a program of its own."""
    return jax.jit(jax.grad(lambda params: loss(params, batch)[0])).lower(params).compile()


def torch_step(shape: Any, inputs: Any, targets: Any, threads: int) -> Any:
    """The same update in torch, eager."""
    model = torch_t5(shape.model, threads)
    if model is None:
        return None
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    x, y = (torch.from_numpy(tokens).long().to(torch_device()) for tokens in (inputs, targets))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=x, labels=y).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return finished(step)


if __name__ == "__main__":
    main()
