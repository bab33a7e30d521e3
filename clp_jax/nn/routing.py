"""Which tokens go to which experts: routers, and the slots that the chosen tokens take.

A router is a frozen dataclass of plain values. Given the probabilities of a group of tokens it makes `Slots`: for each row of
the experts' input, the token it holds and the weight of its output. Everything here is a pure function of one group;
`clp_jax.nn.moe` maps it over groups. What routers did, and their losses, is in `clp_jax.nn.routing_statistics`.

What a token gets never depends on padding: a router with a capacity has rows for all tokens of a group, because shapes are
static, and uses as many as the valid ones are worth, in training and in evaluation. flaxformer counts padding: where half of
a group is padding, its experts have twice the room. To have as much here, give twice the factor, or a `fixed_capacity`.

* `TokenChoice`: each token takes its k best experts while they have room (Switch, arXiv 2101.03961; GShard, 2006.16668;
  ST-MoE, 2202.08906).
* `ExpertChoice`: each expert takes its best tokens (arXiv 2202.09368).
* `Dropless`: each token takes its k best experts, which always have room (Mixtral, arXiv 2401.04088; MegaBlocks, 2211.15841).
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from clp_jax.array_types import Array, Bool, Float, Int, PRNGKeyArray
from clp_jax.nn.slots import Slots, fill_slots, rank_choices

MAX_BLOCK = 128
MIN_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Each token takes its `k` best experts, as long as they have room in its group.

    All first choices of a group go before all second choices, and each in the order of the tokens: what an earlier token
    gets never depends on a later one's first choice, but with ``k > 1`` a second choice may give way to it.

    Attributes:
        k: experts of a token; 1 is Switch.
        train_capacity: rows of an expert, over the group's valid tokens divided by the number of experts, in training.
        eval_capacity: the same in evaluation.
        min_capacity: rows of an expert, at least (flaxformer: 4).
        capacity_times_k: whether the capacity is multiplied by `k` (GShard) or not (flaxformer).
        fixed_capacity: rows of an expert whatever the group's size (Hugging Face's ``expert_capacity``); the factors
            then say nothing.
        group: what shares the capacity: ``"row"`` (one sequence, as in Hugging Face's Switch), ``"batch"``, or a number of
            tokens, as nearly as the batch can be divided (flaxformer). Rows of one token each, as in decoding, share none.
        batch_prioritised: tokens with the highest first probability go first (V-MoE, arXiv 2106.05974, section 4);
            encoders only.
        renormalize: whether the weights of a token's choices sum to one (Mixtral), or are the raw probabilities (Switch).
            With ``k=1`` the weight is then 1, and the router learns from the auxiliary losses alone.
        jitter: the router's input is multiplied by uniform noise in ``[1 - jitter, 1 + jitter]`` in training.

    Raises:
        ValueError: for a value out of range.
    """

    k: int = 1
    train_capacity: float = 1.25
    eval_capacity: float = 2.0
    min_capacity: int = 1
    capacity_times_k: bool = False
    fixed_capacity: int | None = None
    group: int | str = "row"
    batch_prioritised: bool = False
    renormalize: bool = False
    jitter: float = 0.0

    def __post_init__(self):
        _check_least(self, "k", 1)
        _check_capacity(self)
        if self.fixed_capacity is not None:
            _check_least(self, "fixed_capacity", 1)
        _check_jitter(self)

    @property
    def experts_per_token(self) -> float:
        """Experts that a valid token visits on average in training, at most: `k`, or the rows that it brings if they are fewer.

        By the factor: what `min_capacity` and `fixed_capacity` come to depends on the group, and counts as room for all.
        """
        if self.fixed_capacity is not None:
            return self.k
        return min(self.k, self.train_capacity * (self.k if self.capacity_times_k else 1))

    def check(self, causal: bool, num_experts: int) -> None:
        """Refuses a stack that this router can't serve.

        Raises:
            ValueError: for batch-prioritised routing in a causal stack, or fewer experts than `k`.
        """
        _check_experts(self, num_experts)
        if causal and self.batch_prioritised:
            raise ValueError(
                "TokenChoice.batch_prioritised is True in a causal stack: whether a token keeps its place would depend on the"
                " probabilities of later tokens, which leaks the future. Set batch_prioritised=False there."
            )

    def group_size(self, rows: int, length: int) -> int:
        """Tokens that share the capacity, of a batch of `rows` sequences."""
        return _group_size(self.group, rows, length)

    def capacities(self, group_size: int, num_experts: int, training: bool) -> Int[np.ndarray, "counts"]:
        """Rows of an expert in a group: ``factor [* k] * n / E`` of `n` valid tokens, to the nearest (half to even).

        Args:
            group_size: tokens of the group, padding included.
            num_experts: ``E``.
            training: which factor.

        Returns:
            For each `n` from 0 to `group_size`, in ``[0, n]``: an expert has use for no more. The last is what is reserved.
        """
        if self.fixed_capacity is not None:
            return np.minimum(self.fixed_capacity, np.arange(group_size + 1))
        return _capacities(self, group_size, num_experts, training, self.k if self.capacity_times_k else 1)

    def assign(self, probs: Float[Array, "tokens E"], mask: Bool[Array, "tokens"], *, training: bool = False) -> Slots:
        """Gives the tokens of one group their rows: ``C`` to each expert, in the experts' order.

        Args:
            probs: ``float32``, the router's distributions.
            mask: which tokens are valid; the others take no room.
            training: which capacity.
        """
        num_experts = probs.shape[1]
        capacity, room = _room(self, mask, num_experts, training)
        experts, gates = top_k(probs, self.k, self.renormalize)
        priority = _by_probability(probs, mask, self.k) if self.batch_prioritised else None
        experts = jnp.where(mask[None], experts, num_experts)
        ranking = rank_choices(experts, num_experts, priority)
        owner = jnp.repeat(jnp.arange(num_experts), capacity)
        kept = jnp.minimum(ranking.counts, room)
        return fill_slots(experts, gates, ranking, owner, jnp.arange(num_experts) * capacity, kept, kept)


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes the tokens of a group that want it most (Zhou et al., arXiv 2202.09368, section 3.2); encoders only.

    The weight is the token's raw probability of the expert. Loads are equal by construction: there is no balance loss.

    Attributes:
        train_capacity: tokens of an expert, over the group's valid tokens divided by the number of experts, in training:
            the experts of a token on average.
        eval_capacity: the same in evaluation.
        min_capacity: tokens of an expert, at least.
        group: as in `TokenChoice`.
        jitter: as in `TokenChoice`.

    Raises:
        ValueError: for a value out of range.
    """

    train_capacity: float = 1.0
    eval_capacity: float = 1.0
    min_capacity: int = 1
    group: int | str = "row"
    jitter: float = 0.0

    def __post_init__(self):
        _check_capacity(self)
        _check_jitter(self)

    @property
    def experts_per_token(self) -> float:
        """Experts that a valid token visits on average in training; as `TokenChoice.experts_per_token`."""
        return self.train_capacity

    def check(self, causal: bool, num_experts: int) -> None:
        """Refuses a stack that this router can't serve.

        Raises:
            ValueError: for a causal stack.
        """
        del num_experts
        if causal:
            raise ValueError(
                "ExpertChoice in a causal stack: an expert picks among all tokens of a sequence, so that what an earlier token"
                " gets depends on later ones, which leaks the future. Use TokenChoice or Dropless there."
            )

    def group_size(self, rows: int, length: int) -> int:
        """Tokens that an expert picks from, of a batch of `rows` sequences."""
        return _group_size(self.group, rows, length)

    def capacities(self, group_size: int, num_experts: int, training: bool) -> Int[np.ndarray, "counts"]:
        """Tokens that an expert takes from a group; as `TokenChoice.capacities`."""
        return _capacities(self, group_size, num_experts, training, 1)

    def assign(self, probs: Float[Array, "tokens E"], mask: Bool[Array, "tokens"], *, training: bool = False) -> Slots:
        """Gives each expert its ``C`` best tokens of one group, the best first; see `TokenChoice.assign`."""
        num_tokens, num_experts = probs.shape
        capacity, room = _room(self, mask, num_experts, training)
        wanted = jnp.where(mask[:, None], probs, -1.0).T
        # A sort, because `jax.lax.top_k` gathers what is sharded.
        tokens = jnp.argsort(jax.lax.stop_gradient(-wanted), stable=True)[:, :capacity]
        gates = jnp.take_along_axis(wanted, tokens, 1)
        holds = (gates >= 0) & (jnp.arange(capacity) < room)[None]
        source = jnp.where(holds, tokens, num_tokens).reshape(-1)
        kept = holds.sum(-1)
        taken = jnp.zeros(num_tokens, bool).at[source].set(True, mode="drop")
        return Slots(
            source=source,
            gates=jnp.where(holds, gates, 0.0).reshape(-1),
            slot_of=None,
            owned=kept,
            chosen=jnp.zeros_like(probs),
            kept=kept,
            dropped=(mask & ~taken).sum(),
            offered=mask.sum(),
        )


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Each token takes its `k` best experts, and none is full; what a token gets depends on nothing but itself.

    Attributes:
        k: experts of a token.
        renormalize: whether the weights of a token's choices sum to one (Mixtral; Qwen's ``norm_topk_prob``).
        jitter: as in `TokenChoice`.

    Raises:
        ValueError: for a value out of range.
    """

    k: int = 2
    renormalize: bool = True
    jitter: float = 0.0

    def __post_init__(self):
        _check_least(self, "k", 1)
        _check_jitter(self)

    @property
    def experts_per_token(self) -> float:
        """Experts that a token visits."""
        return self.k

    def check(self, causal: bool, num_experts: int) -> None:
        """Refuses a stack that this router can't serve.

        Raises:
            ValueError: for fewer experts than `k`.
        """
        del causal
        _check_experts(self, num_experts)

    def group_size(self, rows: int, length: int) -> int:
        """All tokens of the batch: they share nothing, so that the group only says what is averaged in the losses."""
        return rows * length

    def block_size(self, num_tokens: int, num_experts: int) -> int:
        """Rows in a block: an expert's rows are filled up to whole blocks, which wastes half a block of each on average."""
        aim = self.k * num_tokens // (4 * num_experts)
        size = MIN_BLOCK
        while size < min(aim, MAX_BLOCK):
            size *= 2
        return size

    def assign(
        self,
        experts: Int[Array, "k tokens"],
        gates: Float[Array, "k tokens"],
        mask: Bool[Array, "tokens"],
        num_experts: int,
        *,
        first_local: Int[Array, ""] | int = 0,
        num_local: int | None = None,
    ) -> Slots:
        """Gives tokens their rows: those of one expert after those of the other, each filled up to whole blocks.

        Args:
            experts: of each choice (`top_k`).
            gates: ``float32``, the weight of each choice.
            mask: which tokens are valid; the others take no row.
            num_experts: ``E``.
            first_local: the first expert that gets rows here.
            num_local: experts from there on that get rows here; None for all.

        Returns:
            Slots of the local experts, whose `owned` counts filled-up rows.
        """
        num_tokens = len(mask)
        num_local = num_experts if num_local is None else num_local
        here = (experts >= first_local) & (experts < first_local + num_local) & mask[None]
        experts = jnp.where(here, experts - first_local, num_local)
        ranking = rank_choices(experts, num_local)

        block = self.block_size(num_tokens, num_experts)
        num_blocks = (self.k * num_tokens + num_local * (block - 1)) // block
        owned = -(-ranking.counts // block) * block
        ends = jnp.cumsum(owned)
        owner = (jnp.arange(num_blocks)[:, None] * block >= ends[None]).sum(-1)
        owner = jnp.repeat(jnp.minimum(owner, num_local - 1), block)
        return fill_slots(experts, gates, ranking, owner, ends - owned, ranking.counts, owned)


Router: TypeAlias = TokenChoice | ExpertChoice | Dropless


def jittered(x: Float[Array, "*batch D"], jitter: float, key: PRNGKeyArray | None) -> Float[Array, "*batch D"]:
    """Multiplies by noise uniform in ``[1 - jitter, 1 + jitter]``, given a key (arXiv 2101.03961, section 2.4)."""
    if key is None or jitter == 0:
        return x
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - jitter, 1 + jitter)


def top_k(
    probs: Float[Array, "tokens E"], k: int, renormalize: bool
) -> tuple[Int[Array, "k tokens"], Float[Array, "k tokens"]]:
    """Each token's best experts, the best first and the lower number first among equals, and the weights of their outputs.

    Args:
        probs: ``float32``.
        k: at most ``E``.
        renormalize: whether a token's weights sum to one.
    """
    # One maximum after another: `jax.lax.top_k` is slower for few, and gathers what is sharded.
    experts, left = [], jax.lax.stop_gradient(probs)
    for _ in range(k):
        experts.append(jnp.argmax(left, -1))
        left = jnp.where(jax.nn.one_hot(experts[-1], probs.shape[-1], dtype=jnp.bool_), -1.0, left)
    # A product with 0 and 1, whose gradient is no scatter.
    gates = (jax.nn.one_hot(jnp.stack(experts), probs.shape[-1], dtype=probs.dtype) * probs[None]).sum(-1)
    return jnp.stack(experts), gates / gates.sum(0, keepdims=True) if renormalize else gates


def _by_probability(probs: Float[Array, "tokens E"], mask: Bool[Array, "tokens"], k: int) -> Int[Array, "pairs"]:
    """The priority of each choice: all first choices, then all second ones, each from the surest token on."""
    rank = jnp.argsort(jnp.argsort(-jnp.where(mask, probs.max(-1), -1.0), stable=True))
    return (jnp.arange(k)[:, None] * len(probs) + rank[None]).reshape(-1)


def _group_size(group: int | str, rows: int, length: int) -> int:
    # What is decoded must not depend on the other rows, nor on those that wait for a request.
    if group == "row" or length == 1:
        return length
    if isinstance(group, str):
        return rows * length
    num_groups = -(-rows * length // group)
    while rows * length % num_groups:
        num_groups += 1
    return rows * length // num_groups


def _capacities(
    router: TokenChoice | ExpertChoice, group_size: int, num_experts: int, training: bool, times: int
) -> Int[np.ndarray, "counts"]:
    factor, tokens = router.train_capacity if training else router.eval_capacity, np.arange(group_size + 1)
    rounded = np.rint(factor * times * tokens / num_experts)
    return np.minimum(np.maximum(rounded, router.min_capacity), tokens).astype(np.int32)


def _room(
    router: TokenChoice | ExpertChoice, mask: Bool[Array, "tokens"], num_experts: int, training: bool
) -> tuple[int, Int[Array, ""]]:
    """Rows of an expert that are reserved for a group, and those that its valid tokens may take."""
    capacities = router.capacities(len(mask), num_experts, training)
    # Looked up, so that no device rounds in its own way.
    return int(capacities[-1]), jnp.asarray(capacities, jnp.int32)[mask.sum()]


def _check_least(router: Router, field: str, least: int) -> None:
    value = getattr(router, field)
    if value < least:
        raise ValueError(f"{type(router).__name__}.{field} is {value}: expected at least {least}.")


def _check_capacity(router: TokenChoice | ExpertChoice) -> None:
    name = type(router).__name__
    for field in ("train_capacity", "eval_capacity"):
        if not getattr(router, field) > 0:
            raise ValueError(f"{name}.{field} is {getattr(router, field)}: expected a number above 0.")
    _check_least(router, "min_capacity", 1)
    group = router.group
    if group not in ("row", "batch") and (isinstance(group, str) or group < 1):
        raise ValueError(f"{name}.group is {group!r}: expected 'row', 'batch' or a number of tokens, at least 1.")


def _check_jitter(router: Router) -> None:
    if not 0 <= router.jitter < 1:
        raise ValueError(f"{type(router).__name__}.jitter is {router.jitter}: expected a number in [0, 1).")


def _check_experts(router: TokenChoice | Dropless, num_experts: int) -> None:
    if router.k > num_experts:
        raise ValueError(
            f"{type(router).__name__}.k is {router.k}: expected at most the {num_experts} experts there are."
        )
