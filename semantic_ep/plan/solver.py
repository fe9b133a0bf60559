"""The semantic solver: experts and the tokens that want them, on the same rank.

Token schedules (attention-TP) plan every layer by itself: co-clustering of sampled tokens from
several starts, the contiguous and the load-balanced placement among them, then a local search
under the exact objective (`search`). Whole requests (attention-DP) share one clustering of
sequences over all layers (`coclustering`). On several nodes, nodes are planned first, then the
ranks of each.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import Literal

import numpy as np
from scipy import sparse

from semantic_ep.errors import PlacementError, explain
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.coclustering import choose_ranks, cocluster
from semantic_ep.plan.load_budget import LoadBudget
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import register
from semantic_ep.plan.request_rows import RequestRows, request_rows
from semantic_ep.plan.router_groups import (
    balanced_ranks,
    check_router_groups,
    mixed_blocks,
    nested,
)
from semantic_ep.plan.samples import Evidence, LayerSample, sample_layer
from semantic_ep.plan.search import SwapSearch, saving_by_pairs
from semantic_ep.topology import Topology

logger = logging.getLogger(__name__)

Mode = Literal["requests", "tokens"]

# A start costs about the square of the experts, a search about their number: with more experts
# than this, fewer of both keep the time of a layer about the same.
_FULL_EFFORT_EXPERTS = 64
# One clustering serves all layers, and no search follows: it can afford more starts than a layer.
_REQUEST_STARTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticPolicy:
    """Joint co-clustering of tokens and experts.

    Attributes:
        mode: What gets a home rank: whole "requests" (one rank for all layers) or "tokens" (one a
            layer).
        starts: Random starts of the co-clustering, up to 64 experts; fewer beyond.
        searches: Best starts that a local search continues from, in each layer; fewer beyond.
        steps: Steps of each local search.
        max_load: Expert load of the fullest rank, over the mean, to keep below on other requests,
            mean over layers; see `LoadBudget`.
        evidence: Raw trace and predictor, when there are any; for mode "tokens".
        router_groups: Router groups to keep whole (see `router_groups`); 1 keeps none.
        pair_weight: For mode "requests", weight of copies that experts on one rank share, against
            local activations. At 1 the two count as a de-duplicating dispatch counts them, which
            co-locates experts and leaves requests little to choose from: copies fall most, LAR
            hardly rises. On the traces we have, 0.3 gives up an eighth of the copies saved for
            half as much LAR again above the floor.
        known: Placements by others, each expert once and equally many a rank, to start from too.
            By the objective planned for, which charges load beyond the cap, the plan is then worse
            than none of them; on several nodes, copies to nodes and to ranks weigh as the time of
            their links. Those that break router groups are left out.
    """

    mode: Mode = "tokens"
    starts: int = 12
    searches: int = 4
    steps: int = 500
    max_load: float = 1.15
    evidence: Evidence | None = None
    router_groups: int = 1
    pair_weight: float = 0.3
    known: tuple[Placement, ...] = ()

    @property
    def name(self) -> str:
        """Name on the command line."""
        return "semantic" if self.mode == "tokens" else "semantic-requests"

    def place(
        self,
        profile: RoutingProfile,
        *,
        ep_size: int,
        seed: int = 0,
        time_limit: float | None = None,
        topology: Topology | None = None,
    ) -> Placement:
        """See `PlacementPolicy.place`. Ctrl-C ends the search with the best placement so far."""
        fingerprint = profile.fingerprint
        layers = fingerprint.num_layers
        contiguous = Placement.contiguous(
            num_layers=layers, num_experts=fingerprint.num_experts, ep_size=ep_size
        )
        check_router_groups(
            self.router_groups, num_experts=fingerprint.num_experts, ep_size=ep_size
        )
        if ep_size == 1:
            return contiguous
        started = time.monotonic()
        given = self._given(contiguous)
        if self.mode == "requests":
            deadline = None if time_limit is None else started + time_limit
            ranks = self._place_requests(profile, given, ep_size, seed, deadline, topology)
            return Placement.from_rank_of_expert(ranks, ep_size=ep_size)
        budget = LoadBudget(profile, ep_size=ep_size, allowed=self.max_load, seed=seed)
        ranks = contiguous.rank_of_expert.astype(np.int64)
        balanced = balanced_ranks(profile.load, ep_size=ep_size, num_groups=self.router_groups)
        try:
            for layer in range(layers):
                deadline = None
                if time_limit is not None:
                    deadline = started + time_limit * (layer + 1) / layers
                sample = sample_layer(profile, self.evidence, layer, ep_size=ep_size, seed=seed)
                known = [ranks[layer], balanced[layer], *(rank_LE[layer] for rank_LE in given)]
                ranks[layer] = self._place_layer(
                    sample, known, budget.cap(), ep_size, (seed, layer), deadline, topology
                )
                budget.spend(layer, ranks[layer])
        except KeyboardInterrupt:
            logger.warning("interrupted: layers from %d on keep contiguous placement", layer)
        return Placement.from_rank_of_expert(ranks, ep_size=ep_size)

    def _given(self, like: Placement) -> list[np.ndarray]:
        """[L, E] ranks of the known placements that can be starts; checks all of them."""
        wanted = (like.physical_to_logical_map.shape, like.num_experts, like.ep_size)
        for other in self.known:
            found = (other.physical_to_logical_map.shape, other.num_experts, other.ep_size)
            if found != wanted:
                raise PlacementError(
                    explain(
                        "a known placement does not fit the profile, or its ranks hold different "
                        "numbers of experts",
                        where="SemanticPolicy.known",
                        got=f"(layers, slots), experts, ranks {found}",
                        allowed=f"{wanted}",
                    )
                )
        return [
            other.rank_of_expert.astype(np.int64)
            for other in self.known
            if not mixed_blocks(other.physical_to_logical_map, self.router_groups).size
        ]

    def _place_layer(
        self,
        sample: LayerSample,
        known: list[np.ndarray],
        cap: float,
        ep_size: int,
        seed: tuple[int, int],
        deadline: float | None,
        topology: Topology | None,
    ) -> np.ndarray:
        """[E] ranks for one layer; nodes first where there are several of equal size."""
        rng = np.random.default_rng(seed)
        groups = self.router_groups
        per_node = _equal_nodes(topology, ep_size, groups)
        if per_node is None:
            return self._place_flat(sample, known, cap, ep_size, rng, deadline, groups)
        nodes = ep_size // per_node
        on_nodes = [rank_E // per_node for rank_E in known]
        node_E = self._place_flat(sample, on_nodes, cap, nodes, rng, deadline, groups)
        scores = sample.expected_NE @ np.eye(nodes, dtype=np.float32)[node_E]
        home = choose_ranks(scores, np.ones(len(scores)))
        rank_E = np.empty(len(node_E), dtype=np.int64)
        for node in range(nodes):
            experts = np.flatnonzero(node_E == node)
            tokens = np.flatnonzero(home == node)
            part = sample.part(tokens, experts)
            start = np.arange(len(experts)) * per_node // len(experts)
            inner = dataclasses.replace(self, starts=1, searches=1, steps=self.steps // 4)
            own_groups = max(groups // nodes, 1)
            local = inner._place_flat(part, [start], cap, per_node, rng, deadline, own_groups)
            rank_E[experts] = node * per_node + local
        # Nodes chosen first may leave their ranks little; a known placement can be better on both.
        on_ranks = self._search(sample, cap, ep_size, groups=1)
        across_nodes = self._search(sample, cap, nodes, groups=1)

        def value(rank_E: np.ndarray) -> float:
            across = across_nodes.start(rank_E // per_node)
            return _by_time_of_links(topology, across, on_ranks.start(rank_E))

        return max([rank_E, *known], key=value)

    def _search(self, sample: LayerSample, cap: float, ep_size: int, *, groups: int) -> SwapSearch:
        """The objective on ranks, or on nodes, and the search that climbs it."""
        return SwapSearch(
            sample.expected_NE,
            sample.active_NE,
            sample.load_E,
            ep_size=ep_size,
            top_k=sample.top_k,
            batches=sample.batches,
            load_cap=cap,
            pairs_EE=sample.pairs_EE if sample.active_NE is None else None,
            router_groups=groups,
        )

    def _place_flat(
        self,
        sample: LayerSample,
        known: list[np.ndarray],
        cap: float,
        ep_size: int,
        rng: np.random.Generator,
        deadline: float | None,
        groups: int,
    ) -> np.ndarray:
        """[E] ranks: the best of the known placements and our own starts, improved by swaps."""
        experts = len(sample.load_E)
        if groups > 1 and ep_size <= groups:  # whole groups move
            size = experts // groups
            first = [rank_E[::size] for rank_E in known]
            merged = sample.merged(groups)
            return np.repeat(self._place_flat(merged, first, cap, ep_size, rng, deadline, 1), size)
        if experts == ep_size or len(sample.expected_NE) < 2 * ep_size:
            return known[0]
        effort = min(1.0, _FULL_EFFORT_EXPERTS / experts)
        starts = list(known)
        rows = [sparse.csr_array(np.maximum(sample.expected_NE, 0))]
        weight = np.ones(len(sample.expected_NE))
        for _ in range(math.ceil(self.starts * effort**2)):
            ranks, _ = cocluster(
                rows,
                weight,
                ep_size,
                rng=rng,
                pairs_LEE=sample.pairs_EE[None] / sample.top_k,
                load_cap=cap,
                deadline=deadline,
                router_groups=groups,
            )
            starts.append(ranks[0])
            if deadline is not None and time.monotonic() > deadline:
                break
        search = self._search(sample, cap, ep_size, groups=groups)
        # Where a search begins matters more than how long it goes on: several short ones.
        best, best_value = known[0], -np.inf
        for start in sorted(starts, key=search.start, reverse=True)[
            : math.ceil(self.searches * effort)
        ]:
            search.start(start)
            rank_E, value = search.run(rng, steps=self.steps, deadline=deadline)
            if value > best_value:
                best, best_value = rank_E, value
            if deadline is not None and time.monotonic() > deadline:
                break
        return best

    def _place_requests(
        self,
        profile: RoutingProfile,
        known: list[np.ndarray],
        ep_size: int,
        seed: int,
        deadline: float | None,
        topology: Topology | None,
    ) -> np.ndarray:
        """[L, E] ranks from one clustering of sequences over all layers, nodes first."""
        fingerprint = profile.fingerprint
        layers, experts, top_k = (
            fingerprint.num_layers,
            fingerprint.num_experts,
            fingerprint.top_k,
        )
        rng = np.random.default_rng(seed)
        tables, weight = request_rows(profile, ep_size, rng)
        pairs = [
            saving_by_pairs(together, tokens=profile.tokens, top_k=top_k, ep_size=ep_size)
            * (self.pair_weight / top_k)
            for together in profile.coactivation
        ]
        cap = LoadBudget(profile, ep_size=ep_size, allowed=self.max_load, seed=seed).cap()
        rows = RequestRows(tables=tables, weight=weight, pairs_LEE=np.stack(pairs))
        groups = self.router_groups
        per_node = _equal_nodes(topology, ep_size, groups)
        if per_node is None:
            return self._cluster_requests(rows, known, cap, ep_size, rng, deadline, groups)
        nodes = ep_size // per_node
        on_nodes = [rank_LE // per_node for rank_LE in known]
        node_LE = self._cluster_requests(rows, on_nodes, cap, nodes, rng, deadline, groups)
        home = choose_ranks(rows.on_ranks(node_LE, nodes) / weight[:, None], weight)
        rank_LE = np.empty((layers, experts), dtype=np.int64)
        for node in range(nodes):
            columns = np.stack([np.flatnonzero(row == node) for row in node_LE])
            part = rows.part(np.flatnonzero(home == node), columns)
            own_groups = max(groups // nodes, 1)
            inner = self._cluster_requests(part, [], cap, per_node, rng, deadline, own_groups)
            np.put_along_axis(rank_LE, columns, node * per_node + inner, axis=1)

        def value(rank_LE: np.ndarray) -> float:
            across = rows.value(rank_LE // per_node, nodes, load_cap=cap)
            return _by_time_of_links(topology, across, rows.value(rank_LE, ep_size, load_cap=cap))

        return max([rank_LE, _in_order(layers, experts, ep_size), *known], key=value)

    def _cluster_requests(
        self,
        rows: RequestRows,
        known: list[np.ndarray],
        cap: float,
        ep_size: int,
        rng: np.random.Generator,
        deadline: float | None,
        groups: int,
    ) -> np.ndarray:
        """[L, E] ranks: the best clustering of several starts, known placements among them."""
        layers, experts = rows.pairs_LEE.shape[:2]
        if groups > 1 and ep_size <= groups:  # whole groups move
            size = experts // groups
            first = [rank_LE[:, ::size] for rank_LE in known]
            merged = rows.merged(groups)
            moved = self._cluster_requests(merged, first, cap, ep_size, rng, deadline, 1)
            return np.repeat(moved, size, axis=1)
        contiguous = _in_order(layers, experts, ep_size)
        best, best_value = contiguous, -np.inf
        if experts == ep_size or len(rows.weight) < ep_size:
            return best

        def value_of(rank_LE: np.ndarray) -> float:
            return rows.value(rank_LE, ep_size, load_cap=cap)

        effort = min(1.0, _FULL_EFFORT_EXPERTS / experts)
        firsts: list[np.ndarray | None] = [contiguous]
        if known:
            firsts.append(max(known, key=value_of))
        firsts += [None] * math.ceil(_REQUEST_STARTS * self.starts * effort**3)
        try:
            for first_LE in firsts:
                ranks, value = cocluster(
                    rows.tables,
                    rows.weight,
                    ep_size,
                    rng=rng,
                    pairs_LEE=rows.pairs_LEE,
                    load_cap=cap,
                    first=first_LE,
                    deadline=deadline,
                    router_groups=groups,
                )
                if value > best_value:
                    best, best_value = ranks, value
                if deadline is not None and time.monotonic() > deadline:
                    break
        except KeyboardInterrupt:
            logger.warning("interrupted: keeping the best clustering so far")
        # Alternation may lose what a start had: rows follow experts, not the other way about.
        return max([best, *known], key=value_of) if known else best


def _in_order(layers: int, experts: int, ep_size: int) -> np.ndarray:
    """[L, E] ranks of contiguous placement."""
    return np.tile(np.arange(experts) * ep_size // experts, (layers, 1))


def _by_time_of_links(topology: Topology | None, on_nodes: float, on_ranks: float) -> float:
    """One value of a placement on nodes and on ranks: each weighs as the time of its link."""
    assert topology is not None
    links = topology.inter_node, topology.intra_node
    seconds = np.array([1 / link.gigabytes_per_second for link in links])
    return float(seconds @ (on_nodes, on_ranks) / seconds.sum())


def _equal_nodes(topology: Topology | None, ep_size: int, router_groups: int) -> int | None:
    """Ranks a node when several equal nodes of adjacent ranks can be planned first, else None.

    Nodes and router groups must be nested: one node of whole groups, or one group of whole nodes.
    """
    if topology is None or topology.num_nodes == 1 or topology.num_nodes == ep_size:
        return None
    if not nested(topology.num_nodes, router_groups):
        return None
    per_node = ep_size // topology.num_nodes
    adjacent = np.arange(ep_size) // per_node
    return per_node if np.array_equal(topology.nodes, adjacent) else None


register(SemanticPolicy(mode="tokens"))
register(SemanticPolicy(mode="requests"))
