"""Cards tell what is known, and nothing else."""

from clp_jax.interop.model_card import Card, render
from clp_jax.models.config import T5Config

CONFIG = T5Config(
    vocab_size=11,
    embed_dim=4,
    mlp_dim=6,
    num_heads=1,
    head_dim=4,
    num_buckets=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
# Embedding and head, tables, norms, two self-attentions and one to the encoder, two feed-forward blocks.
PARAMETERS = 2 * 11 * 4 + 2 * 4 + 7 * 4 + 3 * 4 * 4 * 4 + 2 * 3 * 4 * 6


def test_a_steered_policy():
    text = render(
        Card(
            name="Short summaries",
            source="runs/clp",
            form="Hugging Face, model_type t5",
            dtype="bfloat16",
            step=1200,
            weights={"brevity": 0.25, "faithful": 0.75},
            alpha=0.5,
            origin="google/t5-v1_1-small",
            left_out=[f"vision.{i}" for i in range(7)],
            command="clp convert --from=runs/clp",
        ),
        CONFIG,
    )
    for line in (
        "library_name: transformers",
        "# Short summaries",
        "| source | `runs/clp` |",
        "| training step | 1200 |",
        "| started from | `google/t5-v1_1-small` |",
        "| format | Hugging Face, model_type t5 |",
        "| type of the tensors | bfloat16 |",
        f"| parameters | {PARAMETERS} |",
        "| reward weights | brevity 0.25, faithful 0.75 |",
        "| KL weight α | 0.5 |",
        "Left out: `vision.0`, `vision.1`, `vision.2`, `vision.3`, `vision.4` and 2 more.",
        "clp convert --from=runs/clp",
        '  "num_buckets": 4,',
    ):
        assert line in text.splitlines(), line
    assert '"dropout_rate"' not in text


def test_what_is_not_known_is_not_said():
    text = render(Card(name="Plain", source="here", form="T5X", dtype="float32"), CONFIG)
    assert "library_name: clp_jax" in text
    for word in ("step", "weights", "KL", "Left out", "Written by", "None"):
        assert word not in text
