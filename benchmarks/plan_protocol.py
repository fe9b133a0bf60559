"""How placement methods are compared on a trace: plan on one part of it, count on the other."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import PlacementPolicy
from semantic_ep.plan.predictor_choice import ExpertPredictor, choose_predictor
from semantic_ep.plan.samples import Evidence
from semantic_ep.plan.slices import BATCH_TOKENS
from semantic_ep.plan.solver import Mode, SemanticPolicy
from semantic_ep.plan.verdict import home_ranks, rows_of_cost
from semantic_ep.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """What is learned from the profiled requests, whatever the placement.

    Attributes:
        trace: The profiled requests.
        profile: Counted from them.
        predictor: Fitted on them; None where nothing is predicted from earlier layers.
        seconds: Wall time of fitting.
    """

    trace: RoutingTrace
    profile: RoutingProfile
    predictor: ExpertPredictor | None
    seconds: float


def learn(trace: RoutingTrace, *, ep_size: int, seed: int, predict: bool) -> Learned:
    """Count a profile and, if home ranks of single tokens are to be predicted, fit a predictor.

    Args:
        trace: The profiled requests.
        ep_size: EP ranks (G) that predictors are compared on.
        seed: Seed of that comparison.
        predict: Whether to fit one.
    """
    profile = RoutingProfile.from_trace(trace)
    started = time.perf_counter()
    predictor = None
    if predict:
        predictor = choose_predictor(trace, profile, ep_size=ep_size, batch=BATCH_TOKENS, seed=seed)
    return Learned(
        trace=trace,
        profile=profile,
        predictor=predictor,
        seconds=time.perf_counter() - started,
    )


def place(
    learned: Learned,
    policy: PlacementPolicy,
    *,
    ep_size: int,
    seed: int,
    topology: Topology | None = None,
    time_limit: float | None = None,
) -> tuple[Placement, float]:
    """Return a policy's placement and its wall time; our own also sees the trace, if predicted."""
    if isinstance(policy, SemanticPolicy) and learned.predictor is not None:
        evidence = Evidence(trace=learned.trace, predictor=learned.predictor)
        policy = dataclasses.replace(policy, evidence=evidence)
    started = time.perf_counter()
    placement = policy.place(
        learned.profile, ep_size=ep_size, seed=seed, time_limit=time_limit, topology=topology
    )
    return placement, time.perf_counter() - started


def count(
    trace: RoutingTrace,
    placement: Placement,
    learned: Learned | None,
    mode: Mode,
    *,
    topology: Topology | None = None,
) -> list[dict[str, Any]]:
    """Count on requests that nothing was learned from.

    Args:
        trace: Requests to count on.
        placement: Where experts live.
        learned: What home ranks are predicted from; None: they ignore affinity (slices in order;
            requests balanced by tokens).
        mode: "tokens": batches of 512 consecutive tokens in equal slices, chosen anew in each
            layer. "requests": windows of 64 requests, tokens a rank within 5 % where whole
            requests allow it, rank predicted from token ids.
        topology: Nodes of the ranks.

    Returns:
        One row a layer and one with layer "mean".
    """
    home = home_ranks(
        trace,
        placement,
        None if learned is None else learned.profile,
        mode,
        predictor=None if learned is None else learned.predictor,
    )
    return rows_of_cost(evaluate(placement, trace, home, topology=topology))
