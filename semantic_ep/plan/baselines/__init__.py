"""Published placement methods, written from their papers, under one interface.

Every method here keeps routing unchanged. They are what the semantic solver is measured against.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.baselines.eplb import eplb_placement, rebalance_experts
from semantic_ep.plan.baselines.exflow import exflow_placement
from semantic_ep.plan.baselines.grace import grace_placement
from semantic_ep.plan.baselines.moetuner import moetuner_placement
from semantic_ep.plan.baselines.occult import occult_placement
from semantic_ep.plan.baselines.semmoe import semmoe_placement
from semantic_ep.plan.baselines.simple import (
    contiguous_placement,
    greedy_load_placement,
    random_placement,
)
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import register
from semantic_ep.topology import Topology

__all__ = [
    "Baseline",
    "contiguous_placement",
    "eplb_placement",
    "exflow_placement",
    "grace_placement",
    "greedy_load_placement",
    "moetuner_placement",
    "occult_placement",
    "random_placement",
    "rebalance_experts",
    "semmoe_placement",
]


# DeepSeek-V3's router has 8 groups, and EPLB keeps a group on a node. A profile does not name the
# router's groups; models without any are grouped alike, so that the hierarchy has work to do.
EPLB_GROUPS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a policy is asked for; the arguments of `PlacementPolicy.place` in one object."""

    profile: RoutingProfile
    ep_size: int
    seed: int
    time_limit: float | None
    topology: Topology

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E) of the model."""
        return self.profile.fingerprint.num_layers, self.profile.fingerprint.num_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A `PlacementPolicy` made of one function.

    Attributes:
        name: Its name on the command line and in tables.
        source: Where the method is published.
        solve: The method.
    """

    name: str
    source: str
    solve: Callable[[Request], Placement]

    def place(
        self,
        profile: RoutingProfile,
        *,
        ep_size: int,
        seed: int = 0,
        time_limit: float | None = None,
        topology: Topology | None = None,
    ) -> Placement:
        """See `PlacementPolicy.place`."""
        ranks = Topology.uniform(ep_size) if topology is None else topology
        return self.solve(
            Request(
                profile=profile,
                ep_size=ep_size,
                seed=seed,
                time_limit=time_limit,
                topology=ranks,
            )
        )


def _contiguous(request: Request) -> Placement:
    layers, experts = request.shape
    return contiguous_placement(num_layers=layers, num_experts=experts, ep_size=request.ep_size)


def _random(request: Request) -> Placement:
    layers, experts = request.shape
    return random_placement(
        num_layers=layers, num_experts=experts, ep_size=request.ep_size, seed=request.seed
    )


def _greedy(request: Request) -> Placement:
    return greedy_load_placement(request.profile.load, ep_size=request.ep_size)


def _eplb(request: Request) -> Placement:
    nodes = _even_nodes(request.topology)
    groups = nodes
    if request.shape[1] % EPLB_GROUPS == 0 and EPLB_GROUPS % nodes == 0:
        groups = EPLB_GROUPS
    return eplb_placement(
        request.profile.load, ep_size=request.ep_size, num_groups=groups, num_nodes=nodes
    )


def _eplb_global(request: Request) -> Placement:
    return eplb_placement(request.profile.load, ep_size=request.ep_size)


def _moetuner(request: Request) -> Placement:
    profile = request.profile
    return moetuner_placement(
        profile.load,
        profile.transition,
        topology=request.topology,
        time_limit=request.time_limit,
    )


def _exflow(request: Request) -> Placement:
    return exflow_placement(
        request.profile.transition,
        ep_size=request.ep_size,
        num_nodes=_even_nodes(request.topology),
        seed=request.seed,
        time_limit=60.0 if request.time_limit is None else request.time_limit,
    )


def _grace(request: Request, *, replicate: bool = False) -> Placement:
    return grace_placement(
        request.profile.coactivation,
        request.profile.load,
        topology=request.topology,
        seed=request.seed,
        replicate=replicate,
    )


def _occult(request: Request) -> Placement:
    return occult_placement(request.profile.coactivation, ep_size=request.ep_size)


def _semmoe(request: Request) -> Placement:
    return semmoe_placement(
        request.profile,
        ep_size=request.ep_size,
        seed=request.seed,
        time_limit=request.time_limit,
    )


def _even_nodes(topology: Topology) -> int:
    """Nodes, or 1 where they hold different numbers of ranks, which EPLB cannot express."""
    ranks = Counter(topology.node_of_rank)
    return topology.num_nodes if len(set(ranks.values())) == 1 else 1


for _baseline in (
    Baseline(name="contiguous", source="every upstream runtime", solve=_contiguous),
    Baseline(name="random", source="the floor of a placement", solve=_random),
    Baseline(name="greedy", source="SmartMoE, MindSpeed", solve=_greedy),
    Baseline(name="eplb", source="deepseek-ai/EPLB, hierarchical", solve=_eplb),
    Baseline(name="eplb-global", source="deepseek-ai/EPLB, global", solve=_eplb_global),
    Baseline(name="moetuner", source="MoETuner, two stages", solve=_moetuner),
    Baseline(name="exflow", source="ExFlow, solve_affinity", solve=_exflow),
    Baseline(name="grace", source="GRACE-MoE, grouping alone", solve=_grace),
    Baseline(
        name="grace-replicated",
        source="GRACE-MoE with its copies, which need spare slots",
        solve=partial(_grace, replicate=True),
    ),
    Baseline(name="occult", source="Occult, greedy growth", solve=_occult),
    Baseline(name="semmoe", source="Sem-MoE as its paper prints it", solve=_semmoe),
):
    register(_baseline)
