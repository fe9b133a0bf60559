"""Load-balancing loss of placed and of AutoEP layers over what all ranks routed lately.

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
from semantic_ep.integrations.deepspeed.observation import ObservedRouter, find_routers


class LoadBalancingLoss:
    """Watches the routers of a model; one layer may run once a pass, not recomputed."""

    def __init__(self, model: nn.Module, *, window: float = 10.0) -> None:
        """Attach to a model after `initialize`.

        Args:
            model: With placed experts, or with AutoEP layers.
            window: Passes after which a count weighs 1 / e.

        Raises:
            ConfigError: The model has neither.
        """
        routers = find_routers(model)
        if any(router.gate is None for router in routers):
            raise ConfigError(
                explain(
                    "native deepspeed.moe layers bring a balancing loss of their own",
                    got=type(model).__name__,
                    do="Add the l_aux that each MoE layer returns",
                )
            )
        self._keep = 1 - 1 / window
        self._logits_TE: list[Tensor] = []
        self._expert_TK: list[Tensor] = []
        self._recent_LE = torch.zeros(
            len(routers), routers[0].num_experts, device=routers[0].weight.device
        )
        for router in routers:
            self._attach(router)

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

    def _attach(self, router: ObservedRouter) -> None:
        latest: list[Tensor] = []

        def on_logits(_module: nn.Module, _args: Any, output: Any) -> None:
            # AutoEP calls the gate again where transformers records its logits: up to 0.19.7 in a
            # hook of the router, which runs before ours, and since then after the router.
            latest[:] = [output if isinstance(output, Tensor) else output[0]]

        def on_route(module: nn.Module, _args: Any, output: Any) -> None:
            if module.training and torch.is_grad_enabled():
                self._logits_TE += latest
                self._expert_TK.append(router.experts(output))
            latest.clear()

        router.gate.register_forward_hook(on_logits)
        router.module.register_forward_hook(on_route)
