"""Plans with copies of experts, and plans that change a placement in force."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from semantic_ep.apply.exporters import read_sglang
from semantic_ep.cli import main
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.moving import count_moves, rank_names
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.verdict import home_ranks, verdict
from semantic_ep.runtime.slots import slot_tables
from tests.unit.plan.synthetic import planted_trace, random_trace

RANKS = 4
SIZES = ["--hidden-size", "1024", "--expert-bytes", "1000000"]


@pytest.fixture
def run_dir(tmp_path):
    RoutingProfile.from_trace(planted_trace(seed=1)).save(tmp_path / "profile")
    planted_trace(seed=2).save(tmp_path / "holdout")
    return tmp_path


def plan(run_dir, output: str, *more: str) -> list[str]:
    arguments = ["plan", "--profile", str(run_dir / "profile"), "--json", *more]
    return [*arguments, "--ep-size", str(RANKS), "-o", str(run_dir / output)]


def save_in_force(run_dir, placement: Placement) -> None:
    profile = RoutingProfile.read(run_dir / "profile")
    Plan(
        placement=placement,
        schedule=Schedule.from_profile(profile, placement),
        verdict={},
        fingerprint=profile.fingerprint,
    ).save(run_dir / "current")


def copies_sent(trace, placement, home_N) -> float:
    """Remote copies a token, walking every route through the runtime's own slot tables."""
    tables = [slot_tables(placement, rank=rank) for rank in range(placement.ep_size)]
    sent = 0
    for token in range(trace.num_tokens):
        home = int(home_N[token])
        for layer in range(placement.num_layers):
            slots = tables[home][layer, trace.experts[token, layer]]
            sent += len(set(slots // placement.slots_per_rank) - {home})
    return sent / trace.num_tokens / placement.num_layers


def test_copies_are_judged_as_the_runtime_serves_them(run_dir, capsys):
    assert main(plan(run_dir, "plan", "--redundant-slots", "8")) == 0
    account = json.loads(capsys.readouterr().out)["verdict"]
    made = Plan.read(run_dir / "plan")
    assert made.placement.slots_per_rank == 16 // RANKS + 2
    trace = RoutingTrace.load(run_dir / "holdout")
    profile = RoutingProfile.read(run_dir / "profile")
    home = home_ranks(trace, made.placement, profile, "requests")
    rows = {(row["policy"], row["schedule"]): row for row in account["policies"]}
    planned = rows["semantic+replicas", "by affinity"]
    assert planned == account["policies"][-1]
    assert planned["remote_copies"] == pytest.approx(copies_sent(trace, made.placement, home))
    plain = rows["semantic", "by affinity"]
    saved = account["copies"]["remote_copies_saved"]["by affinity"]
    assert saved == pytest.approx(1 - planned["remote_copies"] / plain["remote_copies"])
    assert saved > 0
    assert account["copies"]["raise_traffic"] == []
    main(plan(run_dir, "plain"))
    alone = json.loads(capsys.readouterr().out)["verdict"]
    assert alone["copies"] is None
    assert alone["policies"][-1]["remote_copies"] == plain["remote_copies"]


def test_copies_that_raise_traffic_are_said_to():
    """Every token uses a pair of experts; a copy of one alone parts the pair for other ranks."""
    single = Placement.contiguous(num_layers=1, num_experts=8, ep_size=RANKS)
    slots = np.concatenate([np.arange(8).reshape(RANKS, 2), [[2], [0], [0], [0]]], axis=1)
    copied = Placement(physical_to_logical_map=slots.reshape(1, -1), num_experts=8, ep_size=RANKS)
    rng = np.random.default_rng(0)
    pair = 2 * rng.integers(RANKS, size=2048)
    trace = random_trace(tokens=2048, layers=1, experts=8, top_k=2, rng=rng)
    routes = np.stack([pair, pair + 1], axis=1)[:, None].astype(np.uint8)
    trace = dataclasses.replace(trace, experts=routes, token_id=pair.astype(np.int32))
    placements = {"contiguous": single, "semantic": single, "semantic+replicas": copied}
    account = verdict(
        placements,
        chosen="semantic+replicas",
        profile=RoutingProfile.from_trace(trace),
        holdout=trace,
        mode="tokens",
        without_copies="semantic",
    )
    assert "in order" in account["copies"]["raise_traffic"]
    assert account["copies"]["remote_copies_saved"]["in order"] < -0.01
    assert "RAISE traffic" in account["copies"]["summary"]


def test_a_replicated_plan_is_exported_whole(run_dir, capsys):
    main(plan(run_dir, "plan", "--redundant-slots", "4"))
    file = run_dir / "sglang.json"
    assert main(["export", "--plan", str(run_dir / "plan"), "--to", "sglang", "-o", str(file)]) == 0
    found = read_sglang(file, layer_ids=(0, 1), num_experts=16, ep_size=RANKS)
    planned = Plan.read(run_dir / "plan").placement
    np.testing.assert_array_equal(found.physical_to_logical_map, planned.physical_to_logical_map)


@pytest.mark.parametrize("slots", ["3", "-4", "400"])
def test_spare_slots_that_ranks_cannot_share_or_fill_are_refused(run_dir, slots, capsys):
    assert main(plan(run_dir, "plan", "--redundant-slots", slots)) == 2
    assert "--redundant-slots" in capsys.readouterr().err
    assert not (run_dir / "plan").exists()


def test_copies_need_to_know_where_tokens_run(run_dir, capsys):
    trace = planted_trace(seed=1)
    object.__setattr__(trace, "token_id", np.full(trace.num_tokens, -1))
    RoutingProfile.from_trace(trace).save(run_dir / "profile")
    assert main(plan(run_dir, "plan", "--redundant-slots", "4")) == 2
    assert "token ids" in capsys.readouterr().err


def test_the_plan_in_force_keeps_all_experts_that_another_naming_of_ranks_can_keep(run_dir, capsys):
    assert main(plan(run_dir, "free")) == 0
    wanted = Plan.read(run_dir / "free").placement
    slots = wanted.physical_to_logical_map.reshape(2, RANKS, -1)[:, [2, 0, 3, 1]].copy()
    slots[0, 0, 0], slots[0, 1, 0] = slots[0, 1, 0], slots[0, 0, 0]
    in_force = Placement(
        physical_to_logical_map=slots.reshape(2, -1), num_experts=16, ep_size=RANKS
    )
    save_in_force(run_dir, in_force)
    capsys.readouterr()
    main(plan(run_dir, "next", "--current", str(run_dir / "current"), *SIZES))
    account = json.loads(capsys.readouterr().out)["verdict"]
    made = Plan.read(run_dir / "next")
    assert account["moves"]["expert_copies"] == 2
    assert account["effect"]["bytes_to_move"] == 2_000_000
    moves = count_moves(made.placement, in_force, bytes_per_expert=1)
    assert moves.copies.sum() == 2
    names = rank_names(wanted, in_force, shared_ranks=True)[0]
    old = Plan.read(run_dir / "free").schedule.request_affinity
    np.testing.assert_array_equal(made.schedule.request_affinity[:, names], old)


def test_a_plan_that_is_in_force_already_is_not_worth_moving_to(run_dir, capsys):
    main(plan(run_dir, "current"))
    capsys.readouterr()
    assert main(plan(run_dir, "next", "--current", str(run_dir / "current"), *SIZES)) == 1
    account = json.loads(capsys.readouterr().out)["verdict"]
    assert account["moves"]["expert_copies"] == 0
    assert account["remote_copies_saved"] == 0
    assert "current placement with home ranks by affinity" in account["summary"]


def test_moving_must_pay_within_the_horizon(run_dir, capsys):
    save_in_force(run_dir, Placement.contiguous(num_layers=2, num_experts=16, ep_size=RANKS))
    changed = ["--current", str(run_dir / "current"), *SIZES]
    codes, accounts = [], []
    for horizon in ("1", "1e15"):
        codes.append(main(plan(run_dir, "next", *changed, "--horizon-tokens", horizon)))
        accounts.append(json.loads(capsys.readouterr().out)["verdict"])
    assert 1 < accounts[0]["effect"]["break_even_tokens"] < 1e15
    assert codes == [1, 0]
    assert main(plan(run_dir, "next", "--horizon-tokens", "5")) == 2
    assert "--horizon-tokens" in capsys.readouterr().err
