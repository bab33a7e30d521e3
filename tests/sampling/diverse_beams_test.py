"""Diverse beam search against cases by hand, and against what transformers found while it had groups of beams.

Those versions of transformers have rules of their own for beams that the limit cuts, and for searches without early stopping;
later ones, without groups, are what `beam_search_transformers_test.py` compares with. What is recorded ends before.
"""

import dataclasses

import huggingface_results
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_group_beams import HERE, LENGTH, NAMES, SETTINGS
from safetensors.numpy import save_file

from clp_jax.interop import huggingface
from clp_jax.models.policy import Policy
from clp_jax.sampling.beam_policies import CurrentBound, FirstFinished, PowerPenalty, ReachableBound
from clp_jax.sampling.beam_search import BeamConfig, beam_search
from clp_jax.sampling.decoder import CachedDecoder

GOLDEN, RECORD = (dict(np.load(HERE / name)) for name in ("huggingface_golden.npz", "group_beams.npz"))
STOPPING = {True: FirstFinished(), False: CurrentBound(), "never": ReachableBound()}


# Probabilities of the padding, the end and two tokens, after each of them.
AFTER = np.asarray([[0, 1, 4, 3], [8, 0, 0, 0], [0, 5, 2, 1], [0, 1, 4, 3]]) / 8


@dataclasses.dataclass(frozen=True)
class AfterDecoder:
    """Decodes by the last token alone."""

    eos_ids: tuple[int, ...] = (1,)
    pad_id: int = 0

    def start(self, inputs, max_length, num_samples):
        return jnp.zeros((inputs.shape[0] * num_samples,), jnp.int32), None

    def step(self, tokens, state):
        return jnp.log(jnp.maximum(jnp.asarray(AFTER, jnp.float32)[tokens], 1e-30)), state

    def select(self, state, rows):
        return state


@pytest.mark.parametrize(
    ("groups", "factor", "length", "expected"),
    [
        # Half as probable, 2 (2/8) loses to 3 (3/8).
        (2, 2.0, 1, [((2,), 4 / 8), ((3,), 3 / 8)]),
        # A little less probable it wins, and its score keeps what was taken off.
        (2, 1.2, 1, [((2,), 4 / 8), ((2,), 4 / 8 / 1.2)]),
        # Every earlier group counts: for the third, 2 is 4/8 / 1.25^2 = 2.56/8.
        (3, 1.25, 1, [((2,), 4 / 8), ((2,), 4 / 8 / 1.25), ((3,), 3 / 8)]),
        # The first group ends behind 2; what it would have written then does not keep the second from a 2.
        (2, 2.0, 3, [((2, 1), 4 / 8 * 5 / 8), ((3, 3, 2), 3 / 8 * 3 / 8 * 4 / 8)]),
    ],
)
def test_by_hand(groups, factor, length, expected):
    """Groups of one beam, whose scores are products of probabilities."""
    config = BeamConfig(
        length,
        groups,
        groups,
        PowerPenalty(0.0),
        FirstFinished(),
        num_groups=groups,
        diversity=float(np.log(factor)),
    )
    found = jax.jit(lambda inputs: beam_search(AfterDecoder(), inputs, config))(jnp.ones((1, 1), jnp.int32))
    rows = [tokens + (0,) * (length - len(tokens)) for tokens, _ in expected]
    np.testing.assert_array_equal(found.completions.tokens, rows)
    np.testing.assert_allclose(np.exp(found.scores), [score for _, score in expected], rtol=1e-6)


@pytest.fixture(scope="module", params=NAMES)
def searched(request, tmp_path_factory):
    """A model's search, and the name that the record has for it."""
    name, directory = request.param, tmp_path_factory.mktemp("model")
    prefix = f"{name}/tensors/"
    tensors = {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}
    save_file(huggingface_results.unpacked(**tensors), directory / "model.safetensors")
    for file in ("config", "generation_config"):
        (directory / f"{file}.json").write_bytes(GOLDEN[f"{name}/{file}"].tobytes())
    imported = huggingface.open_checkpoint(directory).loaded()
    ending = Policy(dataclasses.replace(imported.config, eos_ids=(int(RECORD[f"{name}/end"]),)))

    def search(config):
        run = jax.jit(lambda p: beam_search(CachedDecoder(ending.bind(p)), jnp.asarray(GOLDEN["inputs"]), config))
        return run(jax.tree.map(jnp.asarray, imported.params))

    return name, search


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=[str(setting) for setting in SETTINGS])
def test_transformers_finds_the_same(searched, number):
    name, search = searched
    beams, groups, diversity, penalty, early = SETTINGS[number]
    found = search(
        BeamConfig(
            LENGTH,
            beams,
            beams,
            PowerPenalty(penalty),
            STOPPING[early],
            num_groups=groups,
            diversity=diversity,
        )
    )
    np.testing.assert_array_equal(found.completions.tokens, RECORD[f"{name}/{number}/tokens"])
    np.testing.assert_allclose(found.scores, RECORD[f"{name}/{number}/scores"], rtol=1e-5)
