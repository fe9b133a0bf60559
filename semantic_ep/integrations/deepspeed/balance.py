"""Load-balancing loss of AutoEP layers, layer by layer.

AutoEP does not train for balance, and the loss that transformers adds (`output_router_logits`)
sums the counts of all layers before it multiplies them: it cannot see two layers that overload
different experts. This is the loss of the Switch Transformer (W. Fedus et al., 2021, section 2.2),
extended to top-k, for every layer by itself: E * sum_e f_e * p_e, where f_e is the share of
activations that expert e got and p_e its mean probability; 1 when balanced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LoadBalancingLoss:
    """Collects what the routers of one forward pass computed."""

    def __init__(self, model: nn.Module) -> None:
        """Attach to the AutoEP layers of a model (after `initialize`)."""
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        self._logits_TE: list[Tensor] = []
        self._expert_TK: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, AutoEPMoELayer):
                module.router.gate.register_forward_hook(self._on_logits)
                module.router.register_forward_hook(self._on_route)

    def of_last_pass(self, mask_T: Tensor) -> Tensor:
        """Mean over layers of the loss of the pass since the last call, real tokens only.

        Args:
            mask_T: [T] true for real tokens.
        """
        mask_T = mask_T.bool()
        losses = []
        for logits_TE, expert_TK in zip(self._logits_TE, self._expert_TK, strict=True):
            experts = logits_TE.shape[1]
            probability = torch.softmax(logits_TE[mask_T].float(), dim=1).mean(dim=0)
            chosen = expert_TK[mask_T].reshape(-1)
            share = torch.bincount(chosen, minlength=experts) / chosen.numel()
            losses.append(experts * (share * probability).sum())
        self._logits_TE, self._expert_TK = [], []
        return torch.stack(losses).mean()

    def _on_logits(self, module: nn.Module, _args: Any, logits_TE: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            self._logits_TE.append(logits_TE)

    def _on_route(self, module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self._expert_TK.append(output[1])
