"""`docs/decoding.md`, followed: its commands as they are typed there, and its Python as one program."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_runs import make_data, make_steerable, make_supervised

from clp_jax.main import main
from clp_jax.rewards.programmatic import Brevity, ExtractiveCoverage

PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)


@pytest.fixture
def home(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data")
    make_supervised(tmp_path / "runs" / "policy", data)
    rewards = (ExtractiveCoverage(), Brevity())
    make_steerable(tmp_path / "runs", "clp", lambda params, k: params, "policy", rewards)
    make_supervised(tmp_path / "runs" / "other", data, seed=1)
    (tmp_path / "prompts.jsonl").write_text('{"inputs": "the quick fox"}\n{"inputs": [3, 4, 5], "seed": 7}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(home, capsys):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        assert shlex.split(line)[0] == "clp"
        assert main([*shlex.split(line)[1:], "--max_tokens=4"]) == 0, line
    written = {path.stem: [json.loads(x) for x in path.read_text().splitlines()] for path in home.glob("*.jsonl")}
    assert set(written) == {"prompts", "samples", "beams", "best", "mixed", "contrast"}
    assert [len(line["rewards"]) for line in written["best"]] == [2, 2]
    for name in ("samples", "beams"):
        assert [len(line["tokens"]) for line in written[name]] == [2, 2]
    assert all(len(answers) == 2 for answers in written.values())


def test_the_python(home, capsys):
    names: dict = {}
    exec(compile("\n".join(blocks("python")), str(PAGE), "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    assert {tuple(line.split(" ")[:2]) for line in shown} == {(str(r), str(s)) for r in range(3) for s in range(2)}
    assert sorted(names["results"]) == [0, 1, 2]
    assert names["beams"].completions.tokens.shape == (2, 8) and isinstance(names["best"], str)


def test_every_strategy_and_flag_is_there():
    """What the page names, `clp sample` has."""
    named = set(re.findall(r"--(\w+)", PAGE.read_text("utf-8"))) - {"help", "gin", "gin_file"}
    text = (PAGE.parents[1] / "clp_jax" / "sampling" / "decoding.py").read_text("utf-8")
    text += (PAGE.parents[1] / "clp_jax" / "training" / "partners.py").read_text("utf-8")
    text += (PAGE.parents[1] / "clp_jax" / "sampling" / "devices.py").read_text("utf-8")
    text += (PAGE.parents[1] / "clp_jax" / "sample.py").read_text("utf-8")
    assert not [name for name in named if not re.search(rf"^    {name}: ", text, flags=re.MULTILINE)]
