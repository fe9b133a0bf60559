"""Experts of all pipeline stages move to one new plan together, or none of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.errors import PlacementError
from semantic_ep.plan.placement import Placement
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.test_megatron_replanning import BF16, SMOOTH, reset_random_state

pytestmark = pytest.mark.distributed

LAYERS = 4
STAGES = {"num_layers": LAYERS}
DENSE_FIRST_STAGE = {**STAGES, "moe_layer_freq": [0, 0, 1, 1]}


def drawn(seed, layers=LAYERS):
    rows = [np.random.default_rng([seed, layer]).permutation(8) for layer in range(layers)]
    return Placement(physical_to_logical_map=np.stack(rows), num_experts=8, ep_size=2)


def build(changes, *, divided=False):
    reset_random_state()
    moe_layers = sum(changes.get("moe_layer_freq", [1] * LAYERS))
    rows = drawn(0, moe_layers).physical_to_logical_map
    settings = {"distributed_optimizer": divided, **SMOOTH}
    return tiny.Trainer.build(tiny.config(**changes), rows, **settings)


def losses_of(trainer, steps):
    """Of the micro-batches of steps, on the last stage; none on the others."""
    from megatron.core import parallel_state

    rank = parallel_state.get_data_parallel_rank()
    return [
        loss
        for step in steps
        for loss in trainer.step([tiny.batch(2 * (step % 2) + micro, rank) for micro in range(2)])
    ]


def moe_layers_of(trainer):
    from semantic_ep.integrations.megatron import SemanticMoELayer

    return [module for module in trainer.model.modules() if isinstance(module, SemanticMoELayer)]


def slots_of(trainer):
    return {
        layer.layer_number - 1: layer.slot_to_logical.tolist() for layer in moe_layers_of(trainer)
    }


def _move_between_steps(rank, ranks, interleaved, runs):
    """Of each run: losses of 9 steps, and of the same with experts moved after every third."""
    from semantic_ep.integrations.megatron.replanning import ModelPlacement

    tiny.start(pipeline_parallel=2, interleaved=interleaved)
    results = []
    for divided, changes in runs:
        still = losses_of(build(changes, divided=divided), range(9))
        trainer, losses, sums = build(changes, divided=divided), [], set()
        moving = ModelPlacement(trainer.parts, trainer.optimizer)
        for start in (0, 3, 6):
            losses += losses_of(trainer, range(start, start + 3))
            done = moving.move(drawn(start + 1, moving.placement.num_layers))
            assert done.experts_moved > 0
            sums.add(done.sha256)
        results.append((still, losses, slots_of(trainer), moving.expert_bytes(), sums))
    return results


@pytest.mark.parametrize(
    ("interleaved", "runs"),
    [
        (None, [(False, STAGES), (True, DENSE_FIRST_STAGE | BF16)]),
        (2, [(True, STAGES)]),
    ],
    ids=["stages", "interleaved"],
)
def test_experts_of_every_stage_move_without_a_trace_in_the_losses(interleaved, runs):
    everyone = run_ranks(_move_between_steps, 4, interleaved, runs, timeout=240)
    for run, (_, changes) in enumerate(runs):
        still, moved, *_ = everyone[3][run]
        assert len(still) == 18
        assert still[-4] < still[0] - 0.3
        np.testing.assert_allclose(moved, still, atol=1e-5)
        moe_layers = np.flatnonzero(changes.get("moe_layer_freq", [1] * LAYERS))
        rows = drawn(7, len(moe_layers)).physical_to_logical_map.tolist()
        # Each stage has its own layers, and all of them have the last placement.
        found = everyone[0][run][2] | everyone[2][run][2]
        assert len(everyone[0][run][2]) == len(moe_layers) - len(everyone[2][run][2])
        assert found == dict(zip(moe_layers.tolist(), rows, strict=True))
        # What an expert weighs, and what all of them sum up to, is the same on every stage.
        assert len({of_rank[run][3] for of_rank in everyone}) == 1
        assert len({frozenset(of_rank[run][4]) for of_rank in everyone}) == 1


def _decide_in_a_run(rank, ranks, directory):
    from semantic_ep.artifacts import ModelFingerprint
    from semantic_ep.config import SemanticEPConfig
    from semantic_ep.integrations.megatron import PlacedLayers, SemanticRun

    tiny.start(pipeline_parallel=2)

    def train(name, **replan):
        section = {
            "enabled": True,
            "plan": {"artifact": "of the test"},
            "observe": {"output": str(directory / name / "profile")},
            "replan": {"interval": 6, **replan},
        }
        run = SemanticRun(
            config=SemanticEPConfig.resolve(json_section=section, environment={}),
            fingerprint=ModelFingerprint(
                architecture="megatron_gpt", layer_ids=tuple(range(LAYERS)), num_experts=8, top_k=2
            ),
            vocab_size=tiny.VOCAB,
            placed=PlacedLayers(placement=drawn(0), layer_ids=tuple(range(LAYERS))),
            groups=None,
        )
        trainer = build(STAGES)
        observation = run.observe(trainer.model)
        replanning = run.replan(trainer.model, trainer.optimizer, observation)
        losses = []
        for step in range(1, 15):
            losses += losses_of(trainer, [step])
            observation.step()
            replanning.step(step)
        replanning.at_checkpoint(14, observation.save())
        return losses, slots_of(trainer)

    return train("pays", horizon_tokens=10**9), train("kept")


def test_stages_decide_once_for_all_their_layers(tmp_path):
    everyone = run_ranks(_decide_in_a_run, 4, tmp_path, timeout=240)

    def reports(name):
        lines = (tmp_path / name / "profile-replanning.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    _, second, *_, last = reports("pays")
    assert (second["step"], second["applied"]) == (12, True)
    # Two data-parallel ranks, two micro-batches, six steps: a token counts once, not once a stage.
    tokens = 6 * 2 * 2 * tiny.BATCH * tiny.SEQUENCE
    assert second["judged_on_tokens"] == reports("kept")[1]["horizon_tokens"] == tokens
    assert second["remote_copies"][1] < second["remote_copies"][0]
    assert last.keys() == {"step", "drift"}
    assert "does not pay: moving" in reports("kept")[1]["reason"]
    old = drawn(0).physical_to_logical_map.tolist()
    for stage, ranks in enumerate(((0, 1), (2, 3))):
        for rank in ranks:
            (_, moved), (_, kept) = everyone[rank]
            assert sorted(moved) == [2 * stage, 2 * stage + 1]
            assert all(kept[layer] == old[layer] for layer in kept)
            assert any(moved[layer] != old[layer] for layer in moved)
            assert moved == everyone[ranks[0]][0][1]
    (moved, _), (kept, _) = everyone[3]
    np.testing.assert_allclose(moved, kept, atol=1e-5)


def _damaged_on_one_stage(rank, ranks):
    from semantic_ep.integrations.megatron import replanning
    from semantic_ep.runtime import exchange

    tiny.start(pipeline_parallel=2)
    still = losses_of(build(STAGES), range(6))
    trainer = build(STAGES)
    moving = replanning.ModelPlacement(trainer.model, trainer.optimizer)
    losses = losses_of(trainer, range(3))

    def held():
        states = [
            value
            for optimizer in moving._optimizers
            for state in optimizer.optimizer.state.values()
            for value in state.values()
        ]
        return [value.clone() for value in (*trainer.model.parameters(), *states)]

    before, slots = held(), slots_of(trainer)
    receive, pieces = exchange._receive_layer, replanning._plain_pieces

    def damage(*call):
        arrived = receive(*call)
        if rank == 3:
            next(iter(next(iter(arrived.values())).values())).view(torch.uint8)[0, 0] ^= 1
        return arrived

    def lack(optimizer, parameter):
        found = pieces(optimizer, parameter)
        one = next(moe_layers_of(trainer)[0].experts.parameters())
        return {} if rank == 2 and parameter is one else found

    problems = []
    for module, name, broken in (
        (exchange, "_receive_layer", damage),
        (replanning, "_plain_pieces", lack),
    ):
        working = getattr(module, name)
        setattr(module, name, broken)
        with pytest.raises(PlacementError) as caught:
            moving.move(drawn(1))
        setattr(module, name, working)
        problems.append(str(caught.value))
        assert all(torch.equal(was, now) for was, now in zip(before, held(), strict=True))
        assert slots_of(trainer) == slots
        assert np.array_equal(
            moving.placement.physical_to_logical_map, drawn(0).physical_to_logical_map
        )
    losses += losses_of(trainer, range(3, 6))
    assert moving.move(drawn(1)).experts_moved > 0
    return still, losses, problems


def test_a_failure_on_one_stage_leaves_all_of_them_as_they_were():
    everyone = run_ranks(_damaged_on_one_stage, 4)
    for _, _, (damaged, lacking) in everyone:
        assert "differ after the exchange" in damaged
        assert "the optimizer has no" in lacking
    still, losses, _ = everyone[3]
    assert losses == still
