"""Random samples of whole sequences with their routes, bounded in tokens.

The sequences with the smallest keys of all processes are the sample, so that samples of several
processes, or of several micro-batches, merge into one of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.traces import RoutingTrace

Part = dict[str, np.ndarray]


def no_samples(num_layers: int, top_k: int) -> Part:
    """A sample of nothing: key [R], length [R], experts [N, L, K], token_id [N], seen [1]."""
    return {
        "key": np.zeros(0),
        "length": np.zeros(0, np.int64),
        "experts": np.zeros((0, num_layers, top_k), np.uint16),
        "token_id": np.zeros(0, np.int32),
        "seen": np.zeros(1),
    }


def merge_samples(one: Part, other: Part, max_tokens: int) -> Part:
    """The sequences of smallest key that fit into `max_tokens` together; tokens seen add up."""
    key = np.concatenate([one["key"], other["key"]])
    length = np.concatenate([one["length"], other["length"]])
    order = np.argsort(key, kind="stable")
    order = order[np.cumsum(length[order]) <= max_tokens]
    tokens = _tokens_of((np.cumsum(length) - length)[order], length[order])
    return {
        "key": key[order],
        "length": length[order],
        "experts": np.concatenate([one["experts"], other["experts"]])[tokens],
        "token_id": np.concatenate([one["token_id"], other["token_id"]])[tokens],
        "seen": one["seen"] + other["seen"],
    }


def join_layers(parts: Sequence[Part], layers: Sequence[Sequence[int]], num_layers: int) -> Part:
    """Whole samples from what several processes hold of the same sequences.

    Args:
        parts: Of processes that saw the same tokens in other layers, each with the sequences of
            smallest keys; those that one of them lacks are left out.
        layers: Layers that each holds the routes of, in their order.
        num_layers: All of them (L).
    """
    common, positions = parts[0]["key"], []
    for part in parts[1:]:
        common = common[np.isin(common, part["key"])]
    for part in parts:
        row = np.flatnonzero(np.isin(part["key"], common))
        start = np.cumsum(part["length"]) - part["length"]
        positions.append(_tokens_of(start[row], part["length"][row]))
    first, kept = parts[0], np.isin(parts[0]["key"], common)
    experts = np.zeros(
        (len(positions[0]), num_layers, first["experts"].shape[2]), first["experts"].dtype
    )
    for part, held, tokens in zip(parts, layers, positions, strict=True):
        experts[:, list(held)] = part["experts"][tokens]
    return {
        "key": first["key"][kept],
        "length": first["length"][kept],
        "experts": experts,
        "token_id": first["token_id"][positions[0]],
        "seen": sum((part["seen"] for part in parts), np.zeros(1)),
    }


def _tokens_of(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """[N] int64 indices of the tokens of sequences that lie somewhere in an array."""
    before = np.cumsum(length) - length
    tokens: np.ndarray = np.arange(int(length.sum())) + np.repeat(start - before, length)
    return tokens


def trace_of(samples: Part, fingerprint: ModelFingerprint) -> RoutingTrace:
    """The sampled sequences as a trace, one request each."""
    offsets = np.concatenate([[0], np.cumsum(samples["length"])]).astype(np.int64)
    return RoutingTrace(
        fingerprint=fingerprint,
        experts=samples["experts"],
        offsets=offsets,
        token_id=samples["token_id"],
    )
