"""Routing traces: which experts each token went to, in every MoE layer.

A trace keeps token sequences, so it is opt-in; the aggregate that a plan is made from is the
profile (`semantic_ep.observe.profile`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from semantic_ep.artifacts import ModelFingerprint, read_artifact, write_artifact
from semantic_ep.errors import ArtifactError, explain


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """Routes of N tokens in R requests.

    Attributes:
        fingerprint: The model; gives L, E and K.
        experts: [N, L, K] logical expert ids, no expert twice in a row; uint8 or uint16.
        offsets: [R + 1] int64, request r holds tokens offsets[r]:offsets[r + 1].
        token_id: [N] int32 vocabulary ids, -1 where unknown.
        requests: One mapping a request (labels, phase, prompt id), or empty.
    """

    fingerprint: ModelFingerprint
    experts: np.ndarray
    offsets: np.ndarray
    token_id: np.ndarray
    requests: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        layers, top_k = self.fingerprint.num_layers, self.fingerprint.top_k
        problem = None
        if self.experts.shape[1:] != (layers, top_k):
            problem = f"experts has shape {self.experts.shape}, expected (N, {layers}, {top_k})"
        elif self.offsets[0] != 0 or self.offsets[-1] != len(self.experts):
            problem = f"offsets span {self.offsets[0]}..{self.offsets[-1]}, not all tokens"
        elif np.any(np.diff(self.offsets) < 0):
            problem = "offsets decrease"
        elif len(self.token_id) != len(self.experts):
            problem = f"{len(self.token_id)} token ids for {len(self.experts)} tokens"
        elif self.experts.size and int(self.experts.max()) >= self.fingerprint.num_experts:
            problem = f"expert id {int(self.experts.max())} of {self.fingerprint.num_experts}"
        if problem:
            raise ArtifactError(explain(f"malformed routing trace: {problem}"))

    @property
    def num_tokens(self) -> int:
        """Number of tokens (N)."""
        return len(self.experts)

    @property
    def num_requests(self) -> int:
        """Number of requests (R)."""
        return len(self.offsets) - 1

    @property
    def request_of_token(self) -> np.ndarray:
        """[N] int64 index of the request that each token belongs to."""
        return np.repeat(np.arange(self.num_requests), np.diff(self.offsets))

    def select_requests(self, index: Sequence[int] | np.ndarray) -> RoutingTrace:
        """Return the trace of these requests, in the given order."""
        index = np.asarray(index, dtype=np.int64)
        lengths = np.diff(self.offsets)[index]
        starts = np.repeat(self.offsets[index], lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = starts + np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], lengths)
        return RoutingTrace(
            fingerprint=self.fingerprint,
            experts=self.experts[tokens],
            offsets=offsets,
            token_id=self.token_id[tokens],
            requests=tuple(self.requests[i] for i in index) if self.requests else (),
        )

    def split(self, fraction: float, *, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
        """Split by request into (fraction, rest), at random for the seed."""
        order = np.random.default_rng(seed).permutation(self.num_requests)
        cut = round(fraction * self.num_requests)
        return self.select_requests(np.sort(order[:cut])), self.select_requests(
            np.sort(order[cut:])
        )

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a `trace` artefact; returns its sha256."""
        return write_artifact(
            path,
            kind="trace",
            fingerprint=self.fingerprint,
            arrays={
                "experts": self.experts,
                "offsets": self.offsets.astype(np.int64),
                "token_id": self.token_id.astype(np.int32),
            },
            meta={"requests": [dict(request) for request in self.requests]},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `trace` artefact."""
        artifact = read_artifact(path, kind="trace")
        return cls(
            fingerprint=artifact.fingerprint,
            requests=tuple(artifact.meta["requests"]),
            **artifact.arrays,
        )
