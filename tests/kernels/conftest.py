import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

# First: it says how CUDA shall start.
import benchmarks.virtual_ranks  # noqa: F401
from semantic_ep.runtime.kernels import abi, build
from tests.kernels.device_memory import (
    DeviceMemory,
    EmulatorOneAtATime,
    GpuLibrary,
    GpuOneAtATime,
)
from tests.kernels.virtual_group import HostMemory, Memory


@pytest.fixture(scope="session")
def emulator():
    """The emulator library, with its default schedule settings."""
    return abi.EmulatorLibrary(library_for("emulator"))


@dataclasses.dataclass(frozen=True)
class Platform:
    """What kernels run on, and where they find the arrays of a test."""

    library: Any
    new_memory: Callable[[], Memory]

    def run(self, run_case: Callable[..., Any], case: Any) -> Any:
        return run_case(self.library, case, memory=self.new_memory())


def library_for(flavour):
    """Path of the emulator's library or of the CUDA one; skips where there is none."""
    import torch

    if flavour == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    outcome = build.find_library(flavour)
    if outcome.path is None:
        pytest.skip(f"the {flavour} library cannot be built: {outcome.reason}")
    return outcome.path


@pytest.fixture(scope="session", params=["emulator", "cuda"])
def platform(request):
    """The emulator, and a GPU where there is one."""
    path = library_for(request.param)
    if request.param == "emulator":
        return Platform(abi.EmulatorLibrary(path), HostMemory)
    return Platform(GpuLibrary(path), lambda: DeviceMemory("cuda"))


@pytest.fixture(scope="session", params=["emulator", "cuda"])
def serial_platform(request):
    """Likewise, but no two kernels run at once."""
    path = library_for(request.param)
    if request.param == "emulator":
        return Platform(EmulatorOneAtATime(path), HostMemory)
    return Platform(GpuOneAtATime(path), lambda: DeviceMemory("cuda"))
