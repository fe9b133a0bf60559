"""Where the tokens of simulated requests are sent: routes recorded for the same token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.cost import nearest_copy
from semantic_ep.plan.placement import Placement


def occurrences(trace: RoutingTrace, token_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n] int64, for each token id a random token of the trace with this id.

    This is the model of expert choice: a token takes the route that the same token took somewhere
    in the trace. An id that the trace lacks takes the route of any token.
    """
    order = np.argsort(trace.token_id, kind="stable")
    ordered = trace.token_id[order]
    first = np.searchsorted(ordered, token_ids, side="left")
    count = np.searchsorted(ordered, token_ids, side="right") - first
    drawn = first + (rng.random(len(token_ids)) * count).astype(np.int64)
    anywhere = rng.integers(trace.num_tokens, size=len(token_ids))
    found: np.ndarray = order[np.where(count > 0, drawn, anywhere)]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RequestRouting:
    """Mean routing of the tokens of R requests under one placement.

    Attributes:
        hits_RLG: [R, L, G] float32, share of tokens with an expert on each rank.
        activations_RLG: [R, L, G] float32, activations on each rank, a token.
    """

    hits_RLG: np.ndarray
    activations_RLG: np.ndarray

    @classmethod
    def of(
        cls, placement: Placement, trace: RoutingTrace, positions: Sequence[np.ndarray]
    ) -> RequestRouting:
        """Count the routes of each request's tokens.

        Args:
            placement: Without replicas: where an expert is then does not depend on who asks.
            trace: Recorded routes.
            positions: For each request, tokens of the trace (see `occurrences`).
        """
        layers, ranks = placement.num_layers, placement.ep_size
        assert placement.logical_to_physical_map.shape[2] == 1, "replicas depend on the home rank"
        count_TLG = np.zeros((trace.num_tokens, layers, ranks), dtype=np.uint8)
        token = np.arange(trace.num_tokens)[:, None]
        for layer in range(layers):
            rank_E = nearest_copy(placement, layer)[0] // placement.slots_per_rank
            np.add.at(count_TLG[:, layer], (token, rank_E[trace.experts[:, layer]]), 1)
        hits = np.empty((len(positions), layers, ranks), dtype=np.float32)
        activations = np.empty_like(hits)
        for row, tokens in enumerate(positions):
            counts = count_TLG[tokens]
            activations[row] = counts.mean(axis=0, dtype=np.float32)
            hits[row] = (counts > 0).mean(axis=0, dtype=np.float32)
        return cls(hits_RLG=hits, activations_RLG=activations)
