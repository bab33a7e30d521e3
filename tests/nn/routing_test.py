"""Routers against loops over tokens, their losses against closed forms."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice, jittered, top_k
from clp_jax.nn.routing_statistics import balance_loss, router_entropy, router_z_loss, routing_statistics, shares
from clp_jax.nn.slots import collect, count_choices, distribute

TOKENS, EXPERTS = 13, 5


def _probs(seed: int, tokens: int = TOKENS, experts: int = EXPERTS) -> np.ndarray:
    logits = 2 * np.random.default_rng(seed).normal(size=(tokens, experts)) + np.linspace(1.5, 0, experts)
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32), -1))


def _mask(seed: int, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(100 + seed).random(tokens) < 0.8


@functools.cache
def _assign(router):
    return jax.jit(lambda probs, mask: router.assign(probs, mask, training=True))


def _capacity(router: TokenChoice | ExpertChoice, tokens: int, num_experts: int = EXPERTS) -> int:
    """Of a group without padding, in training."""
    fixed = getattr(router, "fixed_capacity", None)
    if fixed is not None:
        return min(fixed, tokens)
    times = router.k if getattr(router, "capacity_times_k", False) else 1
    return min(max(round(router.train_capacity * times * tokens / num_experts), router.min_capacity), tokens)


def _expected(router: TokenChoice, probs: np.ndarray, mask: np.ndarray):
    """Rows given out one by one, in the order of priority: a list of (token, gate) for each expert, and who was cut."""
    tokens, num_experts = probs.shape
    reserved, room = (_capacity(router, n, num_experts) for n in (tokens, mask.sum()))
    best = np.argsort(-probs, axis=-1, kind="stable")[:, : router.k]
    order = [s for s in range(tokens) if mask[s]]
    if router.batch_prioritised:
        order.sort(key=lambda s: -probs[s].max())
    rows, cut = [[] for _ in range(num_experts)], []
    for choice in range(router.k):
        for s in order:
            expert = best[s, choice]
            total = probs[s, best[s]].sum() if router.renormalize else 1.0
            if len(rows[expert]) < room:
                rows[expert].append((s, probs[s, expert] / total))
            else:
                cut.append((choice, s))
    return reserved, rows, cut


ROUTERS = {
    "switch": TokenChoice(1, train_capacity=1.25),
    "switch_prioritised": TokenChoice(1, train_capacity=1.0, batch_prioritised=True),
    "top2": TokenChoice(2, train_capacity=1.5, renormalize=True),
    "top2_prioritised": TokenChoice(2, train_capacity=1.25, batch_prioritised=True),
    "top3": TokenChoice(3, train_capacity=0.5, capacity_times_k=True),
    "roomy": TokenChoice(2, fixed_capacity=TOKENS),
    "all": TokenChoice(EXPERTS, fixed_capacity=3),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_take_rows_in_the_order_of_priority(name):
    router = ROUTERS[name]
    cuts = 0
    for seed in range(6):
        probs, mask = _probs(seed), _mask(seed)
        slots = _assign(router)(probs, mask)
        capacity, rows, cut = _expected(router, probs, mask)
        cuts += len(cut)
        source, gates = np.full((EXPERTS, capacity), TOKENS), np.zeros((EXPERTS, capacity))
        slot_of = np.full((router.k, TOKENS), EXPERTS * capacity)
        best = np.argsort(-probs, axis=-1, kind="stable")
        for expert, taken in enumerate(rows):
            for place, (s, gate) in enumerate(taken):
                source[expert, place], gates[expert, place] = s, gate
                slot_of[list(best[s]).index(expert), s] = expert * capacity + place
        np.testing.assert_array_equal(slots.source, source.reshape(-1))
        np.testing.assert_array_equal(slots.slot_of, slot_of)
        np.testing.assert_allclose(slots.gates, gates.reshape(-1), rtol=1e-6)
        np.testing.assert_array_equal(slots.kept, [len(taken) for taken in rows])
        assert (int(slots.dropped), int(slots.offered)) == (len(cut), router.k * mask.sum())
        counted = np.array([[e in best[s, : router.k] and mask[s] for e in range(EXPERTS)] for s in range(TOKENS)])
        np.testing.assert_array_equal(slots.chosen, counted)
    assert (cuts == 0) == (name == "roomy")


@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.25, 1.5, 3.0])
@pytest.mark.parametrize(
    "router", [TokenChoice(1), TokenChoice(2), TokenChoice(2, capacity_times_k=True), ExpertChoice()]
)
def test_no_more_experts_are_visited_than_is_counted_and_as_many_where_choices_are_even(router, capacity):
    router = dataclasses.replace(router, train_capacity=capacity)
    tokens, num_experts = 80, 8
    mask = np.arange(tokens) < 64
    # Each expert is the first choice of every eighth token, and the second one of those before.
    even = np.roll(np.eye(num_experts), 1, 0) / 3 + np.eye(num_experts) * 2 / 3
    even = np.tile(even, (tokens // num_experts, 1)).astype(np.float32)
    visits = [int(_assign(router)(probs, mask).kept.sum()) / 64 for probs in (even, _probs(0, tokens, num_experts))]
    assert visits[0] == router.experts_per_token >= visits[1]


def test_first_choices_go_before_second_ones():
    # Expert 0 is everybody's first or second choice and has three rows: the two late first choices, then one second.
    probs = np.float32([[0.4, 0.6], [0.4, 0.6], [0.7, 0.3], [0.9, 0.1]])
    slots = _assign(TokenChoice(2, fixed_capacity=3))(probs, np.ones(4, bool))
    np.testing.assert_array_equal(slots.source, [2, 3, 0, 0, 1, 2])
    np.testing.assert_array_equal(slots.gates, np.float32([0.7, 0.9, 0.4, 0.6, 0.6, 0.3]))
    assert int(slots.dropped) == 2


def test_batch_priority_keeps_the_surest_tokens():
    sure = np.float32([0.6, 0.9, 0.7, 0.99, 0.8])
    probs = np.stack([sure, 1 - sure], -1)
    kept = {
        name: _assign(TokenChoice(1, fixed_capacity=2, batch_prioritised=name))(probs, np.ones(5, bool))
        for name in (False, True)
    }
    np.testing.assert_array_equal(kept[False].source[:2], [0, 1])
    np.testing.assert_array_equal(kept[True].source[:2], [3, 1])


@pytest.mark.parametrize("seed", range(3))
def test_experts_take_their_best_tokens(seed):
    router = ExpertChoice(train_capacity=1.5)
    probs, mask = _probs(seed), _mask(seed)
    slots = _assign(router)(probs, mask)
    valid = np.flatnonzero(mask)
    room = _capacity(router, len(valid))
    assert _capacity(router, TOKENS) == 4 and slots.slot_of is None
    for expert in range(EXPERTS):
        best = valid[np.argsort(-probs[valid, expert], kind="stable")][:room]
        np.testing.assert_array_equal(slots.source[4 * expert :][:4], [*best, *[TOKENS] * (4 - room)])
        np.testing.assert_array_equal(slots.gates[4 * expert :][:room], probs[best, expert])
    assert int(slots.offered) == len(valid)
    assert int(slots.dropped) == len(set(valid) - set(np.asarray(slots.source).tolist()))
    assert not slots.chosen.any()


def test_experts_leave_rows_empty_rather_than_take_padding():
    mask = np.arange(TOKENS) < 2
    slots = _assign(ExpertChoice(train_capacity=1.5, min_capacity=4))(_probs(0), mask)
    np.testing.assert_array_equal(slots.kept, [2] * EXPERTS)
    holds = np.asarray(slots.source).reshape(EXPERTS, 4)
    assert set(holds[:, :2].flat) == {0, 1} and set(holds[:, 2:].flat) == {TOKENS}
    np.testing.assert_array_equal(np.asarray(slots.gates).reshape(EXPERTS, 4)[:, 2:], 0)


@functools.cache
def _blocks(router, num_local):
    def assign(probs, mask, first):
        experts, gates = top_k(probs, router.k, router.renormalize)
        return router.assign(experts, gates, mask, EXPERTS, first_local=first, num_local=num_local)

    return jax.jit(assign)


@pytest.mark.parametrize("num_local", [EXPERTS, 2])
def test_without_a_capacity_every_choice_has_a_row_in_its_experts_blocks(num_local):
    router, tokens = Dropless(2), 29
    probs, mask = _probs(3, tokens), _mask(3, tokens)
    best = np.argsort(-probs, axis=-1, kind="stable")[:, :2]
    block = router.block_size(tokens, EXPERTS)
    assert block == 8
    for first in range(EXPERTS - num_local + 1):
        slots = _blocks(router, num_local)(probs, mask, first)
        place = 0
        for expert in range(first, first + num_local):
            # First choices before second ones, in the order of the tokens.
            mine = [(j, s) for j in range(2) for s in range(tokens) if mask[s] and best[s, j] == expert]
            for row, (j, s) in enumerate(mine, start=place):
                assert int(slots.source[row]) == s and int(slots.slot_of[j, s]) == row
                np.testing.assert_allclose(slots.gates[row], probs[s, expert] / probs[s, best[s]].sum(), rtol=1e-6)
            assert int(slots.owned[expert - first]) == -(-len(mine) // block) * block
            padding = np.asarray(slots.source[place + len(mine) : place + int(slots.owned[expert - first])])
            assert (padding == tokens).all()
            place += int(slots.owned[expert - first])
        local = np.isin(best.T, range(first, first + num_local)) & mask
        np.testing.assert_array_equal(np.asarray(slots.slot_of) < len(slots.source), local)
        assert (np.asarray(slots.source[place:]) == tokens).all()


def test_the_blocks_of_any_choices_fit():
    router, tokens = Dropless(1), 16
    for loads in ([16, 0, 0, 0, 0], [9, 1, 1, 1, 4], [0, 8, 0, 8, 0], [1, 1, 1, 1, 12]):
        probs = np.float32(np.eye(EXPERTS))[np.repeat(np.arange(EXPERTS), loads)]
        slots = _blocks(router, EXPERTS)(probs, np.ones(tokens, bool), 0)
        np.testing.assert_array_equal(slots.kept, loads)
        assert (np.asarray(slots.slot_of) < len(slots.source)).all()


def test_block_sizes_follow_the_rows_of_an_expert():
    assert [Dropless(2).block_size(tokens, 8) for tokens in (1, 128, 256, 1024, 2**20)] == [8, 8, 16, 64, 128]


@pytest.mark.parametrize(
    ("router", "group", "expected"),
    [
        (TokenChoice(1, 1.25, 2.0), 512, (80, 128)),
        (TokenChoice(2, 1.25, 2.0), 512, (80, 128)),
        (TokenChoice(2, 1.25, 2.0, capacity_times_k=True), 512, (160, 256)),
        (TokenChoice(1, 1.25, 1.75), 16, (2, 4)),  # 2.5 and 3.5: half to even, as flaxformer rounds.
        (TokenChoice(1, 1.0, 1.0, min_capacity=4), 8, (4, 4)),
        (TokenChoice(1, 1.0, 1.0, min_capacity=4), 1, (1, 1)),
        (TokenChoice(1, 1.0, 1.0, min_capacity=4), 0, (0, 0)),
        (TokenChoice(1, 0.01, 100.0), 8, (1, 8)),
        (TokenChoice(1, fixed_capacity=64), 512, (64, 64)),
        (TokenChoice(1, fixed_capacity=64), 48, (48, 48)),
        (ExpertChoice(1.0, 2.0), 512, (64, 128)),
    ],
)
def test_capacities(router, group, expected):
    assert tuple(int(router.capacities(group, 8, training)[-1]) for training in (True, False)) == expected


@pytest.mark.parametrize("num_experts", [1, 5, 8, 64])
@pytest.mark.parametrize("factor", [0.01, 0.7, 1.0, 1.25, 1.5, 2.0, 7.0, 100.0])
def test_valid_tokens_are_worth_what_a_group_of_them_is(factor, num_experts):
    for settings in ({}, {"min_capacity": 4}, {"k": 2, "capacity_times_k": True}, {"fixed_capacity": 6}):
        router = TokenChoice(train_capacity=factor, **settings)
        found = router.capacities(300, num_experts, True)
        np.testing.assert_array_equal(found, [_capacity(router, n, num_experts) for n in range(301)])
        assert (np.diff(found) >= 0).all()
        np.testing.assert_array_equal(router.capacities(90, num_experts, True), found[:91])


EVERY_MASK = np.asarray(list(itertools.product((False, True), repeat=7)))


@pytest.mark.parametrize(
    "router",
    [ROUTERS["switch"], ROUTERS["top3"], TokenChoice(2, min_capacity=2, batch_prioritised=True), ExpertChoice(1.5)],
    ids=["switch", "top3", "prioritised", "experts"],
)
def test_experts_take_no_more_for_padding(router):
    """All masks of seven tokens, with as many choices in demand as there can be."""
    probs = jnp.asarray(np.random.default_rng(4).dirichlet(np.linspace(4, 0.5, EXPERTS), 7), jnp.float32)
    slots = jax.jit(jax.vmap(functools.partial(router.assign, probs, training=True)))(EVERY_MASK)
    valid = EVERY_MASK.sum(1)
    room = np.asarray([_capacity(router, n) for n in valid])
    wanted = np.tile(valid[:, None], EXPERTS)
    if isinstance(router, TokenChoice):
        best = np.argsort(-np.asarray(probs), axis=-1, kind="stable")[:, : router.k]
        wanted = EVERY_MASK.astype(int) @ (best[..., None] == np.arange(EXPERTS)).sum(1)
    np.testing.assert_array_equal(slots.kept, np.minimum(wanted, room[:, None]))
    held = (np.asarray(slots.source) < 7).reshape(len(EVERY_MASK), EXPERTS, -1)
    np.testing.assert_array_equal(held.sum(-1), slots.kept)
    assert held.shape[-1] == _capacity(router, 7)


@pytest.mark.parametrize(
    ("group", "size"), [("row", 6), ("batch", 24), (24, 24), (8, 8), (7, 6), (5, 4), (1, 1), (1000, 24)]
)
def test_group_sizes_divide_the_batch(group, size):
    assert TokenChoice(group=group).group_size(4, 6) == ExpertChoice(group=group).group_size(4, 6) == size
    assert TokenChoice(group=group).group_size(24, 1) == 1


def test_uniform_routing_has_a_balance_loss_of_k():
    mask = jnp.ones((2, 4), bool)
    for k in (1, 2, 4):
        chosen = jnp.asarray([[[(s + j) % 4 == e for e in range(4)] for s in range(4)] for j in range(k)], jnp.float32)
        chosen = jnp.tile(chosen.sum(0)[None], (2, 1, 1))
        assert float(balance_loss(*shares(jnp.full((2, 4, 4), 0.25), chosen, mask))) == k


def test_one_expert_for_all_has_a_balance_loss_of_e():
    one = jnp.tile(jax.nn.one_hot(2, 4), (3, 5, 1))
    assert float(balance_loss(*shares(one, one, jnp.ones((3, 5), bool)))) == 4


def test_the_balance_loss_and_its_gradient_are_those_of_the_formula():
    rng = np.random.default_rng(5)
    logits, mask = rng.normal(size=(3, 7, 4)), rng.random((3, 7)) < 0.7
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-probs, axis=-1)[..., :2]
    chosen = np.stack([(best == e).any(-1) for e in range(4)], -1) * mask[..., None]
    n = mask.sum(-1)[:, None]
    f, p = chosen.sum(1) / n, (probs * mask[..., None]).sum(1) / n

    def loss(logits):
        probs = jax.nn.softmax(logits, -1)
        return balance_loss(*shares(probs, jnp.asarray(chosen, jnp.float32), jnp.asarray(mask)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(value, np.average(4 * (f * p).sum(-1), weights=n[:, 0]), rtol=1e-5)
    inner = (f[:, None] * probs).sum(-1, keepdims=True)
    expected = 4 * probs * (f[:, None] - inner) * mask[..., None] / mask.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_z_loss_and_its_gradient_are_those_of_the_formula():
    rng = np.random.default_rng(6)
    logits, mask = 2 * rng.normal(size=(3, 7, 4)), rng.random((3, 7)) < 0.7
    log_z = np.log(np.exp(logits).sum(-1))
    value, gradient = jax.jit(jax.value_and_grad(router_z_loss))(jnp.asarray(logits, jnp.float32), jnp.asarray(mask))
    np.testing.assert_allclose(value, (log_z**2)[mask].mean(), rtol=1e-5)
    probs = np.exp(logits - log_z[..., None])
    expected = 2 * log_z[..., None] * probs * mask[..., None] / mask.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_entropy_is_that_of_valid_tokens():
    logits = jnp.log(jnp.asarray([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-9, 1e-9], [1.0, 1e-9, 1e-9, 1e-9]]))
    for valid, expected in (([1, 0, 0], np.log(4)), ([1, 1, 0], 1.5 * np.log(2)), ([0, 0, 1], 0.0), ([0, 0, 0], 0.0)):
        np.testing.assert_allclose(router_entropy(logits, jnp.asarray(valid, bool)), expected, atol=1e-6)


def test_statistics_of_nothing_are_zero():
    zeros = jnp.zeros((1, 3, 4))
    statistics = routing_statistics(zeros, jnp.zeros((1, 3), bool), zeros, jnp.zeros(4, jnp.int32), jnp.zeros(()))
    for leaf in jax.tree.leaves(statistics):
        assert leaf.dtype == jnp.float32 and not leaf.any()


def test_statistics_of_an_overflow():
    logits = jnp.log(jnp.asarray([[[0.7, 0.1, 0.2]] * 4]))
    mask = jnp.asarray([[True, True, True, False]])
    slots = jax.vmap(TokenChoice(2, fixed_capacity=2).assign)(jax.nn.softmax(logits, -1), mask)
    dropped = slots.dropped.sum() / slots.offered.sum()
    statistics = routing_statistics(logits, mask, slots.chosen, slots.kept.sum(0), dropped)
    np.testing.assert_allclose(statistics.balance_loss, 3 * (0.7 + 0.2), rtol=1e-6)
    np.testing.assert_allclose(statistics.z_loss, 0, atol=1e-12)
    np.testing.assert_allclose(statistics.load, [0.5, 0, 0.5])
    np.testing.assert_allclose(statistics.dropped, 2 / 6)
    np.testing.assert_allclose(statistics.entropy, -sum(p * np.log(p) for p in (0.7, 0.1, 0.2)), rtol=1e-5)


def test_padding_is_no_choice():
    mask = jnp.asarray([True, False])
    experts = jnp.where(mask[None], jnp.asarray([[1, 1], [0, 2]]), 3)
    np.testing.assert_array_equal(count_choices(experts, 3), [[1, 1, 0], [0, 0, 0]])


def test_gates_are_differentiable_and_equal_probabilities_are_told_apart_by_number():
    probs = jnp.asarray([[0.25, 0.25, 0.4, 0.1], [0.1, 0.3, 0.3, 0.3]])
    experts, gates = top_k(probs, 2, False)
    np.testing.assert_array_equal(experts, [[2, 1], [0, 2]])
    np.testing.assert_array_equal(top_k(probs, 1, False)[0], [[2, 1]])
    np.testing.assert_array_equal(gates, np.float32([[0.4, 0.3], [0.25, 0.3]]))
    np.testing.assert_allclose(top_k(probs, 2, True)[1].sum(0), 1, rtol=1e-6)
    gradient = jax.grad(lambda probs: (top_k(probs, 2, False)[1] * jnp.asarray([[1.0, 2.0], [3.0, 4.0]])).sum())(probs)
    np.testing.assert_array_equal(gradient, [[3, 0, 1, 0], [0, 2, 4, 0]])


@pytest.mark.parametrize("choosing", ["tokens", "experts"])
def test_moving_rows_and_its_gradient_are_those_of_a_matrix(choosing):
    router = TokenChoice(2, train_capacity=1.2) if choosing == "tokens" else ExpertChoice(2.0)
    slots = _assign(router)(_probs(1), _mask(1))
    matrix = np.float32(np.asarray(slots.source)[:, None] == np.arange(TOKENS))
    rng = np.random.default_rng(0)
    x, rows = rng.normal(size=(TOKENS, 3)).astype(np.float32), rng.normal(size=(len(matrix), 3)).astype(np.float32)
    there, there_transposed = jax.vjp(lambda x: distribute(x, slots.source, slots.slot_of), jnp.asarray(x))
    back, back_transposed = jax.vjp(
        lambda rows: collect(rows, slots.source, slots.slot_of, jnp.zeros(TOKENS, bool)), jnp.asarray(rows)
    )
    np.testing.assert_array_equal(there, matrix @ x)
    np.testing.assert_array_equal(back_transposed(jnp.asarray(x))[0], matrix @ x)
    np.testing.assert_allclose(back, matrix.T @ rows, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(there_transposed(jnp.asarray(rows))[0], matrix.T @ rows, rtol=1e-6, atol=1e-6)


def test_gates_of_rows_pass_their_gradient_on():
    router, mask = TokenChoice(2, train_capacity=1.3), jnp.asarray(_mask(2))
    weights = np.random.default_rng(1).normal(size=EXPERTS * 3).astype(np.float32)

    def weighted(probs):
        slots = router.assign(probs, mask, training=True)
        return (slots.gates * weights).sum(), slots.source

    gradient, source = jax.jit(jax.grad(weighted, has_aux=True))(jnp.asarray(_probs(2)))
    expected = np.zeros((TOKENS, EXPERTS), np.float32)
    for row, token in enumerate(np.asarray(source)):
        if token < TOKENS:
            expected[token, row // 3] += weights[row]
    assert np.count_nonzero(expected) > 10
    np.testing.assert_array_equal(gradient, expected)


def test_jitter_multiplies_by_numbers_around_one():
    x = jnp.full((50, 40), 2.0)
    noisy = np.asarray(jittered(x, 0.1, jax.random.key(0)))
    assert 1.8 <= noisy.min() < 1.81 and 2.19 < noisy.max() <= 2.2
    assert jittered(x, 0.1, None) is x and jittered(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize(
    "router", [TokenChoice(2, group=64), TokenChoice(fixed_capacity=3), ExpertChoice(), Dropless()]
)
def test_routers_are_plain_values(router):
    assert type(router)(**json.loads(json.dumps(dataclasses.asdict(router)))) == router
    assert hash(router) == hash(dataclasses.replace(router))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenChoice(0), "TokenChoice.k is 0: expected at least 1."),
        (lambda: TokenChoice(train_capacity=0.0), "TokenChoice.train_capacity is 0.0: expected a number above 0."),
        (lambda: TokenChoice(eval_capacity=-1.0), "TokenChoice.eval_capacity is -1.0"),
        (lambda: TokenChoice(min_capacity=0), "TokenChoice.min_capacity is 0: expected at least 1."),
        (lambda: TokenChoice(fixed_capacity=0), "TokenChoice.fixed_capacity is 0: expected at least 1."),
        (lambda: TokenChoice(jitter=1.0), r"TokenChoice.jitter is 1.0: expected a number in \[0, 1\)."),
        (
            lambda: TokenChoice(group="rows"),
            "TokenChoice.group is 'rows': expected 'row', 'batch' or a number of tokens",
        ),
        (lambda: TokenChoice(group=0), "TokenChoice.group is 0"),
        (lambda: ExpertChoice(train_capacity=float("nan")), "ExpertChoice.train_capacity is nan"),
        (lambda: Dropless(0), "Dropless.k is 0"),
        (lambda: Dropless(jitter=-0.1), "Dropless.jitter is -0.1"),
        (lambda: TokenChoice(9).check(False, 8), "TokenChoice.k is 9: expected at most the 8 experts there are."),
        (lambda: Dropless(9).check(True, 8), "Dropless.k is 9"),
        (
            lambda: TokenChoice(batch_prioritised=True).check(True, 8),
            "batch_prioritised is True in a causal stack.*leaks the future",
        ),
        (
            lambda: ExpertChoice().check(True, 8),
            "ExpertChoice in a causal stack.*leaks the future. Use TokenChoice or Dropless",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_good_settings_are_not():
    for router in (TokenChoice(batch_prioritised=True), ExpertChoice(), Dropless(8)):
        router.check(False, 8)
    for router in (TokenChoice(8), Dropless(1)):
        router.check(True, 8)
