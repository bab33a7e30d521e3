"""Flags from signatures: what can be typed, what it becomes, and what is refused."""

import pytest

from clp_jax.command_line import EntryPoint, parse, usage
from clp_jax.gin_utils.files import ConfigError

ENTRY = EntryPoint.find("toy_entry", "toy")


def test_an_entry_point_is_read_from_its_source():
    assert (ENTRY.summary, ENTRY.description) == ("Does nothing, and remembers what with.", "The second paragraph.")
    arguments = {argument.name: argument for argument in ENTRY.arguments}
    assert ENTRY.takes_config_text
    assert "config_text" not in arguments
    assert arguments["run_dir"].text == "where the run goes, on two lines."
    assert (arguments["run_dir"].default, arguments["num_steps"].default) == (None, "10")
    assert arguments["fail"].text == "how to fail."
    flags = [argument.name for argument in ENTRY.arguments if argument.is_flag]
    expected = ["run_dir", "num_steps", "rate", "weights", "lengths", "mode", "verbose", "fail"]
    assert flags == expected


def test_a_module_or_function_that_is_not_there():
    assert EntryPoint.find("toy_entry", "toil") is None
    assert EntryPoint.find("toyless", "toy") is None


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["--run_dir", "x"], {"run_dir": "x"}),
        (["--run-dir=x=y"], {"run_dir": "x=y"}),
        (["--run_dir="], {"run_dir": ""}),
        (["--num_steps", "-3"], {"num_steps": -3}),
        (["--rate=3"], {"rate": 3.0}),
        (["--weights", "0.8,0.2"], {"weights": (0.8, 0.2)}),
        (["--weights=[1]"], {"weights": (1.0,)}),
        (["--weights="], {"weights": ()}),
        (["--lengths=inputs=5,targets=7"], {"lengths": {"inputs": 5, "targets": 7}}),
        (["--mode", "exact"], {"mode": "exact"}),
        (["--verbose"], {"verbose": True}),
        (["--noverbose"], {"verbose": False}),
        (["--no-verbose"], {"verbose": False}),
        (["--verbose=false"], {"verbose": False}),
        (["--verbose", "--rate", "1"], {"verbose": True, "rate": 1.0}),
        (["--num_steps=1", "--num_steps=2"], {"num_steps": 2}),
    ],
)
def test_arguments(words, arguments):
    assert parse(words, ENTRY).arguments == arguments


SAMPLE, REPORT = EntryPoint.find("clp_jax.sample", "sample"), EntryPoint.find("clp_jax.report", "report")


@pytest.mark.parametrize(
    "text", ["\n", " ", ",", "\n\n,Q:", " Q: ", "(a)", "[a]", "[", "[1]", "['a', 2]", "a=b", "", "a\\n"]
)
def test_a_stop_text_is_taken_as_it_is(text):
    assert parse([f"--stop={text}"], SAMPLE).arguments == {"stop": (text,)}
    assert parse(["--stop", text], SAMPLE).arguments == {"stop": (text,)}


@pytest.mark.parametrize(
    ("words", "stop"),
    [
        (["--stop", "a", "--stop", "b, c"], ("a", "b, c")),
        (['--stop=["\\n\\n", ",", " Q: "]'], ("\n\n", ",", " Q: ")),
        (["--stop=['\\n', \"it's\"]"], ("\n", "it's")),
        (["--stop=[]"], ()),
        (["--stop=['a']", "--stop= b"], ("a", " b")),
        # Data, never code.
        (["--stop=[str(1)]"], ("[str(1)]",)),
    ],
)
def test_several_stop_texts(words, stop):
    assert parse(words, SAMPLE).arguments == {"stop": stop}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--run_dirs=a,b"], ("a", "b")),
        (["--run_dirs", "a, b"], ("a", "b")),
        (["--run_dirs=a", "--run_dirs=b,c"], ("a", "b", "c")),
        (["--run_dirs=['a,b', 'c d']"], ("a,b", "c d")),
        (["--run_dirs=[a,b]"], ("a", "b")),
    ],
)
def test_names_and_paths_are_separated_by_commas(words, names):
    assert parse(words, REPORT).arguments == {"run_dirs": names}


def test_numbers_given_again_replace_those_before():
    assert parse(["--weights=0.8,0.2", "--weights=0.3,0.7"], SAMPLE).arguments == {"weights": (0.3, 0.7)}


def test_gin_flags_and_switches():
    words = ["--gin_file=a.gin", "--gin_file", "b.gin", "--gin.X=1", "--gin.a/b.c='d=e'", "--gin_bindings=Y = 2"]
    parsed = parse([*words, "--gin_search_paths=p,q", "--gin_search_paths=r", "-h", "--debug"], ENTRY)
    assert parsed.gin_files == ["a.gin", "b.gin"]
    assert parsed.gin_bindings == ["X=1", "a/b.c='d=e'", "Y = 2"]
    assert parsed.search_paths == ["p", "q", "r"]
    assert parsed.switches == {"help", "debug"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], r"what is 'run'\? Every argument has a name"),
        (["-x"], r"what is '-x'"),
        (["--num_step=3"], r"there is no flag --num_step \(did you mean num_steps\?\)"),
        (["--gin_fil=3"], r"there is no flag --gin_fil \(did you mean gin_file\?\)"),
        (
            ["--RUN_DIR=3"],
            r"there is no flag --RUN_DIR \(did you mean run_dir\?\). Macros are set with --gin.NAME=VALUE",
        ),
        (["--num_steps"], r"--num_steps has no value"),
        (["--num_steps", "--rate=1"], r"--num_steps has no value"),
        (["--num_steps=ten"], r"--num_steps is 'ten': expected int\."),
        (["--num_steps=1.5"], r"--num_steps is '1.5': expected int\."),
        (["--rate=nan"], r"--rate is 'nan': expected float"),
        (["--weights=0.8;0.2"], r"--weights is '0.8;0.2': expected Sequence\[float\], as in --weights A,B"),
        (["--lengths=5"], r"--lengths is '5': expected Mapping\[str, int\] \| None, as in --lengths A=1,B=2"),
        (["--mode=slow"], r"--mode is 'slow': expected Literal\['fast', 'exact'\]"),
        (["--verbose=perhaps"], r"--verbose is 'perhaps'"),
        (["--model=x"], r"--model takes Model, which can't be typed here: bind it in a gin file"),
        (["--config_text=x"], r"there is no flag --config_text"),
        (["--gin.X", "3"], r"--gin.X has no value: write --gin.X=VALUE, without spaces"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(words, ENTRY)
    assert "\n" not in str(error.value)


def test_usage_tells_every_argument():
    text = usage("toy", ENTRY)
    assert "--run_dir  str  (required)\n      where the run goes, on two lines." in text
    assert "--model  Model  (required; in gin only)" in text
    assert "--gin_file" in text
    assert "--print_config" in text
    assert "config_text" not in text
