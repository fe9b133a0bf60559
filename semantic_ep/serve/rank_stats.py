"""Counters of one rank, as the front shows them."""

from __future__ import annotations

import numpy as np

from semantic_ep.serve.stats import RankStats
from semantic_ep.serve.worker import RankWorker


def rank_stats(worker: RankWorker) -> RankStats:
    """Sum the dispatcher's counters over layers, and by link tier. Waits for the device."""
    model = worker.model
    counted = model.dispatcher.stats.snapshot()
    rank = model.dispatcher.stats.rank
    node_G = model.node_of_rank
    tier_G = np.where(node_G == node_G[rank], "node", "network")
    tier_G[rank] = "rank"

    def by_tier(count_LG: np.ndarray) -> dict[str, int]:
        count_G = count_LG.sum(axis=0)
        tiers = ("rank", "node", "network")
        return {tier: int(count_G[tier_G == tier].sum()) for tier in tiers}

    return RankStats(
        load=worker.load(),
        prompt_tokens=worker.prompt_tokens,
        new_tokens=worker.new_tokens,
        preemptions=worker.batcher.preemptions * worker.speaks,
        prefix_cache_queries=worker.batcher.prefix_queries * worker.speaks,
        prefix_cache_hits=worker.batcher.prefix_hits * worker.speaks,
        routed_tokens=int(counted["tokens"].sum()),
        activations=int(counted["activations"].sum()),
        local_activations=int(counted["activations"][:, rank].sum()),
        computed_activations=int(counted["slot_activations"].sum()),
        rows=by_tier(counted["rows_dispatch"]),
        bytes=by_tier(counted["bytes_dispatch"] + counted["bytes_combine"]),
        phase_seconds=model.context.timer.seconds(),
        slot_rows_LS=counted["slot_activations"] - worker.slot_rows_before,
    )
