"""Which of several reports is recommended, and what is not even tried."""

import io

import pytest
from rich.console import Console

from clp_jax.compilation.report import Memory, ProgramReport, Report
from clp_jax.compilation.search import Findings, Trial, alternatives, explore

QUIET = Console(quiet=True)


def program(name: str, seconds: float, needed: int = 10, runs: int = 1, mfu: float = 0.5) -> ProgramReport:
    memory = Memory(arguments=needed, outputs=0, temporaries=0, code=0, limit=100, needed=needed, peak=needed)
    return ProgramReport(
        name=name, runs=runs, tokens=1000, model_flops=1.0, executed_flops=1.0, compute_seconds=seconds, kernel_seconds=0.0,
        exposed_seconds=0.0, copy_seconds=0.0, loop_seconds=(), mfu=mfu, memory=memory, exchanges=(), buffers=(),
        slowest=(), compile_seconds=1.0,
    )  # fmt: skip


def report(seconds: float, needed: int, *more: ProgramReport) -> Report:
    return Report("v5e:2x2", 1, 4, {}, 1, (program("update", seconds, needed), *more), {})


def shown(found: Findings) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    found.show(console)
    return console.export_text()


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

    notes: list[Findings] = []
    found = explore(alternatives(4, ["a", "b", "odd"], ["full"], []), compile_trial, QUIET, notes.append)
    assert [len(note.tried) for note in notes] == list(range(1, len(found.tried) + 1)) and notes[-1] == found
    assert ("a", "BATCH_SIZE=4") in asked and ("a", "BATCH_SIZE=8") not in asked
    assert found.best.programs[0].seconds == 1 / 8
    plain = found.to_json()
    assert plain["recommended"] == {"layout": "b", "remat": "full", "batch": 8} and plain["fits"]
    assert plain["tried"][-1]["refused"] == "8 heads do not divide"
    text = shown(found)
    assert "odd, full, batch 2: 8 heads do not divide\n" in text
    assert "recommended: b, REMAT='full', BATCH_SIZE=8\n" in text


def test_where_nothing_fits_the_closest_is_shown():
    tried = tuple((Trial("a", "full", size), report(1.0, 200 + size)) for size in (4, 2, 8))
    plain = Findings(tried).to_json()
    assert (plain["recommended"]["batch"], plain["fits"]) == (2, False)


def test_where_nothing_compiles_the_reasons_are_said():
    found = Findings(((Trial("a", "full", 1), "no such thing"),))
    with pytest.raises(ValueError, match="no such thing"):
        _ = found.best
    assert found.to_json() == {
        "tried": [{"layout": "a", "remat": "full", "batch": 1, "refused": "no such thing"}],
        "recommended": None,
        "fits": False,
    }


def test_a_layout_is_as_fast_as_its_whole_step():
    """The update of `quick` is faster, its two rollouts are slower; what a rollout begins with counts in the rollout."""
    quick = report(1.0, 10, program("prefill", 9.0, runs=0), program("rollout", 4.0, runs=2, mfu=0.125))
    slow = report(3.0, 10, program("prefill", 1.0, runs=0), program("rollout", 2.0, runs=2, mfu=0.25))
    assert (quick.step_seconds, slow.step_seconds) == (9.0, 7.0)
    assert slow.step_rate == 1000 / 7 / 4 and slow.step_mfu == (3 * 0.5 + 2 * 2 * 0.25) / 7
    found = Findings(((Trial("quick", "full", 1), quick), (Trial("slow", "full", 1), slow)))
    assert found.best is slow and found.to_json()["recommended"]["layout"] == "slow"
    assert slow.to_json()["step"] == {"seconds": 7.0, "tokens_per_second_per_chip": 1000 / 28, "mfu": 2.5 / 7}
    text = shown(found)
    assert "7,000.0" in text and "3,000.0 update + 2 x 2,000.0 rollout" in text
    assert "one step is update + 2 rollout: 7,000.0 ms" in text


def test_a_part_that_was_compiled_alone_counts_by_itself():
    alone = Report("v5e:2x2", 1, 4, {}, 1, (program("prefill", 2.0, runs=0),), {})
    assert (alone.step_seconds, alone.step_rate) == (2.0, 125.0)
    unknown = report(3.0, 10, program("rollout", 0.0, runs=2))
    assert unknown.step_seconds == unknown.step_rate == unknown.step_mfu == 0
