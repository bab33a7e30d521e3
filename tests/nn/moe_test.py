"""The mixture-of-experts layer against loops over tokens, the dense block, and itself by other ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clp_jax.nn.grouped_product import _ragged_product, _ragged_transposed, grouped_product
from clp_jax.nn.mlp import MLP
from clp_jax.nn.moe import MoE
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice
from clp_jax.nn.stack import scan_layers, stacked

B, T, D, F, E = 3, 7, 6, 10, 5
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
MASK = jnp.asarray(RNG.random((B, T)) < 0.75)
ALL = jnp.ones((B, T), bool)
COTANGENT = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
LONGER = jnp.pad(COTANGENT, ((0, 0), (0, 5), (0, 0)))

ROUTERS = {
    "switch": TokenChoice(1, eval_capacity=0.8),
    "top2_batch": TokenChoice(2, eval_capacity=1.0, group="batch", renormalize=True),
    "top3_tokens": TokenChoice(3, eval_capacity=0.7, group=4, capacity_times_k=True),
    "prioritised": TokenChoice(2, eval_capacity=1.0, batch_prioritised=True),
    "experts": ExpertChoice(eval_capacity=0.6),
    "experts_batch": ExpertChoice(eval_capacity=0.8, group="batch"),
    "dropless": Dropless(2),
    "dropless_raw": Dropless(3, renormalize=False),
}
CAPPED = [name for name in ROUTERS if not name.startswith("dropless")]


def _moe(router, *, seed=0, dim=F, num_experts=E, spread=1.0, **settings) -> MoE:
    settings = dict(activation="gelu", gated=True, dropout_rate=0.0, dtype=jnp.dtype("float32")) | settings
    # A router as decided as a trained one, so that experts overflow.
    return MoE(nnx.Rngs(seed), D, dim, num_experts, router=router, router_stddev=spread, **settings)


@functools.cache
def _program(graph, training=False, remat=False):
    """The layer's output, statistics and gradients (for the parameters and the input) as one program."""

    def apply(state, x, mask, key):
        return nnx.merge(graph, state)(x, mask, key if training else None)

    def run(state, x, mask, cotangent, key):
        call = jax.checkpoint(apply) if remat else apply
        (y, statistics), transposed = jax.vjp(lambda state, x: call(state, x, mask, key), state, x)
        zeros = jax.tree.map(jnp.zeros_like, statistics)
        return y, statistics, transposed((cotangent.astype(y.dtype), zeros))

    return jax.jit(run)


def _run(moe: MoE, x=X, mask=MASK, *, training=False, remat=False, key=None, cotangent=COTANGENT):
    graph, state = nnx.split(moe)
    key = jax.random.key(0) if key is None else key
    y, statistics, (parameters, of_x) = _program(graph, training, remat)(state, x, mask, cotangent, key)
    return y, statistics, (nnx.to_pure_dict(parameters), of_x)


def _close(now, then, **tolerance):
    assert jax.tree.structure(now) == jax.tree.structure(then)
    for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(then), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), **tolerance)


def _feed_forward(moe: MoE, expert: int, x: np.ndarray) -> np.ndarray:
    wi_0, wi_1, wo = (np.asarray(k[expert], np.float64) for k in moe.experts.kernels())
    hidden = x @ wi_0
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))) * (x @ wi_1)
    return hidden @ wo


def _expected(moe: MoE, x, mask, training=False) -> np.ndarray:
    """One token after another, in float64."""
    router = moe.routing
    x, mask = np.asarray(x, np.float64), np.asarray(mask)
    size = router.group_size(*mask.shape)
    y = np.zeros((mask.size, D))
    tokens, valid = x.reshape(-1, D), mask.reshape(-1)
    logits = tokens @ np.asarray(moe.router.kernel[...], np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-probs, axis=-1)
    for start in range(0, mask.size, size):
        group = [s for s in range(start, start + size) if valid[s]]
        capacity = mask.size
        if not isinstance(router, Dropless):
            capacity = router.capacities(size, moe.num_experts, training)[len(group)]
        if isinstance(router, ExpertChoice):
            for expert in range(moe.num_experts):
                for s in sorted(group, key=lambda s, e=expert: -probs[s, e])[:capacity]:
                    y[s] += probs[s, expert] * _feed_forward(moe, expert, tokens[s])
            continue
        if isinstance(router, TokenChoice) and router.batch_prioritised:
            group.sort(key=lambda s: -probs[s].max())
        used = np.zeros(moe.num_experts, int)
        for choice in range(router.k):
            for s in group:
                expert = best[s, choice]
                if used[expert] < capacity:
                    used[expert] += 1
                    total = probs[s, best[s, : router.k]].sum() if router.renormalize else 1.0
                    y[s] += probs[s, expert] / total * _feed_forward(moe, expert, tokens[s])
    return y.reshape(x.shape)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_layer_is_a_loop_over_tokens(name):
    moe = _moe(ROUTERS[name])
    y, statistics, _ = _run(moe)
    np.testing.assert_allclose(y, _expected(moe, X, MASK), rtol=1e-4, atol=1e-5)
    assert (float(statistics.dropped) > 0) == (name in CAPPED)
    np.testing.assert_allclose(statistics.load.sum(), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(y)[~np.asarray(MASK)], 0)


@pytest.mark.parametrize("name", CAPPED)
def test_sorting_is_multiplying_by_one_hot_vectors(name):
    now, then = (_run(_moe(ROUTERS[name], dispatch=way)) for way in ("sort", "einsum"))
    _close(now, then, rtol=1e-5, atol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(now[2]))


@pytest.mark.parametrize("name", ["top2_batch", "experts"])
def test_sorting_is_multiplying_by_one_hot_vectors_in_bfloat16(name):
    x = X.astype(jnp.bfloat16)
    now, then = (_run(_moe(ROUTERS[name], dispatch=way), x) for way in ("sort", "einsum"))
    assert now[0].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((now[1], now[2][0])))
    # Forward, both only move rows and add two or three numbers in float32.
    _close(now[:2], then[:2], rtol=1e-6, atol=1e-6)
    _close(now[2], then[2], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(("k", "renormalize"), [(1, False), (2, True), (3, False)])
def test_dropless_is_capacity_without_end(k, renormalize):
    moe, roomy = (
        _moe(r) for r in (Dropless(k, renormalize), TokenChoice(k, fixed_capacity=T, renormalize=renormalize))
    )
    now, then = _run(moe), _run(roomy)
    _close((now[0], now[2]), (then[0], then[2]), rtol=1e-4, atol=1e-5)
    assert float(then[1].dropped) == 0
    np.testing.assert_allclose(now[1].load, then[1].load, rtol=1e-6)


def _same_experts(moe: MoE) -> tuple[MoE, MLP]:
    mlp = MLP(nnx.Rngs(5), D, F, activation="gelu", gated=True, dropout_rate=0.0, dtype=jnp.dtype("float32"))
    for name in ("wi_0", "wi_1", "wo"):
        kernel = getattr(mlp, name).kernel[...]
        getattr(moe.experts, name).kernel[...] = jnp.tile(kernel[None], (E, 1, 1))
    return moe, mlp


@pytest.mark.parametrize("router", [TokenChoice(2, fixed_capacity=T, renormalize=True), Dropless(2)])
def test_identical_experts_are_the_dense_block(router):
    moe, mlp = _same_experts(_moe(router))
    y, _, (parameters, of_x) = _run(moe, mask=ALL)
    graph, state = nnx.split(mlp)
    expected, transposed = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, X)
    of_state, of_x_expected = transposed(COTANGENT)
    _close((y, of_x), (expected, of_x_expected), rtol=1e-4, atol=1e-5)
    summed = jax.tree.map(lambda g: g.sum(0), parameters["experts"])
    _close(summed, nnx.to_pure_dict(of_state), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", [TokenChoice(2, fixed_capacity=T), Dropless(2, renormalize=False)])
def test_raw_gates_scale_identical_experts_by_their_sum(router):
    moe, mlp = _same_experts(_moe(router))
    y, _, _ = _run(moe, mask=ALL)
    probs = jax.nn.softmax(X @ moe.router.kernel[...], -1)
    total = jax.lax.top_k(probs, 2)[0].sum(-1, keepdims=True)
    np.testing.assert_allclose(y, mlp(X) * total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_changes_nothing(name):
    moe = _moe(ROUTERS[name])
    other = jnp.where(MASK[..., None], X, 100 * jnp.flip(X))
    now, then = _run(moe), _run(moe, other)
    for a, b in zip(jax.tree.leaves(now), jax.tree.leaves(then), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dispatch", ["sort", "einsum"])
@pytest.mark.parametrize("name", ["switch", "prioritised", "experts", "top2_batch", "experts_batch"])
def test_more_padding_changes_nothing(name, dispatch):
    """Neither do other rows, where a row is a group."""
    moe = _moe(ROUTERS[name], dispatch=dispatch)
    y, statistics, _ = _run(moe)
    padded, then, _ = _run(moe, *(jnp.pad(v, ((0, 0), (0, 5), (0, 0))[: v.ndim]) for v in (X, MASK)), cotangent=LONGER)
    np.testing.assert_allclose(padded[:, :T], y, rtol=1e-6, atol=1e-6)
    _close(then, statistics, rtol=1e-6, atol=1e-6)
    assert float(statistics.dropped) > 0
    if not name.endswith("batch"):
        for row in range(B):
            alone, _, _ = _run(moe, X[row : row + 1], MASK[row : row + 1], cotangent=COTANGENT[:1])
            np.testing.assert_allclose(alone[0], y[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("router", [TokenChoice(2, fixed_capacity=T), TokenChoice(1, eval_capacity=1.0), Dropless(2)])
def test_the_past_does_not_depend_on_the_future(router):
    moe = _moe(router)
    y, _, _ = _run(moe, mask=ALL)
    for t in range(1, T):
        changed, _, _ = _run(moe, X.at[:, t:].multiply(-3.0), ALL)
        np.testing.assert_allclose(changed[:, :t], y[:, :t], rtol=1e-5, atol=1e-6)
        assert not np.allclose(changed[:, t:], y[:, t:], atol=1e-3)


@pytest.mark.parametrize("name", ["experts", "prioritised"])
def test_what_is_refused_in_causal_stacks_does_depend_on_it(name):
    moe = _moe(ROUTERS[name])
    y, _, _ = _run(moe, mask=ALL)
    changed, _, _ = _run(moe, X.at[:, 2:].multiply(-3.0), ALL)
    assert not np.allclose(changed[:, :2], y[:, :2], atol=1e-3)


def test_training_has_its_own_capacity_jitter_and_dropout():
    moe = _moe(TokenChoice(1, train_capacity=0.5, eval_capacity=1.25))
    y, statistics, _ = _run(moe, training=True)
    np.testing.assert_allclose(y, _expected(moe, X, MASK, training=True), rtol=1e-4, atol=1e-5)
    assert float(statistics.dropped) > float(_run(moe)[1].dropped)

    noisy = _moe(TokenChoice(1, train_capacity=0.5, eval_capacity=1.25, jitter=0.5))
    np.testing.assert_array_equal(_run(noisy)[0], _run(moe)[0])
    assert float(_run(noisy, training=True)[1].z_loss) != float(statistics.z_loss)
    np.testing.assert_array_equal(_run(noisy, training=True)[0], _run(noisy, training=True)[0])
    assert np.any(_run(noisy, training=True)[0] != _run(noisy, training=True, key=jax.random.key(1))[0])


@pytest.mark.parametrize("router", [TokenChoice(1, fixed_capacity=T), Dropless(1, renormalize=False)])
def test_expert_dropout_zeroes_hidden_units_in_training_only(router):
    # With one hidden unit a token's output is dropped whole, or doubled.
    moe, plain = _moe(router, dim=1, dropout_rate=0.5), _moe(router, dim=1)
    np.testing.assert_array_equal(_run(moe)[0], _run(plain)[0])
    y, expected = (np.asarray(_run(m, mask=ALL, training=True)[0]).reshape(-1, D) for m in (moe, plain))
    dropped = ~y.any(-1)
    assert 0 < dropped.sum() < len(dropped)
    np.testing.assert_allclose(y[~dropped], 2 * expected[~dropped], rtol=1e-5)


@pytest.mark.parametrize("gate", [False, True])
def test_the_shared_expert_sees_every_token(gate):
    router = TokenChoice(1, fixed_capacity=1)
    moe, routed = _moe(router, shared_dim=4, shared_gate=gate), _moe(router)
    y = _run(moe)[0]
    scale = jax.nn.sigmoid(X @ moe.shared_gate.kernel[...]) if gate else 1.0
    np.testing.assert_allclose(y, _run(routed)[0] + scale * moe.shared(X), rtol=1e-5, atol=1e-6)
    paths = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(moe))}
    ways = {f"{part}/{name}/kernel" for part in ("experts", "shared") for name in ("wi_0", "wi_1", "wo")}
    assert paths == ways | {"router/kernel"} | ({"shared_gate/kernel"} if gate else set())


def test_parameters_have_names_for_their_axes():
    axes = {
        "/".join(map(str, path)): variable.get_metadata("logical_axes")
        for path, variable in nnx.to_flat_state(nnx.state(_moe(Dropless(1), gated=False)))
    }
    assert axes == {
        "router/kernel": ("embed", None),
        "experts/wi/kernel": ("expert", "embed", "mlp"),
        "experts/wo/kernel": ("expert", "mlp", "embed"),
    }


def test_statistics_of_a_uniform_router():
    moe = _moe(Dropless(2), spread=0.0)
    _, statistics, _ = _run(moe)
    np.testing.assert_allclose(statistics.balance_loss, 2, rtol=1e-6)
    np.testing.assert_allclose(statistics.z_loss, np.log(E) ** 2, rtol=1e-6)
    np.testing.assert_allclose(statistics.entropy, np.log(E), rtol=1e-6)
    # Equal probabilities: everybody's choices are the first experts.
    np.testing.assert_allclose(statistics.load, [0.5, 0.5, 0, 0, 0])


def test_a_batch_of_padding_is_nothing():
    for name in ("switch", "experts", "dropless"):
        y, statistics, (parameters, of_x) = _run(_moe(ROUTERS[name]), mask=jnp.zeros((B, T), bool))
        for leaf in jax.tree.leaves((y, statistics, parameters, of_x)):
            np.testing.assert_array_equal(leaf, 0)


def test_the_router_computes_in_float32():
    # In bfloat16, 1 + 2^-8 rounds to 1 and the logits would be equal.
    moe = _moe(TokenChoice(1, fixed_capacity=1), num_experts=2)
    moe.router.kernel[...] = jnp.zeros((D, 2)).at[0, :].set(jnp.asarray([1.0, 1.0 + 2**-8]))
    _, statistics, _ = _run(moe, jnp.ones((B, T, D), jnp.bfloat16), ALL)
    assert statistics.load.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["top2_batch", "experts", "dropless"])
def test_recomputing_changes_nothing(name):
    moe = _moe(ROUTERS[name])
    _close(_run(moe, remat=True), _run(moe), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["top2_batch", "experts", "dropless"])
def test_groups_of_parameters_are_as_one_after_another(name):
    graph, _ = nnx.split(_moe(ROUTERS[name]))
    states = [nnx.split(_moe(ROUTERS[name], seed=seed))[1] for seed in range(2)]
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    xs = jnp.stack([X, jnp.flip(X)])
    run = jax.jit(jax.vmap(_program(graph), (0, 0, None, None, None)))
    now = run(many, xs, MASK, COTANGENT, jax.random.key(0))
    for i, state in enumerate(states):
        then = _program(graph)(state, xs[i], MASK, COTANGENT, jax.random.key(0))
        _close(jax.tree.map(lambda leaf, i=i: leaf[i], now), then, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "remat"), [("top2_batch", "full"), ("dropless", "none"), ("dropless", "full")])
def test_stacked_layers_are_run_by_a_loop(name, remat):
    layers = stacked(lambda rngs: _layer(rngs, ROUTERS[name]), 2, nnx.Rngs(0))
    graph, state = nnx.split(layers)

    def body(layer, x, _):
        y, statistics = layer(x, MASK)
        return x + y, statistics

    def loss(state, x):
        y, statistics = scan_layers(nnx.merge(graph, state), body, x, remat=remat, unroll=1)
        return jnp.sum(y * COTANGENT) + statistics.balance_loss.sum(), (y, statistics)

    (_, (y, statistics)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(state, X)
    assert statistics.load.shape == (2, E) and statistics.z_loss.shape == (2,)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    one_by_one = X
    for i in range(2):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        one_by_one = one_by_one + _run(layer, one_by_one)[0]
    np.testing.assert_allclose(y, one_by_one, rtol=1e-5, atol=1e-5)


def _layer(rngs: nnx.Rngs, router) -> MoE:
    settings = dict(activation="gelu", gated=True, dropout_rate=0.0, dtype=jnp.dtype("float32"))
    return MoE(rngs, D, F, E, router=router, router_stddev=1.0, **settings)


@pytest.mark.parametrize("owned", [(16, 0, 8), (0, 0, 0), (0, 32, 0), (8, 8, 16)])
def test_grouped_products_and_their_gradients_are_those_of_each_group(owned):
    rng = np.random.default_rng(2)
    x, kernels, dy = (rng.normal(size=size).astype(np.float32) for size in ((32, 3), (3, 3, 4), (32, 4)))
    y, dx, dkernels = _grouped_program(jnp.asarray(x), jnp.asarray(kernels), jnp.asarray(owned), jnp.asarray(dy))
    expert = np.repeat(np.arange(3), owned)
    rows = slice(0, sum(owned))
    np.testing.assert_allclose(y[rows], np.einsum("ri,rio->ro", x[rows], kernels[expert]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx[rows], np.einsum("ro,rio->ri", dy[rows], kernels[expert]), rtol=1e-5, atol=1e-6)
    for e in range(3):
        mine = np.flatnonzero(expert == e)
        np.testing.assert_allclose(dkernels[e], x[mine].T @ dy[mine], rtol=1e-5, atol=1e-6)
    # What accelerators run.
    ragged = jax.jit(_ragged_product)(x, kernels, jnp.asarray(owned))
    np.testing.assert_allclose(ragged[rows], y[rows], rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.jit(_ragged_transposed)(x, kernels, jnp.asarray(owned), dy), (dx, dkernels), strict=True):
        np.testing.assert_allclose(a[rows] if a.ndim == 2 else a, b[rows] if b.ndim == 2 else b, rtol=1e-5, atol=1e-6)


def test_accelerators_multiply_ragged_rows():
    graph, state = nnx.split(_moe(Dropless(2)))
    traced = _program(graph).trace(state, X, MASK, COTANGENT, jax.random.key(0))
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu")}
    # Three products, and two in the gradient of each.
    assert texts["tpu"].count('"chlo.ragged_dot"(') == 9 and "chlo.ragged_dot" not in texts["cpu"]
    assert "stablehlo.while" not in texts["tpu"]


@jax.jit
def _grouped_program(x, kernels, owned, dy):
    y, transposed = jax.vjp(lambda x, kernels: grouped_product(x, kernels, owned, 8), x, kernels)
    return y, *transposed(dy)


def test_more_experts_cost_no_more_products():
    def operations(num_experts):
        moe = _moe(TokenChoice(1, eval_capacity=1.0), num_experts=num_experts, dim=256)
        x = jnp.zeros((2, 64, D))
        graph, state = nnx.split(moe)
        lowered = _program(graph).lower(state, x, jnp.ones((2, 64), bool), x, jax.random.key(0))
        return lowered.compile().cost_analysis()["flops"]

    dense = MLP(nnx.Rngs(0), D, 256, activation="gelu", gated=True, dropout_rate=0.0, dtype=jnp.dtype("float32"))
    graph, state = nnx.split(dense)
    x = jnp.zeros((2, 64, D))

    def run(state, x):
        y, transposed = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return y, transposed(x)

    one_width = jax.jit(run).lower(state, x).compile().cost_analysis()["flops"]
    few, many = operations(4), operations(16)
    assert one_width < few < 1.3 * one_width
    assert many < 1.1 * few


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(router=TokenChoice(9)), "TokenChoice.k is 9: expected at most the 5 experts there are."),
        (dict(router=Dropless(), shared_gate=True), "MoE shared_gate is True with shared_dim 0"),
        (dict(router=Dropless(), dispatch="einsum"), "MoE dispatch is 'einsum' with Dropless: expected 'sort'"),
        (dict(router=TokenChoice(), dispatch="hash"), "MoE dispatch is 'hash' with TokenChoice"),
        (dict(router=TokenChoice(), num_experts=0), "MoE num_experts is 0: expected at least 1."),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        _moe(**settings)
