"""Who may decode along, and what of a preference reaches whom."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny_policies import stacked_params
from tiny_runs import make_data, make_supervised

from clp_jax.models.conditioning import ParameterConditioning, PromptConditioning
from clp_jax.preferences import Preference
from clp_jax.training import partners
from clp_jax.training.partners import Partners
from clp_jax.training.policies import load_policy

FULL = ParameterConditioning("full", 2)
PROMPT = PromptConditioning((((3,),), ((4,),)), 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    home = tmp_path_factory.mktemp("partners")
    return load_policy(make_supervised(home / "run", make_data(home / "data")))


def steered(policy, conditioning=FULL, names=("a", "b")):
    params = stacked_params(policy.policy, range(2)) if conditioning == FULL else policy.params
    return dataclasses.replace(policy, conditioning=conditioning, objectives=names, params=params)


def joined(monkeypatch, policy, partner):
    monkeypatch.setattr(partners, "load_policy", lambda path: partner)
    return Partners(mix={"there": 0.5}).load(policy)


def test_partners_of_the_same_rewards_are_steered_alike(plain, monkeypatch):
    policy = steered(plain)
    ensemble = joined(
        monkeypatch, policy, dataclasses.replace(policy, params=stacked_params(plain.policy, range(2, 4)))
    )
    preference = Preference.of([0.3, 0.7], 0.0)
    for member, found in zip(ensemble.members, ensemble.at(preference), strict=True):
        expected = FULL.mix(member.params, member.reference, preference)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_a_partner_that_is_not_steered_stays_as_it_is(plain, monkeypatch):
    _, found = joined(monkeypatch, steered(plain), plain).at(Preference.of([0.3, 0.7], 0.0))
    jax.tree.map(np.testing.assert_array_equal, found, plain.params)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (None, (FULL, ("a", "b"))),
        ((FULL, ("a", "b")), (FULL, ("a", "c"))),
        ((FULL, ("a", "b")), (PROMPT, ("a", "b"))),
        # It would read what the preference writes into prompts.
        ((PROMPT, ("a", "b")), None),
    ],
    ids=["steered alone", "other rewards", "otherwise", "prompts"],
)
def test_partners_that_are_steered_otherwise_are_refused(plain, own, other, monkeypatch):
    policy, partner = (plain if how is None else steered(plain, *how) for how in (own, other))
    with pytest.raises(
        ValueError, match=re.escape(f"there is steered otherwise than {plain.run_dir}: expected a policy")
    ):
        joined(monkeypatch, policy, partner)


def test_nobody_decodes_along_by_default(plain):
    ensemble = Partners().load(plain)
    assert ensemble.members == (plain,) and ensemble.shape.policies == (plain.served,)
