"""Routing profile: the aggregate that plans are made from.

It holds counts only, never a token sequence: expert ids alone can reveal text.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Self

import numpy as np
from scipy import sparse

from semantic_ep.artifacts import (
    Artifact,
    ModelFingerprint,
    is_artifact,
    read_artifact,
    write_artifact,
)
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.traces import RoutingTrace


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """Routing counts of one model, in units of (possibly decayed) tokens.

    Attributes:
        fingerprint: The model; gives L, E and K.
        load: [L, E] float64, activations of each logical expert.
        token_count: [V] float64, occurrences of each token id.
        token_expert: L sparse arrays [V, E] float32, activations of an expert by a token id.
        coactivation: [L, E, E] float64, tokens that activate both experts; zero diagonal.
        transition: [L - 1, E, E] float64, activation pairs (expert in layer l, in layer l + 1).
        sequence_load: [M, L, E] float32, expert counts of M sampled sequences, or M = 0.
        dropped_mass: [L] float64, share of token -> expert counts left out to bound memory.
        tokens: Tokens counted, weighted by decay.
        meta: Free description: source, half-life, minimum count, frameworks.
        sha256: Hash of the artefact this was read from, "" if it was not.
    """

    fingerprint: ModelFingerprint
    load: np.ndarray
    token_count: np.ndarray
    token_expert: tuple[sparse.csr_array, ...]
    coactivation: np.ndarray
    transition: np.ndarray
    sequence_load: np.ndarray
    dropped_mass: np.ndarray
    tokens: float
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        layers, experts = self.fingerprint.num_layers, self.fingerprint.num_experts
        vocab = len(self.token_count)
        shapes = {
            "load": (self.load.shape, (layers, experts)),
            "coactivation": (self.coactivation.shape, (layers, experts, experts)),
            "transition": (self.transition.shape, (max(layers - 1, 0), experts, experts)),
            "sequence_load": (self.sequence_load.shape[1:], (layers, experts)),
            "dropped_mass": (self.dropped_mass.shape, (layers,)),
            "token_expert": (
                {table.shape for table in self.token_expert},
                {(vocab, experts)} if layers else set(),
            ),
        }
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ArtifactError(
                    explain(f"malformed profile: {name} has shape {found}, expected {expected}")
                )

    @property
    def vocab_size(self) -> int:
        """Number of token ids (V)."""
        return len(self.token_count)

    @classmethod
    def from_trace(
        cls, trace: RoutingTrace, *, vocab_size: int | None = None, max_sequences: int = 4096
    ) -> Self:
        """Count a trace. Tokens of unknown id (-1) enter all counts but the token tables."""
        fingerprint = trace.fingerprint
        layers, experts = fingerprint.num_layers, fingerprint.num_experts
        known = trace.token_id >= 0
        ids = trace.token_id[known].astype(np.int64)
        vocab = int(ids.max(initial=-1)) + 1 if vocab_size is None else vocab_size
        tables, coactivation, transition = [], [], []
        previous: sparse.csr_array | None = None
        for layer in range(layers):
            routes = trace.experts[:, layer].astype(np.int64)
            rows = np.repeat(np.arange(len(routes)), routes.shape[1])
            multihot = sparse.csr_array(
                (np.ones(routes.size), (rows, routes.ravel())), shape=(len(routes), experts)
            )
            flat = ids[:, None] * experts + routes[known]
            cells, counts = np.unique(flat, return_counts=True)
            tables.append(
                sparse.csr_array(
                    (counts.astype(np.float32), (cells // experts, cells % experts)),
                    shape=(vocab, experts),
                )
            )
            together = (multihot.T @ multihot).toarray()
            np.fill_diagonal(together, 0)
            coactivation.append(together)
            if previous is not None:
                transition.append((previous.T @ multihot).toarray())
            previous = multihot
        load = np.stack(
            [np.bincount(trace.experts[:, i].ravel(), minlength=experts) for i in range(layers)]
        )
        return cls(
            fingerprint=fingerprint,
            load=load.astype(np.float64),
            token_count=np.bincount(ids, minlength=vocab).astype(np.float64),
            token_expert=tuple(tables),
            coactivation=np.stack(coactivation),
            transition=np.stack(transition) if transition else np.zeros((0, experts, experts)),
            sequence_load=_sequence_load(trace, max_sequences),
            dropped_mass=np.zeros(layers),
            tokens=float(trace.num_tokens),
            meta={"source": "trace"},
        )

    @classmethod
    def from_load(cls, load: np.ndarray, fingerprint: ModelFingerprint) -> Self:
        """Profile of [L, E] activations alone: enough to balance load, not to see affinity."""
        layers, experts = load.shape
        empty = sparse.csr_array((0, experts), dtype=np.float32)
        return cls(
            fingerprint=fingerprint,
            load=load.astype(np.float64),
            token_count=np.zeros(0),
            token_expert=(empty,) * layers,
            coactivation=np.zeros((layers, experts, experts)),
            transition=np.zeros((max(layers - 1, 0), experts, experts)),
            sequence_load=np.zeros((0, layers, experts), dtype=np.float32),
            dropped_mass=np.zeros(layers),
            tokens=float(load.sum(axis=1).max()) / fingerprint.top_k,
            meta={"source": "load"},
        )

    @property
    def has_affinity(self) -> bool:
        """Whether it tells more than the load of experts."""
        return bool(self.token_count.any() or self.coactivation.any() or len(self.sequence_load))

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a `profile` artefact; returns its sha256."""
        arrays = {
            "load": self.load,
            "token_count": self.token_count,
            "coactivation": self.coactivation,
            "transition": self.transition,
            "sequence_load": self.sequence_load,
            "dropped_mass": self.dropped_mass,
        }
        for layer, table in enumerate(self.token_expert):
            arrays[f"token_expert.{layer}.indptr"] = table.indptr.astype(np.int64)
            arrays[f"token_expert.{layer}.indices"] = table.indices.astype(np.int32)
            arrays[f"token_expert.{layer}.data"] = table.data.astype(np.float32)
        return write_artifact(
            path,
            kind="profile",
            fingerprint=self.fingerprint,
            arrays=arrays,
            meta={**self.meta, "tokens": self.tokens},
        )

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Self:
        """Build from a verified artefact."""
        arrays, fingerprint = artifact.arrays, artifact.fingerprint
        vocab = len(arrays["token_count"])
        tables = tuple(
            sparse.csr_array(
                (
                    arrays[f"token_expert.{layer}.data"],
                    arrays[f"token_expert.{layer}.indices"],
                    arrays[f"token_expert.{layer}.indptr"],
                ),
                shape=(vocab, fingerprint.num_experts),
            )
            for layer in range(fingerprint.num_layers)
        )
        meta = dict(artifact.meta)
        return cls(
            fingerprint=fingerprint,
            load=arrays["load"],
            token_count=arrays["token_count"],
            token_expert=tables,
            coactivation=arrays["coactivation"],
            transition=arrays["transition"],
            sequence_load=arrays["sequence_load"],
            dropped_mass=arrays["dropped_mass"],
            tokens=meta.pop("tokens"),
            meta=meta,
            sha256=artifact.sha256,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `profile` artefact, or count a `trace` artefact."""
        if is_artifact(path, kind="trace"):
            return cls.from_trace(RoutingTrace.load(path))
        return cls.from_artifact(read_artifact(path, kind="profile"))


def _sequence_load(trace: RoutingTrace, max_sequences: int) -> np.ndarray:
    layers, experts = trace.fingerprint.num_layers, trace.fingerprint.num_experts
    chosen = np.arange(trace.num_requests)
    if len(chosen) > max_sequences:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, max_sequences, replace=False))
    out = np.zeros((len(chosen), layers, experts), dtype=np.float32)
    for row, request in enumerate(chosen):
        routes = trace.experts[trace.offsets[request] : trace.offsets[request + 1]]
        for layer in range(layers):
            out[row, layer] = np.bincount(routes[:, layer].ravel(), minlength=experts)
    return out
