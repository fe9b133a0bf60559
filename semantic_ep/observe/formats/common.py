"""What the readers share: the number of experts, compact ids, and a trace from its pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.traces import RoutingTrace

# Expert counts of published models are multiples of 4, and a trace of useful size misses at most
# its last few experts.
EXPERT_MULTIPLE = 4


def count_experts(largest_id: int, stated: int | None, *, where: str) -> int:
    """Number of experts a layer: as stated, else the largest id + 1, rounded up to a multiple of 4.

    Raises:
        ArtifactError: The stated number is smaller than an id in the data.
    """
    if stated is None:
        return -(-(largest_id + 1) // EXPERT_MULTIPLE) * EXPERT_MULTIPLE
    if largest_id >= stated:
        raise ArtifactError(
            explain(
                "an expert id exceeds the stated number of experts",
                where=where,
                got=f"id {largest_id} of {stated} experts",
                do="State the model's number of routed experts",
            )
        )
    return stated


def model_layers(
    recorded: Sequence[int], stated: Sequence[int] | None, *, where: str
) -> tuple[int, ...]:
    """Model layer of each recorded MoE layer: as stated, else as recorded.

    Args:
        recorded: What the file calls its layers; many tools number MoE layers from 0, which is
            wrong for a model whose first layers are dense.
        stated: The model's own numbers, in order, or None.
        where: File or directory, for messages.

    Raises:
        ArtifactError: The stated layers are not as many, or do not rise.
    """
    if stated is None:
        return tuple(int(layer) for layer in recorded)
    layers = tuple(int(layer) for layer in stated)
    rising = all(one < other for one, other in pairwise((-1, *layers)))
    if len(layers) != len(recorded) or not rising:
        raise ArtifactError(
            explain(
                "the stated layers do not fit the recorded ones",
                where=where,
                got=f"{len(layers)} stated: {_shortened(layers)}",
                allowed=f"{len(recorded)} rising layer numbers",
                do="State the model layer of each recorded MoE layer, as in 1-26",
            )
        )
    return layers


def _shortened(layers: Sequence[int]) -> str:
    text = ", ".join(map(str, layers[:8]))
    return text if len(layers) <= 8 else f"{text}, ..., {layers[-1]}"


def compact(experts: np.ndarray) -> np.ndarray:
    """Return the ids as uint8, or as uint16 where they need it."""
    return experts.astype(np.uint8 if experts.max(initial=0) < 256 else np.uint16)


def assemble(
    pieces: Sequence[np.ndarray],
    *,
    token_ids: Sequence[np.ndarray] | None,
    requests: Sequence[Mapping[str, Any]],
    layer_ids: Sequence[int],
    num_experts: int | None,
    where: str,
) -> RoutingTrace:
    """Build a trace of one request for each piece.

    Args:
        pieces: [N_r, L, K] expert ids of each request.
        token_ids: [N_r] ids of each request's tokens, or None where the tool records none.
        requests: A description of each request, or nothing.
        layer_ids: Model layer of each MoE layer.
        num_experts: See `count_experts`.
        where: File or directory, for messages.

    Raises:
        ArtifactError: There is no token, or requests differ in layers or top-k.
    """
    shapes = {piece.shape[1:] for piece in pieces if len(piece)}
    if len(shapes) != 1:
        raise ArtifactError(
            explain(
                "no routed token" if not shapes else "requests differ in layers or top-k",
                where=where,
                got=sorted(shapes),
                do="Give the files of one run of one model",
            )
        )
    kept = [index for index, piece in enumerate(pieces) if len(piece)]
    experts = np.concatenate([pieces[index] for index in kept])
    lengths = [len(pieces[index]) for index in kept]
    ids = (
        np.full(len(experts), -1, dtype=np.int32)
        if token_ids is None
        else np.concatenate([token_ids[index] for index in kept]).astype(np.int32)
    )
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="",
            layer_ids=tuple(int(layer) for layer in layer_ids),
            num_experts=count_experts(int(experts.max()), num_experts, where=where),
            top_k=experts.shape[2],
        ),
        experts=compact(experts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_id=ids,
        requests=tuple(requests[index] for index in kept) if requests else (),
    )


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file, skipping blank lines.

    Raises:
        ArtifactError: Naming file and line.
    """
    try:
        stream = path.open(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from error
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ArtifactError(
                    explain(
                        f"not JSON: {error}",
                        where=f"{path}:{number}",
                        do="The file may be truncated; remove the line or record anew",
                    )
                ) from error
            if not isinstance(record, dict):
                raise ArtifactError(
                    explain("a line must hold one JSON object", where=f"{path}:{number}")
                )
            yield number, record


def unreadable(path: Path, error: Exception) -> ArtifactError:
    """Return the error for a file that cannot be opened or parsed."""
    reason = error.strerror if isinstance(error, OSError) else error
    return ArtifactError(
        explain(f"cannot be read: {reason}", where=str(path), do="Check the path and the file")
    )
