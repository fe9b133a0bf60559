"""Count the routing of served traffic, and write it as a profile that plans can be made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from semantic_ep.errors import RequestError, explain
from semantic_ep.observe.recorder import RoutingRecorder
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
    _require(not worker.has_all_requests, "attention-TP does not record routing", action)
    recording = worker.model.context.recorder is not None
    if action == "start":
        _require(not recording, "routing is being recorded already", action)
        fingerprint = worker.model.fingerprint
        worker.recorder = RoutingRecorder(
            num_layers=fingerprint.num_layers,
            num_experts=fingerprint.num_experts,
            top_k=fingerprint.top_k,
            vocab_size=worker.model.module.config.get_text_config().vocab_size,
            seed=group.rank(),
        )
        worker.recorded_phase = phase
        worker.model.context.recorder = worker.recorder
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


def _require(condition: bool, otherwise: str, action: RecordAction) -> None:
    if not condition:
        raise RequestError(explain(otherwise, where="action", got=action))
