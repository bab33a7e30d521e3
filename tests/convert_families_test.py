"""`clp convert`, `score` and `sample` of further families of Hugging Face's: what its own model computes of the directory that it saved."""

import json
from pathlib import Path

import numpy as np
import pytest

from clp_jax.main import main

torch = pytest.importorskip("torch", reason="the references need the extra `hf` (torch, transformers)")
import torch_models

# With positions in each layer, a window, caps; parity of all families, layer by layer, is tested in `interop`.
CASES = ("umt5", "mistral_window", "gemma2_rest")
ROWS = [{"inputs": [3, 4, 5], "targets": [6, 7, 1]}, {"inputs": [9, 8, 9, 7, 11, 12, 9], "targets": [8, 10]}]
LENGTH, BEAMS = 6, 3


def clp(*words: str) -> None:
    assert main(list(words)) == 0


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_the_commands_compute_what_transformers_does(tmp_path, case):
    model = torch_models.make(case)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    clp("convert", f"hf:{tmp_path / 'hf'}", f"clp:{tmp_path / 'run'}")
    words = [f"--checkpoint={tmp_path / 'run'}", f"--input={tmp_path / 'rows.jsonl'}"]
    clp("score", *words, f"--output={tmp_path / 'scores.jsonl'}")
    decoding = {"greedy": [], "beam": [f"--num_beams={BEAMS}"]}
    for strategy, more in decoding.items():
        out = f"--output={tmp_path / strategy}.jsonl"
        clp("sample", *words, out, f"--strategy={strategy}", f"--max_tokens={LENGTH}", *more)
    found = [lines_of(tmp_path / f"{name}.jsonl") for name in ("scores", *decoding)]
    for row, scored, greedy, beam in zip(ROWS, *found, strict=True):
        prompt, targets = torch.tensor([row["inputs"]]), torch.tensor(row["targets"])
        shifted = torch.tensor([[0, *row["targets"][:-1]]])
        with torch.no_grad():
            logits = torch_models.row_logits(model, prompt, shifted, targets)
        expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy()
        np.testing.assert_allclose(scored["logprobs"], expected, rtol=1e-5, atol=1e-5)
        assert greedy["tokens"] == written(model, prompt)
        assert np.ravel(beam["tokens"]).tolist() == written(model, prompt, num_beams=BEAMS, early_stopping=False)


def written(model, prompt, **settings) -> list[int]:
    """What `generate` writes, up to and including the end."""
    asked = dict(attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=False, max_new_tokens=LENGTH)
    with torch.no_grad():
        row = model.generate(prompt, **asked, **settings)[0]
    tokens = row[1 if model.config.is_encoder_decoder else prompt.shape[1] :].tolist()
    return tokens[: tokens.index(torch_models.EOS) + 1] if torch_models.EOS in tokens else tokens
