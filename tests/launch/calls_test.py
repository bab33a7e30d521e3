"""What a tool says: when the same call may do better, and when it is a refusal."""

import pytest
from clp_jax.launch.calls import call
from clp_jax.launch.errors import LaunchError
from clp_jax.launch.target import Run, Unreachable


def says(text):
    return Run(("bash", "-c", 'echo "$1" >&2; exit 1', "bash", text))


@pytest.mark.parametrize(
    "text", ["HTTPError 503: Service Unavailable", "error code 503", "UNAVAILABLE: try again", "dial tcp: i/o timeout"]
)
def test_what_may_pass_is_silence(text):
    with pytest.raises(Unreachable, match="can't reach the other side"):
        call(says(text), may_fail=True)


@pytest.mark.parametrize("text", ["ERROR: quota of project 150377 exceeded", "error: 5031 of 5000 GPUs"])
def test_numbers_that_look_like_a_code_are_refusals(text):
    assert call(says(text), may_fail=True).error == f"{text}\n"
    with pytest.raises(LaunchError, match="refused: ") as error:
        call(says(text))
    assert not isinstance(error.value, Unreachable)
