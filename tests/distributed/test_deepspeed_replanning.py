"""A DeepSpeed run that moves its experts to a new plan trains as if they had stayed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import numpy as np

from semantic_ep.errors import ConfigError, PlacementError
from semantic_ep.plan.placement import Placement
from tests.distributed import test_deepspeed_native_placed as native
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_placed import (
    MIXED,
    data_of,
    placed_config,
    placed_engine,
    save_plan,
    train,
)
from tests.distributed.test_deepspeed_training import start, tiny_model
from tests.distributed.test_exchange import drawn, one_bit_lost

pytestmark = pytest.mark.distributed


BF16 = {"bf16": {"enabled": True}}
# Tiny parameters would all be kept whole.
IN_PIECES = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}

SINGLE = Placement.from_rank_of_expert(np.array(MIXED), ep_size=2)
# A bad choice of copies for the routing of this model.
COPIED = drawn(49, 2, 6)


def moved_by_hand(engine, seed):
    """Another placement of the same shape."""
    rng = np.random.default_rng(seed)
    held = engine.placed_experts.placement
    return Placement(
        physical_to_logical_map=np.stack([rng.permutation(8) for _ in range(held.num_layers)]),
        num_experts=8,
        ep_size=held.ep_size,
    )


def _move_between_steps(rank, ranks, plan, runs):
    """Losses of 16 steps, and of the same with experts moved after every fourth."""
    from semantic_ep.integrations.deepspeed.replanning import EnginePlacement

    data, results = data_of(rank, 16), []
    for stage, changes in runs:

        def engine_of(stage=stage, changes=changes):
            return start(tiny_model(), placed_config(plan, stage) | changes)

        still = train(engine_of(), data)
        engine, losses = engine_of(), []
        for step in range(0, 16, 4):
            losses += train(engine, data[step : step + 4])
            done = EnginePlacement(engine).move(moved_by_hand(engine, step))
            assert done.experts_moved > 0
        results.append((still, losses))
    return results


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        (2, [(0, {}), (2, {}), (1, BF16)]),
        (2, [(3, {}), (3, IN_PIECES | BF16)]),
        (4, [(1, {}), (3, IN_PIECES)]),
    ],
)
def test_experts_and_their_optimizer_state_move_without_a_trace_in_the_losses(
    tmp_path, ranks, runs
):
    plan = save_plan(tmp_path / "plan", MIXED)
    results = run_ranks(_move_between_steps, ranks, plan, runs)[0]
    for (still, moved), (_, changes) in zip(results, runs, strict=True):
        assert moved == pytest.approx(still, abs=2e-3 if "bf16" in changes else 1e-5)


def _move_native(rank, ranks, plan):
    from semantic_ep.integrations.deepspeed.replanning import EnginePlacement

    still = native.train(native.native_engine(rank, plan, 1), rank, range(12))
    engine, losses = native.native_engine(rank, plan, 1), []
    for step in range(0, 12, 4):
        losses += native.train(engine, rank, range(step, step + 4))
        EnginePlacement(engine).move(moved_by_hand(engine, step))
    return still, losses


def test_native_layers_move_their_experts_too(tmp_path):
    plan = save_plan(tmp_path / "plan", MIXED, fingerprint=native.FINGERPRINT)
    still, moved = run_ranks(_move_native, 2, plan)[0]
    assert moved == pytest.approx(still, abs=1e-5)


def _decide_in_a_run(rank, ranks, plan, output, stage):
    data = data_of(rank, 16)

    def observed(name, **replan):
        section = {"replan": {"interval": 4, **replan}}
        return placed_engine(plan, stage, output / name / "profile", section)

    still = train(placed_engine(plan, stage), data)
    engine = observed("pays", horizon_tokens=10**9)
    moved = train(engine, data[:12])
    engine.save_checkpoint(str(output / "checkpoint"))
    moved += train(engine, data[12:])

    resumed = observed("resumed", horizon_tokens=10**9)
    assert resumed.load_checkpoint(str(output / "checkpoint"))[0] is not None
    same = np.array_equal(
        resumed.placed_experts.placement.physical_to_logical_map,
        engine.placed_experts.placement.physical_to_logical_map,
    )
    again = train(resumed, data[12:15])

    kept = observed("kept")
    train(kept, data[:8])

    damaged = observed("damaged", horizon_tokens=10**9)
    train(damaged, data[:7])
    lost = one_bit_lost(here=rank == 1)
    with lost, pytest.raises(PlacementError, match="differ after the exchange"):
        train(damaged, data[7:8])
    maps = [
        e.placed_experts.placement.physical_to_logical_map.tolist() for e in (engine, kept, damaged)
    ]
    return still, moved, (same, again), maps, train(damaged, data[8:11])


@pytest.mark.parametrize(
    ("stage", "placement"), [(1, SINGLE), (3, COPIED)], ids=["1", "3-with-copies"]
)
def test_a_run_moves_to_a_plan_that_pays_and_resumes_under_it(tmp_path, stage, placement):
    plan = save_plan(tmp_path / "plan", placement)
    result = run_ranks(_decide_in_a_run, 2, plan, tmp_path, stage)[0]
    still, moved, (same, again), (new, *old), damaged = result

    def reports(name):
        lines = (tmp_path / name / "profile-replanning.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    first, second, *_ = reports("pays")
    assert "no routing from before this window" in first["reason"]
    assert second["step"] == 8
    assert second["applied"]
    assert second["remote_copies"][1] < second["remote_copies"][0]
    assert second["experts_moved"] > 0
    assert moved == pytest.approx(still, abs=1e-5)
    # A checkpoint reports drift without a decision.
    assert any(report.keys() == {"step", "drift"} for report in reports("pays"))
    assert same
    assert again == moved[12:15]

    assert not reports("kept")[1]["applied"]
    assert "does not pay: moving" in reports("kept")[1]["reason"]
    # What was damaged on its way changed nothing, and the run could go on.
    assert old == [placement.physical_to_logical_map.tolist()] * 2
    # In every slot an expert, or a copy of one: of as many as before.
    assert np.shape(new) == placement.physical_to_logical_map.shape
    assert np.min(new) == 0
    assert damaged == pytest.approx(still[8:11], abs=1e-5)


def _refused(rank, ranks, plan, output):
    section = {"replan": {"interval": 5}}
    with pytest.raises(ConfigError, match=r"without semantic_ep\.observe\.output"):
        placed_engine(plan, section=section)
    with pytest.raises(ConfigError, match="does not name the parameters it stores"):
        placed_engine(plan, 0, output, section, bf16={"enabled": True})


def test_what_cannot_move_is_refused_at_the_start(tmp_path):
    run_ranks(_refused, 2, save_plan(tmp_path / "plan", MIXED), tmp_path / "profile")
