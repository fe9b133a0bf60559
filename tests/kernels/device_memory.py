"""What the cases of the emulator need to run on a GPU, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from semantic_ep.runtime.kernels import abi


class GpuLibrary(abi.CudaLibrary):
    """The CUDA library, used as the emulator's is; a GPU chooses its own schedule."""

    def new_stream(self, device: int) -> int:
        self._streams = getattr(self, "_streams", [])
        self._streams.append(torch.cuda.Stream())
        return self._streams[-1].cuda_stream

    def configure(self, *, seed: int, max_resident_blocks: int = 0) -> None:
        self._streams = []

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class OneAtATime:
    """Mixed into a library: runs a kernel of every rank, one after the other, then the next.

    No kernel waits for one that is launched later, so this also works under tools that run one
    kernel at a time, as memory checkers may.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._noted: dict[int, list[Callable[[], None]]] = {}

    def _note(self, launch: abi.Launch, run: Callable[[], None]) -> None:
        self._noted.setdefault(launch.stream, []).append(run)

    def launch_moe(self, kernel: str, arguments: abi.Moe, launch: abi.Launch) -> None:
        self._note(launch, partial(super().launch_moe, kernel, arguments, launch))

    def launch_send(self, arguments: abi.Moe, launch: abi.Launch, *, with_routes: bool) -> None:
        run = partial(super().launch_send, arguments, launch, with_routes=with_routes)
        self._note(launch, run)

    def launch_shuffle(self, kernel: str, arguments: abi.Shuffle, launch: abi.Launch) -> None:
        self._note(launch, partial(super().launch_shuffle, kernel, arguments, launch))

    def synchronize(self) -> None:
        for kernels in zip(*self._noted.values(), strict=True):
            for run in kernels:
                run()
                super().synchronize()
        self._noted.clear()


class GpuOneAtATime(OneAtATime, GpuLibrary):
    pass


class EmulatorOneAtATime(OneAtATime, abi.EmulatorLibrary):
    pass


class DeviceMemory:
    """Copies of arrays on a device, as `tests.kernels.virtual_group.Memory`."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._copies: dict[int, tuple[np.ndarray, torch.Tensor]] = {}
        self._visible: list[torch.Tensor] = []

    def address(self, array: np.ndarray) -> int:
        if id(array) not in self._copies:
            copy = torch.from_numpy(_bytes(array)).to(self._device, copy=True)
            self._copies[id(array)] = array, copy
        return self._copies[id(array)][1].data_ptr()

    def visible(self, num_bytes: int) -> int:
        pinned = self._device != "cpu"
        self._visible.append(torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned))
        return self._visible[-1].data_ptr()

    def settle(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()

    def fetch(self) -> None:
        for array, copy in self._copies.values():
            _bytes(array)[:] = copy.cpu().numpy()


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
