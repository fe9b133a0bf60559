"""A plan for prompts and another for generated tokens, in force at once."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from semantic_ep.errors import PlacementError
from semantic_ep.plan.phases import PhasePlacements
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.slots import slot_tables
from semantic_ep.serve.scheduling.make import make_scheduler
from tests.distributed.launcher import run_ranks
from tests.distributed.test_serve_attention_tp import some_schedule
from tests.distributed.test_serve_engine import (
    EXPERTS,
    LAYERS,
    contiguous,
    placements,
    prompts_of,
    save_tiny_model,
    single_process,
)
from tests.distributed.test_serve_group import GREEDY, Client, random_prompts, save_plan

pytestmark = pytest.mark.distributed

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    return save_tiny_model(root / "model", "qwen3_moe", num_key_value_heads=4)


def of_phases(ranks):
    return placements(ranks)["random"], placements(ranks, seed=1)["replicated"]


def load(directory, **options):
    from semantic_ep.integrations.deepspeed.inference import init_distributed
    from semantic_ep.serve.engine import SemanticInferenceEngine

    init_distributed(device_type="cpu", peer_timeout=60)
    prefill, decode = of_phases(dist.get_world_size())
    return SemanticInferenceEngine.from_checkpoint(
        directory,
        placement=prefill,
        decode_placement=decode,
        group=dist.group.WORLD,
        **options,
    )


def expected_activations(directory, prompts, outputs, *, rank, ranks):
    """[L, G] int64, activations of a rank's tokens by the rank that each phase has them on."""
    from transformers import AutoModelForCausalLM

    from semantic_ep.integrations.routes import record_routes

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    routes = record_routes(model, [p + new[:-1] for p, new in zip(prompts, outputs, strict=True)])
    generated = np.concatenate(
        [
            np.arange(len(prompt) + len(new) - 1) >= len(prompt)
            for prompt, new in zip(prompts, outputs, strict=True)
        ]
    )
    phases = PhasePlacements.of(*of_phases(ranks))
    tables = np.stack([slot_tables(serving, rank=rank) for serving in phases.serving(rank)])
    tables //= phases.resident.slots_per_rank
    counted = np.zeros((LAYERS, ranks), dtype=np.int64)
    for layer in range(LAYERS):
        target = tables[generated.astype(int)[:, None], layer, routes.experts[:, layer]]
        counted[layer] = np.bincount(target.ravel(), minlength=ranks)
    return counted


def _serve(rank, ranks, directory):
    prompts = prompts_of(rank)
    want = single_process(directory, prompts, NEW_TOKENS)
    engine = load(directory)
    # So few at a time that steps have tokens of both phases.
    got = engine.generate(prompts, max_new_tokens=NEW_TOKENS, max_batch_size=2)
    assert got.outputs == want
    counted = engine.model.dispatcher.stats.activations
    if prompts:
        expected = expected_activations(directory, prompts, want, rank=rank, ranks=ranks)
        assert counted.tolist() == expected.tolist()
    else:
        assert not counted.any()
    held = engine.model.phases.resident.slots_per_rank
    return held, engine.expert_bytes_resident / engine.expert_bytes_total


def test_every_token_follows_the_plan_of_its_phase(model):
    for held, share in run_ranks(_serve, 4, model):
        assert held == PhasePlacements.of(*of_phases(4)).resident.slots_per_rank
        assert share == held / EXPERTS


def _serve_slices(rank, ranks, directory, by_table):
    prompts = [*prompts_of(0), *prompts_of(2)]
    want = single_process(directory, prompts, NEW_TOKENS)
    tables = [some_schedule(placement) for placement in of_phases(ranks)]
    predictors = {"predictor": "look-ahead"}
    if by_table:
        predictors = {"predictor": tables[0], "decode_predictor": tables[1]}
    engine = load(directory, attention="tp", **predictors)
    got = engine.generate(prompts if rank == 0 else [], max_new_tokens=NEW_TOKENS, max_batch_size=3)
    assert got.outputs == (want if rank == 0 else [])


@pytest.mark.parametrize("by_table", [True, False], ids=["tables", "look-ahead"])
def test_slices_of_both_phases_do_not_change_tokens(model, by_table):
    run_ranks(_serve_slices, 2, model, by_table)


def _reload(rank, ranks, directory, plan, plan_of_more_ranks):
    from semantic_ep.serve.start import serve_group

    engine = load(directory)
    prompts = random_prompts(4)
    want = single_process(directory, prompts, GREEDY.max_tokens) if rank == 0 else None

    def front(running):
        client = Client(running)
        with pytest.raises(
            PlacementError, match=r"got one placement\)\. Allowed: one for each phase"
        ):
            running.reload_plan(plan).result(60)
        for number, prompt in enumerate(prompts):
            client.submit(f"r{number}", prompt)
        with pytest.raises(PlacementError, match="different models or ranks"):
            running.reload_plan(plan_of_more_ranks, plan_of_more_ranks).result(60)
        assert running.reload_plan(plan, plan).result(60)["experts_moved"] > 0
        assert [client.tokens(f"r{number}") for number in range(len(prompts))] == want
        assert running.reload_plan(plan, plan).result(60)["experts_moved"] == 0
        held = Placement(
            physical_to_logical_map=running.stats().physical_to_logical_map,
            num_experts=EXPERTS,
            ep_size=ranks,
        )
        assert held.slots_per_rank == engine.model.placement.slots_per_rank
        assert held.expert_on_rank.tolist() == contiguous(ranks).expert_on_rank.tolist()

    serve_group(
        engine,
        scheduler=make_scheduler("round-robin", ep_size=ranks, max_wait_seconds=0),
        front=front,
        kv_cache_tokens=512,
        block_size=4,
    )


def test_both_plans_change_at_once_while_requests_go_on(model, tmp_path):
    plan = save_plan(tmp_path / "plan", model, contiguous(2))
    run_ranks(_reload, 2, model, plan, save_plan(tmp_path / "more", model, contiguous(4)))
