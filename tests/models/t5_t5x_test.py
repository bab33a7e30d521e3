"""Parity with T5X: a T5 1.1 that T5X trained for two steps, and what T5X computed with it (`make_t5x_policy.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_logits import loss_of_logits

from clp_jax.data.batch import Batch
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.vocabulary_loss import token_statistics
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.score import score
from clp_jax.sampling.strategies import Greedy
from clp_jax.training.supervised import SupervisedLoss

RECORD = dict(np.load(Path(__file__).parents[1] / "fixtures" / "t5x_policy.npz"))
POLICY = Policy(
    T5Config.t5_1_1(
        vocab_size=64,
        embed_dim=16,
        mlp_dim=32,
        num_heads=2,
        head_dim=8,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
)
NAMES = {
    "pre_attention_layer_norm": "self_attention_norm",
    "pre_self_attention_layer_norm": "self_attention_norm",
    "pre_cross_attention_layer_norm": "cross_attention_norm",
    "pre_mlp_layer_norm": "mlp_norm",
    "attention": "self_attention",
    "encoder_decoder_attention": "cross_attention",
    "encoder_norm": "norm",
    "decoder_norm": "norm",
    "rel_embedding": "embedding",
}


def tree(kind: str) -> dict:
    """T5X's arrays under our names, layers stacked."""
    out: dict = {}
    flat = {name.removeprefix(f"{kind}/"): value for name, value in RECORD.items() if name.startswith(f"{kind}/")}
    for path in flat:
        if "/layers_1/" in path:
            continue
        value = flat[path]
        if "/layers_0/" in path:
            value = np.stack([value, flat[path.replace("/layers_0/", "/layers_1/")]])
        if path == "decoder/logits_dense/kernel":
            path = "logits_head/kernel"
        *parents, last = [NAMES.get(name, name) for name in path.replace("/layers_0/", "/layers/").split("/")]
        node = out
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = jnp.asarray(value)
    return out


def batch(prefix: str = "") -> dict[str, jax.Array]:
    names = (name for name in RECORD if name.startswith(f"{prefix}batch/"))
    return {name.rpartition("/")[2]: jnp.asarray(RECORD[name]) for name in names}


@pytest.fixture(scope="module")
def results():
    """Logits, the loss with T5X's z-loss, its gradient, scores and greedy completions."""
    example = batch()
    weights = example["decoder_loss_weights"].astype(jnp.float32)

    def loss(params):
        logits = POLICY.bind(params)(example["encoder_input_tokens"], example["decoder_input_tokens"])
        total, _, sums = loss_of_logits(logits, example["decoder_target_tokens"], weights, z_loss=1e-4)
        sums["z_loss"] = 1e-4 * (token_statistics(logits, example["decoder_target_tokens"]).log_z ** 2 * weights).sum()
        return total, (logits, sums)

    @jax.jit
    def run(params):
        (total, (logits, sums)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        model = POLICY.bind(params)
        config = SamplingConfig(max_length=16, strategy=Greedy())
        keys = row_keys(jax.random.key(0), 2)
        greedy = generate(CachedDecoder(model), example["encoder_input_tokens"], keys=keys, config=config)
        scores = score(model, example["encoder_input_tokens"], example["decoder_target_tokens"])
        return dict(logits=logits, loss=total, sums=sums, gradient=gradient, scores=scores, greedy=greedy.tokens)

    return run(tree("target"))


def test_the_parameters_are_those_of_this_policy():
    POLICY.bind(tree("target"))


def test_logits(results):
    seen = RECORD["batch/decoder_loss_weights"] > 0
    np.testing.assert_allclose(results["logits"][seen], RECORD["logits"][seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_loss(results, mode):
    """Without dropout both are the same."""
    np.testing.assert_allclose(results["loss"], RECORD["loss" if mode == "eval" else "loss_train"], rtol=1e-6)
    tokens = RECORD["batch/decoder_loss_weights"].sum()
    found = {
        "cross_ent_loss": results["sums"]["cross_entropy"],
        "accuracy": results["sums"]["accuracy"] / tokens,
        "z_loss": results["sums"]["z_loss"],
    }
    recorded = {name.rpartition("/")[2] for name in RECORD if name.startswith(f"metric_{mode}/")}
    assert recorded == set(found)
    for name, value in found.items():
        np.testing.assert_allclose(value, RECORD[f"metric_{mode}/{name}"], rtol=1e-6, err_msg=name)


def test_the_loss_that_is_trained(results):
    """`SupervisedLoss`, which tells padding by segments."""
    example, present = batch(), {}
    for side in ("encoder_input", "decoder_target"):
        present[side] = (example[f"{side}_tokens"] != 0).astype(jnp.int32)
    places = {side: jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape) * rows for side, rows in present.items()}
    rows = Batch(
        inputs=example["encoder_input_tokens"],
        input_segments=present["encoder_input"],
        input_positions=places["encoder_input"],
        decoder_inputs=example["decoder_input_tokens"],
        targets=example["decoder_target_tokens"],
        target_segments=present["decoder_target"],
        target_positions=places["decoder_target"],
        loss_weights=example["decoder_loss_weights"].astype(jnp.float32),
        example_ids=jnp.arange(2),
    )
    total, tokens, sums = jax.jit(lambda params: SupervisedLoss(POLICY, 1e-4).sums(params, rows, None))(tree("target"))
    np.testing.assert_allclose(total, RECORD["loss_train"], rtol=1e-6)
    np.testing.assert_allclose(sums["cross_entropy"], RECORD["metric_train/cross_ent_loss"], rtol=1e-6)
    np.testing.assert_allclose(sums["accuracy"] / tokens, RECORD["metric_train/accuracy"], rtol=1e-6)


def test_every_gradient(results):
    def check(path, ours, theirs):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, results["gradient"], tree("grad"))


def test_what_every_gradient_comes_to(results):
    """Sums of squares, layer by layer, as clipping and monitoring see them."""

    def check(path, ours, theirs):
        own = tuple(range(theirs.ndim, ours.ndim))
        np.testing.assert_allclose(jnp.square(ours).sum(own), theirs, rtol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, results["gradient"], tree("grad_sumsq"))


def test_scores(results):
    np.testing.assert_allclose(results["scores"].sum(-1), RECORD["score_batch"], rtol=1e-6)


def test_greedy_completions(results):
    np.testing.assert_array_equal(results["greedy"], RECORD["greedy/tokens"])


def test_packed_examples():
    example = batch("packed/")

    @jax.jit
    def run(params):
        return POLICY.bind(params)(
            example["encoder_input_tokens"],
            example["decoder_input_tokens"],
            encoder_segments=example["encoder_segment_ids"],
            decoder_segments=example["decoder_segment_ids"],
        )

    logits = run(tree("target"))
    np.testing.assert_allclose(logits, RECORD["packed/logits"], rtol=1e-5, atol=1e-5)
    weights = example["decoder_loss_weights"].astype(jnp.float32)
    total, _, _ = loss_of_logits(logits, example["decoder_target_tokens"], weights, z_loss=1e-4)
    np.testing.assert_allclose(total, RECORD["packed/loss"], rtol=1e-6)
