import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

# First: it says how CUDA shall start.
import benchmarks.virtual_ranks  # noqa: F401
from semantic_ep.runtime.kernels import abi, build
from tests.kernels.device_memory import DeviceMemory, GpuLibrary
from tests.kernels.virtual_group import HostMemory, Memory


@pytest.fixture(scope="session")
def emulator():
    """The emulator library, with its default schedule settings."""
    outcome = build.find_library("emulator")
    if outcome.path is None:
        pytest.skip(f"the emulator library cannot be built: {outcome.reason}")
    return abi.EmulatorLibrary(outcome.path)


@dataclasses.dataclass(frozen=True)
class Platform:
    """What kernels run on, and where they find the arrays of a test."""

    library: Any
    new_memory: Callable[[], Memory]

    def run(self, run_case: Callable[..., Any], case: Any) -> Any:
        return run_case(self.library, case, memory=self.new_memory())


@pytest.fixture(scope="session", params=["emulator", "cuda"])
def platform(request):
    """The emulator, and a GPU where there is one."""
    if request.param == "emulator":
        return Platform(request.getfixturevalue("emulator"), HostMemory)
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    outcome = build.find_library("cuda")
    if outcome.path is None:
        pytest.skip(f"the CUDA library cannot be built: {outcome.reason}")
    return Platform(GpuLibrary(outcome.path), lambda: DeviceMemory("cuda"))
