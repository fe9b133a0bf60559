"""Dispatcher: the exchange that brings tokens to their experts and the results back.

A dispatcher knows ranks and physical slots, not logical experts: the caller maps router ids with
`slot = table[id]` (`semantic_ep.runtime.slots`). Physical slots are numbered over the whole EP
group; slot s lives on rank s // S. Several backends implement the one protocol
(`semantic_ep.runtime.backends`), from an all-gather reference to CUDA kernels.

Shapes: T tokens on this rank, D hidden, K top-k, R received rows, S slots a rank, G EP ranks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

from semantic_ep.errors import BackendError, explain

if TYPE_CHECKING:
    from torch import Tensor

    from semantic_ep.runtime.overlap import OverlapMode
    from semantic_ep.runtime.stats import DispatchStats


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertRows:
    """Rows that this rank's experts must process.

    Attributes:
        rows_RD: One row for each (token, local slot) activation, sorted by local slot; within a
            slot by source rank, then by position on the source.
        weight_R: Combine weight of each row, float32 (float64 for float64 weights).
        tokens_per_slot_S: int64, rows of each local slot; sums to R.
    """

    rows_RD: Tensor
    weight_R: Tensor
    tokens_per_slot_S: Tensor

    @property
    def slot_R(self) -> Tensor:
        """int64, local slot of each row."""
        import torch

        slots = torch.arange(len(self.tokens_per_slot_S), device=self.rows_RD.device)
        return torch.repeat_interleave(slots, self.tokens_per_slot_S, output_size=len(self.rows_RD))


class Travelling(Protocol):
    """Rows of other ranks' tokens on their way."""

    def wait(self) -> ExpertRows:
        """The rows, once they are here; on a GPU, once work queued from now on finds them.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched(ExpertRows):
    """The rows, and what `combine` needs to send their results home.

    Attributes:
        num_tokens: Tokens on this rank (T).
        layer: Layer that the counters are kept under.
        state: The backend's own metadata.
        travelling: None: the rows are all there is. Else they are those of this rank's own tokens,
            and this stands for the others.
    """

    num_tokens: int
    layer: int
    state: Any
    travelling: Travelling | None = None


class Dispatcher(Protocol):
    """One object for an EP group and its layers of equal shape; not an `nn.Module`.

    `dispatch` and `combine` communicate: every rank of the group calls them in the same order,
    with T = 0 where it has nothing. Both are differentiable, and each is the other's backward.
    """

    stats: DispatchStats

    def dispatch(
        self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, *, layer: int = 0
    ) -> Dispatched:
        """Send each token once to every rank that holds one of its slots.

        Args:
            x_TD: Tokens, contiguous.
            slot_TK: int64 or int32 global physical slots, no slot twice in a row; -1 drops a route.
            weight_TK: Floating combine weights; those of dropped routes are ignored.
            layer: Index that counters are kept under.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        ...

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return [T, D]: for each token the weighted sum of its experts' rows.

        Sums run in a fixed order (top-k position within a rank, then rank), at float32 or better,
        and are rounded once on each rank. A token without routes gets zeros.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        ...


class LocalFirstDispatcher(Dispatcher, Protocol):
    """A dispatcher that can hand over this rank's own rows while those of other ranks travel.

    A rank decides alone: what the ranks send each other is the same either way.
    """

    def dispatch_local_first(
        self,
        x_TD: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        *,
        overlap: OverlapMode,
        layer: int = 0,
    ) -> Dispatched:
        """As `dispatch`; `Dispatched.travelling` is set if this call is split.

        Then the inputs must keep their values until `travelling.wait()`: they may be sent later.

        See `semantic_ep.runtime.overlap.splits`.
        """
        ...

    def combine(
        self, y_RD: Tensor, dispatched: Dispatched, y_travelled_RD: Tensor | None = None
    ) -> Tensor:
        """As `Dispatcher.combine`, in the same order of sums; results of both kinds of rows."""
        ...


def check_inputs(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, num_slots: int) -> None:
    """Raise `BackendError` unless shapes and kinds fit each other and `num_slots` (G * S).

    Slot values are checked on CPU tensors only: reading them from a GPU would stall it.
    """
    problem = None
    if x_TD.ndim != 2 or slot_TK.ndim != 2 or weight_TK.shape != slot_TK.shape:
        problem = "x must be [T, D] and slots and weights [T, K]"
    elif len(x_TD) != len(slot_TK):
        problem = "tokens and slots differ in number"
    elif not x_TD.is_floating_point() or not weight_TK.is_floating_point():
        problem = "x and weights must be floating point"
    elif slot_TK.is_floating_point():
        problem = "slots must be integers"
    elif slot_TK.device.type == "cpu" and slot_TK.numel():
        low, high = (int(bound) for bound in slot_TK.aminmax())
        if low < -1 or high >= num_slots:
            problem = f"slots {low}..{high} leave the range -1..{num_slots - 1}"
    if problem:
        raise BackendError(
            explain(
                f"cannot dispatch: {problem}",
                got=f"x {tuple(x_TD.shape)} {x_TD.dtype}, slots {tuple(slot_TK.shape)} "
                f"{slot_TK.dtype}, weights {tuple(weight_TK.shape)} {weight_TK.dtype}",
            )
        )
