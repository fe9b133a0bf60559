from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.errors import ConfigError, PlacementError
from semantic_ep.plan.cost import (
    evaluate,
    nearest_copy,
    remote_copies_by_token,
    transfer_seconds,
)
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology
from tests.unit.plan.synthetic import random_trace


def _random_case(seed: int, *, replicas: bool):
    rng = np.random.default_rng(seed)
    trace = random_trace(tokens=40, layers=2, experts=8, top_k=3, rng=rng)
    rows = []
    for _ in range(2):
        slots = rng.permutation(8).reshape(4, 2)
        if replicas:
            extra = [rng.choice(np.setdiff1d(np.arange(8), held)) for held in slots]
            slots = np.hstack([slots, np.array(extra)[:, None]])
        rows.append(slots.ravel())
    placement = Placement(physical_to_logical_map=np.stack(rows), num_experts=8, ep_size=4)
    return trace, placement, rng.integers(4, size=(40, 2))


def _count_by_hand(placement, trace, home, nodes):
    """Token by token, with sets: the definitions as a reader would apply them."""
    layers = placement.num_layers
    lar, copies, node_copies = np.zeros(layers), np.zeros(layers), np.zeros(layers)
    load = np.zeros((layers, placement.ep_size))
    for layer in range(layers):
        for token in range(trace.num_tokens):
            here = int(home[token, layer])
            ranks = []
            for expert in trace.experts[token, layer]:
                held = np.flatnonzero(placement.expert_on_rank[layer, expert])
                near = [rank for rank in held if nodes[rank] == nodes[here]]
                pool = [here] if here in held else (near or list(held))
                ranks.append(pool[here % len(pool)])
                load[layer, ranks[-1]] += 1
            lar[layer] += sum(rank == here for rank in ranks)
            copies[layer] += len(set(ranks) - {here})
            node_copies[layer] += len({nodes[rank] for rank in ranks} - {nodes[here]})
    tokens = trace.num_tokens
    return (
        lar / tokens / trace.fingerprint.top_k,
        copies / tokens,
        node_copies / tokens,
        load.max(axis=1) / load.mean(axis=1),
    )


@given(seed=st.integers(0, 10_000), replicas=st.booleans())
@settings(max_examples=25, deadline=None)
def test_evaluate_agrees_with_counting_token_by_token(seed, replicas):
    trace, placement, home = _random_case(seed, replicas=replicas)
    topology = Topology.uniform(4, num_nodes=2)
    cost = evaluate(placement, trace, home, topology=topology)
    lar, copies, node_copies, load = _count_by_hand(placement, trace, home, topology.node_of_rank)
    np.testing.assert_allclose(cost.lar, lar)
    np.testing.assert_allclose(cost.remote_copies, copies)
    np.testing.assert_allclose(cost.node_copies, node_copies)
    np.testing.assert_allclose(cost.load_max_over_mean, load)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_rows_between_ranks_add_up_to_the_remote_copies(seed):
    trace, placement, home = _random_case(seed, replicas=False)
    cost = evaluate(placement, trace, home)
    off_diagonal = (
        cost.rows_between_ranks.sum() - np.trace(cost.rows_between_ranks, axis1=1, axis2=2).sum()
    )
    assert off_diagonal == pytest.approx(cost.remote_copies.sum() * trace.num_tokens)
    by_token = remote_copies_by_token(placement, trace, home)
    assert by_token.mean() == pytest.approx(cost.remote_copies.mean())


def test_a_rank_with_a_copy_serves_itself():
    placement = Placement(
        physical_to_logical_map=np.array([[0, 1, 2, 1, 2, 3]]), num_experts=4, ep_size=2
    )
    slots = nearest_copy(placement, 0)
    assert slots[0, 1] == 1
    assert slots[1, 1] == 3


def test_one_home_for_all_layers_equals_that_home_repeated():
    trace, placement, home = _random_case(3, replicas=False)
    once = evaluate(placement, trace, home[:, 0])
    repeated = evaluate(placement, trace, np.repeat(home[:, :1], 2, axis=1))
    np.testing.assert_array_equal(once.rows_between_ranks, repeated.rows_between_ranks)


def test_all_gather_costs_the_same_whatever_the_placement():
    trace, placement, home = _random_case(1, replicas=False)
    other = Placement.contiguous(num_layers=2, num_experts=8, ep_size=4)
    topology = Topology.uniform(4)
    seconds = {
        transfer_seconds(evaluate(one, trace, home), topology, row_bytes=4096, runtime="all-gather")
        for one in (placement, other)
    }
    assert len(seconds) == 1


def test_slower_links_between_nodes_cost_time_only_where_nodes_are_crossed():
    trace, placement, home = _random_case(2, replicas=False)
    cost = evaluate(placement, trace, home)
    one_node = transfer_seconds(cost, Topology.uniform(4), row_bytes=2**20)
    two_nodes = transfer_seconds(cost, Topology.uniform(4, num_nodes=2), row_bytes=2**20)
    assert two_nodes > one_node > 0


def test_mismatched_shapes_are_refused_with_both_sizes():
    trace, placement, home = _random_case(2, replicas=False)
    with pytest.raises(PlacementError, match=r"home ranks of shape \(39, 2\)"):
        evaluate(placement, trace, home[:-1])
    with pytest.raises(PlacementError, match="home rank does not exist"):
        evaluate(placement, trace, home + 4)
    with pytest.raises(ConfigError, match="unknown runtime"):
        transfer_seconds(
            evaluate(placement, trace, home), Topology.uniform(4), row_bytes=1, runtime="magic"
        )
