"""Count the routing of served traffic, and write it as a profile that plans can be made from."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from semantic_ep.errors import RequestError, explain
from semantic_ep.integrations.token_slices import TokenSlices
from semantic_ep.observe.micro_batch import MicroBatch
from semantic_ep.observe.recorder import RoutingRecorder
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.serve.protocol import RecordAction, RecordedPhase
from semantic_ep.serve.worker import RankWorker


def record(
    worker: RankWorker,
    group: ProcessGroup,
    *,
    action: RecordAction,
    output: Path | None,
    phase: RecordedPhase = "all",
) -> dict[str, Any]:
    """Carry out a command on this rank; every rank calls this together.

    Args:
        worker: Of this rank.
        group: Its ranks, on gloo: profiles are combined on the host.
        action: See `semantic_ep.serve.protocol.Engine.record`.
        output: Directory of the profile, for "dump"; rank 0 writes it.
        phase: Tokens to count, for "start"; named in the profile.

    Raises:
        RequestError: The command does not fit the state; on all ranks alike.
        PeerFailureError: Another rank died.
    """
    recording = worker.model.context.recorder is not None
    if action == "start":
        _require(not recording, "routing is being recorded already", action)
        fingerprint = worker.model.fingerprint
        slices = worker.model.token_slices
        worker.recorder = recorder = RoutingRecorder(
            num_layers=fingerprint.num_layers,
            num_experts=fingerprint.num_experts,
            top_k=fingerprint.top_k,
            vocab_size=worker.model.module.config.get_text_config().vocab_size,
            seed=group.rank(),
            complete=None if slices is None else functools.partial(_of_all_slices, group),
        )
        worker.recorded_phase = phase
        worker.model.context.recorder = (
            recorder if slices is None else _SlicedRoutes(recorder, slices)
        )
        return {}
    if action == "stop":
        _require(recording, "routing is not being recorded", action)
        worker.model.context.recorder = None
        return {}
    _require(worker.recorder is not None, "no routing has been recorded", action)
    _require(output is not None, "there is nowhere to write the profile to", action)
    meta = {"framework": "serving", "ranks": group.size(), "phase": worker.recorded_phase}
    profile = worker.recorder.profile(worker.model.fingerprint, group=group, meta=meta)
    if profile is None:
        return {}
    profile.save(output)
    return {"tokens": profile.tokens, "output": str(output)}


class _SlicedRoutes:
    """The sink of attention-TP, where a rank's routers see the tokens of its slice alone."""

    def __init__(self, recorder: RoutingRecorder, slices: TokenSlices) -> None:
        self._recorder = recorder
        self._slices = slices

    def record(self, layer: int, expert_TK: Tensor, **_: Any) -> None:
        """See `RoutingSink`: the routes in the step's order, -1 where others have the token."""
        slices = self._slices
        expert_NK = expert_TK.new_full((slices.num_tokens, expert_TK.shape[1]), -1)
        expert_NK[slices.current.own_T] = expert_TK
        self._recorder.record(layer, expert_NK)


def _of_all_slices(group: ProcessGroup, steps: list[MicroBatch]) -> list[MicroBatch]:
    """Steps with every token's routes, for rank 0 to count. Slices differ from layer to layer."""
    for step in steps:
        expert_LNK = torch.stack(list(step.experts.values()))
        with peer_guard("gathering of routes", group):
            dist.reduce(expert_LNK, group_dst=0, op=dist.ReduceOp.MAX, group=group)
        step.experts = dict(zip(step.experts, expert_LNK))
    return steps if group.rank() == 0 else []


def _require(condition: bool, otherwise: str, action: RecordAction) -> None:
    if not condition:
        raise RequestError(explain(otherwise, where="action", got=action))
