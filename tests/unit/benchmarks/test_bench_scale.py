"""Scale on paper: joined routing is recorded routing, and rows agree with closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import scale_checks
from benchmarks.scale_cost import bytes_by_tier, count, seconds, wire_limit_seconds
from benchmarks.scale_models import FABRICS, PUBLISHED
from benchmarks.scale_plan import counted_variants
from benchmarks.scale_routing import RouterShape, blind_trace, joined_trace
from semantic_ep.errors import ConfigError
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology
from tests.unit.plan.synthetic import planted_trace

SENDING = ("routes", "ranks", "forwarded")


def counted_blind(shape, ep_size, nodes, *, tokens_a_rank=400):
    topology = Topology.uniform(ep_size, num_nodes=nodes)
    placement = Placement.contiguous(num_layers=1, num_experts=shape.num_experts, ep_size=ep_size)
    trace = blind_trace(shape, tokens=tokens_a_rank * ep_size, seed=1)
    home = np.repeat(np.arange(ep_size), tokens_a_rank)
    return count(placement, trace, home, topology), topology


def test_joined_experts_keep_the_company_that_was_recorded():
    recorded = planted_trace(layers=4, experts=16, top_k=2)
    joined = joined_trace(recorded, RouterShape(num_experts=32, top_k=4), layers=2, seed=3)
    assert joined.experts.shape == (recorded.num_tokens, 2, 4)
    for layer, parts in ((0, (0, 2)), (1, (1, 3))):
        # One new number for each recorded (layer, expert), the same for every token.
        numbers = {}
        for token in range(200):
            old = {(part, int(e)) for part in parts for e in recorded.experts[token, part]}
            new = set(joined.experts[token, layer].tolist())
            for pair in old:
                numbers[pair] = numbers.get(pair, new) & new
        assert all(numbers.values())


def test_a_group_limited_token_stays_in_its_groups():
    shape = RouterShape(num_experts=32, top_k=4, groups=4, top_groups=2)
    for trace in (
        joined_trace(
            planted_trace(layers=2, experts=32, top_k=8, topics=2), shape, layers=1, seed=0
        ),
        blind_trace(shape, tokens=500, seed=0),
    ):
        groups = trace.experts[:, 0] // 8
        assert max(len(set(row)) for row in groups.tolist()) <= 2


def test_a_shape_that_cannot_be_joined_is_refused():
    recorded = planted_trace(layers=2, experts=16, top_k=2)
    for shape in (RouterShape(num_experts=24, top_k=2), RouterShape(num_experts=32, top_k=8)):
        with pytest.raises(ConfigError, match="cannot be joined"):
            joined_trace(recorded, shape, layers=1, seed=0)


def test_counted_rows_of_blind_routing_agree_with_the_closed_form():
    shape = RouterShape(num_experts=256, top_k=8)
    counted, topology = counted_blind(shape, 8, 1)
    assert counted.cost.remote_copies[0] == pytest.approx(4.63, abs=0.05)  # kernels' limit
    limit = wire_limit_seconds(
        shape, 8, tokens=4096, row_bytes=2, wire_intra=topology.intra_node.gigabytes_per_second,
        wire_inter=1.0,
    )  # fmt: skip
    predicted = seconds(counted, topology, sending="ranks", tokens=4096, row_bytes=2)
    latency = 2e-6 * topology.intra_node.latency_microseconds
    assert predicted - latency == pytest.approx(limit, rel=0.03)


def test_each_step_of_de_duplication_sends_less_between_nodes():
    counted, topology = counted_blind(RouterShape(num_experts=64, top_k=8), 16, 4)
    between = [bytes_by_tier(counted, topology, sending=way, row_bytes=1)[1] for way in SENDING]
    assert between[0] == pytest.approx(8 * 12 / 16, rel=0.02)
    assert between[0] > between[1] > between[2]
    assert between[2] == pytest.approx(counted.cost.node_copies[0], rel=1e-9)
    times = [
        seconds(counted, topology, sending=way, tokens=4096, row_bytes=1000) for way in SENDING
    ]
    assert times[0] > times[1] > times[2]


def test_forwarding_neither_loses_nor_invents_rows():
    counted, topology = counted_blind(RouterShape(num_experts=32, top_k=4), 8, 2)
    inside, _ = bytes_by_tier(counted, topology, sending="forwarded", row_bytes=1)
    direct, between = bytes_by_tier(counted, topology, sending="ranks", row_bytes=1)
    # Every row of a distinct rank is delivered inside a node, but for those that enter at their
    # destination: one in four here.
    assert inside == pytest.approx(direct + 3 / 4 * between, rel=0.02)


def test_parts_of_a_plan_add_up_on_planted_routing():
    trace = planted_trace(requests=120, layers=1)
    counted = counted_variants(trace, FABRICS[0].topology(4), seed=0)
    copies = {name: float(entry.cost.remote_copies[0]) for name, entry in counted.items()}
    assert copies["placement + schedule"] < copies["placement"] < copies["contiguous"]
    assert copies["copies"] < copies["placement"]


@pytest.mark.parametrize("ep_size", [16, 32])
def test_predictions_meet_published_low_latency_figures(ep_size):
    entries = [e for e in PUBLISHED if e.kernel == "low latency" and e.ep_size == ep_size]
    assert len(entries) == 2
    for entry in entries:
        assert abs(scale_checks.compare(entry, seed=0)["error"]) < 0.12
