"""The ledger with a clock of its own: everything is somewhere once, compiling is taken once, restarts lose what they lose."""

import json

import jax
import jax.numpy as jnp
import pytest

from clp_jax.training.ledger import (
    ACTIVITIES,
    COMPILE,
    DATA,
    EVALUATION,
    LOST,
    OTHER,
    REPEATED,
    ROLLOUT,
    SAVE,
    SECONDS,
    STEP,
    Ledger,
    carried,
    read_records,
    spending,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_activities_nest_and_add_up():
    clock = Clock()
    ledger = Ledger(clock=clock)
    clock.now += 1
    with ledger, ledger.spend(DATA):
        clock.now += 2
        with spending(ROLLOUT):
            clock.now += 4
        clock.now += 8
        with pytest.raises(KeyError), spending(EVALUATION):
            clock.now += 16
            raise KeyError
    clock.now += 32
    expected = dict.fromkeys(ACTIVITIES, 0.0) | {OTHER: 33, DATA: 10, ROLLOUT: 4, EVALUATION: 16}
    assert ledger.seconds == expected and sum(expected.values()) == clock.now - 100
    with spending(STEP):  # There is no ledger any more.
        clock.now += 1
    assert ledger.seconds[STEP] == 0


def test_compiling_is_taken_from_what_caused_it_and_only_once():
    """Reports are made at the end, and those of what is inside come first."""
    clock = Clock()
    ledger = Ledger(clock=clock)
    with ledger.spend(STEP):
        clock.now += 10
        ledger.compiled(3)  # From 107 to 110.
        clock.now += 1
        ledger.compiled(2)  # From 109 to 111: one second of it is known.
        clock.now += 4
        ledger.compiled(15)  # From 100 to 115: all of it, with what was inside.
        clock.now += 5
    assert ledger.seconds == dict.fromkeys(ACTIVITIES, 0.0) | {COMPILE: 15, STEP: 5}


def test_jax_tells_what_it_compiles():
    with Ledger() as ledger, ledger.spend(STEP):
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T * 1.2345)(jnp.ones((3, 4))).block_until_ready()
        compiled = ledger.seconds[COMPILE]
        jnp.ones(3).block_until_ready()
    assert 0 < compiled <= sum(ledger.seconds.values())


def test_a_restart_loses_what_came_after_its_step(tmp_path):
    """Steps of 1 s and saves of 10 s; the run dies after step 8, with its last save at 6."""
    path, clock = tmp_path / "ledger.json", Clock()
    ledger, lines = Ledger(clock=clock), []
    for step in range(1, 9):
        with ledger.spend(STEP):
            clock.now += 1
        ledger.step = step
        lines.append({"step": step} | ledger.metrics)
        if step % 3 == 0:
            with ledger.spend(SAVE):
                clock.now += 10
            ledger.note(path)
    assert [r["step"] for r in read_records(path)] == [3, 6]
    before, repeated = carried(read_records(path), lines, 6)
    assert before == dict.fromkeys(ACTIVITIES, 0.0) | {STEP: 6, SAVE: 20, LOST: 2} and repeated == 2
    assert sum(before.values()) == clock.now - 100
    # Damage can put it back further; then nothing at all is known of the beginning.
    assert carried(read_records(path), lines, 3)[0] == dict.fromkeys(ACTIVITIES, 0.0) | {STEP: 3, SAVE: 10, LOST: 15}
    assert carried(read_records(path), lines, 0) == (dict.fromkeys(ACTIVITIES, 0.0) | {LOST: 28.0}, 8)
    assert carried([], [], 0) == ({}, 0)
    second = Ledger(clock=clock)
    second.carry(before, repeated, 6)
    with second.spend(STEP):
        clock.now += 1
    assert second.metrics[SECONDS + STEP] == 7 and second.metrics[REPEATED] == 2
    assert (
        second.summary()
        == "time: 24 % of 29.0 s were steps and rollouts (step 7.0, save 20.0, lost 2.0); 2 steps made again"
    )


def test_an_orderly_end_loses_nothing(tmp_path):
    path, clock = tmp_path / "ledger.json", Clock()
    ledger = Ledger(clock=clock)
    lines = [{"step": 0} | ledger.metrics]
    clock.now += 5
    ledger.step = 7
    ledger.note(path)
    assert carried(read_records(path), lines, 7) == (dict.fromkeys(ACTIVITIES, 0.0) | {OTHER: 5.0}, 0)


def test_the_file_does_not_grow_without_end(tmp_path):
    ledger = Ledger()
    for step in range(40):
        ledger.step = step
        ledger.note(tmp_path / "ledger.json")
    steps = [record["step"] for record in json.loads((tmp_path / "ledger.json").read_text())]
    assert steps == list(range(24, 40))
