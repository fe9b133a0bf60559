"""Online scheduling: which rank, how evenly, and that nobody waits forever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ep.errors import ConfigError
from semantic_ep.plan.schedule import Schedule
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.scheduling.affinity import SAMPLED_TOKENS, RankHits
from semantic_ep.serve.scheduling.cost import Accelerator, ModelSize, ServingCost
from semantic_ep.serve.scheduling.make import POLICIES, make_scheduler
from semantic_ep.serve.scheduling.policies import Candidate, GroupLoad, Semantic
from semantic_ep.serve.scheduling.prefix import Prefix, PrefixIndex, blocks_of, stretches_of
from semantic_ep.serve.stats import RankLoad
from semantic_ep.topology import LINKS, Topology

KV = 1000


def serving_cost(ep_size=4, *, link="pcie4", nodes=1):
    return ServingCost(
        model=ModelSize(
            dense_parameters=1_000_000_000,
            expert_parameters=8_000_000,
            num_layers=26,
            num_experts=64,
            top_k=6,
            hidden_size=2048,
            kv_bytes_per_token=31_104,
        ),
        accelerator=Accelerator(teraflops=400, gigabytes_per_second=2500),
        topology=Topology.uniform(ep_size, num_nodes=nodes, intra_node=LINKS[link]),
    )


def schedule(request_affinity):
    affinity = np.asarray(request_affinity, dtype=np.float16)
    empty = np.zeros((1, len(affinity)), dtype=np.int8)
    return Schedule(token_to_rank=empty, confidence=empty.view(np.uint8), request_affinity=affinity)


def scheduler(name, *, ep_size=4, **options):
    prefers = np.full((ep_size, ep_size), 0.1) + np.eye(ep_size) * 0.6
    options = {"schedule": schedule(prefers), "top_k": 6, "cost": serving_cost(ep_size)} | options
    return make_scheduler(name, ep_size=ep_size, **options)


def request(name, prompt, *, max_tokens=10):
    return EngineRequest(
        id=str(name), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens)
    )


def idle(ranks=4, kv=KV):
    return [RankLoad(kv_tokens_total=kv)] * ranks


def ranks_of(queue, prompts, ranks=None):
    """Hand over requests one after another; nothing runs meanwhile."""
    ranks = idle() if ranks is None else ranks
    chosen = []
    for number, prompt in enumerate(prompts):
        queue.add(request(number, prompt), now=0.0)
        chosen += [a.rank for a in queue.assign(ranks, now=0.0)]
    return chosen


def test_round_robin_takes_ranks_in_turn():
    assert ranks_of(scheduler("round-robin"), [[0]] * 6) == [0, 1, 2, 3, 0, 1]


def test_least_loaded_balances_tokens_not_requests():
    prompts = [[0] * 300, [0] * 10, [0] * 10, [0] * 10, [0] * 10, [0] * 10]
    assert 0 not in ranks_of(scheduler("least-loaded"), prompts)[1:]


def test_prefix_only_returns_to_the_rank_that_has_the_prompt():
    queue = scheduler("prefix-only", prefix_tokens_per_rank=500, prefix_block_size=4)
    first, other, again = ranks_of(queue, [[1] * 40, [2] * 40, [1] * 60])
    assert again == first != other


def test_the_window_rule_covers_every_rank_before_any_rank_twice():
    assert sorted(ranks_of(scheduler("semantic-window"), [[2]] * 4)) == [0, 1, 2, 3]
    assert ranks_of(scheduler("semantic-window"), [[2], [1]]) == [2, 1]


def test_semantic_goes_where_the_experts_are():
    assert ranks_of(scheduler("semantic"), [[3] * 50, [1] * 50]) == [3, 1]


def test_semantic_leaves_a_rank_whose_queue_costs_more_than_its_experts_save():
    busy = idle()
    busy[3] = RankLoad(pending_tokens=500, running=2, kv_tokens_total=KV)
    assert ranks_of(scheduler("semantic"), [[3] * 50], busy) != [3]
    busy[3] = RankLoad(pending_tokens=2, running=1, kv_tokens_total=KV)
    assert ranks_of(scheduler("semantic"), [[3] * 50], busy) == [3]


def test_semantic_prefers_a_cached_prefix_to_local_experts_when_it_saves_more_time():
    policy = Semantic(serving_cost(2))
    load = GroupLoad(work_2G=np.zeros((2, 2)), sequences_G=np.zeros(2), kv_total_G=np.zeros(2))

    def best(cached):
        hits = np.array([0.9, 0.5], dtype=np.float32)
        return policy.costs(
            Candidate(
                prompt_tokens=100,
                new_tokens=5.0,
                hits_G=hits,
                new_hits_G=hits,
                cached_G=np.array(cached),
            ),
            load,
        ).argmin()

    assert best([0, 0]) == 0
    assert best([0, 90]) == 1


def test_generated_tokens_go_by_the_plan_of_their_own_where_there_is_one():
    prompts, generated = schedule([[0.9, 0.1]]), schedule([[0.1, 0.9]])

    def rank_of(prompt, new_tokens):
        queue = make_scheduler(
            "semantic",
            ep_size=2,
            schedule=prompts,
            decode_schedule=generated,
            top_k=1,
            cost=serving_cost(2),
        )
        sampling = SamplingParams(max_tokens=new_tokens)
        queue.add(EngineRequest(id="a", prompt_token_ids=prompt, sampling=sampling), now=0)
        (assigned,) = queue.assign([RankLoad(kv_tokens_total=10**6)] * 2, now=0)
        queue.replan(generated, prompts)
        queue.add(EngineRequest(id="b", prompt_token_ids=prompt, sampling=sampling), now=0)
        (after,) = queue.assign([RankLoad(kv_tokens_total=10**6)] * 2, now=0)
        assert after.rank == 1 - assigned.rank
        return assigned.rank

    assert rank_of([0] * 100, new_tokens=10) == 0
    assert rank_of([0] * 10, new_tokens=100) == 1


def test_semantic_costs_are_seconds_of_the_links_that_copies_cross():
    cost = serving_cost(4, nodes=2)
    bytes_per_copy = 2 * 26 * 2048 * 2
    assert cost.copy_seconds_GG[0, 1] == pytest.approx(bytes_per_copy / 20e9)
    assert cost.copy_seconds_GG[0, 2] == pytest.approx(bytes_per_copy / 42e9)
    assert not cost.copy_seconds_GG.diagonal().any()


def test_long_prompts_are_sampled_close_to_their_mean():
    rng = np.random.default_rng(0)
    hits = RankHits.from_schedule(schedule(rng.dirichlet(np.ones(8), size=500)), top_k=2)
    ids = rng.integers(500, size=SAMPLED_TOKENS * 9)
    exact = hits.table_VG[ids].mean(axis=0) / 255
    assert np.abs(hits.of_prompt(ids.tolist()) - exact).max() < 0.05


def test_unknown_token_ids_tell_nothing():
    hits = RankHits.from_schedule(schedule([[0.7, 0.3], [0.2, 0.8]]), top_k=1)
    assert hits.of_prompt([-1, 2, 10**6]).tolist() == [0, 0]
    assert np.allclose(hits.of_prompt([-1, 0, 2]), [0.7, 0.3], atol=0.01)


def test_prefixes_are_forgotten_from_their_end_and_by_rank():
    index = PrefixIndex(ep_size=2, block_size=2, tokens_per_rank=6)
    prefix = blocks_of([1, 2, 3, 4, 5, 6, 7], 2)
    index.insert(prefix, 0)
    index.insert(Prefix(keys=prefix.keys[:1], ends=prefix.ends[:1]), 1)
    assert index.cached_tokens(prefix).tolist() == [6, 2]
    index.insert(blocks_of([9, 9, 9], 2), 0)
    assert index.cached_tokens(prefix).tolist() == [4, 2]


@pytest.mark.parametrize("of", [blocks_of, stretches_of])
def test_a_prompt_is_never_cached_to_its_last_token(of):
    assert list(of([1, 2, 3, 4], 2).ends) == [2]
    assert list(of([1, 2, 3, 4, 5], 2).ends) == [2, 4]
    assert list(of([1, 2], 2).ends) == list(of([], 2).ends) == []


@given(shared=st.integers(0, 400), first=st.integers(1, 100), second=st.integers(1, 100))
def test_stretches_find_most_of_what_two_prompts_share_and_hardly_more(shared, first, second):
    index = PrefixIndex(ep_size=1, block_size=2, tokens_per_rank=10**6)
    common = list(range(shared))
    index.insert(stretches_of(common + [1000] * first, 2), 0)
    found = int(index.cached_tokens(stretches_of(common + [2000] * second, 2))[0])
    assert found < shared + 4  # of the longest stretch every fourth token is looked at
    assert found > shared * 2 / 3 - 4


def test_cancelled_requests_leave_the_queue_and_finished_ones_free_their_room():
    queue = scheduler("round-robin", ep_size=1)
    for name in "ab":
        queue.add(request(name, [0] * 600), now=0.0)
    assert [a.request_id for a in queue.assign(idle(1), now=0.0)] == ["a"]
    assert len(queue) == 1
    queue.finished("a", new_tokens=3)
    assert [a.request_id for a in queue.assign(idle(1), now=0.0)] == ["b"]
    queue.add(request("c", [0] * 600), now=0.0)
    assert queue.remove("c")
    assert not queue.remove("c")
    assert len(queue) == 0


def test_after_another_plan_requests_go_where_experts_are_now_those_queued_too():
    queue = scheduler("semantic", ep_size=2)
    queue.add(request("queued", [0] * 50), now=0.0)
    queue.replan(schedule([[0.1, 0.7], [0.7, 0.1]]))
    assert [a.rank for a in queue.assign(idle(2), now=0.0)] == [1]
    queue.add(request("new", [1] * 50), now=0.0)
    assert [a.rank for a in queue.assign(idle(2), now=0.0)] == [0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("semantik", {}, 'Did you mean "semantic"?'),
        ("semantic", {"cost": None}, "needs the cost"),
        ("semantic", {"cost": serving_cost(8)}, "for other ranks"),
    ],
)
def test_a_scheduler_that_cannot_be_made_says_why(name, options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        scheduler(name, **options)


class Ranks:
    """Serve in order, one sequence's worth of KV at a time; a request runs for a fixed time."""

    def __init__(self, ranks, *, kv, max_sequences):
        self.kv, self.max_sequences = kv, max_sequences
        self.waiting = [[] for _ in range(ranks)]
        self.running = [[] for _ in range(ranks)]

    def loads(self):
        return [
            RankLoad(
                running=len(running),
                waiting=len(waiting),
                pending_tokens=sum(r.size for r in waiting),
                kv_tokens_total=self.kv,
            )
            for running, waiting in zip(self.running, self.waiting, strict=True)
        ]

    def step(self):
        ended = []
        for running, waiting in zip(self.running, self.waiting, strict=True):
            for job in running:
                job.left -= 1
            ended += [job for job in running if job.left == 0]
            running[:] = [job for job in running if job.left]
            while waiting and len(running) < self.max_sequences:
                if sum(job.size for job in running) + waiting[0].size > self.kv:
                    break
                running.append(waiting.pop(0))
        return ended


class Job:
    def __init__(self, name, size, duration):
        self.name, self.size, self.left = name, size, duration


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    ranks=st.integers(1, 4),
    bursts=st.lists(
        st.lists(st.tuples(st.integers(1, 95), st.integers(1, 4)), max_size=6),
        min_size=1,
        max_size=25,
    ),
)
def test_no_request_starves_or_waits_longer_than_the_bound(policy, ranks, bursts):
    """Any arrivals: small requests that always fit, large ones that rarely do, all at once."""
    bound = 5
    queue = scheduler(policy, ep_size=ranks, max_sequences=3, max_wait_seconds=bound)
    machine = Ranks(ranks, kv=100, max_sequences=3)
    jobs, arrived, waits = {}, {}, []
    for now in range(len(bursts) + 400):
        for size, duration in bursts[now] if now < len(bursts) else []:
            name = str(len(jobs))
            # Prompt and output together are the size, so that both bounds of a rank matter.
            queue.add(request(name, [int(name) % ranks] * size, max_tokens=1), now=now)
            jobs[name], arrived[name] = Job(name, size + 1, duration), now
        for assignment in queue.assign(machine.loads(), now=now):
            waits.append(now - arrived[assignment.request_id])
            machine.waiting[assignment.rank].append(jobs[assignment.request_id])
        for job in machine.step():
            queue.finished(job.name, new_tokens=1)
    assert len(waits) == len(jobs)
    assert max(waits, default=0) <= bound
    assert len(queue) == 0
    assert all(job.left == 0 for job in jobs.values())


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=8, max_size=60),
    favourite=st.integers(0, 3),
)
def test_semantic_keeps_tokens_even_when_all_requests_want_one_rank(lengths, favourite):
    queue = scheduler("semantic", max_wait_seconds=100.0)
    tokens = np.zeros(4)
    for number, length in enumerate(lengths):
        queue.add(request(number, [favourite] * length, max_tokens=1), now=0.0)
        loads = [RankLoad(pending_tokens=int(t), kv_tokens_total=10**6) for t in tokens]
        for assignment in queue.assign(loads, now=0.0):
            tokens[assignment.rank] += length
    # No rank is ahead of another by more than what local experts can be worth for one request.
    assert tokens.max() - tokens.min() <= 3 * max(lengths)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=8, max_size=60),
    favourite=st.integers(0, 3),
)
def test_semantic_keeps_kv_even_up_to_what_local_experts_are_worth(lengths, favourite):
    """Prompts are computed at once, and nothing ends: all that grows is the KV cache."""
    queue, cost, new_tokens = scheduler("semantic", max_wait_seconds=100.0), serving_cost(4), 100
    kv = np.zeros(4)
    for number, length in enumerate(lengths):
        queue.add(request(number, [favourite] * length, max_tokens=new_tokens), now=0.0)
        for assignment in queue.assign(idle(kv=10**6), now=0.0):
            kv[assignment.rank] += length + new_tokens
    copies = cost.copy_seconds_GG.sum(axis=1).max()
    longest = max(lengths) + new_tokens
    worth = longest * copies / (new_tokens * cost.seconds_per_kv_token)
    assert kv.max() - kv.min() <= worth + longest
    assert kv.sum() == sum(lengths) + new_tokens * len(lengths)
