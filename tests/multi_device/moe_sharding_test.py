"""Experts on eight virtual devices: the numbers of one device, tokens that move, and kernels that stay."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from rounding import assert_same_to_rounding

from clp_jax.nn.moe import MoE
from clp_jax.nn.routing import Dropless, ExpertChoice, TokenChoice
from clp_jax.partitioning import Rules, active_axes, active_mesh, make_mesh, use_groups, use_mesh

B, T, D, F, E = 8, 12, 16, 24, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
MASK = jnp.asarray(RNG.random((B, T)) < 0.8)
COTANGENT = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)

EXPERT = (("expert", "expert"), ("act_expert", "expert"))
DATA = ("batch", ("slice", "data", "fsdp", "expert"))
LAYOUTS = {
    "expert": (dict(data=2, expert=4), Rules((DATA, *EXPERT))),
    "all": (
        dict(data=1, fsdp=2, expert=2, tensor=2),
        Rules((DATA, *EXPERT, ("embed", "fsdp"), ("mlp", "tensor"), ("act_mlp", "tensor"))),
    ),
    "tokens_everywhere": (dict(data=4, expert=2), Rules((("batch", "data"), *EXPERT))),
    "data": (dict(data=8), Rules((DATA,))),
    "length": (dict(data=2, expert=2, sequence=2), Rules((DATA, *EXPERT, ("length", "sequence")))),
}
ROUTERS = {
    "switch": TokenChoice(1, eval_capacity=1.25),
    "top2_tokens": TokenChoice(2, eval_capacity=1.0, group=6, renormalize=True),
    "experts": ExpertChoice(eval_capacity=1.0),
    "dropless": Dropless(2),
}


def _moe(router) -> MoE:
    settings = dict(activation="gelu", gated=True, dropout_rate=0.0, shared_dim=8, dtype=jnp.dtype("float32"))
    return MoE(nnx.Rngs(0), D, F, E, router=router, router_stddev=1.0, **settings)


def _run(graph, state, x, mask, cotangent):
    def loss(state, x):
        y, statistics = nnx.merge(graph, state)(x, mask)
        return jnp.sum(y * cotangent) + statistics.balance_loss + statistics.z_loss, (y, statistics)

    (_, (y, statistics)), (parameters, of_x) = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)
    return y, statistics, parameters, of_x


def _placed(state, mesh, rules):
    def place(_, variable):
        sharding = NamedSharding(mesh, rules.spec(variable.get_metadata("logical_axes")))
        return variable.replace(jax.device_put(variable[...], sharding))

    return nnx.map_state(place, state)


@functools.cache
def _on_one(router):
    graph, state = nnx.split(_moe(ROUTERS[router]))
    return jax.jit(functools.partial(_run, graph))(state, X, MASK, COTANGENT)


@functools.cache
def _compiled(layout, router):
    """The program of eight devices, and its arguments on them."""
    sizes, rules = LAYOUTS[layout]
    mesh = make_mesh(**sizes)
    graph, state = nnx.split(_moe(ROUTERS[router]))
    batch = NamedSharding(mesh, rules.spec(("batch",)))
    arguments = (_placed(state, mesh, rules), *jax.device_put((X, MASK, COTANGENT), batch))
    with use_mesh(mesh, rules):
        return jax.jit(functools.partial(_run, graph)).lower(*arguments).compile(), arguments


@pytest.mark.parametrize(
    ("layout", "router"),
    [*((layout, router) for layout in ("expert", "all") for router in ROUTERS)]
    + [(layout, router) for layout in ("tokens_everywhere", "data", "length") for router in ("switch", "dropless")],
)
def test_eight_devices_compute_what_one_does(layout, router):
    assert jax.device_count() == 8
    program, arguments = _compiled(layout, router)
    assert_same_to_rounding(program(*arguments), _on_one(router))
    y, statistics, parameters, of_x = _on_one(router)
    assert all(np.any(leaf) for leaf in jax.tree.leaves((y, statistics.load, parameters, of_x)))


def _collectives(layout, router) -> list[tuple[str, tuple[int, ...]]]:
    """The collectives of a program and the shapes of what they make."""
    text = _compiled(layout, router)[0].as_text()
    found = []
    for line in text.splitlines():
        kind = re.search(
            r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(", line
        )
        if kind:
            for shape in re.findall(r"\w+\[([\d,]*)\]", kind[1]):
                found.append((kind[2], tuple(int(size) for size in shape.split(",") if size)))
    return found


@pytest.mark.parametrize("router", ["switch", "top2_tokens", "experts"])
def test_tokens_move_to_the_experts_by_all_to_all(router):
    found = _collectives("expert", router)
    kinds = [kind for kind, _ in found]
    assert "all-to-all" in kinds
    # Nobody gets another's kernels, nor tokens that are not for it.
    assert "all-gather" not in kinds, found


@pytest.mark.parametrize("router", ROUTERS)
def test_kernels_of_experts_stay_where_they_are(router):
    found = _collectives("expert", router)
    gathered = [shape for kind, shape in found if kind == "all-gather"]
    assert not any(sorted(shape[-2:]) == sorted((D, F)) for shape in gathered), gathered
    # Their gradients are summed over the data, for the experts of a device alone.
    reduced = [shape for kind, shape in found if kind == "all-reduce" and sorted(shape[-2:]) == sorted((D, F))]
    assert all(np.prod(shape) == D * F for shape in reduced) and reduced


def test_dropless_tokens_come_back_summed():
    kinds = {kind for kind, _ in _collectives("expert", "dropless")}
    assert {"all-gather", "reduce-scatter"} <= kinds


@pytest.mark.parametrize("router", ["switch", "dropless"])
@pytest.mark.parametrize("num_groups", [2, 8])
def test_groups_of_preferences_on_their_devices(router, num_groups):
    sizes, rules = dict(data=2, expert=4), LAYOUTS["expert"][1]
    mesh = make_mesh(**sizes)
    graph, state = nnx.split(_moe(ROUTERS[router]))
    many = jax.tree.map(lambda x: jnp.stack([x, x[..., ::-1]] * (num_groups // 2)), state)
    xs, masks, cotangents = (jnp.stack([x, jnp.flip(x, 0)] * (num_groups // 2)) for x in (X, MASK, COTANGENT))
    one = jax.jit(jax.vmap(functools.partial(_run, graph)))(many, xs, masks, cotangents)

    def grouped(*arguments):
        with use_groups(num_groups) as axes:
            assert "data" in axes and "expert" not in axes
            return jax.vmap(functools.partial(_run, graph), spmd_axis_name=axes)(*arguments)

    with use_mesh(mesh, rules):
        eight = jax.jit(grouped)(many, xs, masks, cotangents)
    assert_same_to_rounding(eight, one)


def test_the_active_layout_is_asked_by_name():
    assert active_mesh() is None and active_axes("batch", 8) == ()
    mesh = make_mesh(data=2, expert=4)
    with use_mesh(mesh, LAYOUTS["expert"][1]):
        assert active_mesh() is mesh
        assert active_axes("batch", 8) == ("data", "expert")
        assert active_axes("batch", 6) == ("data",)
        assert active_axes("batch", 5) == active_axes("mlp", 8) == ()
        with pytest.raises(ValueError, match="unknown logical axis 'act_experts'.*did you mean 'act_expert'"):
            active_axes("act_experts", 8)
