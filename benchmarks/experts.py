"""Speed and memory of a training step with experts, over the dense policy that costs the same products.

    python benchmarks/experts.py --size small --rows 64

Both are T5 1.1-like; the twin's blocks are as wide as what a token visits. Steps are whole ones, with the Adafactor that
pretraining uses, of policies with experts in every layer and in every other one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from measure import SHAPES, mebibytes, medians, parse_arguments, peak_bytes, random_tokens, report

from clp_jax.models.config import MoEConfig
from clp_jax.models.language_model import routing_loss
from clp_jax.models.layer import fold
from clp_jax.models.policy import Policy
from clp_jax.nn.routing import TokenChoice
from clp_jax.nn.vocabulary_loss import chunked_token_statistics
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor

NUM_EXPERTS = 8
ROUTER = TokenChoice(k=1, train_capacity=1.25)
EVERY = {"every layer": 1, "every other layer": 2}


class Step:
    """A whole update of one policy; the state is given away and taken back each time."""

    def __init__(self, policy: Policy, batch: tuple[jax.Array, jax.Array]):
        def loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
            del frozen
            return loss_of(policy, params, batch, key)

        self.policy, self.batch, self.metrics = policy, batch, {}
        self.learner = Learner(loss, Adafactor(), logical_axes=policy.logical_axes())
        self.state = self.learner.init_state(lambda: policy.init(jax.random.key(0)), 0)

    def __call__(self) -> None:
        self.state, self.metrics = self.learner.update(self.state, {}, self.batch)
        jax.block_until_ready((self.state, self.metrics))

    def temporary(self) -> int | None:
        """Bytes that the gradient holds beside its arguments, itself included."""
        gradient = jax.grad(lambda params, batch: loss_of(self.policy, params, batch, jax.random.key(0))[0])
        return peak_bytes(jax.jit(gradient).lower(self.state.params, self.batch).compile())


def loss_of(policy: Policy, params: Any, batch: tuple[jax.Array, jax.Array], key: Any) -> tuple[Any, Any, Any]:
    """Summed token loss with the routers' own, the tokens, and what the routers did."""
    inputs, targets = batch
    model = policy.bind(params)
    encoded = model.encode(inputs, dropout_key=fold(key, 0))
    decoded = model.decode(jnp.pad(targets[:, :-1], ((0, 0), (1, 0))), encoded, dropout_key=fold(key, 1))
    found = chunked_token_statistics(decoded.hidden, model.logits, targets)
    auxiliary, metrics = routing_loss(policy.config.moe, decoded.routing)
    return -found.log_probs.sum() + auxiliary * targets.size, jnp.asarray(targets.size, jnp.float32), metrics


def main() -> None:
    """Measures, and prints."""
    arguments = parse_arguments(__doc__ or "", rows=True)
    shape = SHAPES[arguments.size]
    num_rows = arguments.rows or shape.batch_size
    lengths = ((shape.inputs, 0), (shape.targets, 1))
    made = [random_tokens(num_rows, length, shape.model.vocab_size, seed) for length, seed in lengths]
    batch = (jnp.asarray(made[0]), jnp.asarray(made[1]))
    steps: dict[str, Step] = {}
    for name, every in EVERY.items():
        moe = MoEConfig(num_experts=NUM_EXPERTS, router=ROUTER, every=every)
        steps[name] = Step(Policy(dataclasses.replace(shape.model, moe=moe)), batch)
    # One twin for both: with an expert as wide as a dense block, it is the policy without experts.
    twin = dataclasses.replace(shape.model, moe=MoEConfig(num_experts=NUM_EXPERTS, router=ROUTER, dense=True))
    steps["dense twin"] = Step(Policy(twin), batch)

    times = medians(dict(steps), arguments.repeats, arguments.clock)
    tokens = num_rows * (shape.inputs + shape.targets)
    rows = [(name, f"{seconds * 1e3:8.1f} ms   {tokens / seconds:10,.0f} tokens/s") for name, seconds in times.items()]
    ratios = {f"{name} / dense twin": times[name] / times["dense twin"] for name in EVERY}
    rows += [(name, f"{value:8.2f}") for name, value in ratios.items()]
    memory = {f"gradient, {name}, temporary": step.temporary() for name, step in steps.items()}
    rows += [(name, mebibytes(count)) for name, count in memory.items()]
    routers: dict[str, Any] = {}
    for name in EVERY:
        metrics = steps[name].metrics
        routers[name] = {key: float(metrics[f"router/{key}"]) for key in ("dropped", "load_max", "load_min")}
        found = routers[name]
        told = f"{found['dropped']:.1%} dropped, loads {found['load_min']:.3f} to {found['load_max']:.3f}"
        rows.append((f"routers, {name}", told))
    compiled = {name: step.learner.compile_count for name, step in steps.items()}
    rows.append(("programs compiled for each step", ", ".join(map(str, compiled.values()))))
    parameters = ", ".join(f"{name} {step.policy.num_params():,}" for name, step in steps.items())
    title = f"{arguments.size}: {num_rows} x ({shape.inputs} + {shape.targets}) tokens"
    figures = {"seconds": times, "ratios": ratios, "bytes": memory, "routers": routers, "compile_count": compiled}
    report(f"{title}, {jax.default_backend()}; parameters: {parameters}", rows, figures, arguments.json)


if __name__ == "__main__":
    main()
