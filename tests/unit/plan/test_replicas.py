"""Spare slots get the copies that save most traffic, or level most load."""

import numpy as np
import pytest
from scipy import sparse

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import PlacementError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.baselines import contiguous_placement, random_placement
from semantic_ep.plan.cost import evaluate, nearest_copy
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import PlacementPolicy, policy
from semantic_ep.plan.replicas import (
    WithReplicas,
    _Copies,
    _HomeTraffic,
    add_replicas,
    serving_ranks,
)
from semantic_ep.plan.schedule import rank_shares
from semantic_ep.plan.verdict import home_ranks
from semantic_ep.topology import Topology
from tests.unit.plan.synthetic import planted_trace

LAYERS, EXPERTS, RANKS = 2, 8, 4


@pytest.fixture(scope="module")
def trace():
    """Every id has its own two experts in each layer, so routes are known for certain."""
    rng = np.random.default_rng(0)
    route_of_id = rng.random((30, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :2]
    ids = rng.choice(30, 1500, p=rng.dirichlet(np.ones(30)))
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="toy", layer_ids=(0, 1), num_experts=EXPERTS, top_k=2
        ),
        experts=route_of_id[ids].astype(np.uint8),
        offsets=np.arange(0, 1501, 100),
        token_id=ids.astype(np.int32),
    )


@pytest.fixture(scope="module")
def profile(trace):
    return RoutingProfile.from_trace(trace)


@pytest.fixture
def plain():
    return contiguous_placement(num_layers=LAYERS, num_experts=EXPERTS, ep_size=RANKS)


def best_homes(trace, profile, placement):
    """[N, L] rank with most of a token's expected experts, as the schedule chooses."""
    shares = [rank_shares(profile, placement, layer)[0] for layer in range(LAYERS)]
    return np.stack([share[trace.token_id].argmax(axis=1) for share in shares], axis=1)


@pytest.mark.parametrize(("nodes", "scheduled"), [(1, 1.0), (1, 0.0), (2, 0.0)])
def test_saved_rows_are_those_of_every_rank_that_a_copy_changes(
    trace, profile, plain, nodes, scheduled
):
    """A copy keeps rows at home, and may cost ranks that it serves from now on some."""
    topology = Topology.uniform(RANKS, num_nodes=nodes)
    traffic = _HomeTraffic.of_layer(profile, plain, 0, scheduled=scheduled)
    copies = _Copies(traffic, plain.expert_on_rank[0], topology.nodes)
    own = plain.physical_to_logical_map.reshape(LAYERS, RANKS, -1)
    mixes = [np.full(trace.num_tokens, rank) for rank in range(RANKS)]
    mixes = [best_homes(trace, profile, plain)] if scheduled == 1 else mixes
    added = [(7, 1)]  # (expert, rank): a first copy, to start from
    copies.add(*added[0])

    def rows(extra):
        spare = np.full((LAYERS, RANKS, 2), -1)
        for column, (expert, rank) in enumerate(extra):
            spare[0, rank, column] = expert
        placement = Placement(
            physical_to_logical_map=np.concatenate([own, spare], axis=2).reshape(LAYERS, -1),
            num_experts=EXPERTS,
            ep_size=RANKS,
        )
        costs = [evaluate(placement, trace, homes, topology=topology) for homes in mixes]
        return np.mean([cost.remote_copies[0] for cost in costs]) * trace.num_tokens

    before = rows(added)
    changes = []
    for rank in range(RANKS):
        saved = copies.saved_rows(rank)
        for expert in np.flatnonzero(~copies.held[:, rank]):
            changes.append(before - rows([*added, (int(expert), rank)]))
            assert saved[expert] == pytest.approx(changes[-1], abs=0.02)
    assert max(changes) > 0
    assert scheduled or nodes > 1 or min(changes) < 0


def test_copies_do_not_raise_traffic_where_home_ranks_ignore_affinity():
    """A copy that parts experts used together, for ranks that have neither, costs rows there."""
    trace = planted_trace(seed=1)
    profile = RoutingProfile.from_trace(trace)
    single = policy("semantic").place(profile, ep_size=4)
    home = home_ranks(trace, single, None, "tokens")
    copied = add_replicas(single, profile, slots_per_rank=2, scheduled=0.0)
    before, after = (evaluate(one, trace, home).mean() for one in (single, copied))
    assert after["remote_copies"] < before["remote_copies"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_copies_serve_tokens_by_the_rule_of_the_cost_model(nodes):
    rng = np.random.default_rng(3)
    start = random_placement(num_layers=1, num_experts=EXPERTS, ep_size=RANKS, seed=3)
    held = start.expert_on_rank[0] | (rng.random((EXPERTS, RANKS)) < 0.3)
    room = int(held.sum(axis=0).max())
    rows = [np.flatnonzero(held[:, rank]) for rank in range(RANKS)]
    table = [np.pad(row, (0, room - len(row)), constant_values=-1) for row in rows]
    placement = Placement(
        physical_to_logical_map=np.reshape(table, (1, -1)), num_experts=EXPERTS, ep_size=RANKS
    )
    topology = Topology.uniform(RANKS, num_nodes=nodes)
    expected = nearest_copy(placement, 0, node_of_rank=topology.nodes) // room
    np.testing.assert_array_equal(serving_ranks(held, topology.nodes), expected)


def test_copies_for_traffic_save_more_rows_than_copies_of_the_hottest_experts(
    trace, profile, plain
):
    ours = add_replicas(plain, profile, slots_per_rank=1, load_weight=0)
    own = plain.physical_to_logical_map.reshape(LAYERS, RANKS, -1)
    by_load = np.argsort(-profile.load, axis=1)
    hottest = [
        [[next(e for e in order if e not in held)] for held in row]
        for order, row in zip(by_load, own)
    ]
    naive = Placement(
        physical_to_logical_map=np.concatenate([own, hottest], axis=2).reshape(LAYERS, -1),
        num_experts=EXPERTS,
        ep_size=RANKS,
    )
    homes = best_homes(trace, profile, plain)
    copies = [evaluate(p, trace, homes).mean()["remote_copies"] for p in (plain, naive, ours)]
    assert copies[2] < copies[1] < copies[0]


def test_load_weight_levels_the_busiest_rank(trace, profile, plain):
    homes = best_homes(trace, profile, plain)
    load = [
        evaluate(
            add_replicas(plain, profile, slots_per_rank=1, load_weight=weight), trace, homes
        ).mean()["load_max_over_mean"]
        for weight in (0.0, 100.0)
    ]
    assert load[1] < load[0]


def test_with_room_for_every_expert_nothing_is_remote(trace, profile, plain):
    full = add_replicas(plain, profile, slots_per_rank=EXPERTS - 2)
    assert evaluate(full, trace, best_homes(trace, profile, plain)).remote_copies.max() == 0


def test_each_rank_gets_its_slots_filled_with_experts_it_lacked(profile, plain):
    placement = add_replicas(plain, profile, slots_per_rank=2, topology=Topology.uniform(RANKS))
    assert placement.slots_per_rank == plain.slots_per_rank + 2
    assert (placement.physical_to_logical_map >= 0).all()
    assert placement.logical_count.sum(axis=1).tolist() == [EXPERTS + 2 * RANKS] * LAYERS


def test_without_a_schedule_every_rank_sees_the_same_mix(profile, plain):
    traffic = _HomeTraffic.of_layer(profile, plain, 0, scheduled=0.0)
    np.testing.assert_allclose(traffic.load_GE, traffic.load_GE[:1].repeat(RANKS, axis=0))
    np.testing.assert_allclose(traffic.load_GE.sum(axis=0), profile.load[0])


def test_a_rank_without_any_token_at_home_is_no_trouble(plain):
    empty = _HomeTraffic([sparse.csr_array((0, EXPERTS))] * RANKS, [np.zeros(0)] * RANKS)
    copies = _Copies(empty, plain.expert_on_rank[0], np.zeros(RANKS, dtype=int))
    assert copies.saved_rows(0).tolist() == [0.0] * EXPERTS


@pytest.mark.parametrize("slots", [-1, EXPERTS])
def test_more_slots_than_experts_left_are_refused(profile, plain, slots):
    with pytest.raises(PlacementError, match="redundant"):
        add_replicas(plain, profile, slots_per_rank=slots)


def test_replicas_are_not_added_twice(profile, plain):
    once = add_replicas(plain, profile, slots_per_rank=1)
    with pytest.raises(PlacementError, match="single copies"):
        add_replicas(once, profile, slots_per_rank=1)


def test_a_policy_with_replicas_is_a_policy(profile):
    chosen = WithReplicas(policy=policy("eplb"), slots_per_rank=1)
    assert isinstance(chosen, PlacementPolicy)
    assert chosen.name == "eplb+replicas"
    assert chosen.place(profile, ep_size=RANKS).has_replicas
