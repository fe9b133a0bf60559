"""Rows that cross links under each way of sending, and their time by the planner's cost model.

Shapes: L layers, G ranks of one EP group, M nodes. Rows are of one step in which every rank holds
T tokens: what a rank's counted tokens send, scaled to T, so that a rank which happened to be given
more counted tokens does not look slow.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.scale_models import GPUS_A_NODE
from benchmarks.scale_routing import RouterShape
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import RoutingCost, evaluate, link_seconds
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """What one placement and schedule make of a trace.

    Attributes:
        cost: Counted by the cost model: a row for each distinct rank.
        per_route_LGG: [L, G, G] rows a home token, one for each activation: no de-duplication.
        per_rank_LGG: [L, G, G] rows a home token, one for each distinct rank.
        per_node_LMM: [L, M, M] rows a home token, one for each distinct node.
    """

    cost: RoutingCost
    per_route_LGG: np.ndarray
    per_rank_LGG: np.ndarray
    per_node_LMM: np.ndarray


def count(
    placement: Placement, trace: RoutingTrace, home_N: np.ndarray, topology: Topology
) -> Counted:
    """Count all three ways of sending, each with `cost.evaluate`."""
    cost = evaluate(placement, trace, home_N, topology=topology)
    tokens_G = np.bincount(home_N, minlength=placement.ep_size)
    one = dataclasses.replace(trace.fingerprint, top_k=1)
    by_route = sum(
        evaluate(
            placement,
            dataclasses.replace(trace, fingerprint=one, experts=trace.experts[:, :, k : k + 1]),
            home_N,
            topology=topology,
        ).rows_between_ranks
        for k in range(trace.fingerprint.top_k)
    )
    return Counted(
        cost=cost,
        per_route_LGG=by_route / tokens_G[:, None],
        per_rank_LGG=cost.rows_between_ranks / tokens_G[:, None],
        per_node_LMM=_rows_between_nodes(placement, trace, home_N, topology),
    )


def seconds(
    counted: Counted, topology: Topology, *, sending: str, tokens: int, row_bytes: int
) -> float:
    """Seconds of dispatch and combine of one layer, mean over layers.

    Args:
        counted: Rows a home token.
        topology: Nodes and links.
        sending: "routes" (a row an activation), "ranks" (a row a distinct rank) or "forwarded" (a
            row a distinct node, and from its GPU of the same number a row a distinct rank).
        tokens: Of each rank (T).
        row_bytes: Mean of both ways.
    """
    layers = len(counted.per_rank_LGG)
    if sending in ("routes", "ranks"):
        rows = counted.per_route_LGG if sending == "routes" else counted.per_rank_LGG
        return link_seconds(tokens * rows, topology, row_bytes=row_bytes) / layers
    inside = link_seconds(
        tokens * _forwarded(counted.per_rank_LGG, topology), topology, row_bytes=row_bytes
    )
    if topology.num_nodes == 1:
        return inside / layers
    nodes = Topology.uniform(
        topology.num_nodes, num_nodes=topology.num_nodes, inter_node=topology.inter_node
    )
    # The GPUs of a node share its rows evenly, each over its own port.
    between = link_seconds(tokens * counted.per_node_LMM, nodes, row_bytes=row_bytes)
    return max(inside, between) / layers


def bytes_by_tier(
    counted: Counted, topology: Topology, *, sending: str, row_bytes: int
) -> tuple[float, float]:
    """Dispatch bytes of a token inside nodes and between them, mean over ranks and layers."""
    off_diagonal = ~np.eye(topology.ep_size, dtype=bool)
    same = topology.nodes[:, None] == topology.nodes
    rows = counted.per_route_LGG if sending == "routes" else counted.per_rank_LGG
    between = (rows * ~same).sum(axis=2).mean()
    if sending == "forwarded":
        rows = _forwarded(rows, topology)
        apart = ~np.eye(topology.num_nodes, dtype=bool)
        between = (counted.per_node_LMM * apart).sum(axis=2).mean()
    inside = (rows * (same & off_diagonal)).sum(axis=2).mean()
    return float(inside * row_bytes), float(between * row_bytes)


def wire_limit_seconds(
    router: RouterShape,
    ep_size: int,
    *,
    tokens: int,
    row_bytes: int,
    wire_intra: float,
    wire_inter: float,
) -> float:
    """Dispatch and combine of blind routing, a row a distinct rank, at nominal rates, in s.

    Distinct ranks D = G (1 - C(E - E/G, K) / C(E, K)), of which (G - 1) / G are remote and spread
    evenly; no latency. Groups of the router are left out.
    """
    experts, top_k = router.num_experts, router.top_k
    elsewhere = np.arange(top_k)
    missed = np.prod((experts - experts / ep_size - elsewhere) / (experts - elsewhere))
    to_each = float(1 - missed)
    near = min(ep_size, GPUS_A_NODE) - 1
    far = ep_size - 1 - near
    inside = tokens * to_each * near * row_bytes / (wire_intra * 1e9)
    between = tokens * to_each * far * row_bytes / (wire_inter * 1e9)
    return 2 * max(inside, between)


def _rows_between_nodes(
    placement: Placement, trace: RoutingTrace, home_N: np.ndarray, topology: Topology
) -> np.ndarray:
    """[L, M, M] rows a token between nodes, one a distinct node.

    Counted by the same cost model on a placement whose ranks are the nodes.
    """
    nodes = topology.num_nodes
    if nodes == 1:
        return np.zeros((placement.num_layers, 1, 1))
    layers, slots = placement.num_layers, placement.slots_per_rank * placement.ep_size // nodes
    table = placement.physical_to_logical_map.reshape(layers, nodes, slots).copy()
    for row in table.reshape(-1, slots):
        first = np.unique(row, return_index=True)[1]
        again = np.setdiff1d(np.arange(slots), first)
        row[again] = -1  # a second copy on a node is none between nodes
    on_nodes = Placement(
        physical_to_logical_map=table.reshape(layers, -1),
        num_experts=placement.num_experts,
        ep_size=nodes,
    )
    home = topology.nodes[home_N]
    rows = evaluate(on_nodes, trace, home).rows_between_ranks
    return np.asarray(rows / np.bincount(home, minlength=nodes)[:, None])


def _forwarded(rows_LGG: np.ndarray, topology: Topology) -> np.ndarray:
    """[L, G, G] rows inside nodes when rows from afar enter by the GPU of the sender's number."""
    ranks = topology.ep_size
    per_node = ranks // topology.num_nodes
    to = np.arange(ranks)
    inside = np.zeros_like(rows_LGG)
    for source in range(ranks):
        entry = topology.nodes * per_node + source % per_node
        inside[:, entry, to] += rows_LGG[:, source]
    return inside
