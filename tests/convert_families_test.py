"""`clp convert`, `score` and `sample` of every family of Hugging Face's: what its own model computes, and its files to the bit."""

import json

import numpy as np
import pytest
from command_lines import clp, lines_of
from safetensors.numpy import load_file

from clp_jax.interop.hf_families import FAMILIES

torch = pytest.importorskip("torch", reason="the references need the extra `hf` (torch, transformers)")
import torch_cases
import torch_models
import transformers
from torch_cases import BEAMS, ENDS, PAD

# Heads, windows and caps as the published models have them.
CASES = {
    "t5_1_0": "t5",
    "flan_t5": "t5_gated_own_head",
    "ul2": "t5_own_head",
    "mt5": "mt5_own_head",
    "umt5": "umt5_own_head",
    "switch": "switch",
    "gemma": "gemma",
    "gemma2": "gemma2_rest",
    "gemma3": "gemma3_rest",
    "llama2": "llama_without_padding",
    "llama3": "llama_mqa_llama3",
    "mistral": "mistral_window",
    "mixtral": "mixtral",
    "qwen2": "qwen2_windows",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}
LENGTH = 6
ROWS = [
    {"inputs": [3, 5, 7], "targets": [6, 7, 1]},
    {"inputs": [9, 8, 9, 7, 11, 12, 9], "targets": [8]},
    {"inputs": [23], "targets": [10, 3, 28, 6, 4, 13]},
]


def test_every_family_is_there():
    classes = [torch_cases.CASES[case][1] for case in CASES.values()]
    assert {getattr(transformers, name).model_type for name in classes} == set(FAMILIES)


@pytest.mark.parametrize("family", CASES)
def test_the_commands_compute_what_transformers_does(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    model = torch_models.make(CASES[family], eos_token_id=list(ENDS))
    torch_models.save(model, tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    clp("convert", "hf:hf", "clp:run")
    words = ["--checkpoint=run", "--input=rows.jsonl"]
    clp("score", *words, "--output=scores.jsonl")
    clp("sample", *words, "--output=greedy.jsonl", "--strategy=greedy", f"--max_tokens={LENGTH}")
    clp("sample", *words, "--output=beams.jsonl", "--strategy=beam", f"--num_beams={BEAMS}", f"--max_tokens={LENGTH}")
    for row, scored in zip(ROWS, lines_of(tmp_path / "scores.jsonl"), strict=True):
        expected = log_probs(model, row)
        np.testing.assert_allclose(scored["logprobs"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(scored["total"], expected.sum(), rtol=1e-5)
    prompts = np.stack([np.pad(row["inputs"], (0, 7 - len(row["inputs"])), constant_values=PAD) for row in ROWS])
    for name, settings in (("greedy", {}), ("beams", {"num_beams": BEAMS, "early_stopping": False})):
        expected = torch_models.write(model, prompts, LENGTH, **settings)["tokens"]
        found = [line["tokens"] for line in lines_of(tmp_path / f"{name}.jsonl")]
        assert [tokens + [0] * (LENGTH - len(tokens)) for tokens in found] == expected.tolist(), name

    clp("convert", "clp:run", "hf:back")
    for file in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / place / file).read_text()) for place in ("hf", "back"))
        assert after == before
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("hf", "back"))
    assert sorted(after) == sorted(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)


def log_probs(model, row) -> np.ndarray:
    """Of a row's targets, by torch."""
    prompt, targets = (np.asarray([row[name]], np.int32) for name in ("inputs", "targets"))
    batch = torch_models.Rows(prompt, np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets)
    with torch.no_grad():
        logits = torch_models.target_logits(model, batch)[0]
    return logits.log_softmax(-1).gather(-1, torch.tensor(row["targets"])[:, None])[:, 0].numpy()
