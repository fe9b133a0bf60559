"""Verdict: what a placement and its schedule are worth on routing they were not planned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.bounds import bounds, saving_interval
from semantic_ep.plan.compared import BASELINES, is_even
from semantic_ep.plan.cost import RoutingCost, evaluate, remote_copies_by_token
from semantic_ep.plan.effect import Workload, effect_on_time
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import (
    Predictor,
    TablePredictor,
    context_of,
)
from semantic_ep.plan.requests import WINDOW_REQUESTS, assign_in_windows
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.slices import BATCH_TOKENS, natural_slices, slices_in_batches
from semantic_ep.plan.solver import Mode
from semantic_ep.topology import Topology

# Below this share of the copies, a saving drowns in what else varies between runs.
WORTHWHILE_SHARE = 0.05


def rows_of_cost(cost: RoutingCost) -> list[dict[str, Any]]:
    """One row a layer, then the row "mean"."""
    names = list(cost.mean())
    rows: list[dict[str, Any]] = [
        {"layer": layer, **{name: float(getattr(cost, name)[layer]) for name in names}}
        for layer in range(len(cost.lar))
    ]
    return [*rows, {"layer": "mean", **cost.mean()}]


def home_ranks(
    trace: RoutingTrace,
    placement: Placement,
    profile: RoutingProfile | None,
    mode: Mode,
    *,
    predictor: Predictor | None = None,
) -> np.ndarray:
    """Home rank of each token as a runtime would choose it, blind to the true routes.

    Args:
        trace: Tokens to schedule; ids and request bounds are looked at and, by a predictor with
            history, the experts of earlier layers.
        placement: Where experts live.
        profile: What the schedule may know; None for a schedule that ignores affinity.
        mode: "tokens": batches of 512 consecutive tokens in equal slices, chosen anew in each
            layer. "requests": windows of 64 requests, tokens a rank within 5 % where whole
            requests allow it, rank predicted from token ids.
        predictor: Scores ranks for tokens; None means the profile's token table.

    Returns:
        [N] for mode "requests" and for slices in order, else [N, L].
    """
    if mode == "requests":
        scores = np.zeros((trace.num_requests, placement.ep_size))
        if profile is not None:
            schedule = Schedule.from_profile(profile, placement)
            bounds = zip(trace.offsets[:-1], trace.offsets[1:], strict=True)
            scores = np.stack([schedule.request_score(trace.token_id[a:b]) for a, b in bounds])
        lengths = np.diff(trace.offsets)
        rank_R = assign_in_windows(scores, lengths, window=WINDOW_REQUESTS)
        return np.asarray(rank_R[trace.request_of_token])
    if profile is None:
        return natural_slices(trace.num_tokens, placement.ep_size, batch=BATCH_TOKENS)
    predictor = predictor or TablePredictor(profile=profile)
    homes = []
    for layer in range(placement.num_layers):
        scores = predictor.rank_scores(context_of(trace, layer), placement)
        homes.append(slices_in_batches(scores, batch=BATCH_TOKENS))
    return np.stack(homes, axis=1)


def verdict(
    placements: Mapping[str, Placement],
    *,
    chosen: str,
    profile: RoutingProfile,
    holdout: RoutingTrace,
    mode: Mode,
    topology: Topology | None = None,
    workload: Workload | None = None,
    in_force: str = "contiguous",
    horizon_tokens: float | None = None,
    without_copies: str | None = None,
    left_out: Mapping[str, str] | None = None,
    known: Placement | None = None,
) -> dict[str, Any]:
    """Judge a plan against other placements on held-out requests.

    Args:
        placements: Policy name -> placement, contiguous among them. The best of those that carry
            the name of a baseline is found among both kinds of home rank.
        chosen: The policy planned with.
        profile: What the schedule is made from.
        holdout: Requests that are not in the profile.
        mode: See `home_ranks`.
        topology: Nodes of the ranks.
        workload: Sizes and runtime, for the effect on time; None leaves it out.
        in_force: The placement to move away from. Contiguous placement knows no schedule; another
            one can follow a fresh schedule without moving, so that is what a move must beat.
        horizon_tokens: Tokens expected until routing drifts, within which moving experts must pay
            on the links of the workload; None asks for no such thing.
        without_copies: The chosen placement before experts were copied; None if none were.
        left_out: Baselines that were not placed, and why.
        known: Placement that knows the held-out routes, for the ceiling of placements; see
            `bounds`.

    Returns:
        JSON-serialisable account: one row a placement and kind of home rank, the verdict, the
        interval of the saving over requests, the best baseline, floor and ceiling, what copies of
        experts change, and the effect on time.
    """
    rows: list[dict[str, Any]] = []
    homes, costs = [], []
    for name, placement in placements.items():
        both = name in (chosen, in_force, without_copies, *BASELINES)
        for scheduled in (False, True) if both else (False,):
            home = home_ranks(holdout, placement, profile if scheduled else None, mode)
            cost = evaluate(placement, holdout, home, topology=topology)
            row = {"policy": name, "schedule": "by affinity" if scheduled else "in order"}
            homes.append((name, home))
            costs.append(cost)
            straggler = int(cost.straggler_rows().sum())
            rows.append({**row, **cost.mean(), "straggler_rows": straggler})
    of_force = [index for index, row in enumerate(rows) if row["policy"] == in_force]
    first = of_force[0 if in_force == "contiguous" else -1]
    plain, planned = rows[first], rows[-1]
    saved = 1 - planned["remote_copies"] / max(plain["remote_copies"], 1e-12)
    straggler_saved = 1 - planned["straggler_rows"] / max(plain["straggler_rows"], 1)
    # The slowest rank sets the time of an all-to-all: a mean that falls alone is no gain.
    worth_it = saved >= WORTHWHILE_SHARE and straggler_saved >= 0
    sent = [
        remote_copies_by_token(placements[name], holdout, home, topology=topology)
        for name, home in (homes[first], homes[-1])
    ]
    effect = None
    if workload is not None:
        effect = effect_on_time(
            costs[first],
            costs[-1],
            placements[in_force],
            placements[chosen],
            topology=topology or Topology.uniform(placements[chosen].ep_size),
            workload=workload,
        )
        worth_it = worth_it and effect["seconds_saved_share"] > 0
        if horizon_tokens is not None:
            break_even = effect["break_even_tokens"]
            worth_it = worth_it and break_even is not None and break_even <= horizon_tokens
    theirs = {
        name: placement
        for name, placement in placements.items()
        if name in BASELINES and name not in (chosen, without_copies)
    }
    best = _best_baseline(rows, theirs, left_out or {})
    return {
        "ep_size": placements[chosen].ep_size,
        "mode": mode,
        "tokens": holdout.num_tokens,
        "held_out": True,
        "policies": rows,
        "remote_copies_saved": saved,
        "worth_it": worth_it,
        "straggler_rows_saved": straggler_saved,
        "saved_interval_95": saving_interval(sent[0], sent[1], holdout),
        "bounds": bounds(placements[chosen], holdout, mode, known=known),
        "best_baseline": best,
        "effect": effect,
        "copies": None if without_copies is None else _copies(rows, chosen, without_copies),
        "horizon_tokens": horizon_tokens,
        "summary": f"{'worth it' if worth_it else 'not worth it'}: {saved:.1%} fewer remote copies "
        f"than {in_force} placement with home ranks {plain['schedule']}, and "
        f"{straggler_saved:.1%} fewer rows on the busiest rank"
        + ("" if horizon_tokens is None else f", over {horizon_tokens:,.0f} tokens")
        + ("" if best is None else f"; {best['summary']}"),
    }


def _best_baseline(
    rows: list[dict[str, Any]], placements: Mapping[str, Placement], left_out: Mapping[str, str]
) -> dict[str, Any] | None:
    """The row of fewest remote copies among baselines; None if no other one was placed.

    Our schedule counts too: a baseline gets the home ranks that serve it best.
    """
    uneven = {
        name: "its ranks hold different numbers of experts"
        for name, placement in placements.items()
        if not is_even(placement)
    }
    eligible = [row for row in rows if row["policy"] in placements and row["policy"] not in uneven]
    if not eligible:
        return None
    best, plan = min(eligible, key=lambda row: float(row["remote_copies"])), rows[-1]
    figures = ("policy", "schedule", "remote_copies", "lar", "load_max_over_mean")
    saved = 1 - plan["remote_copies"] / max(best["remote_copies"], 1e-12)
    against = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'MORE'} than"
    return {
        **{name: best[name] for name in figures},
        "remote_copies_saved": saved,
        "left_out": {**left_out, **uneven},
        "summary": f"{plan['remote_copies']:.3f} remote copies, {against} the best of "
        f"{len(placements) - len(uneven)} baselines, {best['policy']} with home ranks "
        f"{best['schedule']} ({best['remote_copies']:.3f}); LAR {plan['lar']:.3f} against "
        f"{best['lar']:.3f}, load max/mean {plan['load_max_over_mean']:.2f} against "
        f"{best['load_max_over_mean']:.2f}",
    }


def _copies(rows: list[dict[str, Any]], chosen: str, without: str) -> dict[str, Any]:
    """What copies of experts change: remote copies saved by kind of home rank, and load."""
    figures = {(row["policy"], row["schedule"]): row for row in rows}
    saved = {
        schedule: 1
        - figures[chosen, schedule]["remote_copies"]
        / max(figures[without, schedule]["remote_copies"], 1e-12)
        for schedule in ("by affinity", "in order")
    }
    before, after = (
        figures[name, "by affinity"]["load_max_over_mean"] for name in (without, chosen)
    )
    summary = (
        f"copies of experts: {saved['by affinity']:.1%} fewer remote copies than {without} alone "
        f"({saved['in order']:.1%} with home ranks in order), load max/mean {before:.2f} -> "
        f"{after:.2f}"
    )
    worse = [schedule for schedule, share in saved.items() if share < 0]
    if worse:
        summary += (
            f"; they RAISE traffic with home ranks {' and '.join(worse)}: plan without spare slots "
            "there, unless levelling load is what they are for"
        )
    return {"remote_copies_saved": saved, "raise_traffic": worse, "summary": summary}
