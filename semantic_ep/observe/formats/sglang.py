"""SGLang's expert-distribution recorder (`--expert-distribution-recorder-mode`).

Mode `stat` sums activations: `logical_count` [layers, E], or [steps, layers, E]; rows of dense
layers are zero. Mode `per_token` keeps token ids and the physical experts of every token, with the
`physical_to_logical_map` to translate them. Dumps are `torch.save` files, so torch is imported
here when one is read, and only tensors and plain containers are accepted from it.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.formats.common import assemble, unreadable
from semantic_ep.observe.traces import RoutingTrace


def read_logical_count(path: str | os.PathLike[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Read expert load from a `stat` dump (.pt) or from its JSON form `{"logical_count": ...}`.

    Returns:
        ([L, E] float64 load of the MoE layers, their model layer ids); layers without any
        activation are dense and left out.

    Raises:
        ArtifactError: The file is unreadable or holds no counts.
    """
    file = Path(path)
    data = _load_json(file) if file.suffix == ".json" else _load_torch(file)
    count = data.get("logical_count") if isinstance(data, dict) else None
    load = None if count is None else np.asarray(count, dtype=np.float64)
    if load is not None and load.ndim == 3:
        load = load.sum(axis=0)
    if load is None or load.ndim != 2 or not load.any() or load.min() < 0:
        raise ArtifactError(
            explain(
                "no logical_count [layers, experts] here",
                where=str(file),
                got=sorted(data) if isinstance(data, dict) else type(data).__name__,
                do="Record with --expert-distribution-recorder-mode stat",
            )
        )
    layers = np.flatnonzero(load.sum(axis=1) > 0)
    return load[layers], tuple(int(layer) for layer in layers)


def write_logical_count(
    load: np.ndarray, path: str | os.PathLike[str], *, layer_ids: tuple[int, ...] | None = None
) -> None:
    """Write expert load as `{"logical_count": [layers][E]}`.

    SGLang takes the file as `--init-expert-location` and then runs its own balancer on it.

    Args:
        load: [L, E] activations.
        path: A .json file.
        layer_ids: Model layer of each row; layers between them are written as zeros.
    """
    ids = tuple(range(len(load))) if layer_ids is None else layer_ids
    full = np.zeros((max(ids) + 1, load.shape[1]))
    full[list(ids)] = load
    Path(path).write_text(json.dumps({"logical_count": np.rint(full).astype(int).tolist()}))


def read_sglang_trace(
    path: str | os.PathLike[str], *, num_experts: int | None = None
) -> RoutingTrace:
    """Read `per_token` dumps: one request for each sequence of a prefill batch.

    The recorder names no requests. A prefill batch is cut at its sequence lengths; the tokens of
    a decode batch are of different requests and become requests of one token. Ranks that recorded
    the same batch are read once.

    Args:
        path: One .pt file, or the directory of all ranks' files.
        num_experts: Experts a layer; None infers it (see `common.count_experts`).

    Raises:
        ArtifactError: The files are unreadable or were recorded in another mode.
    """
    source = Path(path)
    files = sorted(source.glob("*.pt")) if source.is_dir() else [source]
    pieces: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    described: list[dict[str, Any]] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for file in files:
        dump = _load_torch(file)
        records = dump.get("records") if isinstance(dump, dict) else None
        if not records or "topk_ids_of_layer" not in records[0]:
            raise ArtifactError(
                explain(
                    "not a per-token dump",
                    where=str(file),
                    do="Record with --expert-distribution-recorder-mode per_token",
                )
            )
        logical_of = np.asarray(dump["last_physical_to_logical_map"])
        for record in records:
            key = (int(record["forward_pass_id"]), tuple(record["input_ids"]))
            if key in seen:
                continue
            seen.add(key)
            routes = _logical_routes(np.asarray(record["topk_ids_of_layer"]), logical_of)
            lengths = record.get("extend_seq_lens") or [1] * len(record["input_ids"])
            bounds = np.concatenate([[0], np.cumsum(lengths)])
            tokens = np.asarray(record["input_ids"])
            for start, stop in pairwise(bounds):
                pieces.append(routes[start:stop])
                ids.append(tokens[start:stop])
                described.append({"forward_pass": key[0], "rank": int(record["rank"])})
    return _moe_layers_only(pieces, ids, described, num_experts, str(source))


def _logical_routes(routes: np.ndarray, logical_of: np.ndarray) -> np.ndarray:
    """[layers, T, >= K] physical ids, -1 where unused -> [T, layers, >= K] logical ids or -1."""
    layer = np.arange(len(routes))[:, None, None]
    logical = np.where(routes >= 0, logical_of[layer, np.maximum(routes, 0)], -1)
    return logical.transpose(1, 0, 2)


def _moe_layers_only(
    pieces: list[np.ndarray],
    ids: list[np.ndarray],
    described: list[dict[str, Any]],
    num_experts: int | None,
    where: str,
) -> RoutingTrace:
    """Drop layers and columns that the recorder padded with -1."""
    routes = np.concatenate(pieces) if pieces else np.zeros((0, 0, 0), dtype=np.int64)
    layers = np.flatnonzero((routes >= 0).any(axis=(0, 2)))
    columns = np.flatnonzero((routes >= 0).any(axis=(0, 1)))
    if (routes[:, layers][:, :, columns] < 0).any():
        raise ArtifactError(
            explain(
                "some tokens were routed in some layers only",
                where=where,
                do="Record without two-batch overlap and without CUDA-graph padding",
            )
        )
    return assemble(
        [piece[:, layers][:, :, columns] for piece in pieces],
        token_ids=ids,
        requests=described,
        layer_ids=[int(layer) for layer in layers],
        num_experts=num_experts,
        where=where,
    )


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error


def _load_torch(file: Path) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise unreadable(file, error) from error
