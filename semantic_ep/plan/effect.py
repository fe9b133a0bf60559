"""What a plan is worth in time: transfers saved on the user's links, against moving experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from semantic_ep.plan.cost import RoutingCost, transfer_seconds
from semantic_ep.plan.moving import count_moves, relabel_ranks
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes that turn rows into bytes.

    Attributes:
        row_bytes: Bytes of one token's hidden vector on the wire.
        expert_bytes: Bytes of one expert's weights in one layer; with optimiser state in training.
        runtime: See `transfer_seconds`.
    """

    row_bytes: int
    expert_bytes: int
    runtime: str = "all-to-all"


def effect_on_time(
    plain: RoutingCost,
    planned: RoutingCost,
    current: Placement,
    wanted: Placement,
    *,
    topology: Topology,
    workload: Workload,
) -> dict[str, Any]:
    """Predict transfer time before and after, and the tokens after which moving has paid.

    Computation, and any overlap of it with transfers, is left out: this bounds what can be saved.

    Args:
        plain: Counted with `current`.
        planned: Counted with `wanted`, on the same tokens.
        current: The placement in force.
        wanted: The placement proposed.
        topology: Nodes and links of the ranks.
        workload: Sizes and runtime.
    """
    before, after = (
        transfer_seconds(cost, topology, row_bytes=workload.row_bytes, runtime=workload.runtime)
        for cost in (plain, planned)
    )
    # Under attention-DP one rank number means one rank in every layer; a plan of token schedules
    # could rename the ranks of each layer, which moves less still.
    renamed = relabel_ranks(wanted, current, shared_ranks=True, topology=topology)
    moves = count_moves(renamed, current, bytes_per_expert=workload.expert_bytes, topology=topology)
    link = topology.inter_node if topology.num_nodes > 1 else topology.intra_node
    moving = moves.bytes_of_busiest_rank / (link.gigabytes_per_second * 1e9)
    saved = (before - after) / max(planned.tokens, 1)
    break_even = moving / saved if saved > 0 else None
    share = 1 - after / before if before > 0 else 0.0
    if workload.runtime == "all-gather":
        summary = "all-gather sends every token to every rank: no placement can save transfers"
    elif break_even is None:
        summary = "on these links the busiest rank gains nothing"
    else:
        summary = (
            f"transfers: {before * 1e6 / plain.tokens:.2f} -> {after * 1e6 / planned.tokens:.2f} us"
            f" a token ({share:.1%} less); moving {moves.bytes / 1e9:.3f} GB pays after "
            f"{break_even:,.0f} tokens"
        )
    return {
        "seconds_per_token_before": before / max(plain.tokens, 1),
        "seconds_per_token_after": after / max(planned.tokens, 1),
        "seconds_saved_share": share,
        "bytes_to_move": moves.bytes,
        "seconds_to_move": moving,
        "break_even_tokens": break_even,
        "summary": summary,
    }
