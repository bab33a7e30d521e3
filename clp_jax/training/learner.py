"""The one learner: gradients, accumulation, clipping, the optimizer and the moving average, in one jitted update."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from clp_jax.array_types import Array, Metrics, Params, PRNGKeyArray, PyTree
from clp_jax.host_rows import place_whole
from clp_jax.partitioning import Rules, constrain, make_mesh, named_sharding, tree_shardings, use_mesh
from clp_jax.training.digests import digest
from clp_jax.training.guards import Guards
from clp_jax.training.optimizers import OptimizerConfig
from clp_jax.training.stage import Derived, LossFn, Outline, StageSetup
from clp_jax.training.train_state import TrainState, full_axes, new_state

LOSS_KEY = 0  # The purpose of the learner's random key; other purposes belong to the sources.


class Learner:
    """Descends a loss, whatever the stage.

    Args:
        loss_fn: ``(params, frozen, batch, key) -> (sum, weight, metrics)``; see `clp_jax.training.stage.LossFn`.
        optimizer: its settings.
        logical_axes: names for each dimension of each parameter; None is replicated.
        frozen_logical_axes: the same for the frozen tree.
        mesh: all devices, data-parallel, by default.
        rules: maps logical names to mesh axes.
        accumulation: micro-batches of a batch. Sums of losses and weights add up over them, so the gradient is that of
            the whole batch to rounding, unless the loss compares rows (centred advantages: rows of one micro-batch).
        ema_decay: None keeps no moving average.
        guards: which updates are left out.

    Raises:
        ValueError: for an accumulation below 1, or a decay outside ``(0, 1)``.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        optimizer: OptimizerConfig,
        *,
        logical_axes: PyTree = None,
        frozen_logical_axes: PyTree = None,
        mesh: Mesh | None = None,
        rules: Rules = Rules(),
        accumulation: int = 1,
        ema_decay: float | None = None,
        guards: Guards = Guards(),
    ):
        if accumulation < 1:
            raise ValueError(f"Learner: accumulation is {accumulation}: expected at least 1.")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"Learner: ema_decay is {ema_decay}: expected a number in (0, 1), or None for no average.")
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._transformation = optimizer.build(logical_axes)
        self._axes = logical_axes
        self._frozen_axes = frozen_logical_axes
        self._mesh = make_mesh() if mesh is None else mesh
        self._rules = rules
        self._accumulation = accumulation
        self._ema_decay = ema_decay
        self._guards = guards
        self._jitted: Any = None

    @classmethod
    def for_stage(cls, stage: StageSetup | Outline, optimizer: OptimizerConfig, **settings: Any) -> "Learner":
        """The learner of a stage.

        Args:
            stage: has the loss and the logical axes.
            optimizer: its settings.
            **settings: the other ones.
        """
        return cls(
            stage.loss_fn,
            optimizer,
            logical_axes=stage.logical_axes,
            frozen_logical_axes=stage.frozen_logical_axes,
            **settings,
        )

    @property
    def mesh(self) -> Mesh:
        """Of its devices."""
        return self._mesh

    @property
    def compile_count(self) -> int:
        """Programs compiled for the update so far; stays at 1 while shapes do."""
        return 0 if self._jitted is None else self._jitted._cache_size()

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Makes what is traced inside, rollouts and evaluations too, follow the learner's mesh and rules."""
        return use_mesh(self._mesh, self._rules)

    def abstract_state(self, params: Params | Callable[[], Params] | Derived) -> TrainState:
        """Shapes, types and shardings of the state, without making it; what a checkpoint is restored into.

        Args:
            params: arrays, shapes, or what makes them; see `clp_jax.training.stage.StageSetup`.
        """
        abstract = jax.eval_shape(functools.partial(self._new_state, seed=0), self._derived(params).abstract())
        shardings = self._state_shardings(abstract)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

    def init_state(self, params: Params | Callable[[], Params] | Derived, seed: int) -> TrainState:
        """The state before the first step, each array made where it lives.

        Args:
            params: arrays, or what makes them; see `clp_jax.training.stage.StageSetup`.
            seed: decides every random number of the learner.
        """
        made = self._derived(params)
        return self.initialiser(made, seed)(*map(self._place, made.arguments, made.logical_axes))

    def initialiser(self, params: Params | Callable[[], Params] | Derived, seed: int) -> Any:
        """The program of `init_state`: of no argument where `params` is a function, of the arrays otherwise."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state(params))
        function = self._derived(params).function
        return jax.jit(lambda *trees: self._new_state(function(*trees), seed), out_shardings=shardings)

    def _derived(self, params: Params | Callable[[], Params] | Derived) -> Derived:
        if isinstance(params, Derived):
            return params
        return Derived(params) if callable(params) else Derived(lambda tree: tree, (params,), (self._axes,))

    def place_frozen(self, frozen: PyTree) -> PyTree:
        """The frozen tree on the mesh, by its logical axes."""
        return self._place(frozen, self._frozen_axes)

    def _place(self, tree: PyTree, logical_axes: PyTree) -> PyTree:
        axes = full_axes(logical_axes, tree)
        return place_whole(tree, tree_shardings(axes, self._mesh, self._rules, tree))

    def place_batch(self, batch: PyTree) -> PyTree:
        """A batch on the mesh, its examples spread over the data-parallel devices.

        Raises:
            ValueError: when the examples do not divide among micro-batches and devices.
        """
        return jax.device_put(batch, self._batch_sharding(batch))

    def _batch_sharding(self, batch: PyTree) -> NamedSharding:
        sharding = named_sharding(("batch",), self._mesh, self._rules)
        shards = _shards(sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            rows = leaf.shape[0] if leaf.ndim else 0
            if rows == 0 or rows % (self._accumulation * shards):
                raise ValueError(
                    f"batch{jax.tree_util.keystr(path)} has shape {leaf.shape}: its leading dimension must divide into "
                    f"{self._accumulation} micro-batches on {shards} devices. Change the batch size or the accumulation."
                )
        return sharding

    def update(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        """One step.

        Args:
            state: is donated: use the returned one from here on.
            frozen: what `place_frozen` gave.
            batch: a pytree of numpy or jax arrays that lead with examples; global ones where there are several processes.

        Returns:
            The next state, and metrics on the device: what the loss reports, and ``loss`` (mean over the weight),
            ``weight``, ``grad_norm`` (before clipping), ``update_norm``, ``param_norm``, ``learning_rate``, ``skipped``
            (updates left out so far), ``non_finite`` (in a row), ``grad_digest`` and ``param_digest`` (of the new parameters).
        """
        batch = self.place_batch(batch)
        if self._jitted is None:
            self._jitted = self._program(state, self._update)
        with self.activate():
            return self._jitted(state, frozen, batch)

    def lower(self, params: Params, frozen: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """The update for arrays of these shapes, ready to be compiled; the devices of the mesh need not be here.

        Raises:
            ValueError: when the examples do not divide among micro-batches and devices.
        """
        return self.trace(params, frozen, batch).lower()

    def trace(self, params: Params, frozen: PyTree, batch: PyTree) -> jax.stages.Traced:
        """The update for arrays of these shapes, ready to be lowered; the mesh may be one of no devices (`AbstractMesh`).

        Raises:
            ValueError: when the examples do not divide among micro-batches and devices.
        """
        state, sharding = self.abstract_state(params), self._batch_sharding(batch)
        leaves, treedef = jax.tree.flatten(batch)
        structure: Any = treedef
        examples = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in leaves]

        def update(state: TrainState, frozen: PyTree, leaves: list[Array]) -> tuple[TrainState, Metrics]:
            # JAX describes arguments with trees of its own things, which make no valid batch.
            return self._update(state, frozen, structure.unflatten(leaves))

        with self.activate():
            return self._program(state, update).trace(state, self.abstract(frozen, self._frozen_axes), examples)

    def abstract(self, tree: PyTree, logical_axes: PyTree) -> PyTree:
        """Shapes, types and shardings of a tree by its logical axes, without making it."""
        shardings = tree_shardings(full_axes(logical_axes, tree), self._mesh, self._rules, tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def _program(self, state: TrainState, update: Callable[..., Any]) -> Any:
        replicated = named_sharding((), self._mesh, self._rules)
        return jax.jit(update, out_shardings=(self._state_shardings(state), replicated), donate_argnums=0)

    def _new_state(self, params: Params, seed: int) -> TrainState:
        # Gradients reach the optimizer in float32, so its slots are float32 from the start.
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return new_state(
            params, self._transformation.init(wide), seed, self._ema_decay is not None, self._guards.init()
        )

    def _update(self, state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, Metrics]:
        loss_sum, weight, metric_sums, grads = self._sums(state.params, frozen, batch, state.key(LOSS_KEY))
        scale = _inverse(weight)
        updates, opt_state = self._transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        loss, grad_norm = loss_sum * scale, optax.tree.norm(grads)
        make, guard = self._guards.judge(state.guard, loss, grad_norm, weight)
        made = (params, opt_state, self._average(state.ema, params))
        params, opt_state, ema = jax.tree.map(
            functools.partial(jnp.where, make), made, (state.params, state.opt_state, state.ema)
        )
        metrics = {name: value * scale for name, value in metric_sums.items()} | {
            "loss": loss,
            "weight": weight,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(make, optax.tree.norm(updates), 0.0),
            "param_norm": optax.tree.norm(params),
            # The optimizer's own count leaves out what was skipped.
            "learning_rate": jnp.asarray(self._optimizer.schedule(state.step - state.guard.skipped), jnp.float32),
            "skipped": guard.skipped,
            "non_finite": guard.non_finite,
            "grad_digest": digest(grads),
            "param_digest": digest(params),
        }
        return TrainState(state.step + 1, params, opt_state, ema, state.rng, guard), metrics

    def _sums(
        self, params: Params, frozen: PyTree, batch: PyTree, key: PRNGKeyArray
    ) -> tuple[Array, Array, Metrics, Params]:
        """Loss, weight and metrics, each summed over the examples, and the gradient of the mean, in float32."""

        def one(
            part: PyTree, index: Array | int, scale: Callable[[Array], Array]
        ) -> tuple[Array, Array, Metrics, Params]:
            """Of a part of the batch; `scale` makes of its weight what its gradient is multiplied with."""

            def loss(params):
                loss_sum, weight, metrics = self._loss_fn(params, frozen, part, jax.random.fold_in(key, index))
                weight = jax.lax.stop_gradient(weight)
                sums = {name: value.astype(jnp.float32) * weight for name, value in metrics.items()}
                return loss_sum, (weight, jax.lax.stop_gradient(sums))

            loss_sum, pull_back, (weight, sums) = jax.vjp(loss, params, has_aux=True)
            (grads,) = pull_back(scale(weight).astype(loss_sum.dtype))
            return jax.tree.map(lambda x: x.astype(jnp.float32), (loss_sum, weight, sums, grads))

        if self._accumulation == 1:
            # The gradient comes scaled out of the backward pass: scaled after it, each of its readers would do so again.
            return one(batch, 0, _inverse)
        # Leaves, because a batch of stacked micro-batches is not a valid batch: its dimensions are one too many.
        leaves, treedef = jax.tree.flatten(batch)
        structure: Any = treedef
        parts = [self._split(leaf) for leaf in leaves]
        shapes = jax.eval_shape(lambda: one(structure.unflatten([part[0] for part in parts]), 0, jnp.ones_like))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total, indexed):
            index, part = indexed
            return jax.tree.map(jnp.add, total, one(structure.unflatten(part), index, jnp.ones_like)), None

        *sums, grad_sums = jax.lax.scan(add, zeros, (jnp.arange(self._accumulation), parts))[0]
        scale = _inverse(sums[1])
        return *sums, jax.tree.map(lambda g: g * scale, grad_sums)

    def _split(self, leaf: Array) -> Array:
        # Slices of consecutive rows, so that rows which belong together (samples of a prompt) stay together.
        leaf = leaf.reshape(self._accumulation, -1, *leaf.shape[1:])
        return constrain(leaf, None, "batch", *[None] * (leaf.ndim - 2))

    def _average(self, ema: Params | None, params: Params) -> Params | None:
        if ema is None or self._ema_decay is None:
            return None
        step = 1 - self._ema_decay
        return jax.tree.map(lambda old, new: old + step * (new - old), ema, params)

    def _state_shardings(self, state: TrainState) -> TrainState:
        axes = full_axes(self._axes, state.params)
        structure: Any = jax.tree.structure(state.params)

        def like_params(tree: PyTree) -> PyTree:
            def one(parameter, slot, names):
                # A factored slot keeps the rank of its parameter: a dimension that was summed out has size 1.
                same_rank = slot.ndim == parameter.ndim
                kept = [n if same_rank and slot.shape[i] == parameter.shape[i] else None for i, n in enumerate(names)]
                return named_sharding(
                    kept if same_rank else (), self._mesh, self._rules, slot.shape if same_rank else ()
                )

            return jax.tree.map(one, state.params, tree, axes)

        def is_slots(tree: PyTree) -> bool:
            return jax.tree.structure(tree) == structure

        replicated = named_sharding((), self._mesh, self._rules)
        return TrainState(
            step=replicated,
            params=like_params(state.params),
            opt_state=jax.tree.map(
                lambda t: like_params(t) if is_slots(t) else replicated, state.opt_state, is_leaf=is_slots
            ),
            ema=None if state.ema is None else like_params(state.ema),
            rng=replicated,
            guard=jax.tree.map(lambda _: replicated, state.guard),
        )


def learner_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of `clp_jax.train.train` is the learner's, for `Learner.for_stage`."""
    own = inspect.signature(Learner).parameters
    return {name: value for name, value in arguments.items() if name in own}


def _inverse(weight: Array) -> Array:
    """``float32[]``. A batch without a single target has weight 0 and sums 0: it must not turn parameters into NaN."""
    weight = weight.astype(jnp.float32)
    return 1 / jnp.where(weight > 0, weight, 1)


def _shards(sharding: NamedSharding) -> int:
    """How many devices hold rows of a batch of their own."""
    spread = sharding.spec[0] if sharding.spec else None
    names = (spread,) if isinstance(spread, str) else (spread or ())
    shards = 1
    for name in names:
        shards *= sharding.mesh.shape[name]
    return shards
