"""An optimizer on the host, at ZeRO 1, 2 and 3 under a plan; and routing observed at ZeRO 3."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from semantic_ep.observe.profile import RoutingProfile
from tests.distributed.launcher import run_ranks
from tests.distributed.test_deepspeed_placed import (
    LAYERS,
    MIXED,
    UNEVEN,
    damage,
    data_of,
    placed_config,
    placed_engine,
    save_plan,
    train,
)
from tests.distributed.test_deepspeed_replanning import moved_by_hand
from tests.distributed.test_deepspeed_training import (
    BruteForce,
    assert_same_counts,
    autoep_routers,
    batches,
    deepspeed_config,
    routes_of_autoep,
    start,
    tiny_model,
)

pytestmark = pytest.mark.distributed

# DeepSpeed's own Adam for the host is compiled when it is first used; torch's is not.
ON_HOST = {"zero_force_ds_cpu_optimizer": False}


def _offloaded(plan, stage):
    section = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0
    config = placed_config(plan, gradient_clipping=0.5, **ON_HOST)
    engine = start(tiny_model(), config | {"zero_optimization": section})
    assert engine.zero_cpu_offload()
    return engine


def _train_on_the_host(rank, ranks, plan, other, stage, output):
    from semantic_ep.integrations.deepspeed.replanning import EnginePlacement

    data = data_of(rank, 12)
    device = train(placed_engine(plan, stage, gradient_clipping=0.5), data)
    engine = _offloaded(plan, stage)
    host = train(engine, data[:6])
    engine.save_checkpoint(str(output))
    assert EnginePlacement(engine).move(moved_by_hand(engine, 0)).experts_moved > 0
    host += train(engine, data[6:])
    resumed = _offloaded(other, stage)
    damage(resumed)
    assert resumed.load_checkpoint(str(output))[0] is not None
    return device, host, train(resumed, data[6:])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_host_trains_moves_and_resumes_as_one_on_the_device(tmp_path, stage):
    plan, other = save_plan(tmp_path / "plan", MIXED), save_plan(tmp_path / "other", UNEVEN)
    results = run_ranks(_train_on_the_host, 2, plan, other, stage, tmp_path / "checkpoint")
    device, host, resumed = results[0]
    assert device[-1] < device[0]
    assert host == pytest.approx(device, abs=1e-5)
    assert resumed == pytest.approx(device[6:], abs=1e-5)


def _observe(rank, ranks, plan, output):
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    expected = []
    autoep = start(tiny_model(), deepspeed_config(output / "autoep") | zero)
    placed = start(tiny_model(), placed_config(plan, output=output / "placed") | zero)
    routers = [placed.module.get_submodule(f"model.layers.{layer}.mlp.gate") for layer in LAYERS]
    for name, engine, count in (
        ("autoep", autoep, BruteForce(autoep_routers(autoep), routes_of_autoep)),
        ("placed", placed, BruteForce(routers, lambda _router, _args, output: output[2])),
    ):
        for token_id, mask in batches(rank, 4):
            engine.backward(count.forward(engine, token_id, mask, labels=token_id).loss)
            engine.step()
        engine.save_checkpoint(str(output / f"{name} checkpoint"))
        expected.append((name, count.profile(engine.semantic_ep.fingerprint())))
    return expected


def test_the_profile_at_zero_3_equals_a_brute_force_count_with_a_plan_and_without(tmp_path):
    plan = save_plan(tmp_path / "plan", UNEVEN)
    for name, expected in run_ranks(_observe, 2, plan, tmp_path)[0]:
        profile = RoutingProfile.read(tmp_path / name)
        # The hash of the routers is taken of whole weights.
        assert profile.fingerprint == expected.fingerprint
        assert_same_counts(profile, expected)
