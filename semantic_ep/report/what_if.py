"""The small table of the first screen: what other EP degrees and links would give.

For each EP degree the experts of a few layers are placed anew, on the run's profile, and both
placements are counted on its held-out requests. Time is that of the busiest rank's rows at a link's
bandwidth, dispatch and combine, without latency and computation: predicted, not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import RoutingCost, evaluate
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import policy
from semantic_ep.plan.solver import Mode
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.report.headline import WORTHWHILE_SHARE
from semantic_ep.report.heldout import sampled
from semantic_ep.report.sources import HOLDOUT_DIR, PROFILE_DIR, RunSources
from semantic_ep.topology import LINKS

EP_SIZES = (2, 4, 8, 16, 32, 64)
SHOWN_LINKS = ("nvlink4", "pcie5", "ib_ndr", "ethernet_100g", "ethernet_25g")
# Planning for every EP degree must not make a report slow.
MAX_LAYERS = 4
# A row both ways where the run does not tell its size: 4,096 elements in bf16.
ASSUMED_BYTES = 2 * 4096 * 2
# Time is stated for this many tokens of the EP group.
TOKENS = 1000


def what_if(sources: RunSources, serve: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Plan and count at every EP degree that divides the experts.

    Args:
        sources: The run; needs plan, profile and held-out trace.
        serve: Section `serve` of the report, for the size of a row.

    Returns:
        `{"source", "layers", "bytes_of_copy", "assumed", "tokens", "links", "rows"}`, a row being
        `{"ep_size", "planned", "lar": [before, after], "remote_copies": [before, after],
        "busiest_rows": [before, after], "worth_it", "seconds": {link: [before, after]}}`; None
        where something is missing.
    """
    plan, profile, trace = sources.plan, sources.profile, sources.holdout
    if plan is None or profile is None or trace is None or not profile.has_affinity:
        return None
    mode: Mode = plan.verdict["mode"]
    of_model = profile.fingerprint.num_layers
    layers = np.unique(np.linspace(0, of_model - 1, min(of_model, MAX_LAYERS)).round().astype(int))
    few, held_out = _few_layers(profile, sampled(trace), layers)
    copy_bytes = bytes_of_copy(serve) if serve else None
    rows = []
    for ep_size in EP_SIZES:
        if few.fingerprint.num_experts % ep_size == 0:
            costs = _costs(few, held_out, ep_size, mode)
            rows.append(
                {
                    "ep_size": ep_size,
                    "planned": ep_size == plan.placement.ep_size,
                    **_figures(costs, of_model, copy_bytes or ASSUMED_BYTES),
                }
            )
    return {
        "source": f"{PROFILE_DIR}/ and {HOLDOUT_DIR}/",
        "layers": [int(profile.fingerprint.layer_ids[layer]) for layer in layers],
        "bytes_of_copy": copy_bytes or ASSUMED_BYTES,
        "assumed": copy_bytes is None,
        "tokens": TOKENS,
        "links": {name: LINKS[name].gigabytes_per_second for name in SHOWN_LINKS},
        "rows": rows,
    }


def bytes_of_copy(serve: Mapping[str, Any]) -> float | None:
    """Bytes that a remote copy cost, there and back, as counted while serving."""
    mode = serve["modes"]["before"]
    copies = sum(mode["remote_copies"]) * sum(mode["tokens_per_rank"])
    return mode["wire_bytes_total"] / copies if copies else None


def _few_layers(
    profile: RoutingProfile, trace: RoutingTrace, layers: np.ndarray
) -> tuple[RoutingProfile, RoutingTrace]:
    fingerprint = dataclasses.replace(
        profile.fingerprint, layer_ids=tuple(profile.fingerprint.layer_ids[i] for i in layers)
    )
    experts = fingerprint.num_experts
    few = dataclasses.replace(
        profile,
        fingerprint=fingerprint,
        load=profile.load[layers],
        token_expert=tuple(profile.token_expert[layer] for layer in layers),
        coactivation=profile.coactivation[layers],
        # Between layers that do not follow each other nothing was counted.
        transition=np.zeros((len(layers) - 1, experts, experts)),
        sequence_load=profile.sequence_load[:, layers],
        dropped_mass=profile.dropped_mass[layers],
    )
    return few, dataclasses.replace(
        trace, fingerprint=fingerprint, experts=trace.experts[:, layers]
    )


def _costs(
    profile: RoutingProfile, trace: RoutingTrace, ep_size: int, mode: Mode
) -> tuple[RoutingCost, RoutingCost]:
    shape = profile.fingerprint
    contiguous = Placement.contiguous(
        num_layers=shape.num_layers, num_experts=shape.num_experts, ep_size=ep_size
    )
    name = "semantic" if mode == "tokens" else "semantic-requests"
    semantic = policy(name).place(profile, ep_size=ep_size)
    return (
        evaluate(contiguous, trace, home_ranks(trace, contiguous, None, mode)),
        evaluate(semantic, trace, home_ranks(trace, semantic, profile, mode)),
    )


def _figures(
    costs: tuple[RoutingCost, RoutingCost], layers: int, copy_bytes: float
) -> dict[str, Any]:
    """Contiguous and semantic; time is of all layers, for `TOKENS` tokens, on each link."""
    copies = [float(cost.remote_copies.mean()) for cost in costs]
    rows = [float(cost.straggler_rows().mean()) / cost.tokens * TOKENS * layers for cost in costs]
    return {
        "lar": [float(cost.lar.mean()) for cost in costs],
        "remote_copies": copies,
        "busiest_rows": rows,
        "worth_it": copies[1] <= (1 - WORTHWHILE_SHARE) * copies[0] and rows[1] <= rows[0],
        "seconds": {
            name: [sent * copy_bytes / (LINKS[name].gigabytes_per_second * 1e9) for sent in rows]
            for name in SHOWN_LINKS
        },
    }
