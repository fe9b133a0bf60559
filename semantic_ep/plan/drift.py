"""Drift: is a plan still the right one for the routing of today?"""

from __future__ import annotations

import dataclasses

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.coclustering import choose_ranks
from semantic_ep.plan.moving import count_moves
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.schedule import rank_shares
from semantic_ep.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
    """Distance between the routing planned on and the routing of today.

    Attributes:
        load_distance: [L] total variation between the load shares of experts, 0..1.
        token_distance: Total variation between the frequencies of token ids, 0..1.
        unseen_tokens: Share of today's tokens whose id the plan's profile never saw.
    """

    load_distance: np.ndarray
    token_distance: float
    unseen_tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether to plan again.

    Attributes:
        replan: The saving over the horizon exceeds the bytes to move.
        saved_bytes: Predicted over the horizon; negative when the new placement is worse.
        bytes_to_move: Expert bytes that ranks must receive.
        reason: One sentence.
    """

    replan: bool
    saved_bytes: float
    bytes_to_move: int
    reason: str


def measure_drift(
    planned_on: RoutingProfile, fresh: RoutingProfile, *, included: float = 0.0
) -> Drift:
    """Compare two profiles of one model.

    Args:
        planned_on: The older one.
        fresh: The newer one.
        included: Weight with which the older counts are part of the newer profile, as where one
            recorder went on counting: 1, or less with decay. They are taken out.

    Raises:
        FingerprintError: They are of different models.
    """
    planned_on.fingerprint.check(fresh.fingerprint, what="the fresh profile", allow_retrained=True)
    fresh_load = np.maximum(fresh.load - included * planned_on.load, 0)
    vocab = max(planned_on.vocab_size, fresh.vocab_size)
    seen = np.zeros((2, vocab))
    seen[0, : planned_on.vocab_size] = planned_on.token_count
    seen[1, : fresh.vocab_size] = fresh.token_count
    seen[1] = np.maximum(seen[1] - included * seen[0], 0)
    frequency = _shares(seen)
    return Drift(
        load_distance=load_distance(planned_on.load, fresh_load),
        token_distance=float(np.abs(frequency[0] - frequency[1]).sum() / 2),
        unseen_tokens=float(frequency[1][seen[0] == 0].sum()),
    )


def load_distance(planned_on_LE: np.ndarray, fresh_LE: np.ndarray) -> np.ndarray:
    """[L] total variation between the load shares of experts, 0..1."""
    distance_L: np.ndarray = np.abs(_shares(planned_on_LE) - _shares(fresh_LE)).sum(axis=1) / 2
    return distance_L


def expected_local_share(profile: RoutingProfile, placement: Placement) -> float:
    """Expected LAR of equal-share token schedules, mean over layers, from counts alone.

    It is judged on the counts it was made from: good for comparing two placements on one profile,
    too high as a forecast.
    """
    seen = np.flatnonzero(profile.token_count > 0)
    if not len(seen):
        return 1 / placement.ep_size
    weight = profile.token_count[seen]
    shares = []
    for layer in range(placement.num_layers):
        share_VG, _ = rank_shares(profile, placement, layer)
        share_VG = share_VG[seen]
        home = choose_ranks(share_VG, weight)
        shares.append(weight @ share_VG[np.arange(len(seen)), home] / weight.sum())
    return float(np.mean(shares))


def advise(
    fresh: RoutingProfile,
    current: Placement,
    candidate: Placement,
    *,
    row_bytes: int,
    expert_bytes: int,
    horizon_tokens: float,
    topology: Topology | None = None,
) -> Advice:
    """Advise to re-plan only if the predicted saving over the horizon exceeds the move.

    Both sides are bytes over the links. The saving counts each activation that becomes local as
    one row less, there and back, which de-duplication makes an upper bound: the advice errs
    towards planning again only where activations of one token already travel together.

    Args:
        fresh: Today's profile.
        current: The placement in force.
        candidate: A placement planned on `fresh`.
        row_bytes: Bytes of one token's row, one way.
        expert_bytes: Bytes of one expert's weights in one layer.
        horizon_tokens: Tokens expected before routing drifts again.
        topology: Nodes of the ranks.

    Raises:
        ConfigError: The horizon is not positive.
    """
    if horizon_tokens <= 0:
        raise ConfigError(
            explain("the horizon must be positive", where="--horizon-tokens", got=horizon_tokens)
        )
    gain = expected_local_share(fresh, candidate) - expected_local_share(fresh, current)
    top_k, layers = fresh.fingerprint.top_k, fresh.fingerprint.num_layers
    saved = gain * top_k * layers * 2 * row_bytes * horizon_tokens
    moves = count_moves(candidate, current, bytes_per_expert=expert_bytes, topology=topology)
    replan = saved > moves.bytes > 0
    reason = (
        f"planning again {'pays' if replan else 'does not pay'}: {saved / 1e9:.3f} GB saved over "
        f"{horizon_tokens:,.0f} tokens (local share {gain:+.3f}) against {moves.bytes / 1e9:.3f} "
        "GB to move"
    )
    return Advice(replan=replan, saved_bytes=saved, bytes_to_move=moves.bytes, reason=reason)


def domain_matrix(
    profiles: dict[str, RoutingProfile], placements: dict[str, Placement]
) -> dict[str, dict[str, float]]:
    """Expected local share on each domain (inner key) of the plan made on each (outer key)."""
    return {
        planned: {
            judged: expected_local_share(profile, placement) for judged, profile in profiles.items()
        }
        for planned, placement in placements.items()
    }


def _shares(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-12))
