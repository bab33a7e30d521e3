"""From gin files to arguments: what wins, what is stored, and every mistake in one line."""

from pathlib import Path

import gin
import pytest
import toy_entry

from clp_jax.gin_utils.configuration import configure
from clp_jax.gin_utils.files import ConfigError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "gin"


@pytest.fixture(autouse=True)
def _search_path(monkeypatch):
    monkeypatch.chdir(FIXTURES)


def resolve(*gin_bindings: str, files=("short.gin",), entry=toy_entry.toy, **arguments):
    return configure(entry, gin_files=files, gin_bindings=gin_bindings, arguments=arguments)


RESOLVED = """\
from __gin__ import dynamic_registration
import toy_entry

MODEL = @toy_entry.Model()
NUM_STEPS = 7
RUN_DIR = '/tmp/x'
TEACHER = @teacher/toy_entry.Model()

toy_entry.toy.run_dir = %RUN_DIR
toy_entry.toy.model = %MODEL
toy_entry.toy.rewards = [@toy_entry.Length()]
toy_entry.toy.num_steps = %NUM_STEPS
toy_entry.toy.rate = 0.25
toy_entry.toy.weights = ()
toy_entry.toy.lengths = None
toy_entry.toy.mode = 'fast'
toy_entry.toy.verbose = False
toy_entry.toy.teacher = %TEACHER
toy_entry.toy.hook = @toy_entry.shout
toy_entry.toy.fail = None

toy_entry.Length.names = ('length',)

toy_entry.Model.size = 12
toy_entry.Model.rate = 0.0
toy_entry.Model.kind = 'plain'
teacher/toy_entry.Model.size = 4

toy_entry.shout.times = 1
"""


def test_the_resolved_configuration_and_what_it_builds():
    configuration = resolve("RUN_DIR=/tmp/x", "TEACHER=@teacher/Model()", rate=0.25)
    assert configuration.text == RESOLVED
    arguments = configuration.build()
    assert arguments.pop("hook")("a") == "A"
    assert arguments == {
        "run_dir": "/tmp/x",
        "model": toy_entry.Model(12),
        "teacher": toy_entry.Model(4),
        "rewards": [toy_entry.Length()],
        "num_steps": 7,
        "rate": 0.25,
        "weights": (),
        "lengths": None,
        "mode": "fast",
        "verbose": False,
        "fail": None,
    }
    assert type(arguments["model"]) is toy_entry.Model


def test_the_resolved_configuration_resolves_to_itself(tmp_path):
    (tmp_path / "config.gin").write_text(RESOLVED)
    assert resolve(files=[str(tmp_path / "config.gin")]).text == RESOLVED
    again = resolve("NUM_STEPS=8", "Model.kind='other'", files=[str(tmp_path / "config.gin")])
    assert again.build()["num_steps"] == 8
    assert again.build()["model"].kind == "other"


def test_files_mean_to_gin_alone_what_they_mean_here(monkeypatch):
    gin.clear_config()
    gin.parse_config_files_and_bindings(["short.gin"], ["RUN_DIR = '/tmp/x'"])
    expected = gin.get_bindings(toy_entry.toy)
    actual = resolve("RUN_DIR=/tmp/x").build()
    assert expected.pop("hook")("a") == actual["hook"]("a") == "A"
    assert expected.items() <= actual.items()


@pytest.mark.parametrize(
    ("binding", "argument", "value"),
    [
        ("toy.num_steps=3", "num_steps", 3),
        ("toy_entry.toy.num_steps=3", "num_steps", 3),
        ("NUM_STEPS=3", "num_steps", 3),
        ("toy.rate=1", "rate", 1),
        ("Model.size=5", "model", toy_entry.Model(5)),
        ("MODEL/Model.size=5", "model", toy_entry.Model(5)),
        ("MODEL=@Model.small()", "model", toy_entry.Model(1)),
        ("toy.model=@toy_entry.Model.small()", "model", toy_entry.Model(1)),
        ("toy.weights=[0.5, 0.5]", "weights", [0.5, 0.5]),
        ("toy.lengths={'a': 3}", "lengths", {"a": 3}),
        ("toy.rewards=()", "rewards", ()),
    ],
)
def test_bindings_of_the_command_line(binding, argument, value):
    assert resolve("RUN_DIR='x'", binding).build()[argument] == value


def test_later_wins():
    built = resolve("RUN_DIR=x", "NUM_STEPS=1", "NUM_STEPS=2", files=["base.gin", "short.gin"]).build()
    assert built["num_steps"] == 2
    assert resolve("RUN_DIR=x", "toy.num_steps=1", num_steps=4).build()["num_steps"] == 4
    assert resolve("RUN_DIR=x", files=["short.gin", "base.gin"]).build()["num_steps"] == 100


def test_arguments_of_a_preset():
    assert resolve("RUN_DIR=x", "MODEL=@Model.small()", "Model.small.rate=0.5").build()["model"] == toy_entry.Model(
        1, 0.5
    )


def test_an_argument_may_be_a_field_of_one():
    """It is bound to the dataclass, which is then built, also where a file has bound it already."""
    alone = configure(toy_entry.toy, arguments={"run_dir": "x", "size": 3}).build()
    assert alone["model"] == toy_entry.Model(3)
    given = resolve("RUN_DIR=x", "Model.rate=0.5", size=3, kind="other")
    assert given.build()["model"] == toy_entry.Model(3, 0.5, "other")


def test_without_files():
    configuration = configure(toy_entry.shout, arguments={"text": "a"})
    assert configuration.build() == {"text": "a", "times": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), r"^toy still needs --gin.RUN_DIR=VALUE\.$"),
        (("RUN_DR=x",), r"^--gin.RUN_DR: nothing here uses a macro RUN_DR \(did you mean RUN_DIR\?\)\.$"),
        (("weight=3",), r"nothing here uses a macro weight \(did you mean --weights\?\)"),
        (("UNUSED=4",), r"nothing here uses a macro UNUSED"),
        (
            ("RUN_DIR=x", "toy.num_step=3"),
            r"^--gin.toy.num_step: toy has no argument 'num_step' \(did you mean num_steps\?\)",
        ),
        (
            ("RUN_DIR=x", "Modle.size=3"),
            r"^--gin.Modle.size: there is no function or class 'Modle' here \(did you mean Model\?\)",
        ),
        (("RUN_DIR=x", "Model.small.rate=3"), r"nothing here uses toy_entry.Model.small; it uses toy, .*Model"),
        (("RUN_DIR=x", "MODEL=@Reward"), r"--gin.MODEL: toy.model is %MODEL, @toy_entry.Reward: expected Model\."),
        (("RUN_DIR=3",), r"^--gin.RUN_DIR: toy.run_dir is %RUN_DIR, 3: expected str\.$"),
        (("RUN_DIR=x", "NUM_STEPS=1e3"), r"^--gin.NUM_STEPS: toy.num_steps is %NUM_STEPS, 1000.0: expected int\.$"),
        (("RUN_DIR=x", "NUM_STEPS=ten"), r"'ten': expected int"),
        (("RUN_DIR=x", "MODEL=@Length()"), r"toy.model is %MODEL, @toy_entry.Length\(\): expected Model"),
        (("RUN_DIR=x", "toy.rewards=[@Model()]"), r"expected Sequence\[Reward\]"),
        (("RUN_DIR=x", "toy.mode='slow'"), r"expected 'fast' \| 'exact'"),
        (("RUN_DIR=%RUN_DIR",), r"the macro RUN_DIR stands for itself"),
        (("RUN_DIR=%RUM_DIR",), r"--gin.RUN_DIR: the macro RUM_DIR is set nowhere \(did you mean RUN_DIR\?\)"),
        (("RUN_DIR=x", "toy.config_text='x'"), r"toy has no argument 'config_text'"),
    ],
)
def test_mistakes_on_the_command_line(given, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve(*given)
    assert "\n" not in str(error.value)


HEAD = "from __gin__ import dynamic_registration\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import toy_enty\n", r"bad.gin:2: there is no module toy_enty \(did you mean toy_entry\?\)"),
        ("from clp_jax import preference\n", r"no module clp_jax.preference \(did you mean clp_jax.preferences\?\)"),
        ("from clp_jax.preferences import AlphaRange\n", r"gin imports modules, .*: import clp_jax.preferences and write preferences.AlphaRange"),
        ("import toy_entry\ntoy_enty.toy.rate = 1.0\n", r"bad.gin:3: the file imports nothing called 'toy_enty' \(did you mean toy_entry\?\)"),
        ("import toy_entry\ntoy_entry.Modle.size = 1\n", r"bad.gin:3: toy_entry has no 'Modle' \(did you mean Model\?\)"),
        ("import toy_entry\ntoy_entry.toy.num_step = 1\n", r"bad.gin:3: toy has no argument 'num_step' \(did you mean num_steps\?\)"),
        ("import toy_entry\ntoy_entry.toy.rate = 'x'\n", r"bad.gin:3: toy.rate is 'x': expected float"),
        ("import toy_entry\ntoy_entry.CALLS.rate = 'x'\n", r"bad.gin:3: toy_entry.CALLS is a list, not a function or class"),
        ("import toy_entry\ntoy_entry.toy.model = %MODLE\nMODEL = 3\n", r"bad.gin:4: nothing uses the macro MODEL \(did you mean MODLE\?\)"),
        ("import toy_entry\ntoy_entry.toy.model = @toy_entry.Model()\n", r"toy still needs --run_dir=VALUE, --gin.Model.size=VALUE"),
        ("import toy_entry\ntoy_entry.toy.run_dir = %gin.REQUIRED\n", r"toy still needs --gin.toy.model=VALUE, --run_dir=VALUE"),
    ],
)  # fmt: skip
def test_mistakes_in_files(tmp_path, text, message):
    (tmp_path / "bad.gin").write_text(HEAD + text)
    with pytest.raises(ConfigError, match=message) as error:
        resolve(files=[str(tmp_path / "bad.gin")])
    assert "\n" not in str(error.value)


def test_a_name_that_may_be_two_things(tmp_path, monkeypatch):
    for name in ("first_rewards", "second_rewards"):
        (tmp_path / f"{name}.py").write_text("def score(x: int = 1) -> int:\n    return x\n")
        (tmp_path / f"{name}.gin").write_text(f"{HEAD}import {name} as rewards\n{name.upper()} = @rewards.score\n")
    monkeypatch.syspath_prepend(tmp_path)
    files = ["base.gin", *(str(tmp_path / f"{name}_rewards.gin") for name in ("first", "second"))]
    with pytest.raises(ConfigError, match=r"'score' may be first_rewards.score or second_rewards.score"):
        resolve("RUN_DIR=x", "toy.hook=@score", files=files)
    text = resolve("RUN_DIR=x", "toy.hook=@second_rewards.score", files=files).text
    assert "toy_entry.toy.hook = @second_rewards.score" in text


def test_an_object_that_refuses_its_arguments():
    configuration = resolve("RUN_DIR=x", "Model.size=0")
    with pytest.raises(ConfigError, match=r"^Model.size is 0: expected at least 1\.$"):
        configuration.build()


def test_a_module_that_needs_another(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import module_that_is_missing\n")
    (tmp_path / "needy.gin").write_text(f"{HEAD}import needy\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match="needy.gin:2: needy needs the module module_that_is_missing, which is missing"
    ):
        resolve(files=[str(tmp_path / "needy.gin")])
