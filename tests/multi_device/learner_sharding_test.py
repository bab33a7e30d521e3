"""The learner on eight virtual devices: the numbers of one device, and arrays where the rules put them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from rounding import ROUNDING, assert_same_metrics, assert_same_to_rounding

from clp_jax.data.batch import Batch
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.partitioning import Rules, constrain, make_mesh
from clp_jax.training.checkpoints import Checkpoints
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.replicas import check_replicas
from clp_jax.training.supervised import SupervisedLoss

DATA = ("batch", ("slice", "data", "fsdp"))
FSDP = Rules((DATA, ("embed", "fsdp")))
BOTH = Rules(
    (DATA, ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"), ("vocab", "tensor"), ("act_mlp", "tensor"))
)
LAYOUTS = {
    "data": (dict(data=8), Rules((DATA,))),
    "fsdp": (dict(data=1, fsdp=8), FSDP),
    "tensor": (dict(data=2, tensor=4), BOTH),
    "all": (dict(data=2, fsdp=2, tensor=2), BOTH),
}
OPTIMIZERS = {"adafactor": Adafactor(0.05, min_dim_to_factor=8), "adamw": AdamW(0.01, weight_decay=0.1)}
AXES = {"layers": {"in": ("layers", "embed", "mlp"), "out": ("layers", "mlp", "embed"), "scale": ("layers", "embed")}}


def init():
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = {"in": (2, 16, 32), "out": (2, 32, 16)}
    layers = {name: jax.random.normal(key, shape) / 4 for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {"layers": layers | {"scale": jnp.ones((2, 16))}}


def loss_fn(params, frozen, batch, key):
    def layer(x, p):
        hidden = constrain(jax.nn.relu((x * p["scale"][None]) @ p["in"]), "batch", "act_mlp")
        return constrain(x + hidden @ p["out"], "batch", "act_embed"), None

    y, _ = jax.lax.scan(layer, batch["x"], params["layers"])
    error = jnp.square(y - 1 - 0.01 * jax.random.normal(key)).mean(-1)
    return (error * batch["weights"]).sum(), batch["weights"].sum(), {"size": jnp.abs(y).mean()}


def batch(step, rows=16):
    rng = np.random.default_rng(step)
    weights = rng.uniform(size=(rows,)).astype(np.float32)
    return {"x": rng.normal(size=(rows, 16)).astype(np.float32), "weights": weights}


def make(layout, optimizer, accumulation=1):
    sizes, rules = LAYOUTS[layout] if layout else ({"devices": jax.devices()[:1]}, Rules((DATA,)))
    return Learner(
        loss_fn,
        OPTIMIZERS[optimizer],
        logical_axes=AXES,
        mesh=make_mesh(**sizes),
        rules=rules,
        accumulation=accumulation,
        ema_decay=0.9,
    )


def train(learner):
    state = learner.init_state(init, seed=1)
    history = []
    for step in range(3):
        state, metrics = learner.update(state, {}, batch(step))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.fixture(scope="module")
def one_device():
    return {name: train(make(None, name)) for name in OPTIMIZERS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_make_the_steps_of_one(one_device, layout, optimizer):
    assert jax.device_count() == 8
    learner = make(layout, optimizer)
    state, history = train(learner)
    expected_state, expected_history = one_device[optimizer]
    for now, then in zip(history, expected_history, strict=True):
        assert_same_metrics(now, then)
    assert_same_to_rounding((state.params, state.ema), (expected_state.params, expected_state.ema))
    assert learner.compile_count == 1


@pytest.mark.parametrize("layout", ["data", "all"])
def test_a_nan_on_one_device_skips_the_update_on_all(layout):
    learner = make(layout, "adafactor")
    state, _ = learner.update(learner.init_state(init, seed=1), {}, batch(0))
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.ema))
    bad = batch(1)
    bad["x"][5, 3] = np.nan
    state, metrics = learner.update(state, {}, bad)
    assert int(metrics["skipped"]) == 1 and not np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state, state.ema))
    for count in (metrics["skipped"], metrics["param_digest"], *jax.tree.leaves(state.guard)):
        assert len({np.asarray(shard.data).tobytes() for shard in count.addressable_shards}) == 1
    check_replicas(state, 2)
    assert learner.compile_count == 1


def test_accumulation_on_eight_devices(one_device):
    _, history = train(make("data", "adamw", accumulation=2))
    expected = [metrics["weight"] for metrics in one_device["adamw"][1]]
    np.testing.assert_allclose([metrics["weight"] for metrics in history], expected, rtol=1e-6)
    # Micro-batches draw noise of their own, which the loss sees at 1e-2.
    np.testing.assert_allclose(history[0]["size"], one_device["adamw"][1][0]["size"], rtol=0.05)


def test_parameters_slots_and_averages_are_where_the_rules_put_them():
    learner = make("all", "adafactor")
    state, _ = train(learner)
    factored = state.opt_state[1]
    where = {name: tree["layers"]["out"] for name, tree in {"params": state.params, "ema": state.ema}.items()}
    assert where["params"].sharding.spec == where["ema"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    slots = {name: getattr(factored, name)["layers"]["out"] for name in ("v_row", "v_col", "v")}
    assert slots["v_row"].shape == (2, 1, 16) and slots["v_row"].sharding.spec == PartitionSpec(None, None, "fsdp")
    assert slots["v_col"].shape == (2, 32, 1) and slots["v_col"].sharding.spec == PartitionSpec(None, "tensor", None)
    assert slots["v"].shape == (1,) and slots["v"].sharding.is_fully_replicated
    shards = where["params"].addressable_shards
    assert len(shards) == 8 and shards[0].data.shape == (2, 16, 8)
    abstract = learner.abstract_state(jax.eval_shape(init))
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a} {b}"), abstract, state)


def test_a_checkpoint_moves_to_another_layout(tmp_path):
    state, _ = train(make("all", "adamw"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {}, {"stage": "toy"}, {})
    abstract = make("fsdp", "adamw").abstract_state(init)
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(abstract)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), restored, state)
    jax.tree.map(lambda a, b: a.sharding == b.sharding or pytest.fail(f"{a} {b}"), restored, abstract)


def test_a_batch_that_does_not_divide_is_said_clearly():
    learner = make("data", "adamw")
    with pytest.raises(ValueError, match=r"has shape \(12,\).* 1 micro-batches on 8 devices"):
        learner.update(learner.init_state(init, 0), {}, batch(0, rows=12))


def sequences():
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(2, 32, (8, length)).astype(np.int32) for length in (6, 5))
    places = np.broadcast_to(np.arange(6, dtype=np.int32), inputs.shape)
    return Batch(
        inputs=inputs,
        input_segments=np.ones_like(inputs),
        input_positions=places,
        decoder_inputs=np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        targets=targets,
        target_segments=np.ones_like(targets),
        target_positions=places[:, :5],
        loss_weights=rng.integers(0, 2, targets.shape).astype(np.float32),
        example_ids=np.arange(8, dtype=np.int32),
    )


def test_a_t5_takes_the_same_step_on_all_axes():
    sizes = {"vocab_size": 32, "embed_dim": 8, "mlp_dim": 16, "num_heads": 2, "head_dim": 4}
    policy = Policy(T5Config.t5_1_1(num_encoder_layers=1, num_decoder_layers=1, **sizes))
    losses = []
    for mesh, rules in (
        (make_mesh(devices=jax.devices()[:1]), Rules((DATA,))),
        (make_mesh(data=2, fsdp=2, tensor=2), BOTH),
    ):
        axes = policy.logical_axes()
        learner = Learner(SupervisedLoss(policy), Adafactor(0.05), logical_axes=axes, mesh=mesh, rules=rules)
        state = learner.init_state(lambda: policy.init(jax.random.key(0)), seed=0)
        for _ in range(2):
            state, metrics = learner.update(state, {}, sequences())
            losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "update_norm")])
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=ROUNDING)
    assert state.params["encoder"]["layers"]["mlp"]["wo"]["kernel"].sharding.spec == PartitionSpec(
        None, "tensor", "fsdp"
    )
