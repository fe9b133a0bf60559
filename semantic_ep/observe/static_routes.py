"""Routes in tensors that stay where they are, so that a CUDA graph writes them when it is replayed.

A replayed graph runs no Python. `record` therefore only issues operations: a copy into a tensor of
the layer, and a count of such copies, both on the device, without a branch or a wait that would
depend on values. What the copies hold after a training pass is read when the pass has ended; the
counts then say whether each layer ran in it, once.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from semantic_ep.errors import BackendError, explain

_SHAPES = 8


class StaticRoutes:
    """The routes of one pass, on the device."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        self._runs: dict[int, Tensor] = {}

    def start_pass(self) -> None:
        """Forget how often layers ran."""
        for runs in self._runs.values():
            runs.zero_()

    def record(self, layer: int, expert_TK: Tensor) -> None:
        """Hold the routes of a layer; issues device operations only.

        Raises:
            BackendError: A graph is being captured, and no pass of this shape ran before.
        """
        key = (layer, expert_TK.shape)
        if key not in self._held:
            self._held[key] = self._make(layer, expert_TK)
        held_TK, runs = self._held[key]
        held_TK.copy_(expert_TK.detach())
        runs.add_(1)

    def held(self, layers: Collection[int] | None = None) -> list[tuple[int, Tensor, Tensor]]:
        """(layer, [T, K] experts, how often they were written in this pass), on the device."""
        return [
            (layer, *tensors)
            for (layer, _), tensors in self._held.items()
            if layers is None or layer in layers
        ]

    def _make(self, layer: int, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        shapes = sum(known == layer for known, _ in self._held)
        if shapes == _SHAPES or (expert_TK.is_cuda and torch.cuda.is_current_stream_capturing()):
            # Memory of a graph's own pool is reused, and a graph needs fixed shapes anyway.
            raise BackendError(
                explain(
                    f"no tensor for the routes of layer {layer} was there before they came",
                    got=f"shape {tuple(expert_TK.shape)}, after {shapes} others",
                    allowed=f"at most {_SHAPES} shapes, each seen before a graph of it is captured",
                    do="Run one pass of this shape before the graph is captured",
                )
            )
        if layer not in self._runs:
            self._runs[layer] = torch.zeros(_SHAPES, dtype=torch.int32, device=expert_TK.device)
        held_TK = torch.empty(expert_TK.shape, dtype=torch.int32, device=expert_TK.device)
        return held_TK, self._runs[layer][shapes]


def routes_of_pass(held: list[tuple[int, Tensor, Tensor]]) -> dict[int, Tensor]:
    """Layer -> [T, K] experts, from what `held` returned, on the host.

    Raises:
        BackendError: A layer did not run exactly once.
    """
    ran = {layer: 0 for layer, _, _ in held}
    routes = {}
    for layer, expert_TK, runs in held:
        ran[layer] += int(runs)
        if int(runs):
            routes[layer] = expert_TK
    for layer, times in ran.items():
        if times != 1:
            raise BackendError(
                explain(
                    f"MoE layer {layer} ran {times} times in one training pass, of which its graph "
                    "keeps the last",
                    allowed=1,
                    do="Switch CUDA graphs or the observation off",
                )
            )
    return routes
