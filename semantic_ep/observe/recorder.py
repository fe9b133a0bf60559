"""Recorder: watches the routers of a training run and makes a routing profile.

An integration opens a micro-batch when the model's forward pass begins in training (or passes the
token ids to `record`), calls `record` from each router, and `step` when the optimizer has stepped.
Counted are exactly the tokens that are trained on: padding is masked, evaluation opens no
micro-batch, and recomputed activations are recognised by the autograd engine running.

The hot path copies the expert ids and returns. They are counted at the end of the step: by this
thread on CPU, where a second one would only take a core from the model, and by a background thread
when the ids come from an accelerator, while it computes the next step.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import BackendError, explain
from semantic_ep.observe.counters import CounterLimits, RoutingCounters
from semantic_ep.observe.micro_batch import MicroBatch, routed_tokens, to_host, wait_for
from semantic_ep.observe.reduction import reduce_to_first
from semantic_ep.observe.samples import Part, trace_of
from semantic_ep.observe.static_routes import StaticRoutes

if TYPE_CHECKING:
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.observe.traces import RoutingTrace

logger = logging.getLogger(__name__)

_MAX_STEPS_BEHIND = 4


class RoutingSink(Protocol):
    """What a router reports to; the only call on a hot path."""

    def record(
        self,
        layer: int,
        expert_TK: Tensor,
        *,
        token_id_T: Tensor | None = None,
        mask_T: Tensor | None = None,
    ) -> None:
        """Take the experts of the tokens of one forward pass of a router.

        Args:
            layer: Index among the MoE layers, 0..L - 1.
            expert_TK: [T, K] logical experts; -1 where a token was dropped.
            token_id_T: [T] vocabulary ids, where the sink does not know them otherwise.
            mask_T: [T] true for real tokens; goes with `token_id_T`.
        """


class RoutingRecorder:
    """Counts the routes of the training tokens of this process; a `RoutingSink`."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        vocab_size: int,
        halflife_steps: float | None = None,
        limits: CounterLimits | None = None,
        seed: int = 0,
        layers: Collection[int] | None = None,
        counts_tokens: bool = True,
        complete: Callable[[list[MicroBatch]], list[MicroBatch]] | None = None,
        join: Callable[[Part], Part] | None = None,
        graph_safe: bool = False,
    ) -> None:
        """Start with empty counters.

        Args:
            num_layers: MoE layers of the whole model (L).
            num_experts: Logical experts a layer (E).
            top_k: Experts a token activates (K).
            vocab_size: Token ids (V).
            halflife_steps: Optimizer steps after which a count weighs half; None keeps all.
            limits: Bounds on memory.
            seed: See `RoutingCounters`; give each data-parallel rank another.
            layers: See `RoutingCounters`.
            counts_tokens: See `RoutingCounters`.
            complete: Called at each step with its micro-batches, all on the host; returns those
                to count. For what this process must ask of others.
            join: Called with the sequences sampled here, where `layers` are not all; returns those
                that this process answers for, with the routes of all layers.
            graph_safe: Routers run inside CUDA graphs: `record` issues device operations only,
                whatever pass it is called in, and what they wrote is read when a micro-batch ends.
        """
        self.counters = RoutingCounters(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            vocab_size=vocab_size,
            halflife_steps=halflife_steps,
            limits=limits,
            seed=seed,
            layers=layers,
            counts_tokens=counts_tokens,
        )
        self._complete, self._join = complete, join
        self._static = StaticRoutes() if graph_safe else None
        self._open: MicroBatch | None = None
        self._buffer: list[MicroBatch] = []
        self._worker: _Worker | None = None
        self._warned = False

    def start_micro_batch(
        self,
        token_id_T: Tensor | None = None,
        *,
        mask_T: Tensor | None = None,
        sequence_T: Tensor | None = None,
        layers: Collection[int] | None = None,
    ) -> None:
        """Open a micro-batch of training tokens; `record` belongs to the one opened last.

        Args:
            token_id_T: [T] vocabulary ids in the order in which routers see the tokens.
            mask_T: [T] true (non-zero) for real tokens; None if all are.
            sequence_T: [T] number of each token's sequence in this pass; None for one sequence.
            layers: MoE layers that run in this pass, for what is `graph_safe`; None for all.
        """
        self._close()
        self._open = MicroBatch(
            token_id_T=token_id_T, mask_T=mask_T, sequence_T=sequence_T, layers=layers
        )
        if self._static is not None:
            self._static.start_pass()

    def ignore_pass(self) -> None:
        """Close the micro-batch: until the next one is opened, `record` does nothing."""
        self._close()

    def record(
        self,
        layer: int,
        expert_TK: Tensor,
        *,
        token_id_T: Tensor | None = None,
        mask_T: Tensor | None = None,
    ) -> None:
        """See `RoutingSink`.

        Calls that bring the same tensor of token ids form a micro-batch of their own. Other calls
        belong to the open micro-batch, and are not counted when there is none.
        """
        if _in_backward():
            return
        batch = self._open
        if token_id_T is not None and (batch is None or batch.token_id_T is not token_id_T):
            self.start_micro_batch(token_id_T, mask_T=mask_T)
            batch = self._open
        if self._static is not None:
            self._static.record(layer, expert_TK)
            return
        if batch is None:
            return
        if layer in batch.experts:
            if not self._warned:
                logger.warning("layer %d ran twice in one pass; its first run is counted", layer)
                self._warned = True
            return
        batch.experts[layer] = to_host(expert_TK)

    def step(self) -> None:
        """Count what was recorded since the last step, and advance the decay by one step.

        Raises:
            BackendError: Counting failed, perhaps in an earlier step.
        """
        self._close()
        buffer, self._buffer = self._buffer, []
        on_device = any(batch.arrived is not None for batch in buffer)
        if self._complete is not None:
            wait_for(buffer)
            buffer = self._complete(buffer)
        if self._worker is None and on_device:
            self._worker = _Worker(self.counters)
        if self._worker is not None:
            self._worker.submit(buffer)
        else:
            _count_step(self.counters, buffer)

    def flush(self) -> None:
        """Wait until every finished step is counted."""
        if self._worker is not None:
            self._worker.wait()

    def profile(
        self,
        fingerprint: ModelFingerprint,
        *,
        group: dist.ProcessGroup | None = None,
        min_count: int = 1,
        meta: Mapping[str, Any] | None = None,
    ) -> RoutingProfile | None:
        """Sum the counts of all ranks of a group into a profile of the finished steps.

        Collective over `group`, which must be able to send CPU tensors.

        Args:
            fingerprint: The model as it is now.
            group: Ranks that saw different tokens; None for this process alone.
            min_count: Token -> expert cells seen less often are left out.
            meta: Further description of the run.

        Returns:
            The profile on the first rank of the group, None on the others.
        """
        parts = self._combined(self.counters.part_names(), group)
        if parts is None:
            return None
        return self.counters.profile(parts, fingerprint, min_count=min_count, meta=meta)

    def trace(
        self, fingerprint: ModelFingerprint, *, group: dist.ProcessGroup | None = None
    ) -> RoutingTrace | None:
        """The sampled sequences of all ranks, on the first rank; collective over `group`."""
        parts = self._combined(["samples"], group)
        return None if parts is None else trace_of(parts["samples"], fingerprint)

    def start_window(self, max_tokens: int) -> None:
        """Sample up to `max_tokens` of whole sequences of the steps from now on, in memory."""
        self.flush()
        self.counters.start_window(max_tokens)

    def window(
        self, fingerprint: ModelFingerprint, *, group: dist.ProcessGroup | None = None
    ) -> tuple[RoutingTrace, int] | None:
        """The window's sampled sequences, and all its tokens; as `trace`, collective."""
        parts = self._combined(["window"], group)
        if parts is None:
            return None
        return trace_of(parts["window"], fingerprint), int(parts["window"]["seen"][0])

    def _combined(
        self, names: list[str], group: dist.ProcessGroup | None
    ) -> dict[str, Part] | None:
        self.flush()
        parts: dict[str, Part] = {}
        for name in names:
            own = self.counters.part(name)
            if self._join is not None and name in ("samples", "window"):
                own = self._join(own)
            part = reduce_to_first(name, own, self.counters, group)
            if part is not None:
                parts[name] = part
        return parts or None

    def _close(self) -> None:
        batch, self._open = self._open, None
        if batch is None:
            return
        if self._static is not None:
            batch.held = [
                (layer, to_host(expert_TK), to_host(runs))
                for layer, expert_TK, runs in self._static.held(batch.layers)
            ]
        if not (batch.experts or batch.held or self._complete is not None):
            return
        for name in ("token_id_T", "mask_T", "sequence_T"):
            tensor = getattr(batch, name)
            if tensor is not None:
                setattr(batch, name, to_host(tensor))
        routes = (*batch.experts.values(), *(expert_TK for _, expert_TK, _ in batch.held))
        if any(tensor is not None and tensor.is_pinned() for tensor in (batch.token_id_T, *routes)):
            batch.arrived = torch.cuda.Event()
            batch.arrived.record()
        self._buffer.append(batch)


class _Worker:
    """Counts steps in a background thread, at most a few behind."""

    def __init__(self, counters: RoutingCounters) -> None:
        self._counters = counters
        self._steps: queue.Queue[list[MicroBatch]] = queue.Queue(_MAX_STEPS_BEHIND)
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, name="routing-recorder", daemon=True).start()

    def submit(self, buffer: list[MicroBatch]) -> None:
        self._raise_failure()
        self._steps.put(buffer)

    def wait(self) -> None:
        self._steps.join()
        self._raise_failure()

    def _run(self) -> None:
        while True:
            buffer = self._steps.get()
            try:
                if self._failure is None:
                    _count_step(self._counters, buffer)
            except Exception as error:
                self._failure = error
            finally:
                self._steps.task_done()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise BackendError(
                explain("the routing recorder failed", got=repr(self._failure))
            ) from self._failure


def _count_step(counters: RoutingCounters, buffer: list[MicroBatch]) -> None:
    wait_for(buffer)
    for batch in buffer:
        counters.add(routed_tokens(batch))
    counters.step()


def _in_backward() -> bool:
    """Whether the autograd engine runs this: then the forward pass is a recomputation.

    `torch.utils.checkpoint` tells its recomputations apart by the same number.
    """
    return torch._C._current_graph_task_id() != -1
