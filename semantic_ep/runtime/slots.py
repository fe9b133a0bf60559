"""Slot tables: from the router's logical experts to physical slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from semantic_ep.plan.cost import nearest_copy
from semantic_ep.plan.placement import Placement

if TYPE_CHECKING:
    from torch import Tensor


def slot_tables(
    placement: Placement, *, rank: int, node_of_rank: np.ndarray | None = None
) -> np.ndarray:
    """[L, E] int64, the slot that serves each logical expert for tokens of one EP rank.

    Of several copies the nearest one serves: on the rank, else on its node, else any, chosen by
    the rank's number so that ranks spread over copies. The cost model counts with the same rule.
    """
    layers = range(placement.num_layers)
    rows = [nearest_copy(placement, layer, node_of_rank=node_of_rank)[rank] for layer in layers]
    return np.stack(rows).astype(np.int64)


def remap(table_E: Tensor, expert_TK: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """[T, K] int64 physical slots of logical expert ids; -1 for tokens outside `mask_T`.

    Padding tokens are outside the mask: their routes are dropped, so they are neither sent nor
    counted.
    """
    slot_TK = table_E[expert_TK]
    return slot_TK if mask_T is None else slot_TK.masked_fill(~mask_T[:, None], -1)
