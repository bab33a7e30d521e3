"""Traces of some steps: recorded from the first to the last, by the real profiler."""

import jax.numpy as jnp
import pytest

from clp_jax.training.profiling import Profile


def steps_recorded(directory, steps, first, last):
    recorded = []
    with Profile(directory, steps) as profile:
        for step in range(first, last + 1):
            profile.before(step, jnp.ones(3))
            if profile._recording:
                recorded.append(step)
            profile.after(step, jnp.ones(3) * step)
    assert not profile._recording
    return recorded


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path):
    assert steps_recorded(tmp_path, (3, 4), 1, 6) == [3, 4]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_what_goes_on_at_the_end_is_ended(tmp_path):
    assert steps_recorded(tmp_path, (3, 9), 1, 4) == [3, 4]
    assert steps_recorded(tmp_path / "later", (3, 9), 8, 10) == [8, 9]
    assert list((tmp_path / "later" / "profile").rglob("*.xplane.pb"))


def test_nothing_is_recorded_unless_it_is_asked_for(tmp_path):
    assert steps_recorded(tmp_path, None, 1, 4) == steps_recorded(tmp_path, (1, 2), 3, 5) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_settings(tmp_path, steps):
    with pytest.raises(ValueError, match="profile_steps is .*: expected a first and a last step"):
        Profile(tmp_path, steps)
