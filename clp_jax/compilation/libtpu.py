"""libtpu where there is no TPU: told so, it neither searches for one nor complains."""

import importlib.util
import os
from pathlib import Path

_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # There is no chip that two processes could fight over.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def settle(devices: Path = Path("/dev")) -> bool:
    """Tells libtpu that it is alone, where it is installed and there is no TPU; before it is loaded.

    Args:
        devices: where the system shows its devices.

    Returns:
        Whether it did.
    """
    present = [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]
    if present or importlib.util.find_spec("libtpu") is None:
        return False
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    return True
