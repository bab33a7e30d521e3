"""JSON on disk that the fake tools and the tests change at the same time."""

import fcntl
import json
import os
from contextlib import contextmanager


@contextmanager
def kept(path, empty):
    """What a file holds, to be changed; one process at a time, and whole for whoever only reads.

    What raises, or exits, changes nothing.
    """
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        value = json.loads(path.read_text()) if path.is_file() else empty
        yield value
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(json.dumps(value))
        new.replace(path)


def lets_go_wrong(world, name, value=True, times=1):
    """Asks for a trouble, so many times."""
    with kept(world / "troubles.json", []) as waiting:
        waiting += [[name, value]] * times


def taken(world, name):
    """What was asked to go wrong here, once for each time it was; None where nothing was."""
    with kept(world / "troubles.json", []) as waiting:
        found = next((entry for entry in waiting if entry[0] == name), None)
        if found is not None:
            waiting.remove(found)
    return None if found is None else found[1]
