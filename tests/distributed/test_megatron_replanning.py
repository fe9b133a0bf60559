"""A Megatron run that moves its experts to a new plan trains as if they had stayed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.errors import ConfigError
from semantic_ep.plan.placement import Placement
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_exchange import drawn
from tests.distributed.test_megatron import ROWS

pytestmark = pytest.mark.distributed

# A bad choice of copies for the routing of this model.
COPIED = drawn(2, 2, 6).physical_to_logical_map
# With the usual epsilon, Adam makes of the rounding of a tiny gradient a step of full size.
SMOOTH = {"adam_eps": 0.1, "lr": 0.1}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def reset_random_state():
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def losses_of(trainer, rank, steps):
    return [trainer.step([tiny.batch(step % 2, rank)])[0] for step in steps]


def _move_between_steps(rank, ranks, runs):
    """Losses of 12 steps, and of the same with experts moved after every third."""
    from semantic_ep.integrations.megatron.replanning import ModelPlacement

    tiny.start()
    results = []
    for divided, changes in runs:
        reset_random_state()
        build = {"distributed_optimizer": divided, **SMOOTH}
        staying = tiny.Trainer.build(tiny.config(**changes), ROWS, **build)
        still = losses_of(staying, rank, range(12))
        reset_random_state()
        trainer = tiny.Trainer.build(tiny.config(**changes), ROWS, **build)
        moving, losses = ModelPlacement(trainer.model, trainer.optimizer), []
        for start in range(0, 12, 3):
            losses += losses_of(trainer, rank, range(start, start + 3))
            rows = [np.random.default_rng([start, layer]).permutation(8) for layer in range(2)]
            table = np.stack(rows)
            done = moving.move(Placement(physical_to_logical_map=table, num_experts=8, ep_size=2))
            assert done.experts_moved > 0
        results.append((still, losses))
    return results


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [(2, [(False, {}), (False, BF16), (True, BF16)]), (4, [(True, {}), (True, BF16)])],
)
def test_experts_and_their_optimizer_state_move_without_a_trace_in_the_losses(ranks, runs):
    for rank_results in run_ranks(_move_between_steps, ranks, runs):
        for still, moved in rank_results:
            assert still[-2] < still[0] - 0.3
            np.testing.assert_allclose(moved, still, atol=1e-5)


def _decide_in_a_run(rank, ranks, directory, rows):
    from semantic_ep.artifacts import ModelFingerprint
    from semantic_ep.config import SemanticEPConfig
    from semantic_ep.integrations.megatron import PlacedLayers, SemanticRun
    from semantic_ep.integrations.megatron.dispatcher import Exchange

    tiny.start()
    placed = PlacedLayers(
        placement=Placement(physical_to_logical_map=rows, num_experts=8, ep_size=2),
        layer_ids=(0, 1),
    )
    exchange = Exchange("torch", num_layers=2) if placed.placement.has_replicas else None

    def run(name, **replan):
        section = {
            "enabled": True,
            "plan": {"artifact": "of the test"},
            "observe": {"output": str(directory / name / "profile")},
            "replan": {"interval": 6, **replan},
        }
        return SemanticRun(
            config=SemanticEPConfig.resolve(json_section=section, environment={}),
            fingerprint=ModelFingerprint(
                architecture="megatron_gpt", layer_ids=(0, 1), num_experts=8, top_k=2
            ),
            vocab_size=tiny.VOCAB,
            placed=placed,
            groups=None,
            exchange=exchange,
        )

    def train(name, **replan):
        reset_random_state()
        this = run(name, **replan)
        trainer = tiny.Trainer.build(
            tiny.config(), rows, exchange=exchange, finalize=this.finalize_model_grads, **SMOOTH
        )
        observation = this.observe(trainer.model)
        replanning = this.replan(trainer.model, trainer.optimizer, observation)
        losses = []
        for step in range(1, 15):
            losses += losses_of(trainer, rank, [step - 1])
            observation.step()
            replanning.step(step)
        replanning.at_checkpoint(14, observation.save())
        layers = trainer.model.module.decoder.layers
        return losses, [layer.mlp.slot_to_logical.tolist() for layer in layers]

    return train("pays", horizon_tokens=10**9), train("kept")


@pytest.mark.parametrize("rows", [ROWS, COPIED], ids=["single", "copies"])
def test_a_run_moves_to_a_plan_that_pays_and_keeps_one_that_does_not(tmp_path, rows):
    (moved, new_rows), (kept, old_rows) = run_ranks(_decide_in_a_run, 2, tmp_path, rows)[0]

    def reports(name):
        lines = (tmp_path / name / "profile-replanning.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    _, second, *_, last = reports("pays")
    assert (second["step"], second["applied"]) == (12, True)
    assert second["remote_copies"][1] < second["remote_copies"][0]
    assert last.keys() == {"step", "drift"}
    assert old_rows == rows.tolist() != new_rows
    assert np.shape(new_rows) == rows.shape
    assert "does not pay: moving" in reports("kept")[1]["reason"]
    np.testing.assert_allclose(moved, kept, atol=1e-5)


def _refused(rank, ranks):
    from semantic_ep.integrations.megatron.replanning import ModelPlacement

    tiny.start()
    contiguous = tiny.Trainer.build(tiny.config())
    with pytest.raises(ConfigError, match="no placed experts"):
        ModelPlacement(contiguous.model, contiguous.optimizer)
    placed = tiny.Trainer.build(tiny.config(), ROWS)
    placed.model.ddp_config.overlap_param_gather = True
    with pytest.raises(ConfigError, match="--overlap-param-gather"):
        ModelPlacement(placed.model, placed.optimizer)


def test_what_cannot_move_is_refused_at_the_start():
    run_ranks(_refused, 2)


def test_grouped_experts_are_told_apart_by_the_number_in_their_names():
    from semantic_ep.integrations.megatron.copies import rows_of

    experts = torch.nn.Module()
    experts.num_local_experts = 12
    for name in ("linear_fc1", "linear_fc2"):
        linear = torch.nn.Module()
        experts.add_module(name, linear)
        for slot in range(12):
            linear.register_parameter(
                f"weight{slot}", torch.nn.Parameter(torch.tensor([slot]) * 1.0)
            )
    rows = rows_of(experts, where="the test")
    assert list(rows) == ["linear_fc1.weight", "linear_fc2.weight"]
    assert [row.item() for row in rows["linear_fc2.weight"]] == list(range(12))
    experts.num_local_experts = 13
    with pytest.raises(ConfigError, match="do not say which slot"):
        rows_of(experts, where="the test")
