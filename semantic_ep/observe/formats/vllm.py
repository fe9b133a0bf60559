"""vLLM's routed experts (`--enable-return-routed-experts`): JSONL of API responses.

A line is one response of the completions or chat endpoint: `prompt_routed_experts` [prompt, L, K]
for the prompt and `choices[].routed_experts` [generated, L, K] for each completion, as nested
lists or as base64 of a .npy file. Token ids are there if the request had `return_token_ids`. The
last generated token was never fed back, so it has no route. vLLM keeps a row for every layer of the
model and leaves those that it does not capture zero; such layers are left out here.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.formats.common import assemble, model_layers, read_json_lines
from semantic_ep.observe.traces import RoutingTrace


def read_vllm_trace(
    path: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> RoutingTrace:
    """Read responses; a choice is one request, its prompt's tokens before the generated ones.

    Args:
        path: JSONL file, one response a line.
        num_experts: Experts a layer; None infers it (see `common.count_experts`).
        layer_ids: Model layer of each captured layer; None takes the rows' positions, which are
            the model's where vLLM captures by model layer.

    Raises:
        ArtifactError: A line is no response with routed experts, or the stated layers do not fit.
    """
    file = Path(path)
    pieces: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    described: list[dict[str, Any]] = []
    for number, response in read_json_lines(file):
        where = f"{file}:{number}"
        prompt = _routes(response.get("prompt_routed_experts"), where)
        prompt_ids = response.get("prompt_token_ids") or []
        for choice in response.get("choices", [response]):
            generated = _routes(choice.get("routed_experts"), where)
            routes = [part for part in (prompt, generated) if part is not None]
            if not routes:
                raise ArtifactError(
                    explain(
                        "the response has no routed experts",
                        where=where,
                        do="Serve with --enable-return-routed-experts",
                    )
                )
            piece = np.concatenate(routes)
            known = [*prompt_ids, *(choice.get("token_ids") or [])]
            if prompt is None and prompt_ids and len(known) > len(piece) + 1:
                known = known[len(prompt_ids) :]  # only generated tokens carry routes
            pieces.append(piece)
            ids.append(_aligned_ids(known, len(piece), where))
            described.append(
                {
                    "id": str(response.get("id", number)),
                    "choice": int(choice.get("index", 0)),
                    "prompt_tokens": 0 if prompt is None else len(prompt),
                }
            )
    pieces, captured = _captured(pieces, str(file))
    return assemble(
        pieces,
        token_ids=ids,
        requests=described,
        layer_ids=model_layers(captured, layer_ids, where=str(file)),
        num_experts=num_experts,
        where=str(file),
    )


def write_vllm_trace(trace: RoutingTrace, path: str | os.PathLike[str]) -> None:
    """Write each request as a response whose tokens are all prompt."""
    with Path(path).open("w", encoding="utf-8") as stream:
        for request in range(trace.num_requests):
            start, stop = trace.offsets[request], trace.offsets[request + 1]
            buffer = io.BytesIO()
            np.save(buffer, trace.experts[start:stop].astype(np.int16))
            response = {
                "id": str(request),
                "prompt_token_ids": trace.token_id[start:stop].tolist(),
                "prompt_routed_experts": base64.b64encode(buffer.getvalue()).decode(),
                "choices": [{"index": 0}],
            }
            stream.write(json.dumps(response) + "\n")


def _captured(pieces: list[np.ndarray], where: str) -> tuple[list[np.ndarray], list[int]]:
    """Pieces without the layers that hold no route, and the layers they keep.

    With several experts a token, all zeros name one expert twice and are no route.
    """
    layers = list(range(pieces[0].shape[1])) if pieces else []
    if len({piece.shape[1:] for piece in pieces}) != 1 or pieces[0].shape[2] == 1:
        return pieces, layers
    used = np.any([piece.any(axis=(0, 2)) for piece in pieces], axis=0)
    if not used.any():
        raise ArtifactError(
            explain(
                "no layer has a route",
                where=where,
                do="Serve a model with experts, with --enable-return-routed-experts",
            )
        )
    return [piece[:, used] for piece in pieces], np.flatnonzero(used).tolist()


def _routes(value: Any, where: str) -> np.ndarray | None:
    """[T, L, K] from nested lists or base64 of a .npy file; None for null."""
    if value is None:
        return None
    try:
        if isinstance(value, str):
            data = base64.b64decode(value, validate=True)
            routes = np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        else:
            routes = np.asarray(value)
        if routes.ndim != 3 or not np.issubdtype(routes.dtype, np.integer) or routes.min() < 0:
            raise ValueError(f"{routes.dtype} of shape {routes.shape}")
    except (ValueError, binascii.Error) as error:
        raise ArtifactError(
            explain(
                f"routed experts are malformed: {error}",
                where=where,
                allowed="[tokens, layers, top_k] expert ids, as lists or base64 of a .npy file",
            )
        ) from error
    return np.asarray(routes, dtype=np.int64)


def _aligned_ids(known: list[int], tokens: int, where: str) -> np.ndarray:
    """[tokens] ids; -1 for all if the response names none."""
    if not known:
        return np.full(tokens, -1)
    if len(known) not in (tokens, tokens + 1):
        raise ArtifactError(
            explain(
                "token ids and routes do not fit each other",
                where=where,
                got=f"{len(known)} ids for {tokens} routed tokens",
            )
        )
    return np.asarray(known[:tokens])
