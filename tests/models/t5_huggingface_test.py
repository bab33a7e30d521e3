"""Parity with Hugging Face's torch T5 of random weights; torch and transformers come with the extra `hf`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity reference needs the extra `hf` (torch)")
transformers = pytest.importorskip("transformers", reason="the parity reference needs the extra `hf` (transformers)")

from clp_jax.models.config import T5Config
from clp_jax.models.policy import Policy
from clp_jax.nn.position import relative_position_bucket
from clp_jax.sampling.decoder import CachedDecoder
from clp_jax.sampling.generate import SamplingConfig, generate, row_keys
from clp_jax.sampling.strategies import Greedy

SIZES = dict(
    vocab_size=29, embed_dim=12, mlp_dim=20, num_heads=3, head_dim=8, num_encoder_layers=2, num_decoder_layers=3
)
# Sequences reach beyond the last bucket in both directions.
DISTANCES = dict(num_buckets=8, max_distance=12)
ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def torch_model(config: T5Config) -> "transformers.T5ForConditionalGeneration":
    """Every weight random, norms and position biases included."""
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.embed_dim,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu" if config.gated else "relu",
            tie_word_embeddings=config.tied_head,
            decoder_start_token_id=0,
            eos_token_id=1,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Scales near 1, and matrices that keep the size of what they are applied to; T5's queries are smaller.
            scale = parameter.shape[-1] ** -0.5 * (config.head_dim**-0.5 if name.endswith(".q.weight") else 1)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else scale * noise)
    return model


def converted(model: "transformers.T5ForConditionalGeneration", config: T5Config) -> dict:
    """The torch model's weights as a policy's parameters: matrices transposed, layers stacked."""
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}

    def stacks(stack: str, layers: int, blocks: list[tuple[str, str, str]]) -> dict:
        def each(form: str) -> np.ndarray:
            return np.stack([weights[f"{stack}.block.{i}.layer.{form}.weight"] for i in range(layers)])

        out: dict = {}
        for number, (norm, block, name) in enumerate(blocks):
            out[norm] = {"scale": each(f"{number}.layer_norm")}
            names = ATTENTION if "attention" in block else {n: n for n in ("wi", "wi_0", "wi_1", "wo")}
            out[block] = {
                ours: {"kernel": each(f"{number}.{name}.{theirs}").swapaxes(1, 2)}
                for ours, theirs in names.items()
                if f"{stack}.block.0.layer.{number}.{name}.{theirs}.weight" in weights
            }
        bias = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T
        scale = weights[f"{stack}.final_layer_norm.weight"]
        return {"relpos_bias": {"embedding": bias}, "layers": out, "norm": {"scale": scale}}

    attention = ("self_attention_norm", "self_attention", "SelfAttention")
    cross = ("cross_attention_norm", "cross_attention", "EncDecAttention")
    mlp = ("mlp_norm", "mlp", "DenseReluDense")
    params = {
        "token_embedder": {"embedding": weights["shared.weight"]},
        "encoder": stacks("encoder", config.num_encoder_layers, [attention, mlp]),
        "decoder": stacks("decoder", config.num_decoder_layers, [attention, cross, mlp]),
    }
    if not config.tied_head:
        params["logits_head"] = {"kernel": weights["lm_head.weight"].T}
    return jax.tree.map(jnp.asarray, params)


def prompts(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Prompts of all lengths, padded with 0."""
    tokens = rng.integers(2, SIZES["vocab_size"], (rows, length))
    return np.where(np.arange(length) < rng.integers(1, length + 1, (rows, 1)), tokens, 0).astype(np.int32)


@pytest.mark.parametrize(
    "config",
    [
        T5Config.t5_1_0(**SIZES, **DISTANCES),
        T5Config.t5_1_1(**SIZES, **DISTANCES),
        T5Config.t5_1_1(**SIZES, **DISTANCES, tied_head=True),
        T5Config.t5_1_0(**SIZES, **DISTANCES, tied_head=False),
    ],
    ids=["1.0", "1.1", "1.1-tied", "1.0-untied"],
)
def test_logits_states_and_greedy_completions(config):
    model, policy = torch_model(config), Policy(config)
    params = converted(model, config)
    rng = np.random.default_rng(0)
    inputs = prompts(rng, 4, 32)
    decoder_inputs = rng.integers(0, config.vocab_size, (4, 24)).astype(np.int32)

    with torch.no_grad():
        mask = torch.tensor(inputs != 0, dtype=torch.long)
        expected = model(
            input_ids=torch.tensor(inputs, dtype=torch.long),
            attention_mask=mask,
            decoder_input_ids=torch.tensor(decoder_inputs, dtype=torch.long),
        )
        written = model.generate(
            torch.tensor(inputs, dtype=torch.long),
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            use_cache=False,
        )

    @jax.jit
    def run(params, inputs, decoder_inputs):
        bound = policy.bind(params)
        config = SamplingConfig(max_length=10, strategy=Greedy())
        greedy = generate(CachedDecoder(bound), inputs, keys=row_keys(jax.random.key(0), 4), config=config)
        return bound.encode(inputs), bound(inputs, decoder_inputs), greedy.tokens

    encoded, logits, tokens = run(params, jnp.asarray(inputs), jnp.asarray(decoder_inputs))
    seen = inputs != 0
    np.testing.assert_allclose(
        encoded.content[seen], expected.encoder_last_hidden_state.numpy()[seen], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(logits, expected.logits.numpy(), rtol=1e-5, atol=1e-5)
    written = np.pad(written.numpy()[:, 1:], ((0, 0), (0, 11 - written.shape[1])))
    np.testing.assert_array_equal(tokens, written)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12)])
def test_buckets(bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-400, 401, dtype=np.int32)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    ours = relative_position_bucket(
        jnp.asarray(distances), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(ours, expected.numpy())
