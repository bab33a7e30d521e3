"""The command line as a whole: exit codes, one line for a mistake, tracebacks only for bugs."""

import subprocess
import sys
from pathlib import Path

import pytest
import toy_entry

from clp_jax import __version__
from clp_jax import main as cli

FIXTURES = Path(__file__).parent / "fixtures" / "gin"
GIVEN = ["toy", f"--gin_search_paths={FIXTURES}", "--gin_file=short.gin"]


@pytest.fixture(autouse=True)
def _toy_command(monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", {"toy": "toy_entry.toy", "absent": "clp_jax.absent.absent"})
    monkeypatch.setattr(cli, "PACKAGE", "toy_entry")
    monkeypatch.setattr(toy_entry, "CALLS", [])
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_runs_with_the_configuration_it_reports():
    assert cli.main([*GIVEN, "--gin.RUN_DIR=/tmp/x", "--rate=0.25", "--weights", "0.5,0.5"]) == 0
    (call,) = toy_entry.CALLS
    assert (call["run_dir"], call["num_steps"], call["rate"], call["weights"]) == ("/tmp/x", 7, 0.25, (0.5, 0.5))
    assert call["model"] == toy_entry.Model(12)
    assert "toy_entry.toy.weights = (0.5, 0.5)" in call["config_text"].splitlines()
    assert "RUN_DIR = '/tmp/x'" in call["config_text"].splitlines()


def test_print_config_runs_nothing(capsys):
    assert cli.main([*GIVEN, "--gin.RUN_DIR=/tmp/x", "--print_config"]) == 0
    assert "toy_entry.toy.num_steps = %NUM_STEPS" in capsys.readouterr().out
    assert not toy_entry.CALLS


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "  toy         Does nothing, and remembers what with." in out
    assert "absent" not in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_help_tells_the_macros_of_the_gin_files(capsys):
    assert cli.main([*GIVEN, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--num_steps  int  (default 10)\n      updates." in out
    assert (
        "short.gin: The toy, shorter.\n  Required:\n    --gin.RUN_DIR=VALUE  where the run goes, on two lines." in out
    )
    assert "  Commonly overridden:\n    --gin.NUM_STEPS=7  updates.\n    --gin.TEACHER=None" in out
    assert not toy_entry.CALLS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyo"], r"clp: error: there is no command 'tyo' (did you mean toy?)."),
        (["absent"], r"clp: error: there is no command 'absent'."),
        (["toy", "--stage"], r"clp toy: error: there is no flag --stage."),
        (["toy", "--gin_file=none.gin"], r"clp toy: error: --gin_file: there is no file none.gin"),
        (
            ["toy"],
            "toy still needs --run_dir=VALUE, --gin.toy.model=VALUE; most of it comes from a gin file: --gin_file=FILE.",
        ),
        (GIVEN, r"clp toy: error: toy still needs --gin.RUN_DIR=VALUE."),
        ([*GIVEN, "--gin.RUN_DIR=x", "--gin.Model.size=0"], r"clp toy: error: Model.size is 0: expected at least 1."),
        ([*GIVEN, "--gin.RUN_DIR=x", "--fail=ours"], "clp toy: error: run_dir is wrong.\nDo better.\n"),
        ([*GIVEN, "--gin.RUN_DIR=x", "--fail=missing"], r"clp toy: error: /data/file: no such file or directory."),
    ],
)
def test_mistakes_of_the_user(words, message, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_full_disk(capsys):
    assert cli.main([*GIVEN, "--gin.RUN_DIR=x", "--fail=full"]) == 1
    assert "/data/file: the disk is full: free some space and run the same command again" in capsys.readouterr().err


def test_an_interruption(capsys):
    assert cli.main([*GIVEN, "--gin.RUN_DIR=x", "--fail=interrupt"]) == 130
    assert capsys.readouterr().err == "clp toy: interrupted.\n"


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # Elsewhere than the code.
    with pytest.raises(KeyError, match="component"):
        cli.main([*GIVEN, "--gin.RUN_DIR=x", "--fail=bug"])


def test_a_value_error_of_a_library_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "PACKAGE", "clp_jax")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main([*GIVEN, "--gin.RUN_DIR=x", "--fail=library"])


def test_mistakes_in_code_of_the_user_are_shown_from_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "PACKAGE", "clp_jax")
    monkeypatch.chdir(Path(toy_entry.__file__).parent)  # What is below the working directory is the user's.
    assert cli.main([*GIVEN, "--gin.RUN_DIR=x", "--fail=bug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("clp toy: error: your code raised KeyError.") and "toy_entry.py" in said
    assert "clp_jax/main.py" not in said
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("def score(:\n")
    head = "from __gin__ import dynamic_registration\nimport broken_reward\nimport toy_entry\n"
    (tmp_path / "mine.gin").write_text(f"include 'short.gin'\n{head}toy_entry.toy.hook = @broken_reward.score\n")
    assert cli.main([*GIVEN[:2], "--gin_file=mine.gin", "--gin.RUN_DIR=x"]) == 2
    assert "broken_reward.py, line 1: invalid syntax: def score(:" in capsys.readouterr().err


def test_debug_keeps_the_traceback_of_a_mistake():
    with pytest.raises(ValueError, match="run_dir is wrong"):
        cli.main([*GIVEN, "--gin.RUN_DIR=x", "--fail=ours", "--debug"])


def test_modules_next_to_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_here.py").write_text("def score(text: str) -> str:\n    return text\n")
    head = "from __gin__ import dynamic_registration\nimport my_rewards_here\nimport toy_entry\n"
    (tmp_path / "mine.gin").write_text(f"include 'short.gin'\n{head}toy_entry.toy.hook = @my_rewards_here.score\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*GIVEN[:2], "--gin_file=mine.gin", "--gin.RUN_DIR=x"]) == 0
    assert toy_entry.CALLS[0]["hook"]("a") == "a"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["train", "--num_step=3"]])
def test_help_and_mistakes_import_neither_jax_nor_tensorflow(words, tmp_path):
    program = (
        "import sys; from clp_jax.main import main; main(sys.argv[1:]); "
        "print(sorted({'jax', 'tensorflow', 'numpy', 'beartype'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
