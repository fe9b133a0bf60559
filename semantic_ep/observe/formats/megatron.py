"""Megatron's router tracer (`--moe-routing-trace-path`): JSONL, one file a rank.

A record is one forward pass of one router: step, block, layer, rank, num_tokens, topk,
top_indices. It names no token ids and no requests; each forward pass of a rank is read as one
request. Megatron writes no record while a CUDA graph replays.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.formats.common import assemble, model_layers, read_json_lines
from semantic_ep.observe.traces import RoutingTrace

_FIELDS = ("step", "layer", "rank", "top_indices")


def read_megatron_trace(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> RoutingTrace:
    """Read `router_trace_rank*.jsonl`; multi-token-prediction routers are left out.

    Args:
        path: One file, or the directory given to `--moe-routing-trace-path`.
        num_experts: Experts a layer; None infers it (see `common.count_experts`).
        layer_ids: Model layer of each MoE layer; None takes the tracer's numbers, which are the
            model's on the first pipeline stage only.

    Raises:
        ArtifactError: A line is malformed, or ranks saw different layers (pipeline stages number
            their layers from 0: read one stage's ranks at a time), or the stated layers do not fit.
    """
    source = Path(path)
    files = sorted(source.glob("router_trace_rank*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise ArtifactError(explain("no router_trace_rank*.jsonl here", where=str(source)))
    passes: dict[tuple[int, int, int], dict[int, np.ndarray]] = defaultdict(dict)
    for file in files:
        seen: dict[tuple[int, int, int], int] = defaultdict(int)
        for number, record in read_json_lines(file):
            if record.get("block", "decoder") != "decoder":
                continue
            step, layer, rank, routes = _fields(record, f"{file}:{number}")
            # Micro-batches of one training step repeat (step, layer): number them.
            repeat = seen[step, layer, rank]
            seen[step, layer, rank] += 1
            passes[step, rank, repeat][layer] = routes
    layer_sets = {tuple(sorted(layers)) for layers in passes.values()}
    if len(layer_sets) != 1:
        raise ArtifactError(
            explain(
                "forward passes cover different layers",
                where=str(source),
                got=sorted(layer_sets)[:4],
                do="Read the ranks of one pipeline stage at a time, and drop the unfinished step",
            )
        )
    recorded = layer_sets.pop()
    keys = sorted(passes)
    for key in keys:
        tokens = {len(routes) for routes in passes[key].values()}
        if len(tokens) != 1:
            raise ArtifactError(
                explain(
                    "layers of one forward pass saw different numbers of tokens",
                    where=f"{source}: step {key[0]}, rank {key[1]}",
                    got=sorted(tokens),
                )
            )
    return assemble(
        [np.stack([passes[key][layer] for layer in recorded], axis=1) for key in keys],
        token_ids=None,
        requests=[{"step": step, "rank": rank, "pass": repeat} for step, rank, repeat in keys],
        layer_ids=model_layers(recorded, layer_ids, where=str(source)),
        num_experts=num_experts,
        where=str(source),
    )


def write_megatron_trace(trace: RoutingTrace, directory: str | os.PathLike[str]) -> None:
    """Write a trace as rank 0's file, one step a request; token ids have no place in the format."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "router_trace_rank0.jsonl").open("w", encoding="utf-8") as stream:
        for step, (start, stop) in enumerate(pairwise(trace.offsets)):
            for column, layer in enumerate(trace.fingerprint.layer_ids):
                record = {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": 0,
                    "num_tokens": int(stop - start),
                    "topk": trace.fingerprint.top_k,
                    "top_indices": trace.experts[start:stop, column].tolist(),
                }
                stream.write(json.dumps(record) + "\n")


def _fields(record: dict[str, Any], where: str) -> tuple[int, int, int, np.ndarray]:
    try:
        step, layer, rank, indices = (record[name] for name in _FIELDS)
        routes = np.asarray(indices, dtype=np.int64)
        if routes.size == 0:
            routes = routes.reshape(0, int(record["topk"]))
        if routes.ndim != 2 or routes.min(initial=0) < 0:
            raise ValueError(f"top_indices of shape {routes.shape}")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            explain(
                f"not a router-trace record: {error}",
                where=where,
                allowed=f"an object with {', '.join(_FIELDS)}",
            )
        ) from error
    return int(step), int(layer), int(rank), routes
