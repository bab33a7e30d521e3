"""Cards tell what made a policy, and nothing else."""

import json

import pytest

from clp_jax.interop.model_card import model_card
from clp_jax.models.config import T5Config
from clp_jax.models.serialization import from_json

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


def test_a_card():
    provenance = ("From the run `clp` at step 1200.", "Mixed at the reward weights brevity 0.25, faithful 0.75.")
    text = model_card(CONFIG, provenance)
    lines = text.splitlines()
    assert lines[:2] == ["---", "library_name: transformers"]
    assert f"A policy exported by clp_jax: T5Config of {PARAMETERS} parameters." in lines
    assert lines.index("1. From the run `clp` at step 1200.") + 1 == lines.index(f"2. {provenance[1]}")
    settings = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert from_json(settings) == CONFIG
    assert "dropout_rate" not in settings  # As in any T5.


def test_a_card_without_a_source_is_none():
    with pytest.raises(ValueError, match="provenance is empty: expected a sentence"):
        model_card(CONFIG, ())
