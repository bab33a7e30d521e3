"""A trained scorer as a reward."""

import contextlib
import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from clp_jax.array_types import Array, Float, Int, Params
from clp_jax.host_rows import HostRows, InParts, place_active, place_whole
from clp_jax.models.policy import Policy
from clp_jax.partitioning import without_mesh
from clp_jax.rewards.pairs import join
from clp_jax.rewards.protocol import RewardInputs


class LearnedReward:
    """The score of a reward model, squashed so that its extremes are not worth chasing.

    The raw score of a Bradley-Terry model, and the log-odds of a classifier, are unbounded; a policy that climbs them
    leaves what the model was trained on. The reward is ``bound · tanh(score / bound)``.

    The rows of a batch that several devices hold are scored where they are, by parameters spread over the mesh as those of a
    policy are: then all processes score the same batches in the same order.

    Args:
        name: of the objective.
        policy: the scorer.
        params: its parameters: arrays, or what is read in parts (`InParts`) when it goes to its devices.
        vocabulary_fingerprint: of the vocabulary it was trained with.
        bound: the largest reward.
        document_length: tokens of a document it was trained with; longer ones are cut.
    """

    def __init__(
        self,
        name: str,
        policy: Policy,
        params: Params,
        vocabulary_fingerprint: str,
        *,
        bound: float = 4.0,
        document_length: int | None = None,
    ):
        if bound <= 0:
            raise ValueError(f"LearnedReward {name!r}: bound is {bound}, expected a positive number.")
        self._name = name
        self._params = params
        self._scorers: dict[NamedSharding | None, Callable[..., Array]] = {}
        self.policy = policy
        self.vocabulary_fingerprint = vocabulary_fingerprint
        self.bound = bound
        self.document_length = document_length

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's name."""
        return (self._name,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells it from other models of its name."""
        digest = hashlib.sha256(f"{self._name} {self.bound} {self.document_length}".encode())
        for leaf in jax.tree.leaves(self._params):
            array = leaf.read() if isinstance(leaf, InParts) else np.asarray(leaf)
            digest.update(array.tobytes())
        return digest.hexdigest()

    def __call__(self, inputs: RewardInputs) -> Float[np.ndarray, "R 1"]:
        """See `RewardFunction`; compiled once for each shape of batch."""
        documents = inputs.prompt_tokens[:, : self.document_length]
        joined = join(documents, inputs.completion_tokens, self.policy.config.trunk.pad_id)
        rows = inputs.rows or HostRows(len(documents))
        # Rows that are on no mesh are scored by one device, whatever the mesh that generates.
        with without_mesh() if rows.mesh is None else contextlib.nullcontext():
            return rows.fetch(self._scorer(rows)(*rows.place(joined)))[:, None]

    def _scorer(self, rows: HostRows) -> Callable[..., Array]:
        # What is traced reads the active mesh, which is no part of JAX's own key.
        where = None if rows.mesh is None else rows.sharding
        if where not in self._scorers:
            self._scorers[where] = self._new_scorer(where)
        return self._scorers[where]

    def _new_scorer(self, where: NamedSharding | None) -> Callable[..., Array]:
        def score(params: Params, tokens: Int[Array, "R U"], kinds: Int[Array, "R U"]) -> Float[Array, "R"]:
            return self.bound * jnp.tanh(self.policy.bind(params).score(tokens, kinds) / self.bound)

        if where is None:
            (device,) = jnp.zeros(()).devices()
            params = place_whole(self._params, jax.tree.map(lambda _: SingleDeviceSharding(device), self._params))
        else:
            params = place_active(self._params, self.policy.logical_axes())
        return functools.partial(jax.jit(score, out_shardings=where), params)
