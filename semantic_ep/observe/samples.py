"""Random samples of whole sequences with their routes, bounded in tokens.

The sequences with the smallest keys of all processes are the sample, so that samples of several
processes, or of several micro-batches, merge into one of the same kind.
"""

from __future__ import annotations

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
    start = np.cumsum(length) - length
    tokens = np.concatenate(
        [np.arange(start[i], start[i] + length[i]) for i in order] or [np.zeros(0, np.int64)]
    ).astype(np.int64)
    return {
        "key": key[order],
        "length": length[order],
        "experts": np.concatenate([one["experts"], other["experts"]])[tokens],
        "token_id": np.concatenate([one["token_id"], other["token_id"]])[tokens],
        "seen": one["seen"] + other["seen"],
    }


def trace_of(samples: Part, fingerprint: ModelFingerprint) -> RoutingTrace:
    """The sampled sequences as a trace, one request each."""
    offsets = np.concatenate([[0], np.cumsum(samples["length"])]).astype(np.int64)
    return RoutingTrace(
        fingerprint=fingerprint,
        experts=samples["experts"],
        offsets=offsets,
        token_id=samples["token_id"],
    )
