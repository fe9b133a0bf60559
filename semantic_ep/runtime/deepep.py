"""How DeepEP stands in the registry of dispatch backends. Imports nothing heavy by itself."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.backends import DispatchCall
    from semantic_ep.runtime.dispatch import Dispatcher
    from semantic_ep.runtime.stats import DispatchStats

# Bounds that DeepEP's kernels are compiled with: a warp reduces rows by 16-byte pieces, and finds
# the choices of a token in its lanes.
_ROW_ELEMENTS = 256
_MAX_TOPK = 32


class DeepEPBackend:
    """DeepEP, inside one NVLink domain or across nodes."""

    name = "deepep"

    def is_available(self) -> tuple[bool, str]:
        """A GPU and DeepEP 2, which is imported to find out."""
        if importlib.util.find_spec("deep_ep") is None:
            return False, "deep_ep is not installed"
        try:
            import torch

            if not torch.cuda.is_available():
                return False, "torch sees no CUDA device"
            import deep_ep

            buffer = buffer_class(deep_ep)
        # Its import looks for CUDA and NCCL and fails by `assert`, among others.
        except Exception as error:
            return False, f"deep_ep cannot be imported: {error!r}"
        if buffer is None:
            return False, "deep_ep is older than version 2: no EPBuffer and no ElasticBuffer"
        return True, f"DeepEP's {buffer.__name__}, used by name only: not run on a GPU by us"

    def supports(self, call: DispatchCall) -> tuple[bool, str]:
        """bfloat16 rows on GPUs, of a width and top-k that DeepEP's kernels take."""
        import torch

        if call.device_type != "cuda":
            return False, f"the tensors are on {call.device_type}, not on a GPU"
        if call.dtype != torch.bfloat16:
            return False, f"rows are {call.dtype}, and DeepEP combines torch.bfloat16 only"
        if call.hidden % _ROW_ELEMENTS:
            return False, f"hidden size {call.hidden} is no multiple of {_ROW_ELEMENTS}"
        if call.top_k > _MAX_TOPK:
            return False, f"top-{call.top_k} exceeds top-{_MAX_TOPK}"
        return True, "DeepEP's dispatch and combine"

    def create(
        self,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> Dispatcher:
        """Make a dispatcher; every rank of the group calls this together."""
        import deep_ep

        from semantic_ep.runtime.deepep_dispatch import DeepEPDispatcher

        return DeepEPDispatcher(
            deep_ep,
            group=group,
            slots_per_rank=slots_per_rank,
            stats=stats,
            max_tokens=max_tokens,
        )


def buffer_class(deep_ep: Any) -> Any:
    """The class that exchanges tokens in this version of DeepEP, or None."""
    return getattr(deep_ep, "EPBuffer", getattr(deep_ep, "ElasticBuffer", None))
