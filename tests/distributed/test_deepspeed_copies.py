"""Experts with several copies in DeepSpeed training: trained as one, the same bits everywhere."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

import torch

from semantic_ep.errors import ConfigError, PlacementError
from semantic_ep.integrations.deepspeed.universal import convert_to_universal
from semantic_ep.plan.placement import Placement
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_native_placed import FINGERPRINT as NATIVE
from tests.distributed.test_deepspeed_native_placed import NativeModel
from tests.distributed.test_deepspeed_placed import (
    CONTIGUOUS,
    EXPERTS,
    MIXED,
    damage,
    data_of,
    placed_config,
    placed_engine,
    save_plan,
    train,
)
from tests.distributed.test_deepspeed_training import start, tiny_model
from tests.distributed.test_exchange import drawn, one_bit_lost

pytestmark = pytest.mark.distributed

STEPS = 24
# At ZeRO 3 half of the experts' parameters are kept whole, and half are in pieces.
IN_PIECES = {"stage": 3, "stage3_param_persistence_threshold": 4000}
# The norm of gradients is above this in every step.
CLIP = {"gradient_clipping": 0.2}


BF16 = {"bf16": {"enabled": True}}


def copies(*rows, ep_size):
    return Placement(physical_to_logical_map=np.array(rows), num_experts=EXPERTS, ep_size=ep_size)


# An empty slot, and first copies on either rank.
TWO_RANKS = copies(
    [0, 1, 2, 3, 7, 6, 4, 5, 6, 7, 0, 2], [3, 1, 5, -1, 0, 7, 4, 3, 6, 2, 0, 5], ep_size=2
)
# Three copies of an expert, and four of another.
FOUR_RANKS = copies(
    [0, 1, 2, 7, 2, 3, 7, 0, 4, 5, 0, 7, 6, 7, 1, -1],
    [6, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 0, 3],
    ep_size=4,
)


def _gathered(parameter):
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def _held(engine):
    """(layer, name, expert) -> bits of the weights in each slot of this rank."""
    placed = engine.placed_experts
    return [
        ((layer, name, expert), weights[slot].view(torch.uint8).numpy().tobytes())
        for name, layer, parameter in placed.parameters(engine.module)
        for weights in [_gathered(parameter)]
        for slot, expert in enumerate(placed.held_S(layer).tolist())
        if expert >= 0
    ]


def _train(engine, rank, before=lambda step: None):
    """Losses and norms of gradients; `before` is called with the number of each step."""
    losses, norms = [], []
    for step, batch in enumerate(data_of(rank, STEPS)):
        before(step)
        losses += train(engine, [batch])
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def _config(plan, stage, changes=None):
    config = placed_config(plan, stage, **CLIP) | (changes or {})
    return config | ({"zero_optimization": IN_PIECES} if stage == 3 else {})


def _train_under(rank, ranks, plans, stages):
    whole = _train(placed_engine(None, 1, **CLIP), rank)
    runs = []
    for stage in stages:
        for plan in plans:
            engine = start(tiny_model(), _config(plan, stage))
            runs.append((*_train(engine, rank), _held(engine)))
    return whole, runs


def assert_copies_alike(weights_of_ranks):
    """Over all ranks; returns the copies of each expert."""
    bits = {}
    for held in weights_of_ranks:
        for key, content in held:
            bits.setdefault(key, []).append(content)
    assert all(len(set(contents)) == 1 for contents in bits.values())
    return [len(contents) for contents in bits.values()]


@pytest.mark.parametrize("stages", [(0,), (1, 2), (3,)])
def test_copies_train_as_one_expert_with_its_norm_and_stay_the_same_bits(tmp_path, stages):
    plans = [save_plan(tmp_path / "one", CONTIGUOUS), save_plan(tmp_path / "copies", TWO_RANKS)]
    results = run_ranks(_train_under, 2, plans, stages, timeout=300)
    (losses, norms), runs = results[0]
    assert losses[-1] < losses[0] - 0.1
    assert min(norms) > CLIP["gradient_clipping"]
    for number, (found, found_norms, _) in enumerate(runs):
        assert found == pytest.approx(losses, abs=1e-4)
        assert found_norms == pytest.approx(norms, rel=1e-4)
        counts = assert_copies_alike([runs[number][2] for _, runs in results])
        assert max(counts) == 1 + number % 2


def move_to_other_copies(engine, seed):
    """Experts to other ranks, and other copies of others."""
    from semantic_ep.integrations.deepspeed.replanning import EnginePlacement

    held = engine.placed_experts.placement
    new = drawn(seed, held.ep_size, held.slots_per_rank)
    assert EnginePlacement(engine).move(new).experts_moved > 0
    assert engine.placed_experts.placement is new


def _move_between_steps(rank, ranks, plan, stages):
    """As `_train_under`, with a move that fails, and one after every eighth step."""
    whole = _train(placed_engine(None, 1, **CLIP), rank)
    runs = []
    for stage in stages:
        engine = start(tiny_model(), _config(plan, stage))
        held = []

        def move(step, engine=engine, held=held):
            if step == 4:
                before = _held(engine)
                lost = one_bit_lost(here=rank == ranks - 1)
                with lost, pytest.raises(PlacementError, match="differ after the exchange"):
                    move_to_other_copies(engine, 4)
                assert _held(engine) == before
            if step in (8, 16):
                move_to_other_copies(engine, step)
                held.append(_held(engine))

        losses, norms = _train(engine, rank, move)
        runs.append((losses, norms, [*held, _held(engine)]))
    return whole, runs


@pytest.mark.parametrize("stages", [(0, 1), (3,)])
@pytest.mark.parametrize("placement", [TWO_RANKS, FOUR_RANKS])
def test_copies_train_and_move_alike_on_four_ranks_in_one_group_and_in_two(
    tmp_path, placement, stages
):
    plan = save_plan(tmp_path / "copies", placement)
    results = run_ranks(_move_between_steps, 4, plan, stages, timeout=300)
    (losses, norms), runs = results[0]
    for number, (found, found_norms, _) in enumerate(runs):
        assert found == pytest.approx(losses, abs=1e-4)
        assert found_norms == pytest.approx(norms, rel=1e-4)
        for of_ranks in zip(*(runs[number][2] for _, runs in results), strict=True):
            counts = assert_copies_alike(of_ranks)
            # In each group of two, or in the group of four.
            assert len(set(counts)) > 1


def _save_and_go_on(rank, ranks, plan, stage, changes, output, moved=False):
    engine = start(tiny_model(), _config(plan, stage, changes))
    losses = train(engine, data_of(rank, 3))
    if moved:
        move_to_other_copies(engine, 3)
    losses += train(engine, data_of(rank, 6)[3:])
    engine.save_checkpoint(str(output))
    return losses + train(engine, data_of(rank, 12)[6:])


def _resume(rank, ranks, plans, stage, changes, checkpoint):
    losses = []
    for plan in plans:
        engine = start(tiny_model(), _config(plan, stage, changes))
        damage(engine)
        assert engine.load_checkpoint(str(checkpoint))[0] is not None
        losses.append(train(engine, data_of(rank, 12)[6:]))
    return losses, _held(engine)


@pytest.mark.parametrize(
    ("stage", "changes", "moved"),
    [(0, {}, False), (1, {}, True), (2, BF16, True), (3, BF16, False)],
    ids=["0", "1-moved", "2-bf16-moved", "3-bf16"],
)
def test_checkpoints_load_with_copies_and_without_whichever_they_come_from(
    tmp_path, stage, changes, moved
):
    with_copies, without = (
        save_plan(tmp_path / name, placement)
        for name, placement in (("copies", TWO_RANKS), ("single", MIXED))
    )
    near = 2e-3 if changes else 1e-5
    expected = None
    for plan in (without, with_copies):
        saved = tmp_path / f"saved {plan.name}"
        run = (plan, stage, changes, saved, moved)
        losses = run_ranks(_save_and_go_on, 2, *run, timeout=300)[0]
        expected = losses if expected is None else expected
        assert losses == pytest.approx(expected, abs=near)
        both = [without, with_copies]
        results = run_ranks(_resume, 2, both, stage, changes, saved, timeout=300)
        for resumed in results[0][0]:
            assert resumed == pytest.approx(expected[6:], abs=near)
        assert max(assert_copies_alike([held for _, held in results])) == 2


def _resume_without_copies(rank, ranks, plan, checkpoint, output):
    section = {"replan": {"interval": 100}}
    engine = start(tiny_model(), placed_config(plan, 1, output, section, **CLIP))
    damage(engine)
    assert engine.load_checkpoint(str(checkpoint))[0] is not None
    return engine.placed_experts.placement.has_replicas, train(engine, data_of(rank, 12)[6:])


def test_a_run_that_replans_takes_over_no_copies_that_its_plan_has_not(tmp_path):
    with_copies = save_plan(tmp_path / "copies", TWO_RANKS)
    without = save_plan(tmp_path / "single", drawn(0, 2, 6, empty=True))
    losses = run_ranks(_save_and_go_on, 2, with_copies, 1, {}, tmp_path / "saved")[0]
    run = (without, tmp_path / "saved", tmp_path / "profile")
    copied, resumed = run_ranks(_resume_without_copies, 2, *run)[0]
    assert not copied
    assert resumed == pytest.approx(losses[6:], abs=1e-5)


def test_a_universal_checkpoint_of_a_run_with_copies_has_each_expert_once(tmp_path):
    with_copies, without = (
        save_plan(tmp_path / name, placement)
        for name, placement in (("copies", TWO_RANKS), ("single", MIXED))
    )
    saved, universal = tmp_path / "saved", tmp_path / "universal"
    losses = run_ranks(_save_and_go_on, 2, with_copies, 1, {}, saved)[0]
    convert_to_universal(saved / (saved / "latest").read_text(), universal / "step")
    load = {"checkpoint": {"load_universal": True}}
    results = run_ranks(_resume, 2, [without, with_copies], 2, load, universal)
    for resumed in results[0][0]:
        assert resumed == pytest.approx(losses[6:], abs=1e-5)
    assert max(assert_copies_alike([held for _, held in results])) == 2


def _accumulate(rank, ranks, plans):
    changes = {"gradient_accumulation_steps": 2}
    return [
        train(start(tiny_model(), _config(plan, stage, changes)), data_of(rank, 12))
        for plan, stage in plans
    ]


def test_copies_are_summed_once_where_gradients_accumulate(tmp_path):
    plan = save_plan(tmp_path / "copies", TWO_RANKS)
    whole, *found = run_ranks(_accumulate, 2, [(None, 1), *((plan, stage) for stage in range(4))])[
        0
    ]
    for losses in found:
        assert losses == pytest.approx(whole, abs=1e-4)


def _refusals(rank, ranks, plan, native):
    with pytest.raises(ConfigError, match="mixed precision at ZeRO 0 are not kept"):
        placed_engine(plan, 0, bf16={"enabled": True})
    for stage in (1, 3):
        offloaded = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        with pytest.raises(ConfigError, match="before copies are summed where they are offloaded"):
            start(
                tiny_model(),
                placed_config(plan, zero_force_ds_cpu_optimizer=False)
                | {"zero_optimization": offloaded},
            )
    with pytest.raises(PlacementError, match="gives each rank a module for every expert once"):
        start(NativeModel(rank, drop_tokens=False), placed_config(native, 1))
    assert torch.distributed.get_world_size() == ranks


def test_where_copies_cannot_be_trained_they_are_refused_with_the_reason(tmp_path):
    native = save_plan(tmp_path / "native", TWO_RANKS, fingerprint=NATIVE)
    run_ranks(_refusals, 2, save_plan(tmp_path / "plan", TWO_RANKS), native)
