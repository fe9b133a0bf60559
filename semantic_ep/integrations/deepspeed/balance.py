"""Load-balancing loss of AutoEP layers over what all ranks routed lately.

AutoEP does not train for balance. The loss that transformers adds (`output_router_logits`) sums the
counts of all layers before it multiplies them, so that it cannot see two layers that overload
different experts, and it balances every micro-batch by itself: with a few sequences in it, that
forbids experts to specialise in a kind of text, which is what placement lives on (Z. Qiu et al.,
"Demons in the Detail: On Implementing Load Balancing Loss", 2025).

Here it is E * sum_e f_e * p_e for each layer (W. Fedus et al., Switch Transformer, 2021, section
2.2), where p_e is the mean probability of expert e in this micro-batch, and f_e its share of the
activations of all ranks in a window of recent passes. It is 1 when balanced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.errors import ConfigError, explain


class LoadBalancingLoss:
    """Watches the routers of an AutoEP model; one layer may run once a pass, not recomputed."""

    def __init__(self, model: nn.Module, *, window: float = 10.0) -> None:
        """Attach to a model after `initialize`.

        Args:
            model: With AutoEP layers.
            window: Passes after which a count weighs 1 / e.

        Raises:
            ConfigError: The model has no AutoEP layer.
        """
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        layers = [module for module in model.modules() if isinstance(module, AutoEPMoELayer)]
        if not layers:
            raise ConfigError(
                explain("there is no AutoEP layer to balance", got=type(model).__name__)
            )
        self._keep = 1 - 1 / window
        self._logits_TE: list[Tensor] = []
        self._expert_TK: list[Tensor] = []
        self._recent_LE = torch.zeros(
            len(layers), layers[0].num_experts, device=layers[0].router.gate.weight.device
        )
        for layer in layers:
            layer.router.gate.register_forward_hook(self._on_logits)
            layer.router.register_forward_hook(self._on_route)

    def of_last_pass(self, mask_T: Tensor) -> Tensor:
        """The loss of the forward pass since the last call, mean over layers; collective.

        Args:
            mask_T: [T] true for real tokens.
        """
        mask_T = mask_T.bool()
        experts = self._recent_LE.shape[1]
        count_LE = torch.stack(
            [
                torch.bincount(expert_TK[mask_T].reshape(-1), minlength=experts)
                for expert_TK in self._expert_TK
            ]
        ).to(self._recent_LE)
        probability_LE = torch.stack(
            [
                torch.softmax(logits_TE[mask_T].float(), dim=1).mean(dim=0)
                for logits_TE in self._logits_TE
            ]
        )
        self._logits_TE, self._expert_TK = [], []
        dist.all_reduce(count_LE)
        self._recent_LE = self._keep * self._recent_LE + count_LE
        share_LE = self._recent_LE / self._recent_LE.sum(dim=1, keepdim=True)
        return experts * (share_LE * probability_LE).sum(dim=1).mean()

    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean of experts in the window, mean over layers."""
        busiest_L = self._recent_LE.max(dim=1).values / self._recent_LE.mean(dim=1)
        return float(busiest_L.mean())

    def _on_logits(self, module: nn.Module, _args: Any, logits_TE: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            self._logits_TE.append(logits_TE)

    def _on_route(self, module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self._expert_TK.append(output[1])
