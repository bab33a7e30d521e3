"""Pipeline files: what they say, what is wrong with them, and the one that comes with the package."""

import re

import pytest
from clp_jax.launch.pipeline import find_pipeline, read_pipeline, shipped_files

from clp_jax.main import COMMANDS, main

STAGE = "- {name: a, command: train --gin_file=x.gin, outputs: [out]}\n"


def read(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return read_pipeline(path, COMMANDS)


def test_stages_come_after_what_they_need(tmp_path):
    text = """
name: p
stages:
  - {name: c, command: [report, '--run_dirs=a b'], needs: [b, a], outputs: [o/c], target: local --processes=2}
  - {name: d, command: clp score, outputs: ['gs://x/d']}
  - {name: b, command: python3 x.py, needs: [a], inputs: [x], outputs: [o/b]}
  - {name: a, command: clp train, outputs: [o/a]}
"""
    found = read(tmp_path, text)
    assert list(found.stages) == ["d", "a", "b", "c"]
    assert found.stages["a"].command == ("clp", "train")
    assert found.stages["b"].command == ("python3", "x.py")
    assert found.stages["c"].command == ("clp", "report", "--run_dirs=a b")
    assert found.stages["c"].target == ("local", "--processes=2")
    assert list(found.only(["b"]).stages) == ["a", "b"]
    with pytest.raises(ValueError, match=r"there is no stage 'e': there are d, a, b, c"):
        found.only(["e"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: []", "name is missing"),
        ("name: P q\nstages:\n" + STAGE, "its name is 'P q'"),
        ("name: p\nstages: []", "stages: []: expected a list of stages"),
        ("name: p\nstages: [3]", "stage 1: 3: expected name"),
        ("name: p\nstage: []\nstages: []", "unknown key 'stage' (did you mean stages?)"),
        (
            "name: p\nstages:\n" + STAGE.replace("outputs", "output"),
            "stage a: unknown key 'output' (did you mean outputs?)",
        ),
        ("name: p\nstages:\n" + STAGE.replace("[out]", "[]"), "stage a: outputs: there are none"),
        ("name: p\nstages:\n" + STAGE.replace("[out]", "out"), "stage a: outputs: 'out': expected a list of text"),
        (
            "name: p\nstages:\n" + STAGE.replace("train", "trian"),
            "stage a: there is no command 'trian' (did you mean train?)",
        ),
        ("name: p\nstages:\n" + STAGE.replace("train --gin_file=x.gin", "''"), "stage a: command: it is empty"),
        ("name: p\nstages:\n" + STAGE + STAGE, "two stages are called a"),
        ("name: p\nstages:\n" + STAGE + STAGE.replace("name: a", "name: b"), "stages a and b have the same output out"),
        ("name: p\nstages:\n" + STAGE.replace("}", ", needs: [z]}"), "stage a needs z, which is no stage"),
        ("name: p\nstages:\n" + STAGE.replace("}", ", needs: [a]}"), "needs go round: a -> a"),
        (
            "name: p\nstages:\n"
            + STAGE.replace("}", ", needs: [b]}")
            + STAGE.replace("name: a", "name: b").replace("out]", "o2], needs: [c]")
            + STAGE.replace("name: a", "name: c").replace("out]", "o3], needs: [b]"),
            "needs go round: b -> c -> b",
        ),
        ("name: p\nname: q\nstages: []", "'name' stands twice"),
        ("name: p\nstages: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "p.yaml"))


def test_a_file_that_is_not_there(capsys):
    assert main(["pipeline", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "clp pipeline: error: nowhere.yaml: no such file or directory.\n"


SHIPPED = sorted(path.relative_to(shipped_files()).as_posix() for path in shipped_files().rglob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pipelines_resolve_and_leave_what_their_commands_write(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = read_pipeline(find_pipeline(name), COMMANDS)
    outputs = [output for stage in found.stages.values() for output in stage.outputs]
    for stage in found.stages.values():
        assert main([*stage.command[1:], "--print_config"]) == 0
        config = capsys.readouterr().out
        # Every run directory that a configuration names is some stage's, before or now.
        named = set(re.findall(r"'(runs/[^']*)'", config))
        assert named
        upstream = [o for need in (*stage.needs, stage.name) for o in found.stages[need].outputs]
        assert all(any(path == o or path.startswith(f"{o}/") for o in outputs) for path in named)
        if stage.command[1] in ("train", "prepare"):
            own = re.search(r"^(?:RUN_DIR|DATA_DIR) = %?'?([^'\n]*)", config, flags=re.MULTILINE)
            assert own is not None and named <= {*upstream, *stage.outputs}
            assert stage.outputs[0] in named
    assert not list(tmp_path.iterdir())


def test_the_quickstart_is_shipped():
    assert "examples/pydoc.yaml" in SHIPPED
    assert list(read_pipeline(find_pipeline("examples/pydoc.yaml"), COMMANDS).stages) == [
        "prepare", "sft", "preference", "policy", "evaluate", "report",
    ]  # fmt: skip
