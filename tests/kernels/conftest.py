import pytest

from semantic_ep.runtime.kernels import abi, build


@pytest.fixture(scope="session")
def emulator():
    """The emulator library, with its default schedule settings."""
    outcome = build.find_library("emulator")
    if outcome.path is None:
        pytest.skip(f"the emulator library cannot be built: {outcome.reason}")
    return abi.EmulatorLibrary(outcome.path)
