"""Routes of one forward pass, from the device to what the counters take."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semantic_ep.errors import BackendError, explain
from semantic_ep.observe.counters import RoutedTokens
from semantic_ep.observe.static_routes import routes_of_pass


@dataclasses.dataclass(kw_only=True)
class MicroBatch:
    """Routes of one forward pass, still on the device or on their way from it.

    Attributes:
        token_id_T: [T] vocabulary ids, None where unknown.
        mask_T: [T] non-zero for real tokens; None if all are.
        sequence_T: [T] number of each token's sequence; None for one sequence.
        layers: MoE layers that run in the pass; None for all.
        experts: Layer -> [T, K] logical experts, -1 where a token was dropped.
        held: What `StaticRoutes` held when the pass ended, from which `experts` is filled.
        arrived: CUDA event after which all of these are on the host; None if they are.
    """

    token_id_T: Tensor | None
    mask_T: Tensor | None
    sequence_T: Tensor | None
    layers: Collection[int] | None = None
    experts: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    held: list[tuple[int, Tensor, Tensor]] = dataclasses.field(default_factory=list)
    arrived: Any = None


def wait_for(buffer: list[MicroBatch]) -> None:
    """Wait until micro-batches are on the host, and fill in what was held for them."""
    for batch in buffer:
        if batch.arrived is not None:
            batch.arrived.synchronize()
        batch.experts |= routes_of_pass(batch.held)
        batch.held = []


def routed_tokens(batch: MicroBatch) -> RoutedTokens:
    """The real tokens of a micro-batch that is on the host, sequence by sequence.

    Raises:
        BackendError: Routers and inputs saw different numbers of tokens.
    """
    experts = {layer: tensor.numpy() for layer, tensor in batch.experts.items()}
    lengths: dict[Any, int] = {layer: len(e) for layer, e in experts.items()}
    for name, tensor in (
        ("token ids", batch.token_id_T),
        ("mask", batch.mask_T),
        ("sequence numbers", batch.sequence_T),
    ):
        if tensor is not None:
            lengths[name] = tensor.numel()
    tokens = next(iter(lengths.values()), 0)
    if set(lengths.values()) - {tokens}:
        raise BackendError(
            explain(
                "routers and inputs of one forward pass saw different numbers of tokens",
                got=", ".join(f"{name}: {count}" for name, count in lengths.items()),
                do="Open the micro-batch with the tokens that this rank's routers see",
            )
        )

    def host(tensor: Tensor | None, default: int) -> np.ndarray:
        if tensor is None:
            return np.full(tokens, default, np.int64)
        return tensor.reshape(-1).numpy()

    sequence = host(batch.sequence_T, 0)
    order = np.flatnonzero(host(batch.mask_T, 1))
    if np.any(np.diff(sequence[order]) < 0):
        order = order[np.argsort(sequence[order], kind="stable")]
    return RoutedTokens(
        experts={layer: e[order] for layer, e in experts.items()},
        token_id=host(batch.token_id_T, -1)[order],
        sequence=sequence[order],
    )


def to_host(tensor: Tensor) -> Tensor:
    """A compact copy on the host; from a GPU it may still be on its way."""
    tensor = tensor.detach()
    if tensor.dtype == torch.int64:
        tensor = tensor.to(torch.int32)
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
