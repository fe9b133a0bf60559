"""The one cost model: what a placement and a schedule make cross the links, and how evenly.

Solver, simulator, verdict and report all count with these definitions, for each MoE layer:

* local activation rate (LAR): share of (token, expert) activations computed on the token's home
  rank. Its floor is 1 / G for a home rank chosen blindly.
* remote copies: mean number of distinct ranks other than home that a token is sent to. An
  all-to-all with per-rank de-duplication moves exactly these rows, once out and once back.
* node copies: mean number of distinct nodes other than home's that a token is sent to.
* load max/mean: activations on the busiest rank over the mean of ranks.
* tokens max/mean: tokens whose home is the fullest rank over the mean of ranks.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.errors import ConfigError, PlacementError, explain
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology

RUNTIMES = ("all-to-all", "all-gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingCost:
    """Cost of serving N tokens, layer by layer; definitions in the module's docstring.

    Attributes:
        lar: [L] float64 in 0..1.
        remote_copies: [L] float64, a token.
        node_copies: [L] float64, a token.
        load_max_over_mean: [L] float64, of expert activations a rank.
        tokens_max_over_mean: [L] float64, of home tokens a rank.
        rows_between_ranks: [L, G, G] int64, rows that rank [i] sends to rank [j] in dispatch;
            the diagonal counts tokens that stay. Combine moves the transpose.
        tokens: Tokens counted (N).
    """

    lar: np.ndarray
    remote_copies: np.ndarray
    node_copies: np.ndarray
    load_max_over_mean: np.ndarray
    tokens_max_over_mean: np.ndarray
    rows_between_ranks: np.ndarray
    tokens: int

    def bytes_between_ranks(self, bytes_per_row: int) -> np.ndarray:
        """[G, G] int64, dispatch bytes of all layers from rank [i] to another rank [j]."""
        rows: np.ndarray = self.rows_between_ranks.sum(axis=0) * bytes_per_row
        np.fill_diagonal(rows, 0)
        return rows

    def straggler_rows(self) -> np.ndarray:
        """[L] int64, rows of the rank that sends or receives most: it sets the dispatch time."""
        rows = self.rows_between_ranks.copy()
        diagonal = np.arange(rows.shape[1])
        rows[:, diagonal, diagonal] = 0
        busiest: np.ndarray = np.maximum(rows.sum(axis=2), rows.sum(axis=1)).max(axis=1)
        return busiest

    def mean(self) -> dict[str, float]:
        """Means over layers, by the names of the fields."""
        names = (
            "lar",
            "remote_copies",
            "node_copies",
            "load_max_over_mean",
            "tokens_max_over_mean",
        )
        return {name: float(np.mean(getattr(self, name))) for name in names}


def nearest_copy(
    placement: Placement, layer: int, *, node_of_rank: np.ndarray | None = None
) -> np.ndarray:
    """[G, E] int32, physical slot that serves each expert for tokens of each home rank.

    The copy on the home rank if there is one, else one on its node, else any; among equals the
    home rank's number picks, so that sources spread over copies.
    """
    ranks, slots = placement.ep_size, placement.slots_per_rank
    table = placement.logical_to_physical_map[layer]
    nodes = np.zeros(ranks, dtype=np.int64) if node_of_rank is None else np.asarray(node_of_rank)
    if table.shape[1] == 1:
        return np.broadcast_to(table[:, 0], (ranks, len(table)))
    rank_of_copy = np.where(table >= 0, table // slots, 0)
    home = np.arange(ranks)[:, None, None]
    tier = np.where(rank_of_copy == home, 0, np.where(nodes[rank_of_copy] == nodes[home], 1, 2))
    tier = np.where(table < 0, 3, tier)
    eligible = tier == tier.min(axis=2, keepdims=True)
    wanted = np.arange(ranks)[:, None] % eligible.sum(axis=2)
    choice = np.argmax(np.cumsum(eligible, axis=2) > wanted[:, :, None], axis=2)
    return np.take_along_axis(np.broadcast_to(table, tier.shape), choice[:, :, None], 2)[:, :, 0]


def evaluate(
    placement: Placement,
    trace: RoutingTrace,
    home_rank: np.ndarray,
    *,
    topology: Topology | None = None,
) -> RoutingCost:
    """Count exactly what `trace` costs under a placement, given each token's home rank.

    Args:
        placement: L layers on G ranks, with or without replicas (see `nearest_copy`).
        trace: N tokens.
        home_rank: [N] (whole requests: one home for all layers) or [N, L] (token schedules).
        topology: Nodes of the ranks; None means one node.

    Raises:
        PlacementError: Shapes or rank numbers do not fit each other.
    """
    layers, ranks = placement.num_layers, placement.ep_size
    homes = np.asarray(home_rank)
    expected = {(trace.num_tokens,), (trace.num_tokens, layers)}
    fits = trace.fingerprint.num_layers == layers and homes.shape in expected
    if not fits or (topology is not None and topology.ep_size != ranks):
        raise PlacementError(
            explain(
                "placement, trace, home ranks and topology do not fit each other",
                got=f"placement {layers} layers on {ranks} ranks, trace of "
                f"{trace.fingerprint.num_layers} layers and {trace.num_tokens} tokens, home ranks "
                f"of shape {homes.shape}"
                + (f", topology of {topology.ep_size} ranks" if topology else ""),
                do="Use artefacts of one model, and a topology with ep_size ranks",
            )
        )
    if homes.size and (homes.min() < 0 or homes.max() >= ranks):
        raise PlacementError(explain("a home rank does not exist", allowed=f"0..{ranks - 1}"))
    nodes = np.zeros(ranks, dtype=np.int64) if topology is None else topology.nodes
    rows = [
        _evaluate_layer(placement, layer, trace.experts[:, layer], _layer(homes, layer), nodes)
        for layer in range(layers)
    ]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return RoutingCost(tokens=trace.num_tokens, **columns)


def remote_copies_by_token(
    placement: Placement,
    trace: RoutingTrace,
    home_rank: np.ndarray,
    *,
    topology: Topology | None = None,
) -> np.ndarray:
    """[N] float64, remote copies of each token, mean over layers; arguments as `evaluate`."""
    total = np.zeros(trace.num_tokens)
    nodes = None if topology is None else topology.nodes
    homes = np.asarray(home_rank)
    for layer in range(placement.num_layers):
        home_T = _layer(homes, layer).astype(np.int64)
        slot_GE = nearest_copy(placement, layer, node_of_rank=nodes)
        rank_TK = (slot_GE // placement.slots_per_rank)[home_T[:, None], trace.experts[:, layer]]
        hit_TG = np.zeros((trace.num_tokens, placement.ep_size), dtype=bool)
        hit_TG[np.arange(trace.num_tokens)[:, None], rank_TK] = True
        hit_TG[np.arange(trace.num_tokens), home_T] = False
        total += hit_TG.sum(axis=1)
    return total / placement.num_layers


def transfer_seconds(
    cost: RoutingCost, topology: Topology, *, row_bytes: int, runtime: str = "all-to-all"
) -> float:
    """Seconds that dispatch and combine of all layers take on the links, for the counted tokens.

    A layer takes as long as its slowest rank, which sends and receives over the links of its node
    and over those to other nodes at the same time; dispatch and combine follow each other.

    Args:
        cost: What was counted.
        topology: Nodes and links of the ranks.
        row_bytes: Bytes of one token's row, one way.
        runtime: "all-to-all": tokens return to their home rank after each layer. "all-gather":
            every rank gets every token, whatever the placement.

    Raises:
        ConfigError: The runtime is unknown.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(
            explain("unknown runtime", where="--runtime", got=runtime, allowed=RUNTIMES)
        )
    ranks = topology.ep_size
    rows = cost.rows_between_ranks.astype(np.float64)
    if runtime == "all-gather":
        rows = np.full(rows.shape, cost.tokens / ranks)
    return link_seconds(rows, topology, row_bytes=row_bytes)


def link_seconds(rows_LGG: np.ndarray, topology: Topology, *, row_bytes: int) -> float:
    """Seconds of dispatch and combine of all layers; see `transfer_seconds`.

    Args:
        rows_LGG: [L, G, G], rows from rank [i] to rank [j], also fractions of expected ones; the
            diagonal is left out.
        topology: Nodes and links of the ranks.
        row_bytes: Bytes of one token's row, one way.
    """
    same_node = topology.nodes[:, None] == topology.nodes
    to_others = ~np.eye(topology.ep_size, dtype=bool)
    seconds = np.zeros(len(rows_LGG))
    for link, mine in (
        (topology.intra_node, same_node & to_others),
        (topology.inter_node, ~same_node),
    ):
        if not mine.any():
            continue
        on_link = rows_LGG * mine
        busiest = np.maximum(on_link.sum(axis=2), on_link.sum(axis=1)).max(axis=1)
        time_L = busiest * row_bytes / (link.gigabytes_per_second * 1e9)
        time_L += np.where(busiest > 0, link.latency_microseconds * 1e-6, 0.0)
        seconds = np.maximum(seconds, time_L)
    return float(2 * np.sum(seconds))


def _layer(homes: np.ndarray, layer: int) -> np.ndarray:
    return homes if homes.ndim == 1 else homes[:, layer]


def _evaluate_layer(
    placement: Placement, layer: int, expert_TK: np.ndarray, home_T: np.ndarray, nodes: np.ndarray
) -> dict[str, np.ndarray | float]:
    ranks, tokens = placement.ep_size, len(expert_TK)
    home_T = home_T.astype(np.int64)
    slot_GE = nearest_copy(placement, layer, node_of_rank=nodes)
    rank_TK = (slot_GE // placement.slots_per_rank)[home_T[:, None], expert_TK]
    hit_TG = np.zeros((tokens, ranks), dtype=bool)
    hit_TG[np.arange(tokens)[:, None], rank_TK] = True
    sent = np.zeros((ranks, ranks), dtype=np.int64)
    for rank in range(ranks):
        sent[rank] = hit_TG[home_T == rank].sum(axis=0)
    node_hit = np.zeros((tokens, int(nodes.max()) + 1), dtype=bool)
    node_hit[np.arange(tokens)[:, None], nodes[rank_TK]] = True
    node_hit[np.arange(tokens), nodes[home_T]] = False
    load = np.bincount(rank_TK.ravel(), minlength=ranks)
    homes = np.bincount(home_T, minlength=ranks)
    scale = max(tokens, 1)
    return {
        "lar": float((rank_TK == home_T[:, None]).mean()) if tokens else 0.0,
        "remote_copies": float((sent.sum() - np.trace(sent)) / scale),
        "node_copies": float(node_hit.sum() / scale),
        "load_max_over_mean": max_over_mean(load),
        "tokens_max_over_mean": max_over_mean(homes),
        "rows_between_ranks": sent,
    }


def max_over_mean(values: np.ndarray) -> float:
    """Largest value over the mean; 1.0 for nothing at all."""
    mean = float(np.mean(values))
    return float(np.max(values)) / mean if mean > 0 else 1.0
