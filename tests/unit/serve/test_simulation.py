"""The serving simulator: its times can be worked out by hand, and schedulers matter in it."""

import dataclasses

import numpy as np
import pytest

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.cost import evaluate, link_seconds, transfer_seconds
from semantic_ep.plan.policies import policy
from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.scheduling.cost import Accelerator, ModelSize, ServingCost
from semantic_ep.serve.scheduling.make import POLICIES, make_scheduler
from semantic_ep.serve.simulation.metrics import Objective, latencies, summary
from semantic_ep.serve.simulation.routing import RequestRouting, occurrences
from semantic_ep.serve.simulation.simulator import Arrival, RankLimits, replay
from semantic_ep.topology import LINKS, Topology
from tests.unit.plan.synthetic import planted_trace

RANKS = 2
LIMITS = RankLimits(
    kv_tokens=512, max_sequences=4, max_step_tokens=64, prefix_tokens=256, prefix_block_size=8
)


@pytest.fixture(scope="module")
def cost():
    return ServingCost(
        model=ModelSize(
            dense_parameters=1_000_000,
            expert_parameters=100_000,
            num_layers=2,
            num_experts=16,
            top_k=2,
            hidden_size=8192,
            kv_bytes_per_token=1000,
        ),
        accelerator=Accelerator(
            teraflops=0.1, gigabytes_per_second=10, step_overhead_microseconds=50
        ),
        topology=Topology.uniform(RANKS, intra_node=LINKS["ethernet_25g"]),
    )


@pytest.fixture(scope="module")
def planned():
    profile = RoutingProfile.from_trace(planted_trace(requests=200, seed=1))
    placement = policy("semantic-requests").place(profile, ep_size=RANKS)
    return placement, Schedule.from_profile(profile, placement)


@pytest.fixture(scope="module")
def trace():
    return planted_trace(requests=80, seed=2)


def arrivals_of(trace, *, gap, new_tokens=8):
    bounds = zip(trace.offsets[:-1], trace.offsets[1:], strict=True)
    return [
        Arrival(
            seconds=number * gap,
            request=EngineRequest(
                id=str(number),
                prompt_token_ids=trace.token_id[start:end].tolist(),
                sampling=SamplingParams(max_tokens=16),
            ),
            new_tokens=new_tokens,
        )
        for number, (start, end) in enumerate(bounds)
    ]


def routing_of(trace, placement):
    bounds = zip(trace.offsets[:-1], trace.offsets[1:], strict=True)
    return RequestRouting.of(placement, trace, [np.arange(a, b) for a, b in bounds])


def run(name, arrivals, planned, trace, cost, limits=LIMITS):
    placement, schedule = planned
    scheduler = make_scheduler(
        name,
        ep_size=RANKS,
        schedule=schedule,
        top_k=2,
        cost=cost,
        prefix_block_size=limits.prefix_block_size,
        prefix_tokens_per_rank=limits.prefix_tokens,
        max_sequences=limits.max_sequences,
    )
    return replay(arrivals, scheduler, routing_of(trace, placement), cost, limits)


def test_a_request_alone_takes_what_the_cost_model_says(planned, trace, cost):
    alone = trace.select_requests([0])
    result = run("round-robin", arrivals_of(alone, gap=0), planned, alone, cost)
    tokens = alone.num_tokens
    routing = routing_of(alone, planned[0])
    assert tokens <= LIMITS.max_step_tokens

    def step(count):
        busiest = routing.activations_RLG[0].max(axis=1) * count
        experts = np.maximum(
            busiest * cost.seconds_per_activation, cost.expert_weight_seconds
        ).sum()
        dense = max(count * cost.seconds_per_dense_token, cost.dense_weight_seconds)
        rows = np.zeros((2, RANKS, RANKS))
        rows[:, 0] = routing.hits_RLG[0] * count
        return 50e-6 + dense + experts + link_seconds(rows, cost.topology, row_bytes=cost.row_bytes)

    assert result.first_token[0] == pytest.approx(step(tokens), rel=1e-5)
    # The cache grows by one position a step; passing several at once reads it at its first size.
    decode = (result.ended[0] - result.first_token[0]) / 7
    least = step(1) + tokens * cost.seconds_per_kv_token
    assert least * (1 - 1e-5) <= decode <= least + 7 * cost.seconds_per_kv_token


def test_remote_copies_and_lar_are_those_of_the_cost_model(planned, trace, cost):
    limits = dataclasses.replace(LIMITS, prefix_tokens=0)
    result = run("least-loaded", arrivals_of(trace, gap=0.001), planned, trace, cost, limits)
    home = np.repeat(result.rank, np.diff(trace.offsets))
    counted = evaluate(planned[0], trace, home)
    row = summary(result, RANKS)
    assert row["lar"] == pytest.approx(counted.lar.mean(), rel=1e-4)
    assert row["remote_copies"] == pytest.approx(counted.remote_copies.mean(), rel=1e-4)


def test_expected_rows_take_as_long_as_counted_ones(planned, trace, cost):
    home = np.arange(trace.num_tokens) % RANKS
    counted = evaluate(planned[0], trace, home)
    assert link_seconds(
        counted.rows_between_ranks.astype(float), cost.topology, row_bytes=cost.row_bytes
    ) == transfer_seconds(counted, cost.topology, row_bytes=cost.row_bytes)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_every_request_in_possible_order(name, planned, trace, cost):
    arrivals = arrivals_of(trace, gap=0.0002)
    result = run(name, arrivals, planned, trace, cost)
    assert (result.arrived <= result.assigned).all()
    assert (result.assigned < result.first_token).all()
    assert (result.first_token < result.ended).all()
    again = run(name, arrivals, planned, trace, cost)
    assert np.array_equal(result.ended, again.ended)
    assert np.array_equal(result.rank, again.rank)


def test_a_single_new_token_ends_with_the_prompt(planned, trace, cost):
    result = run("round-robin", arrivals_of(trace, gap=0.001, new_tokens=1), planned, trace, cost)
    assert np.array_equal(result.first_token, result.ended)
    assert (latencies(result)["tpot"] == 0).all()


def test_heavier_load_takes_longer(planned, trace, cost):
    slow, fast = (
        summary(run("least-loaded", arrivals_of(trace, gap=gap), planned, trace, cost), RANKS)
        for gap in (0.05, 0.0001)
    )
    assert fast["ttft_p50_ms"] > 2 * slow["ttft_p50_ms"]
    assert fast["requests_per_second"] > slow["requests_per_second"]


def test_semantic_sends_fewer_copies_and_answers_sooner(planned, trace, cost):
    rows = {
        name: summary(
            run(name, arrivals_of(trace, gap=0.004), planned, trace, cost),
            RANKS,
            Objective(ttft_seconds=0.05, tpot_seconds=0.01),
        )
        for name in ("semantic", "round-robin")
    }
    assert rows["semantic"]["remote_copies"] < 0.8 * rows["round-robin"]["remote_copies"]
    assert rows["semantic"]["lar"] > 1.2 * rows["round-robin"]["lar"]
    assert rows["semantic"]["e2e_mean_ms"] < rows["round-robin"]["e2e_mean_ms"]
    assert rows["semantic"]["goodput"] >= rows["round-robin"]["goodput"]


def test_a_repeated_prompt_is_found_in_the_prefix_cache(planned, trace, cost):
    twice = trace.select_requests([3, 3])
    result = run("prefix-only", arrivals_of(twice, gap=1.0), planned, twice, cost)
    assert result.cached_tokens.tolist() == [0, 40]  # Whole blocks of 8, but not the last token.
    assert np.diff(latencies(result)["ttft"]) < 0


def test_tokens_take_a_route_recorded_for_their_id(trace):
    ids = np.array([5, 5, 17, 10_000])
    found = occurrences(trace, ids, np.random.default_rng(0))
    assert trace.token_id[found[:3]].tolist() == [5, 5, 17]
    assert 0 <= found[3] < trace.num_tokens
