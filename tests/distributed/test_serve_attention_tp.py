import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist

from semantic_ep.errors import BackendError, PeerFailureError, RequestError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.schedule import Schedule
from semantic_ep.plan.token_schedule import SchedulePredictor
from semantic_ep.serve.protocol import SamplingParams
from tests.distributed.launcher import run_ranks
from tests.distributed.test_serve_engine import (
    FAMILIES,
    LAYERS,
    VOCAB,
    contiguous,
    placements,
    prompts_of,
    save_tiny_model,
    single_process,
)
from tests.distributed.test_serve_group import (
    GREEDY,
    Client,
    random_prompts,
    record_and_count,
    save_plan,
)

pytestmark = pytest.mark.distributed

HIDDEN_BYTES = 32 * 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    wide = {"num_key_value_heads": 4}  # for 4 ranks
    return {family: save_tiny_model(root / family, family, **wide) for family in FAMILIES}


def load(directory, placement, predictor, **options):
    from semantic_ep.integrations.deepspeed.inference import init_distributed
    from semantic_ep.serve.engine import SemanticInferenceEngine

    init_distributed(device_type="cpu", peer_timeout=60)
    return SemanticInferenceEngine.from_checkpoint(
        directory,
        placement=placement,
        group=dist.group.WORLD,
        attention="tp",
        predictor=predictor,
        **options,
    )


def some_schedule(placement):
    """Tables of a plan, filled at random; some ids are unknown."""
    draw = np.random.default_rng(5)
    shape = (LAYERS, VOCAB)
    return SchedulePredictor(
        schedule=Schedule(
            token_to_rank=draw.integers(-1, placement.ep_size, shape).astype(np.int8),
            confidence=draw.integers(1, 256, shape).astype(np.uint8),
            request_affinity=np.full((VOCAB, placement.ep_size), 0.5, dtype=np.float16),
        )
    )


def check_counters(engine, prompts, want, *, together):
    stats, shuffled = engine.model.dispatcher.stats, engine.model.token_slices.stats
    counted = torch.tensor(
        np.stack([stats.tokens, stats.activations.sum(axis=1), shuffled.bytes_all_gather])
    )
    dist.all_reduce(counted)
    tokens = sum(map(len, prompts)) + sum(len(output) - 1 for output in want)
    # Each token is in one slice of each layer.
    assert counted[0].tolist() == [tokens] * LAYERS
    assert counted[1].tolist() == [2 * tokens] * LAYERS
    # Every rank sends its slice to every other; slices are padded to equal length.
    ranks, least = dist.get_world_size(), (dist.get_world_size() - 1) * tokens * HIDDEN_BYTES
    assert all(sent >= least for sent in counted[2].tolist())
    if together == 1:
        steps = sum(map(len, want))
        rows = sum(-(-len(prompt) // ranks) for prompt in prompts) + steps - len(prompts)
        assert counted[2].tolist() == [ranks * (ranks - 1) * rows * HIDDEN_BYTES] * LAYERS
    assert shuffled.bytes_all_gather.tolist() == shuffled.bytes_reduce_scatter.tolist()


def _serve(rank, ranks, directories, cases):
    new_tokens = 6
    prompts = [*prompts_of(0), *prompts_of(2)]
    for name, directory in directories.items():
        want = single_process(directory, prompts, new_tokens)
        for kind, predictor in cases:
            placement = placements(ranks)[kind]
            given = some_schedule(placement) if predictor == "table" else predictor
            engine = load(directory, placement, given)
            for together in (1, 5):
                engine.model.dispatcher.stats.reset()
                engine.model.token_slices.stats.reset()
                got = engine.generate(
                    prompts if rank == 0 else [],
                    max_new_tokens=new_tokens,
                    max_batch_size=together,
                )
                assert got.outputs == (want if rank == 0 else []), (name, kind, predictor)
                check_counters(engine, prompts, want, together=together)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_equal_one_process_for_each_family(models, family):
    cases = [("random", "look-ahead"), ("replicated", None)]
    run_ranks(_serve, 2, {family: models[family]}, cases)


def test_greedy_tokens_do_not_depend_on_placement_or_schedule(models):
    cases = [("contiguous", None), ("random", "table"), ("replicated", "look-ahead")]
    run_ranks(_serve, 4, {"qwen3_moe": models["qwen3_moe"]}, cases)


def _kernels(rank, ranks, directory):
    prompts = prompts_of(0)
    engine = load(directory, placements(ranks)["random"], "look-ahead", backend="kernels-emulated")
    got = engine.generate(prompts if rank == 0 else [], max_new_tokens=4)
    if rank == 0:
        assert got.outputs == single_process(directory, prompts, 4)


def test_the_kernels_shuffle_and_dispatch_the_same_tokens(models):
    run_ranks(_kernels, 2, models["qwen3_moe"])


def _refusals(rank, ranks, directories):
    placement = placements(ranks)["contiguous"]
    with pytest.raises(BackendError, match=r"num_key_value_heads = 1 cannot be divided.*2 ranks"):
        load(directories["few_heads"], placement, None)
    engine = load(directories["qwen3_moe"], placement, None)
    with pytest.raises(RequestError, match=r"\[1, 1\] prompts by rank"):
        engine.generate([[5]], max_new_tokens=1)


def test_what_cannot_be_sharded_is_refused_with_the_reason(models, tmp_path):
    few_heads = save_tiny_model(tmp_path / "few", "qwen3_moe", num_key_value_heads=1)
    run_ranks(_refusals, 2, {**models, "few_heads": few_heads})


def _die_at_the_head(rank, ranks, directory):
    engine = load(directory, placements(ranks)["random"], None)
    if rank == 1:
        # Where DeepSpeed, not the exchange of tokens, waits for the others.
        engine.model.module.lm_head.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
    with pytest.raises(PeerFailureError, match="all-reduce of tensor parallelism failed on rank 0"):
        engine.generate([[5, 6, 7]] if rank == 0 else [], max_new_tokens=4)


def test_a_rank_killed_while_others_reduce_is_named_as_the_reason(models):
    run_ranks(_die_at_the_head, 2, models["qwen3_moe"], dying=[1])


def _served(rank, ranks, directory, plan, prompts, want):
    from semantic_ep.serve.scheduling.make import make_scheduler
    from semantic_ep.serve.start import serve_group

    random = placements(ranks)["random"]
    engine = load(directory, random, some_schedule(random))

    def front(running):
        client = Client(running)
        drawn = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            client.submit(f"r{number}", prompt)
            client.submit(f"d{number}", prompt, drawn)
            client.submit(f"c{number}", prompt, drawn)
            running.cancel(f"c{number}")
        assert running.reload_plan(plan).result(60)["experts_moved"] > 0
        for number, tokens in enumerate(want):
            assert client.tokens(f"r{number}") == tokens
            # No seed: the ranks draw differently and must go on with the same tokens.
            assert len(client.tokens(f"d{number}")) == 12
            assert client.last(f"c{number}").finish_reason in ("cancelled", "length")
        running.drain().result(60)
        stats = running.stats()
        assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)

    serve_group(
        engine,
        scheduler=make_scheduler("least-loaded", ep_size=1, max_wait_seconds=0),
        front=front,
        kv_cache_tokens=256,
        block_size=4,
    )
    slices = engine.model.token_slices
    # The tables of the new plan: everything on rank 0, as far as slices allow.
    assert not slices.predictor.schedule.token_to_rank.any()
    assert (
        slices.placement.physical_to_logical_map.tolist()
        == placements(ranks)["contiguous"].physical_to_logical_map.tolist()
    )


def test_requests_come_and_go_and_plans_change_while_all_ranks_run_one_batch(models, tmp_path):
    plan = save_plan(tmp_path / "plan", models["qwen3_moe"], placements(2)["contiguous"])
    prompts = random_prompts(6)
    want = single_process(models["qwen3_moe"], prompts, GREEDY.max_tokens)
    run_ranks(_served, 2, models["qwen3_moe"], plan, prompts, want)


def _record_while_serving(rank, ranks, directory, output):
    from semantic_ep.serve.scheduling.make import make_scheduler
    from semantic_ep.serve.start import serve_group

    placement = contiguous(1) if ranks == 1 else placements(ranks)["random"]
    serve_group(
        load(directory, placement, "look-ahead"),
        scheduler=make_scheduler("least-loaded", ep_size=1, max_wait_seconds=0),
        front=lambda running: record_and_count(Client(running), output),
        kv_cache_tokens=512,
        block_size=4,
    )


def test_routes_are_recorded_whole_though_every_layer_slices_its_own_way(models, tmp_path):
    for ranks in (1, 2):
        run_ranks(_record_while_serving, ranks, models["qwen3_moe"], tmp_path / f"{ranks}")
    alone, sliced = (RoutingProfile.read(tmp_path / f"{ranks}") for ranks in (1, 2))
    for name in ("load", "token_count", "coactivation", "transition", "tokens"):
        np.testing.assert_array_equal(getattr(sliced, name), getattr(alone, name), err_msg=name)
    for one, other in zip(sliced.token_expert, alone.token_expert, strict=True):
        assert (one != other).nnz == 0


def _cancel_while_recording(rank, ranks, directory, output):
    from semantic_ep.serve.scheduling.make import make_scheduler
    from semantic_ep.serve.start import serve_group

    def front(running):
        client, endless = Client(running), SamplingParams(max_tokens=48, ignore_eos=True)
        running.record("start").result(60)
        for number in range(4):  # Alone: the step after the cancellation has nothing to do.
            client.submit(
                f"c{number}",
                [5] * 10,
                endless,
                on_event=lambda event: running.cancel(event.request_id),
            )
            assert client.last(f"c{number}").finish_reason == "cancelled"
        client.submit("a", [5] * 10)
        client.tokens("a")
        assert running.record("dump", output).result(60)["tokens"] >= 50

    serve_group(
        load(directory, contiguous(ranks), "look-ahead"),
        scheduler=make_scheduler("least-loaded", ep_size=1, max_wait_seconds=0),
        front=front,
        kv_cache_tokens=512,
        block_size=4,
    )


def test_a_cancelled_request_does_not_end_the_recording_of_routes(models, tmp_path):
    run_ranks(_cancel_while_recording, 2, models["qwen3_moe"], tmp_path / "profile")
