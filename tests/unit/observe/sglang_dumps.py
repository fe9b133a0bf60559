"""Per-token dumps as SGLang's expert-distribution recorder writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semantic_ep.observe.traces import RoutingTrace


def sglang_dump(trace: RoutingTrace, *, rank: int = 0, decode: bool = False) -> dict[str, Any]:
    """A dump of one batch: dense layer 0 and unused top-k columns padded with -1."""
    import torch

    layers, top_k = trace.fingerprint.num_layers, trace.fingerprint.top_k
    rng = np.random.default_rng(7)
    experts = trace.fingerprint.num_experts
    logical_of = np.stack([rng.permutation(experts) for _ in range(layers + 1)])
    physical_of = logical_of.argsort(axis=1)
    topk = np.full((layers + 1, trace.num_tokens, 8), -1)
    for layer in range(layers):
        topk[layer + 1, :, :top_k] = physical_of[layer + 1][trace.experts[:, layer]]
    record = {
        "forward_pass_id": 5,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": trace.token_id.tolist(),
        "positions": list(range(trace.num_tokens)),
        "extend_seq_lens": None if decode else np.diff(trace.offsets).tolist(),
        "forward_mode": 2 if decode else 1,
        "topk_ids_of_layer": torch.tensor(topk, dtype=torch.int32),
    }
    return {"records": [record], "last_physical_to_logical_map": torch.tensor(logical_of)}


def write_sglang_trace(trace: RoutingTrace, directory: Path) -> None:
    """Write the dumps of two ranks that saw the same batch."""
    torch = pytest.importorskip("torch")

    directory.mkdir()
    for rank in range(2):
        torch.save(sglang_dump(trace, rank=rank), directory / f"dump_{rank}.pt")
