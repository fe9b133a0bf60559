"""What the scale theme's predictions are held against."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.scale_cost import count, seconds
from benchmarks.scale_models import GPUS_A_NODE, PUBLISHED, PUBLISHED_ROUTER, Published
from benchmarks.scale_plan import counted_variants
from benchmarks.scale_routing import RouterShape, blind_trace, joined_trace
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology

_TOKENS_A_RANK = 256


def published_rows(*, seed: int) -> list[dict[str, Any]]:
    """Predict each published figure's time; `error` is predicted over stated, less 1.

    Nothing is fitted: links are those of `semantic_ep.topology`, but for the H800's NVLink, whose
    rate is DeepEP's own statement. A stated bandwidth becomes a time by the rows that it counts.
    """
    return [compare(entry, seed=seed) for entry in PUBLISHED]


def joining_rows(
    recorded: RoutingTrace, smaller: RoutingTrace, *, seed: int
) -> list[dict[str, Any]]:
    """Compare a recording with another model's layers joined to its shape, layer for layer.

    Args:
        recorded: Of the shape that is joined to.
        smaller: Of the model with fewer experts.
        seed: Of joining and of planning.
    """
    shape = recorded.fingerprint
    wanted = RouterShape(num_experts=shape.num_experts, top_k=shape.top_k)
    joined = joined_trace(smaller, wanted, layers=2, seed=seed)
    # The same layers of the recorded model, and requests cut in the same way.
    same = joined_trace(recorded, wanted, layers=2, seed=seed)
    topology = Topology.uniform(8)
    costs = [counted_variants(trace, topology, seed=seed) for trace in (same, joined)]
    rows = []
    for name in ("contiguous", "placement", "schedule", "placement + schedule", "copies"):
        real, ours = (float(cost[name].cost.remote_copies.mean()) for cost in costs)
        rows.append(
            {
                "what": name,
                "remote copies, recorded": real,
                "remote copies, joined": ours,
                "error": ours / real - 1,
            }
        )
    return rows


def compare(entry: Published, *, seed: int) -> dict[str, Any]:
    """One row of `published_rows`."""
    nodes = max(entry.ep_size // GPUS_A_NODE, 1)
    topology = dataclasses.replace(
        Topology.uniform(entry.ep_size, num_nodes=nodes), intra_node=entry.intra_node
    )
    router = PUBLISHED_ROUTER
    # Low-latency kernels are measured without groups; normal ones with a group a node, four used.
    groups = nodes if entry.kernel == "normal" else 1
    router = dataclasses.replace(router, groups=groups, top_groups=min(groups, 4))
    trace = blind_trace(router, tokens=_TOKENS_A_RANK * entry.ep_size, seed=seed)
    placement = Placement.contiguous(
        num_layers=1, num_experts=router.num_experts, ep_size=entry.ep_size
    )
    counted = count(placement, trace, np.repeat(np.arange(entry.ep_size), _TOKENS_A_RANK), topology)
    both_ways = seconds(
        counted,
        topology,
        sending="routes" if entry.kernel == "low latency" else "forwarded",
        tokens=entry.tokens,
        row_bytes=entry.row_bytes,
    )
    predicted = both_ways / 2 * 1e6
    stated = entry.microseconds
    if stated is None:
        # The home rank, or node, is counted in a stated bandwidth.
        rows = counted.per_rank_LGG if nodes == 1 else counted.per_node_LMM
        counted_bytes = entry.tokens * float(rows.sum(axis=2).mean()) * entry.row_bytes
        stated = counted_bytes / (entry.gigabytes_per_second * 1e9) * 1e6
    return {
        "what": f"{entry.kernel} {entry.way} EP{entry.ep_size}, {entry.tokens} tokens",
        "stated_us": stated,
        "predicted_us": predicted,
        "error": predicted / stated - 1,
        "source": entry.source,
    }
