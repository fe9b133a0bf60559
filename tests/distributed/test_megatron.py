"""Megatron-core on gloo ranks: exact observation, and placements that change no number."""

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.megatron_tiny import Trainer

pytestmark = pytest.mark.distributed

ROWS = np.stack([np.random.default_rng(layer).permutation(tiny.EXPERTS) for layer in range(2)])


def _losses(trainer, rank, steps):
    return [trainer.step([tiny.batch(step % 2, rank)])[0] for step in steps]


def _placed_runs(rank, world_size, directory, dispatcher, distributed_optimizer):
    tiny.start(expert_parallel=min(world_size, 4))
    settings = {"moe_token_dispatcher_type": dispatcher}
    build = {"distributed_optimizer": distributed_optimizer}
    contiguous = Trainer.build(tiny.config(**settings), **build)
    first = _losses(contiguous, rank, range(10))
    contiguous.save(directory / "contiguous")
    straight = first + _losses(contiguous, rank, range(10, 50))
    placed = Trainer.build(tiny.config(**settings), ROWS, **build)
    placed.load(directory / "contiguous")
    second = _losses(placed, rank, range(10, 30))
    placed.save(directory / "placed")
    other_rows = Trainer.build(tiny.config(**settings), ROWS[::-1], **build)
    other_rows.load(directory / "placed")
    return straight, first + second + _losses(other_rows, rank, range(30, 50))


@pytest.mark.parametrize(
    ("ranks", "dispatcher", "distributed_optimizer"),
    [(2, "alltoall", True), (2, "allgather", False), (8, "alltoall", True)],
)
def test_a_run_that_changes_placement_at_checkpoints_has_the_losses_of_a_contiguous_one(
    tmp_path, ranks, dispatcher, distributed_optimizer
):
    for straight, moved in run_ranks(
        _placed_runs, ranks, tmp_path, dispatcher, distributed_optimizer, timeout=500
    ):
        assert len(straight) == 50
        assert straight[-2] < straight[0] - 0.1
        np.testing.assert_allclose(moved, straight, atol=1e-4)


def _save_placed(rank, world_size, directory):
    tiny.start()
    trainer = Trainer.build(tiny.config(), ROWS)
    _losses(trainer, rank, range(3))
    trainer.save(directory)
    with torch.no_grad():
        return trainer.model.eval()(**tiny.batch(9, 0)).mean().item()


def _load_on_one_rank(rank, world_size, directory):
    tiny.start(expert_parallel=1)
    trainer = Trainer.build(tiny.config())
    # Megatron names the state of experts otherwise where they are not spread over ranks.
    trainer.load(directory, optimizer=False)
    with torch.no_grad():
        return trainer.model.eval()(**tiny.batch(9, 0)).mean().item()


def test_a_placed_checkpoint_loads_contiguously_at_another_expert_parallel_size(tmp_path):
    placed = run_ranks(_save_placed, 2, tmp_path / "checkpoint")
    alone = run_ranks(_load_on_one_rank, 1, tmp_path / "checkpoint")
    assert placed == pytest.approx(2 * alone, abs=1e-5)


def _errors(rank, world_size):
    from semantic_ep.artifacts import ModelFingerprint
    from semantic_ep.config import SemanticEPConfig
    from semantic_ep.config.sections import ObserveConfig
    from semantic_ep.errors import CheckpointError, ConfigError, PlacementError
    from semantic_ep.integrations.megatron import ModelObservation, PlacedLayers, SemanticRun
    from semantic_ep.plan.placement import Placement

    tiny.start()
    messages = []

    def expect(kind, call):
        with pytest.raises(kind) as caught:
            call()
        messages.append(str(caught.value))

    uneven = Placement(
        physical_to_logical_map=np.array([[0, 1, 2, 3, 4, 5, 6, 7, -1, -1]] * 2),
        num_experts=8,
        ep_size=2,
    )
    expect(PlacementError, lambda: PlacedLayers(placement=uneven, layer_ids=(0, 1)))
    narrow = Placement.contiguous(num_layers=2, num_experts=8, ep_size=2)
    expect(PlacementError, lambda: PlacedLayers(placement=narrow, layer_ids=(0, 1, 2)))
    expect(ConfigError, lambda: tiny.model(tiny.config(mtp_num_layers=1), ROWS))
    placed = tiny.model(tiny.config(), ROWS)
    buffers = {"distrib_optim_sharding_type": "dp_reshardable"}
    expect(CheckpointError, lambda: placed.sharded_state_dict(metadata=buffers))
    settings = SemanticEPConfig.resolve(json_section={"groups": {"ep_size": 4}}, environment={})
    expect(ConfigError, lambda: SemanticRun.prepare(settings, placed.config, vocab_size=9))
    fingerprint = ModelFingerprint(
        architecture="gpt", layer_ids=(0, 1), num_experts=tiny.EXPERTS, top_k=tiny.TOP_K
    )

    def observe(model):
        observed = ObserveConfig(output="x")
        return ModelObservation(model, observed, fingerprint=fingerprint, vocab_size=tiny.VOCAB)

    graphed = tiny.model(tiny.config(), ROWS)
    graphed.config.cuda_graph_impl, graphed.config.cuda_graph_scope = "local", "full_iteration"
    expect(ConfigError, lambda: observe(graphed))
    interleaved = tiny.model(tiny.config(), ROWS)
    interleaved.config.virtual_pipeline_model_parallel_size = 2
    expect(ConfigError, lambda: observe(interleaved))
    hybrid = tiny.model(tiny.config(), ROWS)
    hybrid.config.hybrid_context_parallel = True
    expect(ConfigError, lambda: observe(hybrid))
    observe(placed)
    without_ids = {**tiny.batch(0, rank), "input_ids": None}
    expect(ConfigError, lambda: placed(**without_ids))
    return messages


def test_what_cannot_work_is_refused_with_the_reason():
    messages = run_ranks(_errors, 2)[0]
    for message, fragment in zip(
        messages,
        [
            "--redundant-slots 0",
            "another number of MoE layers",
            "--mtp-num-layers",
            "fully_reshardable",
            "contradicts --expert-model-parallel-size",
            "--cuda-graph-scope full_iteration",
            "--num-layers-per-virtual-pipeline-stage",
            "--hybrid-context-parallel",
            "without token ids",
        ],
        strict=True,
    ):
        assert fragment in message
