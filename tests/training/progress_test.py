"""Progress: lines with a clock of our own, and the bar on a terminal."""

import io

import pytest

from clp_jax.training.progress import Progress, _duration, _short


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(stream, *, seconds_per_step=2.0, pause_at=None, **kwargs):
    clock = Clock()
    with Progress("toy", 20, 0, 500, stream=stream, clock=clock, **kwargs) as progress:
        for step in range(1, 21):
            clock.now += 100.0 if step == 1 else seconds_per_step  # The first compiles.
            progress.update(step, f"loss {1.0 / step:.4g}")
            if step == pause_at:
                with progress.activity("evaluating"):
                    clock.now += 1000.0
        progress.message("done [brackets] stay")


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    run(stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "toy: 1/20  loss 1"
    assert lines[1] == "toy: 6/20  0.5 steps/s  250 tokens/s  0:28 left  loss 0.1667"
    assert lines[-2] == "toy: 20/20  0.5 steps/s  250 tokens/s  0:00 left  loss 0.05"
    assert lines[-1] == "toy: done [brackets] stay"
    assert len(lines) == 6


def test_evaluations_do_not_count_as_slow_steps():
    stream = io.StringIO()
    run(stream, pause_at=18)
    assert "20/20  0.5 steps/s" in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    run(stream)
    text = stream.getvalue()
    assert "20/20" in text and "0.5 steps/s" in text and "250 tokens/s" in text and "loss 0.05" in text
    assert "done [brackets] stay" in text


@pytest.mark.parametrize(("number", "text"), [(12.4, "12"), (1500.0, "1.5k"), (2.5e6, "2.5M"), (3e9, "3G")])
def test_short_numbers(number, text):
    assert _short(number) == text


def test_durations():
    assert [_duration(s) for s in (0.0, 59.6, 3599.0, 3600.0)] == ["0:00", "1:00", "59:59", "1:00:00"]
