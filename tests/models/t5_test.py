"""The encoder-decoder against itself: decoding step by step, packing, recomputation, precision, dropout, padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policies import PROMPTS, tiny_config, varied_params
from whole_logits import loss_of_logits

from clp_jax.data.packing import pack
from clp_jax.data.reader import sequence_batch
from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.training.supervised import SupervisedLoss

RNG = np.random.default_rng(0)
COMPLETIONS = RNG.integers(0, 11, (4, 7)).astype(np.int32)


def dropout_key(seed: int) -> jax.Array:
    """Of a generator that compiles several times faster than the default one."""
    return jax.random.key(seed, impl="unsafe_rbg")


@functools.partial(jax.jit, static_argnames="policy")
def forward(policy, params, inputs, decoder_inputs, dropout_key=None):
    return policy.bind(params)(inputs, decoder_inputs, dropout_key=dropout_key)


@functools.partial(jax.jit, static_argnames=("policy", "num_samples"))
def step_by_step(policy, params, inputs, decoder_inputs, num_samples=1):
    """The logits of `forward`, one token at a time, and the cache that is left."""
    model = policy.bind(params)
    cache = model.init_cache(model.encode(inputs), max_length=decoder_inputs.shape[1], num_samples=num_samples)

    def step(cache, tokens):
        hidden, cache = model.decode_step(tokens, cache, model.loop_weights())
        return cache, model.logits(hidden)

    cache, logits = jax.lax.scan(step, cache, decoder_inputs.T)
    return logits.swapaxes(0, 1), cache


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(num_encoder_layers=1, num_decoder_layers=3),
        tiny_config(activation="relu", gated=False, tied_head=True, scan_unroll=2),
    ],
    ids=["1.1", "1.0"],
)
def test_decoding_step_by_step_is_the_whole_forward(config):
    policy = Policy(config)
    params = varied_params(policy)
    whole = forward(policy, params, PROMPTS, COMPLETIONS)
    logits, cache = step_by_step(policy, params, PROMPTS, COMPLETIONS)
    assert whole.shape == (4, 7, 11) and whole.dtype == jnp.float32
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-5)
    assert int(cache.index) == 7


def test_samples_of_a_prompt_share_its_encoding():
    policy = Policy(tiny_config())
    params = varied_params(policy)
    prompts = PROMPTS[[0, 3]]
    apart = forward(policy, params, np.repeat(prompts, 2, axis=0), COMPLETIONS)
    np.testing.assert_allclose(forward(policy, params, prompts, COMPLETIONS), apart, rtol=1e-5, atol=1e-5)
    logits, cache = step_by_step(policy, params, prompts, COMPLETIONS, num_samples=2)
    np.testing.assert_allclose(logits, apart, rtol=1e-5, atol=1e-5)
    # Cross-attention keys are those of two prompts, self-attention keys of four rows.
    assert len(cache.stacks) == 2
    for (layer,) in cache.stacks:
        assert layer.prompt_keys.shape == layer.prompt_values.shape == (2, 2, 6, 4)
        assert layer.keys.shape == layer.values.shape == (4, 2, 7, 4)
    _, deep = step_by_step(Policy(tiny_config(scan_unroll=1)), params, prompts, COMPLETIONS, num_samples=2)
    ((layer,),) = deep.stacks
    assert layer.prompt_keys.shape == (2, 2, 2, 6, 4) and layer.keys.shape == (2, 4, 2, 7, 4)


def test_what_is_behind_the_padding_does_not_matter():
    policy = Policy(tiny_config())
    params = varied_params(policy)
    longer = np.pad(PROMPTS, ((0, 0), (0, 3)))
    expected = forward(policy, params, PROMPTS, COMPLETIONS)
    np.testing.assert_allclose(forward(policy, params, longer, COMPLETIONS), expected, rtol=1e-5, atol=1e-5)

    @jax.jit
    def with_segments(inputs, segments):
        return policy.bind(params)(inputs, jnp.asarray(COMPLETIONS), encoder_segments=segments)

    junk, segments = np.where(PROMPTS == 0, 9, PROMPTS), (PROMPTS != 0).astype(np.int32)
    np.testing.assert_array_equal(with_segments(junk, segments), with_segments(PROMPTS, segments))


def test_a_token_is_predicted_from_the_tokens_before_it():
    policy = Policy(tiny_config())
    params = varied_params(policy)
    before = forward(policy, params, PROMPTS, COMPLETIONS)
    changed = COMPLETIONS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    after = forward(policy, params, PROMPTS, changed)
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert np.all(np.any(after[:, 4:] != before[:, 4:], axis=-1))


def _examples() -> list[dict[str, np.ndarray]]:
    lengths = [(5, 3), (4, 6), (9, 2), (3, 3), (2, 5), (12, 9), (1, 1)]
    return [{"inputs": RNG.integers(2, 11, s), "targets": RNG.integers(2, 11, t)} for s, t in lengths]


def _rows(groups):
    """Groups of examples as the records that preparation writes."""
    return [
        {
            key: value
            for name in ("inputs", "targets")
            for key, value in (
                (name, np.concatenate([example[name] for example in group])),
                (f"{name}_ends", np.cumsum([len(example[name]) for example in group])),
            )
        }
        for group in groups
    ]


def test_packed_and_unpacked_losses_and_gradients_agree():
    policy = Policy(tiny_config())
    params = varied_params(policy)
    loss = SupervisedLoss(policy, z_loss=1e-2)
    examples, lengths = _examples(), {"inputs": 12, "targets": 10}
    groups = list(pack(examples, lengths))
    assert len(groups) < len(examples) and max(map(len, groups)) >= 3

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(lambda p: loss.sums(p, batch, None)[0])(params)

    packed, apart = (
        run(params, sequence_batch(_rows(rows), np.arange(len(rows), dtype=np.int32), lengths))
        for rows in (groups, [[example] for example in examples])
    )
    np.testing.assert_allclose(packed[0], apart[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (packed[1], apart[1])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope="module")
def loss_and_gradient():
    """Of a model with dropout, whose masks a recomputation must draw again."""

    def compute(**changes):
        policy = Policy(tiny_config(dropout_rate=0.2, **changes))

        @jax.jit
        @jax.value_and_grad
        def run(params, inputs, tokens):
            logits = policy.bind(params)(inputs, tokens, dropout_key=dropout_key(7))
            return loss_of_logits(logits, tokens, jnp.ones(tokens.shape))[0]

        return run(varied_params(policy), PROMPTS, COMPLETIONS)

    return compute, compute()


@pytest.mark.parametrize("changes", [dict(remat="minimal"), dict(remat="full", scan_unroll=2)])
def test_recomputation_and_unrolling_change_no_loss_and_no_gradient(loss_and_gradient, changes):
    compute, (loss, gradient) = loss_and_gradient
    other_loss, other_gradient = compute(**changes)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other_gradient, gradient)


def test_bfloat16_activations_and_float32_logits():
    wide = Policy(tiny_config())
    params = varied_params(wide)
    for tied in (False, True):
        narrow = Policy(tiny_config(dtype="bfloat16", tied_head=tied))
        own = {name: leaf for name, leaf in params.items() if not (tied and name == "logits_head")}

        @jax.jit
        def run(params, inputs, tokens, narrow=narrow):
            model = narrow.bind(params)
            encoded = model.encode(inputs)
            hidden = model.decode(tokens, encoded).hidden
            return encoded.content, hidden, model.logits(hidden), model.logits(hidden.astype(jnp.float32))

        encoded, hidden, logits, logits_of_wide = run(own, PROMPTS, COMPLETIONS)
        assert encoded.dtype == hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
        # The head computes in float32 from what the states are: no rounding of its own.
        np.testing.assert_array_equal(logits, logits_of_wide)
        exact = forward(dataclasses.replace(wide, config=tiny_config(tied_head=tied)), own, PROMPTS, COMPLETIONS)
        # Rounding to 8 bits in some 20 places: about 20**0.5 times 2**-9 of the logits' size, and never none.
        error = np.sqrt(np.mean(np.square(logits - exact)) / np.mean(np.square(exact)))
        assert 2**-11 < error < 5 * 20**0.5 * 2**-9


def test_bfloat16_parameters():
    policy = Policy(tiny_config(param_dtype="bfloat16", dtype="bfloat16"))
    params = varied_params(policy)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert forward(policy, params, PROMPTS, COMPLETIONS).dtype == jnp.float32


def test_dropout_needs_a_key_and_is_decided_by_it():
    plain, dropping = Policy(tiny_config()), Policy(tiny_config(dropout_rate=0.3))
    params = varied_params(plain)
    expected = forward(plain, params, PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(forward(dropping, params, PROMPTS, COMPLETIONS), expected)
    first, again, other = (forward(dropping, params, PROMPTS, COMPLETIONS, dropout_key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.all(np.any(first != expected, axis=-1)) and np.all(np.any(first != other, axis=-1))


def test_layers_have_dropout_masks_of_their_own():
    """Every layer adds to feature 0 of the states alone, which starts at 0: it stays 0 where all their masks are 0."""
    layers, rate = 3, 0.5
    policy = Policy(tiny_config(dropout_rate=rate, num_encoder_layers=layers, activation="relu", gated=False))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), policy.abstract())
    params["token_embedder"]["embedding"] = jnp.ones((11, 8)).at[:, 0].set(0)
    encoder = params["encoder"]
    encoder["norm"]["scale"], encoder["layers"]["mlp_norm"]["scale"] = jnp.ones(8), jnp.ones((layers, 8))
    encoder["layers"]["mlp"]["wi"]["kernel"] = jnp.ones((layers, 8, 12))
    encoder["layers"]["mlp"]["wo"]["kernel"] = jnp.zeros((layers, 12, 8)).at[:, :, 0].set(1)

    @jax.jit
    def run(tokens, key):
        return policy.bind(params).encode(tokens, dropout_key=key).content

    count = 1500
    kept = np.mean(run(np.full((30, 50), 3, np.int32), jax.random.key(0))[:, :, 0] != 0)
    # A layer adds something unless its residual, or all of its hidden units, are dropped; the output is dropped too, and
    # where the seven features of the embedding are all dropped there is nothing to begin with.
    adds = (1 - rate) * (1 - rate**12)
    expected = (1 - rate) * (1 - rate**7) * (1 - (1 - adds) ** layers)
    assert abs(kept - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_a_tied_head_is_the_scaled_embedding():
    policy = Policy(tiny_config(tied_head=True))
    params = varied_params(policy)
    assert "logits_head" not in params and "logits_head" in varied_params(Policy(tiny_config()))
    states = RNG.normal(size=(2, 8)).astype(np.float32)
    logits = jax.jit(lambda p, x: policy.bind(p).logits(x))(params, states)
    table = np.asarray(params["token_embedder"]["embedding"], np.float64)
    np.testing.assert_allclose(logits, states / 8**0.5 @ table.T, rtol=1e-5, atol=1e-6)


def test_presets():
    sizes = {
        f.name: getattr(tiny_config(), f.name) for f in dataclasses.fields(T5Config) if f.default is dataclasses.MISSING
    }
    old, new = T5Config.t5_1_0(**sizes), T5Config.t5_1_1(**sizes)
    assert (old.activation, old.gated, old.tied_head) == ("relu", False, True)
    assert (new.activation, new.gated, new.tied_head) == ("gelu", True, False)
