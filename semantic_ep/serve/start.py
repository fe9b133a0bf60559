"""Start serving on every rank of a group."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from semantic_ep.errors import ConfigError, explain
from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.group_engine import GroupEngine
from semantic_ep.serve.lockstep import run_lockstep
from semantic_ep.serve.protocol import RequestScheduler


def serve_group(
    engine: SemanticInferenceEngine,
    *,
    scheduler: RequestScheduler,
    front: Callable[[GroupEngine], object],
    on_failure: Callable[[BaseException], object] | None = None,
    peer_timeout: float = 50,
    **options: Any,
) -> None:
    """Serve until the front returns; every rank of the job calls this together.

    Args:
        engine: With the model loaded.
        scheduler: Which rank serves a request; used on rank 0.
        front: Called on rank 0, in this thread, with the running engine.
        on_failure: Called on rank 0, from the engine's thread, when a rank is lost. The front must
            return soon after.
        peer_timeout: Seconds after which a silent rank is given up.
        **options: Of `RankWorker`, "kv_cache_tokens" among them.

    Raises:
        ConfigError: The KV cache holds not even one block.
        PeerFailureError: Another rank died or did not answer in time.
    """
    worker = engine.worker(**options)
    capacity = worker.batcher.pool.capacity
    if not capacity:
        raise ConfigError(
            explain(
                "the KV cache is too small",
                where="kv_cache_tokens",
                got=options["kv_cache_tokens"],
                allowed=f"at least one block of {worker.batcher.pool.block_size} tokens",
            )
        )
    group = engine.group
    if dist.get_backend(group) != "gloo":
        # Control messages are small and on the host.
        group = dist.new_group(
            dist.get_process_group_ranks(group),
            backend="gloo",
            timeout=datetime.timedelta(seconds=peer_timeout),
        )
    if group.rank() != 0:
        run_lockstep(worker, group)
        return
    running = GroupEngine(
        worker,
        group,
        scheduler=scheduler,
        max_sequence_tokens=int(min(engine.max_model_tokens or math.inf, capacity)),
        on_failure=on_failure,
    )
    try:
        front(running)
    finally:
        running.close()
    running.raise_failure()
