"""Adafactor against T5X and optax; stacked parameters against separate ones; AdamW's mask; settings."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clp_jax.training import schedules
from clp_jax.training.optimizers import Adafactor, AdamW, scale_by_factored_rms

FIXTURE = Path(__file__).parents[1] / "fixtures" / "t5x_adafactor.npz"


def test_adafactor_makes_the_step_that_t5x_made():
    data = np.load(FIXTURE)
    axes = {"mlp": ("layers", "embed", "mlp"), "norm": ("layers", "embed"), "relpos_bias": None, "logits": None}
    params, grads, v = ({name: jnp.asarray(data[f"{name}/{what}"]) for name in axes} for what in ("param", "grad", "v"))
    transformation = Adafactor(learning_rate=float(data["learning_rate"])).build(axes)
    state = jax.tree.map(lambda x: x, transformation.init(params))
    slots = state[1]._replace(count=jnp.asarray(data["count"]), v=v)
    updates, state = transformation.update(grads, (state[0], slots, *state[2:]), params)
    for name in axes:
        np.testing.assert_allclose(params[name] + updates[name], data[f"{name}/new_param"], rtol=3e-7, atol=1e-8)
        np.testing.assert_allclose(state[1].v[name], data[f"{name}/new_v"], rtol=2e-6)


def random_tree(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def three_steps(transformation, params, shapes):
    state = transformation.init(params)
    for step in range(3):
        updates, state = transformation.update(random_tree(step + 1, shapes), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


SHAPES = {"tall": (130, 128), "wide": (128, 140), "square": (128, 128), "small": (127, 200), "vector": (300,)}


def test_adafactor_without_stacks_is_that_of_optax():
    params = random_tree(0, SHAPES)
    ours, state = three_steps(Adafactor(learning_rate=0.1).build(None), params, SHAPES)
    theirs, _ = three_steps(optax.adafactor(0.1), params, SHAPES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)
    shapes = {
        name: (slots[0].shape, slots[1].shape)
        for name, slots in zip(
            sorted(SHAPES),
            zip(jax.tree.leaves(state[1].v_row), jax.tree.leaves(state[1].v_col), strict=True),
            strict=True,
        )
    }
    # A row slot is as long as the smaller dimension; of a square, as axis 0.
    assert shapes["tall"] == ((1, 128), (130, 1))
    assert shapes["wide"] == ((128, 1), (1, 140))
    assert shapes["square"] == ((128, 1), (1, 128))
    assert shapes["small"] == shapes["vector"] == ((1,), (1,))


@pytest.mark.parametrize("config", [Adafactor(0.1), AdamW(0.1, weight_decay=0.1, max_grad_norm=None)])
def test_a_stack_trains_as_its_layers_would(config):
    shapes = {"matrix": (2, 3, 128, 130), "norm": (2, 3, 64)}
    axes = {"matrix": ("component", "layers", "embed", "mlp"), "norm": ("component", "layers", "embed")}
    params = random_tree(0, shapes)
    params["matrix"] *= np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1, 1)  # Layers of different sizes.
    stacked, _ = three_steps(config.build(axes), params, shapes)
    for m in range(2):
        for layer in range(3):
            alone = {name: p[m, layer] for name, p in params.items()}
            state = config.build(None).init(alone)
            for step in range(3):
                grads = {name: g[m, layer] for name, g in random_tree(step + 1, shapes).items()}
                updates, state = config.build(None).update(grads, state, alone)
                alone = optax.apply_updates(alone, updates)
            for name in shapes:
                np.testing.assert_allclose(stacked[name][m, layer], alone[name], rtol=2e-6, atol=1e-7)


def test_stacked_axes_must_lead():
    with pytest.raises(ValueError, match="must come first"):
        scale_by_factored_rms({"w": ("embed", "layers")}).init({"w": jnp.ones((2, 3))})


def test_adamw_is_that_of_optax_and_leaves_vectors_undecayed():
    shapes = {"matrix": (4, 3), "vector": (5,)}
    params = random_tree(0, shapes)
    config = AdamW(0.1, weight_decay=0.5, max_grad_norm=1.0)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.1, weight_decay=0.5, mask={"matrix": True, "vector": False}),
    )
    ours, _ = three_steps(config.build(None), params, shapes)
    expected, _ = three_steps(theirs, params, shapes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)
    stack, _ = three_steps(config.build({"matrix": ("layers", "embed"), "vector": None}), params, shapes)
    plain, _ = three_steps(AdamW(0.1, max_grad_norm=1.0).build(None), params, shapes)
    np.testing.assert_array_equal(stack["matrix"], plain["matrix"])  # A stack of vectors is no matrix.


def test_global_norm_clipping():
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((4,), 4.0)}
    clipping = AdamW(1.0, max_grad_norm=1.0).build(None)
    state = clipping.init(grads)
    _, state = clipping.update(grads, state, grads)
    first_moment = state[1].mu
    np.testing.assert_allclose(optax.tree.norm(first_moment), 0.1, rtol=1e-6)  # (1 - b1) times the clipped norm.


@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 7.0, np.inf, np.nan])
def test_the_global_norm_is_clipped_as_by_optax(size):
    """One gradient has the size; to the bit where nothing is clipped."""
    grads = {"a": jnp.asarray([size, -0.2]), "b": jnp.full((2, 2), 0.1)}

    def first_moment(clipping):
        steps = optax.chain(clipping, optax.scale_by_adam())
        return steps.update(grads, steps.init(grads))[1][1].mu

    ours = AdamW(1.0, max_grad_norm=2.0).build(None)
    found = ours.update(grads, ours.init(grads), grads)[1][1].mu
    expected = first_moment(optax.clip_by_global_norm(2.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    if size < 2:
        jax.tree.map(np.testing.assert_array_equal, found, first_moment(optax.identity()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adafactor(learning_rate=-1.0), "Constant.value is -1.0: expected a positive number"),
        (lambda: schedules.as_schedule("fast"), "learning_rate is 'fast': expected a positive number or a schedule"),
        (lambda: Adafactor(clipping_threshold=0.0), "Adafactor.clipping_threshold is 0.0"),
        (lambda: AdamW(max_grad_norm=float("nan")), "AdamW.max_grad_norm is nan"),
        (lambda: AdamW(b1=1.0), r"AdamW.b1 is 1.0: expected a number in \[0, 1\)"),
        (lambda: AdamW(weight_decay=-0.1), "AdamW.weight_decay is -0.1"),
        (lambda: schedules.Cosine(1.0, total_steps=5, warmup_steps=5), "must be below total_steps"),
        (lambda: schedules.Linear(1.0, 5, final_fraction=2.0), "final_fraction is 2.0"),
        (lambda: schedules.InverseSquareRoot(offset=0), "InverseSquareRoot.offset is 0"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
