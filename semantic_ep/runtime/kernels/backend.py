"""How the kernels stand in the registry of dispatch backends. Imports nothing heavy by itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from semantic_ep.runtime.kernels import abi, build

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.backends import DispatchCall
    from semantic_ep.runtime.dispatch import Dispatcher
    from semantic_ep.runtime.stats import DispatchStats


class KernelsBackend:
    """Our CUDA kernels over NVLink."""

    name = "kernels"

    def is_available(self) -> tuple[bool, str]:
        """A GPU, and a library built by nvcc."""
        try:
            import torch
        except ImportError as error:
            return False, f"torch cannot be imported: {error}"
        if not torch.cuda.is_available():
            return False, "torch sees no CUDA device"
        outcome = build.find_library("cuda")
        if outcome.path is None:
            return False, outcome.reason
        return True, f"CUDA kernels, {outcome.path.name} ({outcome.reason})"

    def supports(self, call: DispatchCall) -> tuple[bool, str]:
        """One node, a known dtype, and at most 64 ranks and top-16."""
        if call.device_type != "cuda":
            return False, f"the tensors are on {call.device_type}, not on a GPU"
        import torch

        local = max(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if call.ep_size > local:
            return False, f"{call.ep_size} EP ranks on {local} GPUs of this node: NVLink only"
        return _within_limits(call)

    def create(
        self,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> Dispatcher:
        """Make a dispatcher; every rank of the group calls this together."""
        return _create(group, slots_per_rank, stats, max_tokens)


class EmulatedKernelsBackend:
    """The same kernels on CPU ranks, emulated: a tool for tests, never chosen by `auto`."""

    name = "kernels-emulated"

    def is_available(self) -> tuple[bool, str]:
        """A library built by the C++ compiler, or that compiler."""
        outcome = build.find_library("emulator", build=False)
        if outcome.path is None and build.find_cxx() is None:
            return False, "no C++17 compiler on PATH or in CXX"
        found = "built at first use" if outcome.path is None else outcome.path.name
        return True, f"CPU emulator, for tests only: {found}"

    def supports(self, call: DispatchCall) -> tuple[bool, str]:
        """CPU tensors of a known dtype, and at most 64 ranks and top-16."""
        if call.device_type != "cpu":
            return False, f"the tensors are on {call.device_type}, not on the CPU"
        return _within_limits(call)

    def create(
        self,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> Dispatcher:
        """Make a dispatcher; every rank of the group calls this together."""
        return _create(group, slots_per_rank, stats, max_tokens)


def _within_limits(call: DispatchCall) -> tuple[bool, str]:
    from semantic_ep.runtime.kernels.exchange import DTYPES

    if call.dtype not in DTYPES:
        return False, f"{call.dtype} is none of {', '.join(map(str, DTYPES))}"
    if call.ep_size > abi.MAX_RANKS:
        return False, f"{call.ep_size} EP ranks exceed {abi.MAX_RANKS}"
    if call.top_k > abi.MAX_TOPK:
        return False, f"top-{call.top_k} exceeds top-{abi.MAX_TOPK}"
    return True, "dispatch and combine kernels"


def _create(
    group: ProcessGroup, slots_per_rank: int, stats: DispatchStats, max_tokens: int | None
) -> Dispatcher:
    from semantic_ep.runtime.kernels.dispatcher import KernelDispatcher
    from semantic_ep.runtime.symm import require_one_machine

    # Now, while another backend can still be chosen: memory is set up by the first dispatch.
    require_one_machine(group)
    return KernelDispatcher(
        group=group, slots_per_rank=slots_per_rank, stats=stats, max_tokens=max_tokens
    )
