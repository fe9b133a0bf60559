"""Experts on a CPU when a step brings few rows, as decoding does.

transformers' grouped matmul sorts the rows, counts them by expert and visits every expert of the
rank, also those without one. For a handful of rows that takes as long as the experts themselves.
Here only experts that have rows are visited, in an order known without tensors. The matmuls are the
same, and so are the results up to rounding. More rows go to the grouped matmul.

Shapes: T tokens, K experts of each, R = T * K rows, D hidden size, F width of an expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = "semantic_ep_few_rows"

# Above it the grouped matmul is as fast, measured with 16 experts on the rank.
_FEW_ROWS = 16


def experts_implementation(model: PreTrainedModel, device: torch.device) -> str:
    """Name, for transformers, of how the experts of a model on a device compute.

    Families whose experts transformers computes without a grouped matmul stay as they are.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    implementation: str = model.get_correct_experts_implementation(None)
    if device.type != "cpu" or implementation != "grouped_mm":
        return implementation
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, few_rows_experts_forward)
    return EXPERTS


def few_rows_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """[T, D] of gated experts with fused weights, as transformers calls it.

    Args:
        experts: The family's module.
        hidden_states: [T, D].
        top_k_index: [T, K] int64, rows of the fused weights.
        top_k_weights: [T, K].
    """
    if not 0 < top_k_index.numel() <= _FEW_ROWS:
        return _grouped(experts, hidden_states, top_k_index, top_k_weights)
    tokens, top_k = top_k_index.shape
    expert_R = top_k_index.flatten().tolist()
    runs, order_R = _runs(expert_R), None
    if len(runs) > len(set(expert_R)):
        order = sorted(range(len(expert_R)), key=expert_R.__getitem__)
        runs = _runs([expert_R[row] for row in order])
        order_R = torch.tensor(order)
        x_RD = hidden_states[order_R // top_k]
    else:
        x_RD = hidden_states.repeat_interleave(top_k, dim=0) if top_k > 1 else hidden_states
    h_RF = experts._apply_gate(_project(experts, "gate_up_proj", x_RD, runs))
    y_RD = _project(experts, "down_proj", h_RF, runs)
    if order_R is not None:
        y_RD = torch.empty_like(y_RD).index_copy_(0, order_R, y_RD)
    y_TKD = (y_RD * top_k_weights.reshape(-1, 1)).view(tokens, top_k, -1)
    return y_TKD.sum(dim=1).to(hidden_states.dtype)


def _grouped(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    from transformers.integrations.moe import grouped_mm_experts_forward

    out: Tensor = grouped_mm_experts_forward(experts, hidden, index, weights)
    return out


def _runs(expert_R: Sequence[int]) -> list[tuple[int, int]]:
    """(expert, neighbouring rows of it), in order."""
    return [(expert, len(list(rows))) for expert, rows in itertools.groupby(expert_R)]


def _project(experts: Any, name: str, x_RD: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Each run of rows through its expert's matrix."""
    weight = getattr(experts, name)
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    parts = x_RD.split([count for _, count in runs])
    return torch.cat(
        [
            torch.nn.functional.linear(x, weight[expert], None if bias is None else bias[expert])
            for x, (expert, _) in zip(parts, runs)
        ]
    )
