"""A converted policy is trained on by the optimizer that T5X left: the next step is T5X's."""

import dataclasses
import tarfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import make_data

from clp_jax.convert import convert
from clp_jax.interop import t5x
from clp_jax.interop.arrays import in_memory
from clp_jax.interop.links import loaded, opened
from clp_jax.interop.t5x_names import links
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.training.adafactor_slots import load_slots, save_slots, take_over
from clp_jax.training.learner import Learner
from clp_jax.training.optimizers import Adafactor, AdamW
from clp_jax.training.supervised import Supervised

FIXTURES = Path(__file__).parents[1] / "fixtures"
STEP = np.load(FIXTURES / "t5x_adafactor.npz")
RECORD = np.load(FIXTURES / "t5x_policy.npz")


@dataclasses.dataclass(frozen=True)
class Nano:
    """What T5X left."""

    config: T5Config
    params: Any
    slots: Any
    source: Path


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    directory = tmp_path_factory.mktemp("nano")
    with tarfile.open(FIXTURES / "t5x_nano.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    imported = t5x.open_checkpoint(directory / "legacy", optimizer=True).loaded()
    save_slots(directory / "run", imported.slots)
    return Nano(imported.config, imported.params, load_slots(directory / "run"), directory / "legacy")


def recorded(imported, kind):
    """What T5X's record has of every parameter, as a tree like the parameters."""
    found = links(imported.config, None)
    source = {each.name: in_memory(RECORD[f"{kind}/{each.name}"]) for each in found}
    abstract = Policy(imported.config).abstract()
    return jax.tree.map(jnp.asarray, loaded(opened(found, source, abstract, "float32", where="the record")))


def loss(params, grads, batch, key):
    """Its gradient is what is given."""
    products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, grads)
    return sum(jax.tree.leaves(products)), jnp.ones(()), {}


def test_the_next_step_is_t5xs(nano):
    learner = Learner(
        loss,
        Adafactor(learning_rate=float(STEP["learning_rate"])),
        logical_axes=Policy(nano.config).logical_axes(),
    )
    state = take_over(learner.init_state(nano.params, 0), nano.slots)
    assert nano.slots.count == 2 and int(state.step) == 0
    batch = np.zeros((jax.device_count(), 1), np.float32)
    state, _ = learner.update(state, learner.place_frozen(recorded(nano, "grad")), batch)
    (slots,) = (part for part in state.opt_state if hasattr(part, "v_row"))
    assert int(slots.count) == 3

    def chosen(tree):
        encoder, decoder = tree["encoder"], tree["decoder"]
        return {
            "mlp": encoder["layers"]["mlp"]["wi_0"]["kernel"],
            "norm": decoder["layers"]["mlp_norm"]["scale"],
            "relpos_bias": encoder["relpos_bias"]["embedding"],
            "logits": tree["logits_head"]["kernel"],
        }

    def check(path, ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=1e-8, err_msg=jax.tree_util.keystr(path))

    assert float(RECORD["step/lr"]) == float(STEP["learning_rate"])
    jax.tree_util.tree_map_with_path(check, state.params, recorded(nano, "step/target"))
    moments = chosen(slots.v)
    for name in chosen(state.params):
        np.testing.assert_allclose(moments[name], STEP[f"{name}/new_v"], rtol=2e-6, err_msg=name)


def made(nano, optimizer):
    return Learner(loss, optimizer, logical_axes=Policy(nano.config).logical_axes()).init_state(nano.params, 0)


def test_another_optimizer_has_no_place_for_them(nano):
    state = made(nano, AdamW())
    assert take_over(state, nano.slots) is state


def test_another_factoring_is_refused(nano):
    with pytest.raises(ValueError, match="v_row of decoder/.* in the shape .*: set Adafactor.min_dim_to_factor as"):
        take_over(made(nano, Adafactor(min_dim_to_factor=8)), nano.slots)


def test_finetuning_finds_them_beside_a_converted_policy(nano, tmp_path):
    data_dir = str(make_data(tmp_path / "data"))
    for name, optimizer in (("with", True), ("without", False)):
        convert(f"t5x:{nano.source}", f"clp:{tmp_path / name}", optimizer=optimizer)
        stage = Supervised(None, data_dir, batch_size=8, initial_checkpoint=str(tmp_path / name))
        found = stage.setup(tmp_path, 0).slots
        assert (found is not None and found.count == 2) if optimizer else found is None
