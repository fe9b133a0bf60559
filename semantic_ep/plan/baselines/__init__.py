"""Published placement methods, written from their papers, under one interface.

Every method here keeps routing unchanged. They are what the semantic solver is measured against.
"""

from semantic_ep.plan.baselines.eplb import eplb_placement, rebalance_experts
from semantic_ep.plan.baselines.simple import (
    contiguous_placement,
    greedy_load_placement,
    random_placement,
)

__all__ = [
    "contiguous_placement",
    "eplb_placement",
    "greedy_load_placement",
    "random_placement",
    "rebalance_experts",
]
