"""Data and a supervised policy that the processes of all groups read."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from groups import make_home


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))
