"""Which predictor to plan and to deal tokens with: the best on requests left out of its fit."""

from __future__ import annotations

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.history_predictors import PairPredictor
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import (
    DEPTHS,
    Predictor,
    RidgePredictor,
    TablePredictor,
    context_of,
)
from semantic_ep.plan.slices import slices_in_batches

# Those that a placement can be planned with: they expect experts, not ranks.
ExpertPredictor = TablePredictor | PairPredictor | RidgePredictor


def choose_predictor(
    trace: RoutingTrace, profile: RoutingProfile, *, ep_size: int, batch: int, seed: int = 0
) -> ExpertPredictor:
    """Fit the predictor that keeps most activations local on requests left out of the fit.

    A quarter of the requests judges candidates fitted on the rest, under contiguous placement, so
    that the choice does not depend on the placement it will serve. The winner is then fitted on
    all of them.

    Args:
        trace: The profile's part of the trace; other requests are not looked at.
        profile: `RoutingProfile.from_trace` of it.
        ep_size: EP ranks (G).
        batch: Tokens in a batch.
        seed: Seed of the split.
    """
    table = TablePredictor(profile=profile)
    if trace.num_requests < 8 or trace.num_tokens < 4 * batch:
        return table
    fitted_on, judged_on = trace.split(0.75, seed=seed)
    part = RoutingProfile.from_trace(fitted_on, vocab_size=profile.vocab_size, max_sequences=0)
    fingerprint = profile.fingerprint
    placement = Placement.contiguous(
        num_layers=fingerprint.num_layers, num_experts=fingerprint.num_experts, ep_size=ep_size
    )
    layers = np.unique(np.linspace(0, fingerprint.num_layers - 1, 4).astype(int)).tolist()
    candidates: list[ExpertPredictor] = [
        TablePredictor(profile=part),
        PairPredictor.fit(fitted_on, part, layers=layers),
        *(RidgePredictor.fit(fitted_on, part, depth=depth, layers=layers) for depth in DEPTHS),
        RidgePredictor.fit(fitted_on, part, depth=max(DEPTHS), layers=layers, corrected=True),
    ]
    rates = [
        np.mean([_held_out_rate(one, judged_on, placement, layer, batch) for layer in layers])
        for one in candidates
    ]
    best = candidates[int(np.argmax(rates))]
    if isinstance(best, RidgePredictor):
        return RidgePredictor.fit(trace, profile, depth=best.depth, corrected=bool(best.correction))
    return table if isinstance(best, TablePredictor) else PairPredictor.fit(trace, profile)


def _held_out_rate(
    predictor: Predictor, trace: RoutingTrace, placement: Placement, layer: int, batch: int
) -> float:
    scores = predictor.rank_scores(context_of(trace, layer), placement)
    home = slices_in_batches(scores, batch=batch)
    return float((placement.rank_of_expert[layer][trace.experts[:, layer]] == home[:, None]).mean())
