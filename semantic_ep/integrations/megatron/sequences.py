"""Which sequence each token of a Megatron batch belongs to, as every rank that sees a part says it.

Shapes: B rows, S tokens of a row on this context-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from semantic_ep.integrations.observation import sequence_numbers


def sequences_of_batch(
    token_id_BS: Tensor,
    *,
    position_ids: Tensor | None,
    packed_seq_params: Any,
    context_parallel: dist.ProcessGroup,
) -> Tensor:
    """[B, S] int32 sequence numbers, the same on all context-parallel ranks.

    Args:
        token_id_BS: Token ids, cut to this rank as `get_batch_on_this_cp_rank` does: of 2 * G
            chunks of a row, rank r holds r and 2 * G - 1 - r.
        position_ids: [B, S] positions, cut alike; they start again with each packed sequence.
        packed_seq_params: Megatron's description of packed rows ("thd"), or None.
        context_parallel: The ranks that hold parts of a row.
    """
    ranks, rank = context_parallel.size(), context_parallel.rank()
    if packed_seq_params is not None:
        bounds = packed_seq_params.cu_seqlens_q_padded
        if bounds is None:
            bounds = packed_seq_params.cu_seqlens_q
        # Every rank holds the same share of each sequence.
        place = torch.arange(token_id_BS.numel(), device=token_id_BS.device)
        number = torch.searchsorted(bounds[1:].long() // ranks, place, right=True)
        return number.to(torch.int32).view_as(token_id_BS)
    if ranks == 1:
        return sequence_numbers(position_ids, token_id_BS)
    rows, length = token_id_BS.shape
    row_B1 = torch.arange(rows, dtype=torch.int32, device=token_id_BS.device)[:, None]
    if not isinstance(position_ids, Tensor) or position_ids.shape != token_id_BS.shape:
        return row_B1.expand(rows, length)
    half = length // 2
    chunks = (rank, 2 * ranks - 1 - rank)
    place_S = torch.cat([torch.arange(half) + half * chunk for chunk in chunks])
    # A token's place in the row less its position is where its sequence starts.
    start_BS = place_S.to(position_ids.device) - position_ids
    return row_B1 * (length * ranks) + start_BS.to(torch.int32)
