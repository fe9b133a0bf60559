"""The plain npz of public trace collections.

`experts` [tokens, MoE layers, top-k] in the router's order, `offsets` [requests + 1], and
optionally `token_id` [tokens] (-1 where unknown) and `layer_ids` [MoE layers], the model layer of
each; without it, MoE layers are numbered from 0 unless the reader is told. A
`NAME.requests.jsonl` beside `NAME.npz` holds one object a request.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.formats.common import (
    compact,
    count_experts,
    model_layers,
    read_json_lines,
    unreadable,
)
from semantic_ep.observe.traces import RoutingTrace


def read_npz_trace(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> RoutingTrace:
    """Read a trace; without `token_id` every token's id is unknown.

    Args:
        path: The npz file.
        num_experts: Experts a layer; None infers it (see `common.count_experts`).
        layer_ids: Model layer of each MoE layer; None takes the file's, else 0, 1, ...

    Raises:
        ArtifactError: The file is unreadable or lacks an array, or the layers do not fit it.
    """
    file = Path(path)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise unreadable(file, error) from error
    missing = {"experts", "offsets"} - set(arrays)
    if missing or arrays["experts"].ndim != 3 or not arrays["experts"].size:
        raise ArtifactError(
            explain(
                "a trace needs experts [tokens, layers, top_k] and offsets [requests + 1]",
                where=str(file),
                got={name: array.shape for name, array in arrays.items()},
            )
        )
    experts = arrays["experts"]
    tokens, layers, top_k = experts.shape
    sidecar = file.with_name(f"{file.stem}.requests.jsonl")
    requests = tuple(record for _, record in read_json_lines(sidecar)) if sidecar.exists() else ()
    if requests and len(requests) != len(arrays["offsets"]) - 1:
        raise ArtifactError(
            explain(
                "the request descriptions do not fit the trace",
                where=str(sidecar),
                got=f"{len(requests)} lines for {len(arrays['offsets']) - 1} requests",
            )
        )
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture=file.stem,
            layer_ids=model_layers(
                range(layers),
                arrays.get("layer_ids") if layer_ids is None else layer_ids,
                where=str(file),
            ),
            num_experts=count_experts(int(experts.max()), num_experts, where=str(file)),
            top_k=top_k,
        ),
        experts=compact(experts),
        offsets=arrays["offsets"].astype(np.int64),
        token_id=arrays.get("token_id", np.full(tokens, -1)).astype(np.int32),
        requests=requests,
    )


def write_npz_trace(trace: RoutingTrace, path: str | os.PathLike[str]) -> None:
    """Write a trace as npz, and its request descriptions beside it if it has any."""
    file = Path(path)
    np.savez_compressed(
        file,
        experts=trace.experts,
        offsets=trace.offsets,
        token_id=trace.token_id,
        layer_ids=np.asarray(trace.fingerprint.layer_ids),
    )
    if trace.requests:
        lines = "".join(json.dumps(dict(request)) + "\n" for request in trace.requests)
        file.with_name(f"{file.stem}.requests.jsonl").write_text(lines, encoding="utf-8")
