from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from semantic_ep.errors import ConfigError, FingerprintError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.bounds import bounds, oracle_home_ranks, saving_interval
from semantic_ep.plan.compared import BASELINES, is_even, place_baselines
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.drift import advise, domain_matrix, measure_drift
from semantic_ep.plan.effect import Workload
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.solver import SemanticPolicy
from semantic_ep.plan.verdict import home_ranks, verdict
from semantic_ep.topology import Topology
from tests.unit.plan.synthetic import planted_trace

FAST = SemanticPolicy(mode="requests", starts=3)
PLAIN = Placement.contiguous(num_layers=2, num_experts=16, ep_size=4)


@pytest.fixture(scope="module")
def planned():
    trace = planted_trace(seed=1)
    profile = RoutingProfile.from_trace(trace)
    return profile, FAST.place(profile, ep_size=4)


@pytest.mark.parametrize("mode", ["requests", "tokens"])
def test_no_prediction_passes_the_ceiling_and_blind_homes_stand_on_the_floor(planned, mode):
    profile, placement = planned
    held_out = planted_trace(seed=2, requests=400, length=12)
    reached = evaluate(placement, held_out, home_ranks(held_out, placement, profile, mode)).mean()
    blind = evaluate(placement, held_out, home_ranks(held_out, placement, None, mode)).mean()
    limits = bounds(placement, held_out, mode)
    assert limits["floor_lar"] == 0.25
    assert blind["lar"] == pytest.approx(0.25, abs=0.08)
    assert blind["lar"] < reached["lar"] <= limits["ceiling_lar"] + 1e-9


def test_oracle_homes_of_token_schedules_are_equal_slices(planned):
    _, placement = planned
    trace = planted_trace(seed=2, requests=32, length=64)
    homes = oracle_home_ranks(placement, trace, "tokens")
    for layer in range(2):
        counts = np.bincount(homes[:512, layer], minlength=4)
        assert counts.tolist() == [128] * 4


def test_the_interval_brackets_the_saving_and_narrows_with_more_requests():
    rng = np.random.default_rng(0)
    widths = []
    for requests in (20, 400):
        trace = planted_trace(requests=requests, length=8)
        plain = np.full(trace.num_tokens, 2.0)
        planned = 1.0 + rng.random(requests)[trace.request_of_token]
        low, high = saving_interval(plain, planned, trace)
        assert low <= 1 - planned.sum() / plain.sum() <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def _verdict(placements, chosen, profile, **options):
    return verdict(
        placements,
        chosen=chosen,
        profile=profile,
        holdout=planted_trace(seed=2),
        mode="requests",
        **options,
    )


def test_a_plan_that_saves_is_worth_it_and_says_when_moving_has_paid(planned):
    profile, placement = planned
    account = _verdict(
        {"contiguous": PLAIN, "semantic": placement},
        "semantic",
        profile,
        workload=Workload(row_bytes=4096, expert_bytes=10**6),
    )
    assert account["worth_it"]
    assert account["saved_interval_95"][0] < account["remote_copies_saved"]
    assert account["effect"]["break_even_tokens"] > 0


def test_the_verdict_names_the_best_of_the_baselines_with_equal_counts(planned):
    profile, placement = planned
    compared = place_baselines(profile, BASELINES, ep_size=4)
    account = _verdict(
        {**compared.placements, "semantic": placement},
        "semantic",
        profile,
        left_out={"late": "no time"},
    )
    best = account["best_baseline"]
    even = {name for name, placed in compared.placements.items() if is_even(placed)}
    rows = [row for row in account["policies"] if row["policy"] in even]
    assert len(rows) == 2 * len(even)
    assert best["remote_copies"] == min(row["remote_copies"] for row in rows)
    saved = 1 - account["policies"][-1]["remote_copies"] / best["remote_copies"]
    assert best["remote_copies_saved"] == pytest.approx(saved)
    assert best["left_out"]["late"] == "no time"
    assert set(best["left_out"]) == {"late", *(set(compared.placements) - even)}
    named = f"{best['policy']} with home ranks {best['schedule']}"
    assert named in account["summary"]
    assert f"({best['remote_copies']:.3f})" in account["summary"]


def test_a_baseline_that_beats_the_plan_is_said_to(planned):
    profile, placement = planned
    account = _verdict(
        {"contiguous": PLAIN, "occult": placement, "semantic": PLAIN}, "semantic", profile
    )
    assert account["best_baseline"]["policy"] == "occult"
    assert account["best_baseline"]["remote_copies_saved"] < 0
    assert "MORE than the best of 2 baselines, occult" in account["summary"]


def test_ranks_of_different_sizes_are_no_best_baseline(planned):
    profile, placement = planned
    ranks = np.repeat(np.arange(4), [5, 4, 4, 3])
    uneven = Placement.from_rank_of_expert(np.stack([ranks, ranks]), ep_size=4)
    account = _verdict(
        {"contiguous": PLAIN, "grace": uneven, "semantic": placement}, "semantic", profile
    )
    assert account["best_baseline"]["policy"] == "contiguous"
    assert "different numbers of experts" in account["best_baseline"]["left_out"]["grace"]


def test_baselines_that_have_not_begun_in_time_are_left_out_and_named(planned):
    profile, _ = planned
    found = place_baselines(profile, BASELINES, ep_size=4, time_limit=0.0)
    assert list(found.placements) == ["contiguous"]
    assert set(found.left_out) == set(BASELINES) - {"contiguous"}
    assert all("time limit of 0 s" in why for why in found.left_out.values())


def test_baselines_that_a_profile_cannot_feed_are_left_out_and_named(planned):
    profile, _ = planned
    trace = planted_trace()
    unnamed = np.full(trace.num_tokens, -1, dtype=np.int32)
    anonymous = RoutingProfile.from_trace(dataclasses.replace(trace, token_id=unnamed))
    loads = dataclasses.replace(profile, coactivation=np.zeros_like(profile.coactivation))
    assert set(place_baselines(anonymous, BASELINES, ep_size=4).left_out) == {"semmoe"}
    known = set(place_baselines(loads, BASELINES, ep_size=4).placements)
    assert known == {"contiguous", "random", "greedy", "eplb", "eplb-global"}


def test_an_interrupt_leaves_out_the_baselines_that_follow(planned, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("semantic_ep.plan.baselines.grace_placement", interrupted)
    found = place_baselines(planned[0], BASELINES, ep_size=4)
    assert set(found.left_out) == {"grace", "exflow", "moetuner", "semmoe"}
    assert "occult" in found.placements


def test_contiguous_against_itself_is_not_worth_it(planned):
    profile, _ = planned
    blind = dataclasses.replace(
        profile, token_expert=tuple(table * 0 for table in profile.token_expert)
    )
    account = _verdict({"contiguous": PLAIN}, "contiguous", blind)
    assert not account["worth_it"]
    assert "not worth it" in account["summary"]


def test_under_all_gather_nothing_is_worth_it(planned):
    profile, placement = planned
    account = _verdict(
        {"contiguous": PLAIN, "semantic": placement},
        "semantic",
        profile,
        workload=Workload(row_bytes=4096, expert_bytes=10**6, runtime="all-gather"),
    )
    assert not account["worth_it"]
    assert account["effect"]["break_even_tokens"] is None


def _other_domain() -> RoutingProfile:
    trace = planted_trace(seed=3)
    return RoutingProfile.from_trace(
        dataclasses.replace(trace, experts=(trace.experts * 5 + 3) % 16)
    )


def test_drift_is_zero_against_itself_and_large_against_other_routing(planned):
    profile, _ = planned
    same, other = measure_drift(profile, profile), measure_drift(profile, _other_domain())
    assert same.load_distance.max() == 0
    assert same.unseen_tokens == 0
    assert other.load_distance.mean() > 0.02


def test_planning_again_is_advised_only_when_it_pays_within_the_horizon(planned):
    _, current = planned
    fresh = _other_domain()
    candidate = FAST.place(fresh, ep_size=4)
    sizes = {"row_bytes": 4096, "expert_bytes": 10**6}
    soon = advise(fresh, current, candidate, horizon_tokens=10, **sizes)
    later = advise(fresh, current, candidate, horizon_tokens=10**7, **sizes)
    assert not soon.replan
    assert later.replan
    assert soon.bytes_to_move == later.bytes_to_move > 0
    assert not advise(fresh, current, current, horizon_tokens=10**7, **sizes).replan
    with pytest.raises(ConfigError, match="horizon"):
        advise(fresh, current, candidate, horizon_tokens=0, **sizes)


def test_drift_between_models_is_refused(planned):
    profile, _ = planned
    with pytest.raises(FingerprintError, match="another model"):
        measure_drift(profile, RoutingProfile.from_trace(planted_trace(layers=3)))


def test_a_plan_serves_its_own_domain_best(planned):
    profile, placement = planned
    other = _other_domain()
    placements = {"home": placement, "away": FAST.place(other, ep_size=4)}
    matrix = domain_matrix({"home": profile, "away": other}, placements)
    assert matrix["home"]["home"] > matrix["away"]["home"]
    assert matrix["away"]["away"] > matrix["home"]["away"]


def test_effect_counts_the_slow_link_between_nodes(planned):
    profile, placement = planned
    workload = Workload(row_bytes=2**16, expert_bytes=10**6)
    seconds = [
        _verdict(
            {"contiguous": PLAIN, "semantic": placement},
            "semantic",
            profile,
            topology=Topology.uniform(4, num_nodes=nodes),
            workload=workload,
        )["effect"]["seconds_per_token_after"]
        for nodes in (1, 2)
    ]
    assert seconds[1] > seconds[0]
