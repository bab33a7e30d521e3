"""Which of several reports is recommended, and what is not even tried."""

import io

import pytest
from rich.console import Console

from clp_jax.compilation.report import Memory, ProgramReport, Report
from clp_jax.compilation.search import Findings, Trial, alternatives, explore

QUIET = Console(quiet=True)


def report(seconds: float, needed: int) -> Report:
    memory = Memory(arguments=needed, outputs=0, temporaries=0, code=0, limit=100, needed=needed)
    program = ProgramReport(
        name="update", tokens=1000, model_flops=1.0, executed_flops=1.0, compute_seconds=seconds, kernel_seconds=0.0,
        exposed_seconds=0.0, copy_seconds=0.0, loop_seconds=(), mfu=0.5, memory=memory, exchanges=(), buffers=(),
        slowest=(), compile_seconds=1.0,
    )  # fmt: skip
    return Report("v5e:2x2", 1, 4, {}, 1, (program,), {})


def test_alternatives_are_all_combinations_smaller_batches_first():
    found = alternatives(8, ["a", "b"], ["full"], [])
    assert [(t.layout, t.batch) for t in found] == [("a", 4), ("a", 8), ("a", 16), ("b", 4), ("b", 8), ("b", 16)]
    assert [t.batch for t in alternatives(8, ["a"], ["full"], [32, 2])] == [2, 32]
    assert found[0].files == ("a",) and found[0].bindings == ("REMAT='full'", "BATCH_SIZE=4")


def test_the_fastest_that_fits_is_recommended_and_larger_batches_of_what_does_not_fit_are_left_out():
    asked = []

    def compile_trial(files, bindings):
        asked.append((files[0], bindings[1]))
        if files[0] == "odd":
            raise ValueError("8 heads do not divide")
        batch = int(bindings[1].removeprefix("BATCH_SIZE="))
        return report(1.0 / batch, 30 * batch if files[0] == "a" else 10 * batch)

    found = explore(alternatives(4, ["a", "b", "odd"], ["full"], []), compile_trial, QUIET)
    assert ("a", "BATCH_SIZE=4") in asked and ("a", "BATCH_SIZE=8") not in asked
    assert found.best.programs[0].seconds == 1 / 8
    plain = found.to_json()
    assert plain["recommended"] == {"layout": "b", "remat": "full", "batch": 8} and plain["fits"]
    assert plain["tried"][-1]["refused"] == "8 heads do not divide"
    console = Console(width=140, record=True, file=io.StringIO())
    found.show(console)
    shown = console.export_text()
    assert "odd, full, batch 2: 8 heads do not divide\n" in shown
    assert "recommended: b, REMAT='full', BATCH_SIZE=8\n" in shown


def test_where_nothing_fits_the_closest_is_shown():
    tried = tuple((Trial("a", "full", size), report(1.0, 200 + size)) for size in (4, 2, 8))
    plain = Findings(tried).to_json()
    assert (plain["recommended"]["batch"], plain["fits"]) == (2, False)


def test_where_nothing_compiles_the_reasons_are_said():
    with pytest.raises(ValueError, match="no such thing"):
        _ = Findings(((Trial("a", "full", 1), "no such thing"),)).best
