"""Small synthetic routing with planted semantics, for the planner's tests."""

from __future__ import annotations

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.traces import RoutingTrace


def planted_trace(
    *,
    requests: int = 60,
    length: int = 48,
    layers: int = 2,
    experts: int = 16,
    top_k: int = 2,
    topics: int = 4,
    noise: float = 0.1,
    seed: int = 0,
) -> RoutingTrace:
    """Requests of one topic each; token ids of a topic use the experts of that topic, scattered."""
    rng = np.random.default_rng(seed)
    # The structure is fixed; the seed draws requests only, so that seeds are held-out data.
    structure = np.random.default_rng(99)
    vocab = 16 * topics
    groups = np.stack([structure.permutation(experts).reshape(topics, -1) for _ in range(layers)])
    favourites = np.stack(
        [
            [
                structure.choice(groups[layer, token % topics], top_k, replace=False)
                for token in range(vocab)
            ]
            for layer in range(layers)
        ]
    )
    topic_R = rng.integers(topics, size=requests)
    token_id = (rng.integers(16, size=requests * length) * topics).astype(np.int32)
    token_id += np.repeat(topic_R, length).astype(np.int32)
    experts_TLK = favourites[:, token_id].transpose(1, 0, 2).astype(np.uint8)
    for token, layer in zip(*np.nonzero(rng.random((len(token_id), layers)) < noise), strict=True):
        experts_TLK[token, layer] = rng.choice(experts, top_k, replace=False)
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="planted",
            layer_ids=tuple(range(layers)),
            num_experts=experts,
            top_k=top_k,
        ),
        experts=experts_TLK,
        offsets=np.arange(requests + 1, dtype=np.int64) * length,
        token_id=token_id,
    )


def random_trace(
    *, tokens: int, layers: int, experts: int, top_k: int, rng: np.random.Generator
) -> RoutingTrace:
    """Tokens without any structure."""
    routes = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="random", layer_ids=tuple(range(layers)), num_experts=experts, top_k=top_k
        ),
        experts=routes.astype(np.uint8),
        offsets=np.array([0, tokens]),
        token_id=rng.integers(20, size=tokens).astype(np.int32),
    )
