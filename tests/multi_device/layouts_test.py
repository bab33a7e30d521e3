"""Everything that the project trains, under every shipped layout: the update of one device, with the exchanges that it had.

Gradients and metrics are the same to rounding (`rounding.py`): 1e-6 of their own largest number, or of what they would change by if
everything that they are computed from changed by itself. Gradients, not parameters after an update, which hold of a gradient what is left
at their own size; nor what an optimizer makes of it that divides by the gradient's size, and so makes rounding as large as the gradient.

After a change that is meant, `CLP_UPDATE_GOLDEN=1 pytest tests/multi_device/layouts_test.py` writes the golden numbers anew.
"""

import dataclasses
import functools
import json
import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_to_rounding, natural_scales
from same_runs import natural_scale
from workloads import SIZES, WORKLOADS, Descent, layout, rollouts

from clp_jax.compilation.collectives import kind_of
from clp_jax.compilation.hlo import Module
from clp_jax.models.config import PaLMConfig
from clp_jax.models.policy import Policy
from clp_jax.training.learner import Learner
from clp_jax.training.metrics import DIGEST_METRICS
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.supervised import SupervisedLoss

GOLDEN = Path(__file__).parent / "golden_collectives.json"
LAYOUTS = (
    "data_parallel", "fsdp", "tensor_parallel", "fsdp_tensor", "expert", "fsdp_expert", "context", "multislice", "pipeline",
)  # fmt: skip
CASES = [(name, workload) for name in LAYOUTS for workload in WORKLOADS]


@functools.cache
def _workload(name):
    return WORKLOADS[name]()


def _learner(name, workload):
    accumulation = workload.accumulation if name != "single" else 1
    return Learner(
        workload.loss_fn,
        Descent(),
        logical_axes=workload.logical_axes,
        frozen_logical_axes=workload.frozen_logical_axes,
        accumulation=accumulation,
        **layout(name),
    )


@functools.cache
def _program(name, workload_name):
    """A function of parameters, what is frozen and a batch, to the gradient and the metrics; and the program's exchanges."""
    workload = _workload(workload_name)
    learner = _learner(name, workload)
    program = learner.lower(workload.params, workload.frozen, workload.batch).compile()
    first = learner.init_state(workload.params, seed=0)

    def run(params, frozen, batch):
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, first.params))
        state = jax.tree.map(jnp.copy, dataclasses.replace(first, params=params))  # Is donated.
        examples = jax.tree.leaves(learner.place_batch(batch))
        after, metrics = program(state, learner.place_frozen(frozen), examples)
        floats = {name: value for name, value in metrics.items() if name not in DIGEST_METRICS}
        return jax.device_get({"gradient": after.opt_state[0].trace, "metrics": floats})

    return run, _exchanges(program.as_text())


@functools.cache
def _updated(name, workload_name):
    """The gradient and the metrics of an update."""
    workload = _workload(workload_name)
    return _program(name, workload_name)[0](workload.params, workload.frozen, workload.batch)


@functools.cache
def _scales(workload_name):
    """What those are made of."""
    workload = _workload(workload_name)
    scales = natural_scales(_program("single", workload_name)[0], workload.params, workload.frozen, workload.batch)
    # Some metrics are differences whatever they are computed from, as the mean of advantages that are centred.
    line = {name: float(value) for name, value in _updated("single", workload_name)["metrics"].items()}
    metrics = {name: max(float(scale), natural_scale(name, line)) for name, scale in scales["metrics"].items()}
    return scales | {"metrics": metrics}


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _exchanges(text):
    """How many collectives of each kind, and how many bytes they read or gather on one device."""
    counts, sizes = Counter(), Counter()
    module = Module.parse(text)
    for instruction in module.instructions.values():
        kind = kind_of(instruction.opcode)
        if kind is not None:
            counts[kind] += 1
            sizes[kind] += int(instruction.bytes)
    return {kind: [counts[kind], sizes[kind]] for kind in sorted(counts)}


@pytest.mark.parametrize(("name", "workload"), CASES)
def test_an_update_is_that_of_one_device(name, workload):
    assert jax.device_count() == 8
    assert not _program("single", workload)[1]
    assert_same_to_rounding(_updated(name, workload), _updated("single", workload), _scales(workload))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_updates_are_worth_comparing(workload):
    found = _updated("single", workload)
    gradient, norm = found["gradient"], found["metrics"]["grad_norm"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)) and norm > 1e-3
    still = {jax.tree_util.keystr(path, simple=True) for path, leaf in _leaves(gradient) if not np.abs(leaf).max() > 0}
    assert still <= {"score_bias"}  # Pairs of completions do not see it.


@pytest.mark.parametrize("workload", WORKLOADS)
def test_more_than_rounding_is_found(workload):
    """Parameters that are 1e-5 of themselves off; a metric that is; a gradient that misses a thousandth of one of its arrays."""
    at, expected, scales = _workload(workload), _updated("single", workload), _scales(workload)
    others = jax.tree.map(lambda leaf: leaf * (1 + 1e-5 * jnp.cos(1e3 * leaf)), at.params)
    with pytest.raises(AssertionError, match="more than rounding"):
        assert_same_to_rounding(_program("single", workload)[0](others, at.frozen, at.batch), expected, scales)
    metrics = expected["metrics"] | {"loss": expected["metrics"]["loss"] * np.float32(1 + 3e-6)}
    with pytest.raises(AssertionError, match=r"more than rounding \(1e-06\): \['metrics'\]\['loss'\]"):
        assert_same_to_rounding(expected | {"metrics": metrics}, expected, scales)
    largest = max(_leaves(expected["gradient"]), key=lambda entry: np.abs(entry[1]).max())[0]
    gradient = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.float32(1 - 1e-3 * (path == largest)), expected["gradient"]
    )
    with pytest.raises(AssertionError, match="more than rounding"):
        assert_same_to_rounding(expected | {"gradient": gradient}, expected, scales)


def test_no_layout_exchanges_more_than_it_did():
    found = {f"{name} {workload}": _program(name, workload)[1] for name, workload in CASES}
    _check_golden(found, lambda key: key.split()[-1] in WORKLOADS)


def test_no_layout_of_rollouts_exchanges_more_than_it_did():
    """Under the table of training, and with `sharding/rollouts.gin` on top."""
    found = {
        f"{name}{'+rollouts' if own else ''} {kind}": _exchanges(program.compile().as_text())
        for name in LAYOUTS
        for own in (False, True)
        for kind, program in rollouts(name, own).items()
    }
    _check_golden(found, lambda key: key.split()[-1] in ("prefill", "rollout"))


def _check_golden(found, are_these):
    """Compares with those of the golden numbers that are of these programs, or writes them anew."""
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("CLP_UPDATE_GOLDEN"):
        others = {key: value for key, value in golden.items() if not are_these(key)}
        golden = others | {"jax": jax.__version__} | found
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
        GOLDEN.write_text(f"{{\n{lines}\n}}\n")
    if golden["jax"] != jax.__version__:
        pytest.skip(f"the golden numbers are of jax {golden['jax']}: another compiler makes other exchanges")
    changed = [f"{key}: {golden.get(key)} became {value}" for key, value in found.items() if value != golden.get(key)]
    assert not changed, (
        "collectives of one program, [count, bytes] of each kind, changed (see this file's head to accept): "
        + "; ".join(changed)
    )
    assert found.keys() == {key for key in golden if are_these(key)}


@pytest.mark.parametrize("name", ["fsdp", "fsdp_tensor", "fsdp_expert", "context", "multislice", "pipeline"])
def test_parameters_and_slots_are_shared_evenly(name):
    """Every parameter of a decoder has a dimension of the model: devices hold an eighth, or a slice's share."""
    policy = Policy(PaLMConfig.palm(num_layers=2, **SIZES))
    learner = Learner(
        SupervisedLoss(policy), AdamW(0.1), logical_axes=policy.logical_axes(), ema_decay=0.9, **layout(name)
    )
    state = learner.abstract_state(policy.abstract())
    for tree in (state.params, state.ema, state.opt_state[1].mu, state.opt_state[1].nu):
        leaves = jax.tree.leaves(tree)
        mine = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
        whole = sum(leaf.size for leaf in leaves)
        if name == "fsdp_tensor":  # Norms have no dimension for the tensor axis, and one key head is for all.
            assert whole / 8 <= mine < whole / 6
        elif name == "pipeline":  # The embeddings are of no layer.
            assert whole / 8 < mine < whole / 4
        else:
            assert mine == whole / (4 if name == "multislice" else 8)


def test_a_state_is_made_where_it_lives():
    """Initialisation needs little more than a device's share: no parameter is whole anywhere on the way."""
    policy = Policy(PaLMConfig.palm(num_layers=4, **SIZES | dict(embed_dim=128, mlp_dim=512, vocab_size=2048)))
    learner = Learner(SupervisedLoss(policy), Adafactor(0.1), logical_axes=policy.logical_axes(), **layout("fsdp"))
    program = learner.initialiser(lambda: policy.init(jax.random.key(0)), seed=0).lower().compile()
    memory = program.memory_analysis()
    whole = 4 * policy.num_params()
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < whole / 2
    assert "all-gather" not in program.as_text()


def test_kernels_do_not_leave_the_axis_that_shards_them():
    """What each layout is for, read off the golden numbers."""
    golden = json.loads(GOLDEN.read_text())
    assert set(golden["data_parallel reward"]) == {"all-reduce"}
    assert "all-gather" in golden["fsdp palm"]
    assert "all-to-all" in golden["expert experts"]
    assert "collective-permute" in golden["context palm"] and "collective-permute" in golden["pipeline palm"]
    assert "collective-permute" in golden["context rollout"]
    assert "collective-permute" not in golden["context+rollouts rollout"]
    assert golden["fsdp+rollouts rollout"]["all-gather"][0] < golden["fsdp rollout"]["all-gather"][0]
