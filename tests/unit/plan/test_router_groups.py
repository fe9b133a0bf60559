"""Plans for group-limited routers keep router groups whole, and still pay."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.apply.families import RouterGroups
from semantic_ep.apply.layout import Layout
from semantic_ep.cli import main
from semantic_ep.errors import PlacementError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.assignment import assign_in_groups
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.load_budget import LoadBudget
from semantic_ep.plan.plan import Plan
from semantic_ep.plan.samples import sample_layer
from semantic_ep.plan.search import SwapSearch
from semantic_ep.plan.solver import SemanticPolicy
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.topology import Topology
from tests.unit.plan.synthetic import planted_trace, random_trace

FAST = SemanticPolicy(starts=2, searches=2, steps=80)
# (router groups, EP ranks, nodes) for 16 experts, every way in which they can be nested.
NESTINGS = [
    (groups, ranks, nodes)
    for groups, ranks, nodes in itertools.product((2, 4, 8), (2, 4, 8), (1, 2, 4))
    if nodes <= ranks
]


def check_legal(placement, fingerprint, groups):
    layout = Layout.from_placement(placement, fingerprint)
    layout.check_router(RouterGroups(num_groups=groups, topk_group=1))


@pytest.fixture(scope="module")
def profile():
    rng = np.random.default_rng(5)
    return RoutingProfile.from_trace(
        random_trace(tokens=700, layers=2, experts=16, top_k=3, rng=rng)
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NESTINGS), st.sampled_from(["tokens", "requests"]), st.integers(0, 99))
def test_every_plan_is_one_that_a_checkpoint_can_carry(profile, nesting, mode, seed):
    groups, ranks, nodes = nesting
    policy = dataclasses.replace(FAST, mode=mode, router_groups=groups, steps=20)
    topology = Topology.uniform(ranks, num_nodes=nodes)
    placement = policy.place(profile, ep_size=ranks, seed=seed, topology=topology)
    check_legal(placement, profile.fingerprint, groups)


def searches(profile, policy, ranks_LE, *, ep_size, seed):
    """One search a layer that values placements as the solver does, given its placements."""
    budget = LoadBudget(profile, ep_size=ep_size, allowed=policy.max_load, seed=seed)
    for layer in range(profile.fingerprint.num_layers):
        sample = sample_layer(profile, None, layer, ep_size=ep_size, seed=seed)
        yield SwapSearch(
            sample.expected_NE,
            sample.active_NE,
            sample.load_E,
            ep_size=ep_size,
            top_k=sample.top_k,
            batches=1,
            load_cap=budget.cap(),
            pairs_EE=sample.pairs_EE,
        )
        budget.spend(layer, ranks_LE[layer])


@settings(max_examples=6, deadline=None)
@given(st.sampled_from([(2, 4), (2, 8), (4, 8), (4, 2), (8, 4)]), st.integers(0, 99))
def test_a_legal_plan_is_never_worse_than_contiguous_placement(profile, nesting, seed):
    groups, ranks = nesting
    policy = dataclasses.replace(FAST, router_groups=groups)
    ours = policy.place(profile, ep_size=ranks, seed=seed).rank_of_expert
    contiguous = np.arange(16) * ranks // 16
    for layer, search in enumerate(searches(profile, policy, ours, ep_size=ranks, seed=seed)):
        assert search.start(ours[layer]) >= search.start(contiguous) - 1e-6


def test_the_best_legal_placement_is_found_on_small_instances():
    within = list(itertools.combinations(range(4), 2))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        trace = random_trace(tokens=300, layers=1, experts=8, top_k=2, rng=rng)
        profile = RoutingProfile.from_trace(trace)
        policy = dataclasses.replace(FAST, router_groups=2)
        ours = policy.place(profile, ep_size=4, seed=seed).rank_of_expert
        (search,) = searches(profile, policy, ours, ep_size=4, seed=seed)
        values = []
        for first, second in itertools.product(within, within):
            rank_E = np.array([int(e in first) for e in range(4)] + [0] * 4)
            rank_E[4:] = [2 + int(e in second) for e in range(4)]
            values.append(search.start(rank_E))
        assert search.start(ours[0]) >= max(values) - 1e-3


@pytest.mark.parametrize("mode", ["tokens", "requests"])
def test_groups_of_one_expert_bind_nothing(profile, mode):
    free = dataclasses.replace(FAST, mode=mode)
    bound = dataclasses.replace(free, router_groups=16)
    first, second = (policy.place(profile, ep_size=4, seed=3) for policy in (free, bound))
    np.testing.assert_array_equal(first.rank_of_expert, second.rank_of_expert)


def test_whole_groups_that_are_used_together_share_a_rank():
    """Tokens of topic t use groups t and t + 4, which contiguous placement keeps apart."""
    rng = np.random.default_rng(2)
    topic = rng.integers(4, size=1200)
    members = rng.integers(2, size=(1200, 2, 2))
    experts = 2 * (topic[:, None, None] + np.array([0, 4])) + members
    plain = random_trace(tokens=1200, layers=2, experts=16, top_k=2, rng=rng)
    trace = dataclasses.replace(plain, experts=experts.astype(np.uint8), token_id=topic)
    profile = RoutingProfile.from_trace(trace)
    placement = dataclasses.replace(FAST, router_groups=8).place(profile, ep_size=4)
    check_legal(placement, profile.fingerprint, 8)
    home = home_ranks(trace, placement, profile, "tokens")
    assert evaluate(placement, trace, home).mean()["remote_copies"] < 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 200))
def test_groups_take_the_blocks_that_gain_most(seed):
    gain = np.random.default_rng(seed).random((4, 8))
    ours = assign_in_groups(gain, 2)
    index = np.arange(8)
    best = max(
        gain[rank_E, index].sum()
        for flip in (0, 2)
        for one in itertools.combinations(range(4), 2)
        for other in itertools.combinations(range(4, 8), 2)
        for rank_E in [
            np.array(
                [flip + (e in one) for e in range(4)]
                + [2 - flip + (e in other) for e in range(4, 8)]
            )
        ]
    )
    assert gain[ours, index].sum() == pytest.approx(best)


@pytest.mark.parametrize(("groups", "ranks"), [(0, 4), (3, 4), (8, 12)])
def test_groups_that_no_block_of_ranks_can_hold_are_refused(groups, ranks):
    rng = np.random.default_rng(0)
    trace = random_trace(tokens=50, layers=1, experts=24 if ranks == 12 else 16, top_k=2, rng=rng)
    policy = dataclasses.replace(FAST, router_groups=groups)
    with pytest.raises(PlacementError, match="--router-groups"):
        policy.place(RoutingProfile.from_trace(trace), ep_size=ranks)


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}


@pytest.fixture
def plan_command(tmp_path):
    RoutingProfile.from_trace(planted_trace(seed=1)).save(tmp_path / "profile")
    planted_trace(seed=2).save(tmp_path / "holdout")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    command = ["plan", "--profile", str(tmp_path / "profile"), "--ep-size", "4", "--json"]
    return [*command, "-o", str(tmp_path / "plan")]


def test_the_command_reads_the_groups_from_the_models_config(tmp_path, plan_command, capsys):
    code = main([*plan_command, "--router-groups", str(tmp_path / "config.json")])
    account = json.loads(capsys.readouterr().out)["verdict"]
    assert code == (0 if account["worth_it"] else 1)
    plan = Plan.read(tmp_path / "plan")
    check_legal(plan.placement, plan.fingerprint, 4)
    assert {row["policy"] for row in account["policies"]} == {"contiguous", "semantic"}
    main(plan_command)
    free = Plan.read(tmp_path / "plan")
    with pytest.raises(PlacementError, match="--router-groups 4"):
        check_legal(free.placement, free.fingerprint, 4)


@pytest.mark.parametrize(
    "flags", [["--policy", "eplb"], ["--redundant-slots", "4"], ["--current", "plan"]]
)
def test_what_cannot_keep_router_groups_is_refused(tmp_path, plan_command, flags, capsys):
    assert main([*plan_command, "--router-groups", "4", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()
