"""What the exit codes of a job's workers mean together."""

from collections.abc import Sequence

from clp_jax.launch.target import Status

# EX_TEMPFAIL of sysexits.h: nothing is lost, the same command goes on.
RESTARTABLE = 75
# What a worker counts as that ended without an exit code: as if it had got SIGKILL.
KILLED = 137
# What a shell says of a command that it can't run; here also of one that was never begun, as nothing would change by itself.
NOT_BEGUN = 126
# A failure that somebody must mend (a full disk, a bug), a mistake of the user, a command that can't be run, one that is not
# there: they fail again; and a person's Ctrl-C.
FINAL = (1, 2, NOT_BEGUN, 127, 130)


def may_restart(code: int | None) -> bool:
    """Whether the same command may do better; an unknown code may."""
    return code not in FINAL


def verdict(codes: Sequence[int | None]) -> Status:
    """How an attempt stands.

    Args:
        codes: of its workers; None while one runs.
    """
    failed = {worker: code for worker, code in enumerate(codes) if code}
    if failed:
        # A worker that lost another says so with RESTARTABLE: what happened, the other's code tells.
        worker = min(failed, key=lambda w: (failed[w] not in FINAL, failed[w] == RESTARTABLE, w))
        return Status("failed", failed[worker], f"worker {worker} ended with exit code {failed[worker]}")
    return Status("running") if None in codes else Status("succeeded")
