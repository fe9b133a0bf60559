"""The scripts in launch/ as modules."""

from __future__ import annotations

import pytest

from tests import launch_scripts


@pytest.fixture(scope="session")
def load_script():
    """`load_script(NAME)` is launch/NAME.py as a module."""
    return launch_scripts.load_script
