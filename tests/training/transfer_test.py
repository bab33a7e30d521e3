"""Partial restore by rules over paths: exact places, an account of everything, and nothing that no rule names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.training.transfer import Account, Transfer

STORED = {
    "encoder": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
    "decoder": {"kernel": jnp.full((2, 2), 5.0)},
}


def abstract_of(tree):
    return jax.eval_shape(lambda: tree)


def transfer(rules, new, stored=STORED):
    return filled(rules.plan(stored, abstract_of(new)), lambda: new)


def filled(plan, fresh):
    return plan.fill(plan.taken, fresh), plan.account


def never():
    raise AssertionError("nothing has to be made")


def test_without_rules_all_goes_to_where_it_was_in_the_new_type():
    wanted = abstract_of(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), STORED))
    params, account = filled(Transfer().plan(STORED, wanted), never)
    assert jax.tree.structure(params) == jax.tree.structure(STORED)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old.astype(jnp.bfloat16)), params, STORED)
    assert account == Account(loaded=("decoder/kernel", "encoder/bias", "encoder/kernel"))
    assert str(account) == "loaded 3 arrays (decoder 1, encoder 2)"


def test_arrays_move_start_afresh_and_are_ignored():
    new = {"trunk": {"layer": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}, "head": jnp.full((3, 1), 7.0)}
    rules = Transfer({r"encoder/(.*)": r"trunk/layer/\1", "decoder/.*": None}, init=("head",))
    params, account = transfer(rules, new)
    np.testing.assert_array_equal(params["trunk"]["layer"]["kernel"], STORED["encoder"]["kernel"])
    np.testing.assert_array_equal(params["trunk"]["layer"]["bias"], STORED["encoder"]["bias"])
    np.testing.assert_array_equal(params["head"], new["head"])
    assert account.ignored == ("decoder/kernel",) and account.initialised == ("head",)
    assert str(account) == "loaded 2 arrays (trunk 2); initialised 1 array (head 1); ignored 1 array (decoder 1)"


def test_the_first_rule_that_matches_all_of_a_path_decides():
    new = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    rules = Transfer({"encoder/kernel": "a", "encoder/.*": "b", "decoder": "a", "decoder/k.*": None})
    params, account = transfer(rules, new)
    np.testing.assert_array_equal(params["a"], STORED["encoder"]["kernel"])
    assert account.loaded == ("b", "a") and account.ignored == ("decoder/kernel",)


def test_components_are_added_behind_those_that_are_stored():
    stored = {"w": jnp.arange(6.0).reshape(2, 3), "shared": jnp.ones(2)}
    new = {"w": jnp.full((4, 3), 9.0), "shared": jnp.zeros(2)}
    params, account = transfer(Transfer(grow=("w",)), new, stored)
    np.testing.assert_array_equal(params["w"], [[0, 1, 2], [3, 4, 5], [9, 9, 9], [9, 9, 9]])
    assert account.grown == ("w",) and account.loaded == ("shared",)
    for wrong in (jnp.zeros((1, 3)), jnp.zeros((4, 2)), jnp.zeros((4, 3, 1))):
        with pytest.raises(ValueError, match=r"parameter 'w' has shape \(2, 3\) in the checkpoint, this model's has"):
            transfer(Transfer(grow=("w",)), new | {"w": wrong}, stored)


@pytest.mark.parametrize(
    ("rules", "new", "message"),
    [
        (
            Transfer(),
            {"encoder": STORED["encoder"]},
            "'decoder/kernel' of the checkpoint has no place 'decoder/kernel'",
        ),
        (Transfer({"decoder/.*": "lost"}), STORED, "'decoder/kernel' of the checkpoint has no place 'lost'"),
        (Transfer(), STORED | {"head": jnp.ones(1)}, "'head' is missing in the checkpoint: name it in Transfer.init"),
        (Transfer(init=("hea",)), STORED | {"head": jnp.ones(1)}, "'head' is missing in the checkpoint"),
        (Transfer({".*kernel": "encoder/kernel"}), STORED, "both 'decoder/kernel' and 'encoder/kernel' go to"),
        (Transfer(), STORED | {"decoder": {"kernel": jnp.ones((3, 2))}}, r"has shape \(2, 2\) in the checkpoint"),
    ],
)
def test_what_no_rule_provides_for_is_an_error(rules, new, message):
    with pytest.raises(ValueError, match=message):
        transfer(rules, new)


def test_patterns_are_checked():
    with pytest.raises(ValueError, match=r"Transfer: '\(' is not a regular expression"):
        Transfer(init=("(",))
