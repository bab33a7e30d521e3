"""Beam search against enumeration, against plain Python, and against T5X's record."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_tests import load
from slot_policies import HashDecoder, hash_table

from clp_jax.sampling.beam_policies import (
    BrevityPenalty,
    CurrentBound,
    Finishing,
    FirstFinished,
    LengthPenalty,
    PowerPenalty,
    ReachableBound,
    Stopping,
)
from clp_jax.sampling.beam_search import BeamConfig, beam_search, t5x_beam_config
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.processors import BannedSequences, ForcedFirst, NoRepeatNGram

VOCAB, LENGTH, LONGER, TABLES = 5, 4, 6, 12
RNG = np.random.default_rng(0)
# Transitions by place, or permuted completions would be equally likely; peaked, so that beams meet.
CHAINS = (2 * RNG.normal(size=(TABLES, LONGER, VOCAB, VOCAB))).astype(np.float32)
PENALTIES = [
    PowerPenalty(-1.0),
    PowerPenalty(0.0),
    PowerPenalty(0.6),
    PowerPenalty(1.0),
    PowerPenalty(2.0),
    BrevityPenalty(),
]
T5X = Finishing(spare=True, at_limit=False)


@dataclasses.dataclass(frozen=True, eq=False)
class ChainsDecoder:
    """Decodes a chain of each prompt's own: its token is the number of the chain."""

    eos_ids: tuple[int, ...]
    pad_id: int = 0

    def start(self, inputs, max_length, num_samples):
        return jnp.zeros((inputs.shape[0] * num_samples,), jnp.int32), (jnp.repeat(inputs[:, 0], num_samples), 0)

    def step(self, tokens, state):
        chains, place = state
        return jnp.asarray(CHAINS)[chains, place, tokens], (chains, place + 1)

    def select(self, state, rows):
        return state[0][rows], state[1]


@functools.partial(jax.jit, static_argnames=("config", "ends"))
def run(config, ends=(1,)):
    """The search on all chains at once, each a prompt; leading dimensions are chains and completions."""
    out = beam_search(ChainsDecoder(ends), jnp.arange(TABLES)[:, None], config)
    found = dataclasses.asdict(out.completions) | {"scores": out.scores}
    return {name: x.reshape(TABLES, config.num_returned, *x.shape[1:]) for name, x in found.items()}


def log_probs(chain: np.ndarray) -> np.ndarray:
    chain = chain.astype(np.float64)
    return chain - np.log(np.exp(chain).sum(-1, keepdims=True))


def own_log_probs(chain: np.ndarray, tokens: tuple[int, ...]) -> list[float]:
    return [log_probs(chain)[place, a, b] for place, (a, b) in enumerate(itertools.pairwise((0, *tokens)))]


def divisor(penalty: LengthPenalty, length: int) -> float:
    if isinstance(penalty, PowerPenalty):
        return float(length) ** penalty.exponent
    return ((5 + length) / 6) ** penalty.alpha


def ends_now(tokens: tuple[int, ...], ends: tuple[int, ...], stop: tuple[tuple[int, ...], ...], least: int) -> bool:
    stopped = len(tokens) >= least and any(tokens[-len(s) :] == s for s in stop)
    return tokens[-1] in ends or stopped


def ranking(chain: np.ndarray, config: BeamConfig, ends: tuple[int, ...] = (1,)) -> list[tuple[float, tuple[int, ...]]]:
    """All completions there are, the best first: those that end, and those at the limit."""
    found = []
    for length in range(1, config.max_length + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            if any(ends_now(tokens[:i], ends, config.stop, config.min_length) for i in range(1, length)):
                continue
            ended = ends_now(tokens, ends, config.stop, config.min_length)
            banned = length <= config.min_length and tokens[-1] in ends
            if banned or not (ended or (length == config.max_length and config.finishing.at_limit)):
                continue
            found.append((sum(own_log_probs(chain, tokens)) / divisor(config.length_penalty, length), tokens))
    return sorted(found, reverse=True)


def goes_on(stopping: Stopping, live: float, pool: list, size: int, length: int, config: BeamConfig) -> bool:
    if len(pool) < size:
        return True
    now, limit = (live / divisor(config.length_penalty, n) for n in (length, config.max_length))
    worst = pool[-1][0]
    match stopping:
        case FirstFinished():
            return False
        case CurrentBound():
            return now > worst
    return max(now, limit) > worst


def searched(
    chain: np.ndarray, config: BeamConfig, ends: tuple[int, ...] = (1,)
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search in plain Python, group by group: as algorithm 1 of arXiv 1610.02424 with Hamming diversity, where groups differ."""
    table, size, capacity = log_probs(chain), config.group_size, config.pool_size
    groups = [dict(live=[(0.0, ())], pool=[], open=True) for _ in range(config.num_groups)]
    for length in range(1, config.max_length + 1):
        taken = np.zeros(VOCAB)
        if not any(group["open"] for group in groups):
            break
        for group in groups:
            candidates = [
                (score + table[len(tokens), tokens[-1] if tokens else 0, v] - config.diversity * taken[v], (*tokens, v))
                for score, tokens in group["live"]
                for v in range(VOCAB)
            ]
            candidates = sorted(candidates, reverse=True)[: max(2, 1 + len(ends)) * size]
            group["live"] = [c for c in candidates if c[1][-1] not in ends][:size]
            # What a group has searched no further is no beam to differ from: it writes padding, which is 0.
            for _, tokens in group["live"]:
                taken[tokens[-1] if group["open"] else 0] += 1
            if not group["open"]:
                continue
            at_limit = config.finishing.at_limit and length == config.max_length
            group["pool"] += [
                (score / divisor(config.length_penalty, length), tokens)
                for rank, (score, tokens) in enumerate(candidates)
                if (tokens[-1] in ends or at_limit) and (config.finishing.spare or rank < size)
            ]
            group["pool"] = sorted(group["pool"], reverse=True)[:capacity]
            best = group["live"][0][0]
            group["open"] = goes_on(config.stopping, best, group["pool"], capacity, length, config)
    found = sorted(itertools.chain(*(group["pool"] for group in groups)), reverse=True)
    if not found and not config.finishing.at_limit:
        found = sorted(itertools.chain(*(group["live"] for group in groups)), reverse=True)
    return found


def check(config: BeamConfig, expected, ends: tuple[int, ...] = (1,)) -> None:
    """Tokens, masks, scores and log-probabilities; rows of nothing where there are too few."""
    out = run(config, ends)
    for i, chain in enumerate(CHAINS):
        found = expected(chain, config, ends)[: config.num_returned]
        missing = config.num_returned - len(found)
        rows = [(*tokens, *[0] * (config.max_length - len(tokens))) for _, tokens in found] + [
            (0,) * config.max_length
        ] * missing
        lengths = [len(tokens) for _, tokens in found] + [0] * missing
        np.testing.assert_array_equal(out["tokens"][i], rows)
        np.testing.assert_array_equal(out["mask"][i], np.arange(config.max_length) < np.asarray(lengths)[:, None])
        np.testing.assert_allclose(out["scores"][i], [score for score, _ in found] + [-np.inf] * missing, rtol=1e-5)
        for row, (_, tokens) in enumerate(found):
            own = own_log_probs(chain, tokens)
            padded = np.pad(own, (0, config.max_length - len(own)))
            np.testing.assert_allclose(out["log_probs"][i, row], padded, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("finishing", [Finishing(), T5X], ids=["limit", "ends"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
def test_enough_beams_find_the_best_of_all_completions(penalty, finishing):
    """64 beams hold every prefix of three tokens; whatever the penalty, no bound may stop too early."""
    config = BeamConfig(LENGTH, 64, 6, penalty, ReachableBound(), finishing)
    check(config, ranking)


@pytest.mark.parametrize(
    "changes",
    [
        dict(stop=((2, 3), (4,))),
        dict(min_length=2),
        dict(stop=((3,), (2, 2, 4)), min_length=3),
    ],
    ids=str,
)
def test_enough_beams_with_stop_sequences_and_several_ends(changes):
    config = BeamConfig(LENGTH, 64, 5, PowerPenalty(0.6), ReachableBound(), **changes)
    check(config, ranking, ends=(1, 0))


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        (BeamConfig(LONGER, 1), (1,)),
        (BeamConfig(LONGER, 2, 2, PowerPenalty(2.0), CurrentBound()), (1,)),
        (BeamConfig(LONGER, 2, 2, PowerPenalty(2.0), ReachableBound()), (1,)),
        (BeamConfig(LONGER, 3, 3, PowerPenalty(0.0), FirstFinished()), (1, 2)),
        (BeamConfig(LONGER, 4, 2, PowerPenalty(1.0), FirstFinished(0.5)), (1,)),
        (BeamConfig(LONGER, 2, 2, PowerPenalty(1.0), FirstFinished(2.5)), (1,)),
        (t5x_beam_config(LONGER, 3, num_returned=3), (1,)),
        (t5x_beam_config(LONGER, 1), (1,)),
        (BeamConfig(LONGER, 4, 4, num_groups=2, diversity=0.8), (1,)),
        (BeamConfig(LONGER, 6, 5, PowerPenalty(0.6), FirstFinished(), num_groups=3, diversity=0.3), (1, 2)),
        (BeamConfig(LONGER, 3, 3, PowerPenalty(0.0), ReachableBound(), T5X, num_groups=3, diversity=3.0), (1,)),
    ],
    ids=repr,
)
def test_few_beams_search_as_plain_python_does(config, ends):
    check(config, searched, ends)


def test_conventions_differ_where_they_are_used():
    """The comparisons above would miss nothing that never matters."""
    base, narrow = BeamConfig(LONGER, 3, 3), BeamConfig(LONGER, 1, 1, PowerPenalty(0.0), ReachableBound())
    others = [
        dataclasses.replace(base, stopping=ReachableBound()),
        dataclasses.replace(base, stopping=FirstFinished()),
        dataclasses.replace(base, stopping=FirstFinished(2.5)),
        dataclasses.replace(base, finishing=Finishing(at_limit=False)),
        dataclasses.replace(base, length_penalty=BrevityPenalty()),
    ]
    assert all(searched_all(base) != searched_all(other) for other in others)
    assert searched_all(narrow) != searched_all(dataclasses.replace(narrow, finishing=Finishing(spare=True)))


def searched_all(config: BeamConfig) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(tokens for _, tokens in searched(chain, config)[: config.num_returned]) for chain in CHAINS]


def test_groups_without_diversity_search_alike_and_with_much_of_it_begin_differently():
    alike = run(BeamConfig(LENGTH, 4, 2, num_groups=2))["tokens"]
    np.testing.assert_array_equal(alike[:, 0], alike[:, 1])
    single = run(BeamConfig(LENGTH, 2, 1))["tokens"]
    np.testing.assert_array_equal(alike[:, :1], single)
    config = BeamConfig(3, 4, 4, PowerPenalty(0.0), FirstFinished(), num_groups=4, diversity=50.0)
    first = np.asarray(run(config, ends=(9,))["tokens"])[..., 0]
    assert all(len(set(row)) == 4 for row in first.tolist())


@pytest.mark.parametrize("groups", [1, 2])
def test_states_follow_their_beams(groups):
    """A decoder that remembers everything: fed with what was found, it gives the same log-probabilities."""
    decoder = HashDecoder(hash_table())
    prompts = jnp.asarray([[3, 4, 5], [6, 7, 0], [8, 0, 0]], jnp.int32)
    config = BeamConfig(
        7, 4, 3, num_groups=groups, diversity=0.5 * (groups > 1), processors=(NoRepeatNGram(2, "prompt"),)
    )

    @jax.jit
    def both(prompts):
        out = beam_search(decoder, prompts, config)
        last, state = decoder.start(prompts, 7, 3)
        said = []
        for t in range(7):
            logits, state = decoder.step(last, state)
            last = out.completions.tokens[:, t]
            said.append(jnp.take_along_axis(jax.nn.log_softmax(logits), last[:, None], axis=1)[:, 0])
        return out, jnp.stack(said, axis=1) * out.completions.mask

    out, said = both(prompts)
    assert len({tuple(row) for row in out.completions.tokens.tolist()}) >= 7
    np.testing.assert_allclose(out.completions.log_probs, said, rtol=1e-6)
    alone, _ = both(prompts[1:2])
    np.testing.assert_array_equal(alone.completions.tokens, out.completions.tokens[3:6])
    moved, _ = both(prompts[::-1])
    np.testing.assert_array_equal(moved.completions.tokens, out.completions.tokens.reshape(3, 3, 7)[::-1].reshape(9, 7))


def test_what_processors_forbid_is_not_found():
    config = BeamConfig(LENGTH, 4, 4, processors=(ForcedFirst(3), BannedSequences(((2,), (3, 4), (4, 4)))))
    out = run(config)
    tokens = np.asarray(out["tokens"])
    assert np.all(tokens[..., 0] == 3) and not np.any(tokens == 2)
    pairs = {pair for row in tokens.reshape(-1, LENGTH).tolist() for pair in itertools.pairwise(row)}
    assert not pairs & {(3, 4), (4, 4)} and (0, 4) in pairs
    # A forced token counts nothing in the score, and what it had as log-probability of its own.
    assert np.all(np.asarray(out["log_probs"])[..., 0] < 0)
    kept = np.asarray(out["log_probs"])[..., 1:].sum(-1) / np.asarray(out["mask"]).sum(-1)
    np.testing.assert_allclose(out["scores"], kept, rtol=1e-5)


def test_t5x_record():
    """Four beams, α = 0.6; T5X lists the best last, and nothing ended, so that scores are log-probabilities."""
    record = load("models/t5_t5x_test.py")
    inputs = jnp.asarray(record.RECORD["batch/encoder_input_tokens"])

    @jax.jit
    def search(params):
        return beam_search(CachedDecoder(record.POLICY.bind(params)), inputs, t5x_beam_config(16, num_returned=4))

    out = search(record.tree("target"))
    np.testing.assert_array_equal(out.completions.tokens.reshape(2, 4, 16), record.RECORD["beam4/tokens"][:, ::-1])
    np.testing.assert_allclose(out.scores.reshape(2, 4), record.RECORD["beam4/scores"][:, ::-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeamConfig(0), r"BeamConfig\.max_length is 0: expected at least 1"),
        (lambda: BeamConfig(3, min_length=4), r"BeamConfig\.min_length is 4: expected 0 to max_length, 3"),
        (
            lambda: BeamConfig(3, 4, num_groups=3),
            r"BeamConfig\.num_beams is 4, num_groups 3: expected groups of equal size",
        ),
        (lambda: BeamConfig(3, 0), r"BeamConfig\.num_beams is 0"),
        (
            lambda: BeamConfig(3, 4, diversity=0.5),
            r"BeamConfig\.diversity is 0\.5 for 1 groups: expected 0 or more, and 0",
        ),
        (lambda: BeamConfig(3, 4, 5), r"BeamConfig\.num_returned is 5: expected 1 to 4, what the search keeps"),
        (lambda: BeamConfig(3, 4, 3, stopping=FirstFinished(0.5)), r"BeamConfig\.num_returned is 3: expected 1 to 2"),
        (lambda: FirstFinished(0.0), r"FirstFinished\.patience is 0\.0: expected a positive number"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
