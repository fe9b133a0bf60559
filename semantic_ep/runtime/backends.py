"""Registry of dispatch backends: which work here, which to use, and why not the others.

`create_dispatcher("auto", ...)` picks the best backend that is available and whose verifier accepts
the call at hand. A backend decides from facts that are equal on every rank (`DispatchCall`), so
that all ranks of a group pick the same one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from typing import TYPE_CHECKING, Protocol, TypeGuard

from semantic_ep.errors import BackendError, explain
from semantic_ep.runtime.collectives import from_all_ranks
from semantic_ep.runtime.deepep import DeepEPBackend
from semantic_ep.runtime.dispatch import Dispatched, Dispatcher, LocalFirstDispatcher
from semantic_ep.runtime.kernels.backend import EmulatedKernelsBackend, KernelsBackend
from semantic_ep.runtime.stats import DispatchStats

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.overlap import OverlapMode

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchCall:
    """What a verifier may look at: properties of a call that do not differ between ranks.

    Attributes:
        dtype: Of the hidden states.
        device_type: "cpu", "cuda", ...
        hidden: D.
        top_k: K.
        ep_size: G.
        slots_per_rank: S.
        needs_grad: Whether gradients must flow through the exchange.
    """

    dtype: torch.dtype
    device_type: str
    hidden: int
    top_k: int
    ep_size: int
    slots_per_rank: int
    needs_grad: bool


class Backend(Protocol):
    """One way to exchange tokens."""

    name: str

    def is_available(self) -> tuple[bool, str]:
        """Whether this machine can run it, and the reason in words."""
        ...

    def supports(self, call: DispatchCall) -> tuple[bool, str]:
        """Whether it can run this call, and the reason in words."""
        ...

    def create(
        self,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> Dispatcher:
        """Make a dispatcher for an EP group; every rank of it calls this together.

        Args:
            group: Process group of the EP ranks.
            slots_per_rank: S.
            stats: Counters to keep.
            max_tokens: Most tokens a rank will dispatch, for backends with fixed buffers; None:
                not known.

        Raises:
            BackendError: It cannot serve this group.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CollectivesBackend:
    """A dispatcher made of torch.distributed's collectives.

    Attributes:
        name: In the registry.
        target: "module:class" of the dispatcher, imported when one is made.
    """

    name: str
    target: str

    def is_available(self) -> tuple[bool, str]:
        return _torch_distributed()

    def supports(self, call: DispatchCall) -> tuple[bool, str]:
        return True, "any dtype and device that torch.distributed moves"

    def create(
        self,
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> Dispatcher:
        module, name = self.target.split(":")
        dispatcher = getattr(importlib.import_module(module), name)
        return dispatcher(group=group, slots_per_rank=slots_per_rank, stats=stats)


def _torch_distributed() -> tuple[bool, str]:
    try:
        import torch.distributed as dist
    except ImportError as error:
        return False, f"torch cannot be imported: {error}"
    if not dist.is_available():
        return False, "this build of torch has no torch.distributed"
    return True, "torch.distributed"


# In the order in which `auto` tries them. `torch` takes every call: those behind it are used only
# by name.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        KernelsBackend(),
        _CollectivesBackend(
            name="torch", target="semantic_ep.runtime.torch_dispatch:TorchDispatcher"
        ),
        _CollectivesBackend(
            name="reference", target="semantic_ep.runtime.reference_dispatch:ReferenceDispatcher"
        ),
        DeepEPBackend(),
        EmulatedKernelsBackend(),
    )
}


def backend_report() -> list[tuple[str, bool, str]]:
    """(name, available, reason) of every backend, in the order in which `auto` tries them."""
    return [(name, *backend.is_available()) for name, backend in BACKENDS.items()]


def create_dispatcher(
    name: str = "auto",
    *,
    group: ProcessGroup,
    slots_per_rank: int,
    num_layers: int = 1,
    max_tokens: int | None = None,
) -> VerifiedDispatcher:
    """Make the dispatcher of an EP group.

    Args:
        name: A backend, or "auto".
        group: Process group of the EP ranks.
        slots_per_rank: S.
        num_layers: Layers to keep counters for.
        max_tokens: Most tokens a rank will dispatch at once, equal on all ranks. Spares the kernels
            an agreement at each call; None: not known.

    Raises:
        BackendError: The backend is unknown or not available here.
    """
    if name != "auto" and name not in BACKENDS:
        raise BackendError(
            explain(
                "there is no such dispatch backend",
                where="semantic_ep.dispatch.backend, --semantic-ep-dispatch-backend",
                got=name,
                allowed=["auto", *BACKENDS],
            )
        )
    candidates = list(BACKENDS.values()) if name == "auto" else [BACKENDS[name]]
    if name != "auto":
        available, reason = BACKENDS[name].is_available()
        if not available:
            raise BackendError(
                explain(
                    f"dispatch backend {name!r} is not available: {reason}",
                    where="semantic_ep.dispatch.backend, --semantic-ep-dispatch-backend",
                    do="`semantic-ep doctor` says what each backend needs",
                )
            )
    stats = DispatchStats(
        num_layers=num_layers,
        ep_size=group.size(),
        slots_per_rank=slots_per_rank,
        rank=group.rank(),
    )
    return VerifiedDispatcher(
        candidates,
        group=group,
        slots_per_rank=slots_per_rank,
        stats=stats,
        max_tokens=max_tokens,
    )


class VerifiedDispatcher:
    """A `Dispatcher` that asks each backend's verifier and uses the first that accepts.

    A backend that some rank cannot run or set up is passed over on all ranks. The answer is kept
    for each kind of call, so verification is paid once.
    """

    def __init__(
        self,
        candidates: list[Backend],
        *,
        group: ProcessGroup,
        slots_per_rank: int,
        stats: DispatchStats,
        max_tokens: int | None,
    ) -> None:
        self.stats = stats
        self.group = group
        self.slots_per_rank = slots_per_rank
        self.max_tokens = max_tokens
        self._candidates = candidates
        self._created: dict[str, Dispatcher] = {}
        self._failed: dict[str, str] = {}
        self._chosen: dict[DispatchCall, Dispatcher] = {}

    def dispatch(
        self,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        *,
        layer: int = 0,
        overlap: OverlapMode = "off",
    ) -> Dispatched:
        """See `Dispatcher.dispatch`, and `LocalFirstDispatcher` for the overlap.

        Raises:
            BackendError: No backend takes this call, or overlap is "on" and the backend cannot.
        """
        import torch

        call = DispatchCall(
            dtype=x_TD.dtype,
            device_type=x_TD.device.type,
            hidden=x_TD.shape[-1],
            top_k=slot_TK.shape[-1],
            ep_size=self.group.size(),
            slots_per_rank=self.slots_per_rank,
            needs_grad=torch.is_grad_enabled() and (x_TD.requires_grad or weight_TK.requires_grad),
        )
        if call not in self._chosen:
            self._chosen[call] = self._choose(call)
        chosen = self._chosen[call]
        if overlap != "off" and self._can_overlap(chosen, overlap):
            dispatched = chosen.dispatch_local_first(
                x_TD, slot_TK, weight_TK, overlap=overlap, layer=layer
            )
        else:
            dispatched = chosen.dispatch(x_TD, slot_TK, weight_TK, layer=layer)
        return dataclasses.replace(dispatched, state=(chosen, dispatched.state))

    def combine(
        self, y_RD: Tensor, dispatched: Dispatched, y_travelled_RD: Tensor | None = None
    ) -> Tensor:
        """See `Dispatcher.combine`, and `LocalFirstDispatcher.combine` for rows that travelled."""
        chosen, state = dispatched.state
        dispatched = dataclasses.replace(dispatched, state=state)
        if dispatched.travelling is None:
            return chosen.combine(y_RD, dispatched)
        return chosen.combine(y_RD, dispatched, y_travelled_RD)

    def _can_overlap(
        self, chosen: Dispatcher, overlap: OverlapMode
    ) -> TypeGuard[LocalFirstDispatcher]:
        if hasattr(chosen, "dispatch_local_first"):
            return True
        name = next(name for name, created in self._created.items() if created is chosen)
        if overlap == "on":
            raise BackendError(
                explain(
                    f"dispatch backend {name!r} cannot hand over own rows first",
                    where="semantic_ep.dispatch.overlap, --semantic-ep-dispatch-overlap",
                    got="on",
                    allowed=["auto", "off"],
                    do='Or set the backend to "torch"',
                )
            )
        _log_no_overlap(name)
        return False

    def _choose(self, call: DispatchCall) -> Dispatcher:
        for backend in self._candidates:
            name = backend.name
            supported, reason = backend.supports(call)
            if supported:
                if name not in self._created and name not in self._failed:
                    self._create(backend)
                if name in self._created:
                    return self._created[name]
                reason = self._failed[name]
            _log_fallback(name, reason)
        raise BackendError(
            explain(
                f"no dispatch backend can run this call; {name}: {reason}",
                where="semantic_ep.dispatch.backend, --semantic-ep-dispatch-backend",
                got=str(call),
                do='Set the backend to "auto" or "torch"',
            )
        )

    def _create(self, backend: Backend) -> None:
        """Make a backend's dispatcher on all ranks, or note why one of them cannot. Collective."""
        available, reason = backend.is_available()
        problem = self._problem_of_any_rank(None if available else reason)
        if problem is None:
            try:
                created = backend.create(
                    group=self.group,
                    slots_per_rank=self.slots_per_rank,
                    stats=self.stats,
                    max_tokens=self.max_tokens,
                )
            except BackendError as error:
                problem = str(error)
            problem = self._problem_of_any_rank(problem)
        if problem is None:
            self._created[backend.name] = created
        else:
            self._failed[backend.name] = problem

    def _problem_of_any_rank(self, problem: str | None) -> str | None:
        """The first rank's problem, the same on all ranks; None if no rank has one. Collective."""
        if self.group.size() == 1:
            return problem
        problems = from_all_ranks(problem, "agreement on a dispatch backend", self.group)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), None)


@functools.cache
def _log_no_overlap(name: str) -> None:
    logger.info("local-first overlap is not used: backend %r hands over all rows at once", name)


@functools.cache
def _log_fallback(name: str, reason: str) -> None:
    """Say once for each reason why a backend was passed over."""
    logger.info("dispatch backend %r is not used: %s", name, reason)
