"""Routing of models that nobody has recorded, joined from recorded layers of a smaller one.

A layer of 256 experts is four recorded layers of 64 side by side: a token that went to six experts
in each of them goes to the first two (the router's order) in each of the four. Every activation is
a recorded one, so what is real stays real: which ids want which experts, which experts keep
company, what requests have in common, how load is spread. What is assumed is that the larger
model's experts are as specialised as the smaller one's, and that a token spreads evenly over the
four parts. Models of fewer experts are made by merging experts at random.

How far off this is can be seen where a recording of the wanted shape exists: `bench_scale` joins
layers of one model to the shape of another and compares.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.traces import RoutingTrace

# Requests are cut to this many tokens, so that many ranks have several requests each.
REQUEST_TOKENS = 64
_MOST_FILLED = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterShape:
    """What a router chooses from.

    Attributes:
        num_experts: Experts a layer (E).
        top_k: Experts a token activates (K).
        groups: Equal groups of neighbouring experts of a group-limited router.
        top_groups: Groups that a token may use.
    """

    num_experts: int
    top_k: int
    groups: int = 1
    top_groups: int = 1


def joined_trace(
    trace: RoutingTrace, shape: RouterShape, *, layers: int, seed: int
) -> RoutingTrace:
    """Make a trace of another shape from the layers of a recorded one.

    Args:
        trace: Recorded; its experts in the router's order of preference.
        shape: Of the wanted model.
        layers: Layers to make, from different parts of the recorded model.
        seed: Seed of the experts' numbering and, with fewer experts, of the merging.

    Raises:
        ConfigError: The recorded layers cannot be joined or merged to this shape.
    """
    recorded = trace.fingerprint
    parts = max(shape.num_experts // recorded.num_experts, 1)
    whole = shape.num_experts % recorded.num_experts == 0
    if (
        not (whole or recorded.num_experts % shape.num_experts == 0)
        or shape.top_k > parts * recorded.top_k
        or layers * parts > recorded.num_layers
    ):
        raise ConfigError(
            explain(
                "the recorded layers cannot be joined to this shape",
                where="--trace",
                got=f"{recorded.num_layers} layers of {recorded.num_experts} experts, top-"
                f"{recorded.top_k}, for {layers} of {shape.num_experts}, top-{shape.top_k}",
            )
        )
    rng = np.random.default_rng(seed)
    spread = np.linspace(0, recorded.num_layers - 1, layers * parts).round().astype(int)
    routes = []
    for layer in range(layers):
        experts = trace.experts[:, spread[layer::layers]].astype(np.int64)  # [N, parts, K]
        if whole:
            experts = experts + recorded.num_experts * np.arange(parts)[:, None]
        else:
            size = recorded.num_experts // shape.num_experts
            experts = (rng.permutation(recorded.num_experts) // size)[experts]
        in_order = experts.transpose(0, 2, 1).reshape(len(experts), -1)
        chosen = _first_distinct(in_order, shape, rng)
        routes.append(_renumbering(shape, rng)[chosen])
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture=f"joined from {recorded.architecture}",
            layer_ids=tuple(range(layers)),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
        ),
        experts=np.stack(routes, axis=1).astype(np.int16),
        offsets=_cut(trace.offsets),
        token_id=trace.token_id,
    )


def blind_trace(shape: RouterShape, *, tokens: int, seed: int) -> RoutingTrace:
    """Routing without structure: random scores, as benchmarks of all-to-alls draw it."""
    rng = np.random.default_rng(seed)
    scores = rng.random((tokens, shape.num_experts), dtype=np.float32)
    if shape.groups > 1:
        grouped = scores.reshape(tokens, shape.groups, -1)
        # A group's score is its best expert's, as in DeepEP's tests.
        order = np.argsort(-grouped.max(axis=2), axis=1)
        np.put_along_axis(grouped, order[:, shape.top_groups :, None], -1.0, axis=1)
    experts = np.argpartition(-scores, shape.top_k - 1, axis=1)[:, : shape.top_k]
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="blind",
            layer_ids=(0,),
            num_experts=shape.num_experts,
            top_k=shape.top_k,
        ),
        experts=experts[:, None].astype(np.int16),
        offsets=np.array([0, tokens], dtype=np.int64),
        token_id=np.full(tokens, -1, dtype=np.int32),
    )


def _first_distinct(
    in_order: np.ndarray, shape: RouterShape, rng: np.random.Generator
) -> np.ndarray:
    """[N, K] the first K different experts of each row, in the groups that it may use.

    A group-limited token uses the groups with most of its activations, any of those with equally
    many.

    Raises:
        ConfigError: Too many rows have fewer.
    """
    tokens, width = in_order.shape
    position = np.full((tokens, shape.num_experts), width, dtype=np.int64)
    for column in reversed(range(width)):
        np.put_along_axis(position, in_order[:, column : column + 1], column, axis=1)
    if shape.groups > 1:
        size = shape.num_experts // shape.groups
        grouped = position.reshape(tokens, shape.groups, size)
        activations = (grouped < width).sum(axis=2) + rng.random(grouped.shape[:2])
        order = np.argsort(-activations, axis=1)
        np.put_along_axis(grouped, order[:, shape.top_groups :, None], width, axis=1)
    chosen = np.argsort(position, axis=1, kind="stable")[:, : shape.top_k]
    # Where merging leaves a token too few, experts in order of their number fill up.
    filled = float((np.take_along_axis(position, chosen, axis=1) == width).any(axis=1).mean())
    if filled > _MOST_FILLED:
        raise ConfigError(
            explain(
                "too many tokens of the recording have fewer different experts than this shape",
                where="--trace",
                got=f"{filled:.1%} of tokens with fewer than {shape.top_k}",
                allowed=f"at most {_MOST_FILLED:.0%}",
            )
        )
    return chosen


def _renumbering(shape: RouterShape, rng: np.random.Generator) -> np.ndarray:
    """[E] new number of each expert: whole groups, and experts in their group, are shuffled."""
    size = shape.num_experts // shape.groups
    group = rng.permutation(shape.groups)
    within = np.stack([rng.permutation(size) for _ in range(shape.groups)])
    return np.asarray((group[:, None] * size + within).ravel())


def _cut(offsets: np.ndarray) -> np.ndarray:
    """Offsets with requests cut to `REQUEST_TOKENS`."""
    pieces = [np.arange(a, b, REQUEST_TOKENS) for a, b in itertools.pairwise(offsets)]
    return np.append(np.concatenate(pieces), offsets[-1]).astype(np.int64)
