"""The learner against closed forms: one step, accumulation, the moving average, random keys, bad batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training.learner import Learner
from clp_jax.training.metrics import DIGEST_METRICS
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.train_state import full_axes

RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(8, 3)).astype(np.float32),
    "y": RNG.normal(size=(8,)).astype(np.float32),
    "weights": np.asarray([1, 0, 0.5, 1, 0, 0, 0, 2], np.float32),  # One slice of four has no weight at all.
}
PARAMS = {"w": jnp.asarray([1.0, -2.0, 0.5]), "b": jnp.zeros(())}


def weighted_squares(params, frozen, batch, key):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"] + frozen.get("offset", 0.0)
    loss = (batch["weights"] * error**2).sum()
    weight = batch["weights"].sum()
    return loss, weight, {"absolute": (batch["weights"] * jnp.abs(error)).sum() / jnp.maximum(weight, 1e-9)}


def expected_gradient(params):
    x, y, weights = BATCH["x"], BATCH["y"], BATCH["weights"]
    error = x @ np.asarray(params["w"]) + float(params["b"]) - y
    scaled = 2 * weights * error / weights.sum()
    return {"w": scaled @ x, "b": scaled.sum()}, (weights * error**2).sum() / weights.sum(), error


def one_step(**settings):
    learner = Learner(weighted_squares, AdamW(0.1, b1=0.0, max_grad_norm=None), **settings)
    state = learner.init_state(PARAMS, seed=1)
    return (learner, *learner.update(state, {}, BATCH))


def test_one_step_is_the_closed_form():
    _, state, metrics = one_step()
    grads, loss, error = expected_gradient(PARAMS)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], 4.5)
    np.testing.assert_allclose(metrics["absolute"], (BATCH["weights"] * np.abs(error)).sum() / 4.5, rtol=1e-6)
    norm = np.sqrt((grads["w"] ** 2).sum() + grads["b"] ** 2)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["update_norm"], 0.1 * 2, rtol=1e-5
    )  # Adam's first step is the sign of 4 numbers.
    np.testing.assert_allclose(metrics["learning_rate"], 0.1)
    for name, gradient in grads.items():
        np.testing.assert_allclose(state.params[name], PARAMS[name] - 0.1 * np.sign(gradient), rtol=1e-5)
    flat = np.concatenate([np.ravel(state.params["w"]), np.ravel(state.params["b"])])
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(flat), rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_is_the_whole_batch_although_weights_differ(accumulation):
    _, whole, metrics = one_step()
    learner, parts, part_metrics = one_step(accumulation=accumulation)
    for name in metrics.keys() - DIGEST_METRICS:
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    for name in PARAMS:
        np.testing.assert_allclose(parts.params[name], whole.params[name], rtol=1e-5)
        np.testing.assert_allclose(parts.opt_state[1].nu[name], whole.opt_state[1].nu[name], rtol=1e-5)
    assert learner.compile_count == 1


def test_compiles_once_whatever_the_array_type():
    learner, state, _ = one_step()
    for convert in (np.asarray, jnp.asarray, np.asarray):
        state, _ = learner.update(state, {}, jax.tree.map(convert, BATCH))
    assert learner.compile_count == 1


def test_the_frozen_tree_reaches_the_loss():
    learner = Learner(weighted_squares, AdamW(0.1))
    frozen = learner.place_frozen({"offset": np.float32(3.0)})
    _, metrics = learner.update(learner.init_state(PARAMS, 0), frozen, BATCH)
    error = expected_gradient(PARAMS)[2] + 3
    np.testing.assert_allclose(metrics["loss"], (BATCH["weights"] * error**2).sum() / 4.5, rtol=1e-6)


def test_a_batch_without_weight_changes_nothing():
    learner = Learner(weighted_squares, Adafactor(0.1), accumulation=2)
    batch = BATCH | {"weights": np.zeros(8, np.float32)}
    state, metrics = learner.update(learner.init_state(PARAMS, 0), {}, batch)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == float(metrics["weight"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)


def test_moving_average():
    learner = Learner(weighted_squares, AdamW(0.1), ema_decay=0.75)
    state = learner.init_state(PARAMS, 0)
    expected = PARAMS
    for _ in range(3):
        state, _ = learner.update(state, {}, BATCH)
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, expected)
    assert state.averaged_params is state.ema


def test_each_step_and_micro_batch_has_a_random_key_of_its_own():
    def noise(params, frozen, batch, key):
        draw = jax.random.normal(key)
        return params["b"] * 0 + draw * 2, jnp.float32(2), {}

    def losses(seed, accumulation):
        learner = Learner(noise, AdamW(0.1), accumulation=accumulation)
        state = learner.init_state(PARAMS, seed)
        out = []
        for _ in range(3):
            state, metrics = learner.update(state, {}, BATCH)
            out.append(float(metrics["loss"]))
        return out

    def key(seed, step, micro):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 0)
        return jax.random.fold_in(key, micro)

    for accumulation in (1, 2):
        draws = [[float(jax.random.normal(key(7, t, m))) for m in range(accumulation)] for t in range(3)]
        np.testing.assert_allclose(losses(7, accumulation), np.mean(draws, axis=1), rtol=1e-5)
    assert losses(8, 1) != losses(7, 1)


def test_parameters_may_be_made_under_jit():
    learner = Learner(weighted_squares, Adafactor(0.1))
    made = learner.init_state(lambda: jax.tree.map(lambda p: p * 1, PARAMS), seed=3)
    given = learner.init_state(PARAMS, seed=3)
    jax.tree.map(np.testing.assert_array_equal, made, given)
    abstract = learner.abstract_state(lambda: PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(made)
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding) or pytest.fail(f"{a} is not {b}"),
        abstract,
        made,
    )


def test_bfloat16_parameters_keep_their_type_and_float32_slots():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    learner = Learner(weighted_squares, AdamW(0.1))
    state = learner.init_state(params, 0)
    for _ in range(2):
        state, _ = learner.update(state, {}, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state[1].mu)} == {jnp.dtype(jnp.float32)}
    assert learner.compile_count == 1


def test_bad_batches_and_settings():
    learner = Learner(weighted_squares, AdamW(0.1), accumulation=3)
    state = learner.init_state(PARAMS, 0)
    with pytest.raises(ValueError, match=r"batch\['weights'\] has shape \(8,\).*3 micro-batches"):
        learner.update(state, {}, BATCH)
    with pytest.raises(ValueError, match=r"has shape \(\)"):
        learner.update(state, {}, {"x": np.float32(1)})
    with pytest.raises(ValueError, match="accumulation is 0"):
        Learner(weighted_squares, AdamW(0.1), accumulation=0)
    with pytest.raises(ValueError, match="ema_decay is 1.0"):
        Learner(weighted_squares, AdamW(0.1), ema_decay=1.0)


def test_full_axes_fills_what_is_left_out():
    params = {"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(4), "d": jnp.ones(())}}
    assert full_axes(None, params) == {"a": (None, None), "b": {"c": (None,), "d": ()}}
    assert full_axes({"a": ("layers", "embed"), "b": None}, params)["a"] == ("layers", "embed")
    with pytest.raises(ValueError, match=r"logical axes \('embed',\) of a do not fit \(2, 3\)"):
        full_axes({"a": ("embed",), "b": None}, params)
    with pytest.raises(ValueError, match=r"name \['a'\] under the root, the parameters have \['a', 'b'\]"):
        full_axes({"a": None}, params)
