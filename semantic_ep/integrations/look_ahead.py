"""Predict the experts of an MoE layer before its attention has run.

Attention adds little to a residual stream that many layers have written to. The layer's own norm
and router, applied to the stream as it enters the layer, therefore choose mostly the experts that
they will choose after attention: one small matrix product instead of a table.

Shapes: T tokens, D hidden, E logical experts, G EP ranks, L MoE layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from semantic_ep.integrations.transformers import decoder_layer_of, find_moe_layers
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import Context


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ResidualContext(Context):
    """What every rank knows of a step's tokens when they reach a layer in attention-TP.

    The routes of earlier layers stay with the ranks that computed them: the history is empty.

    Attributes:
        residual_TD: The residual stream before the layer's attention.
    """

    residual_TD: Tensor

    @classmethod
    def of(cls, layer: int, token_id: np.ndarray, residual_TD: Tensor) -> ResidualContext:
        """Context without history."""
        history = np.empty((len(token_id), 0, 0), dtype=np.int64)
        return cls(layer=layer, token_id=token_id, history=history, residual_TD=residual_TD)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LookAheadPredictor:
    """Each layer's own router on the residual stream before attention; a `Predictor`.

    Attributes:
        norms: [L], the norm before each MoE block.
        routers: [L], the routers; they return (logits, weights, expert ids).
    """

    norms: Sequence[nn.Module]
    routers: Sequence[nn.Module]

    @property
    def name(self) -> str:
        """Name in tables."""
        return "look-ahead"

    @torch.no_grad()
    def expert_scores(self, layer: int, residual_TD: Tensor) -> Tensor:
        """[T, E] float32: 1 for the experts that the router chooses now, plus its probabilities.

        These tell what the rest of the stream may yet tip: near misses, and narrow choices.
        """
        logits_TE, _, expert_TK = self.routers[layer](self.norms[layer](residual_TD))
        return (
            logits_TE.float()
            .softmax(dim=-1)
            .scatter_add(1, expert_TK, torch.ones_like(expert_TK, dtype=torch.float32))
        )

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """See `semantic_ep.plan.predictors.Predictor`; needs a `ResidualContext`."""
        assert isinstance(context, ResidualContext)
        scores_TE = self.expert_scores(context.layer, context.residual_TD).cpu().numpy()
        scores: np.ndarray = scores_TE @ placement.expert_on_rank[context.layer]
        return scores

    @classmethod
    def of_model(cls, model: nn.Module) -> LookAheadPredictor:
        """The predictor of a Hugging Face model, sharing its modules.

        Raises:
            CheckpointError: As `find_moe_layers`.
        """
        sites = find_moe_layers(model)
        return cls(
            norms=[decoder_layer_of(model, site).post_attention_layernorm for site in sites],
            routers=[model.get_submodule(site.router) for site in sites],
        )
