"""Experts with several copies train in Megatron-core as if each had one."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from semantic_ep.errors import ConfigError, PlacementError
from semantic_ep.plan.placement import Placement
from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.megatron_tiny import Trainer
from tests.distributed.test_exchange import drawn, one_bit_lost

pytestmark = pytest.mark.distributed

# 8 experts on 2 ranks with 2 spare slots each, and on 4 ranks with 1: there one has 3 copies.
ON_TWO = np.array([[3, 1, 6, 0, 4, 7, 2, 4, 5, 3, 1, 0], [0, 1, 2, 3, 6, 7, 4, 5, 6, 7, 2, 0]])
ON_FOUR = np.array([[6, 1, 3, 0, 6, 2, 5, 4, 6, 7, 3, 1], [7, 0, 6, 1, 2, 6, 5, 3, 4, 4, 6, 5]])
ON_STAGES = np.concatenate([ON_TWO, ON_TWO[::-1]])
STEPS, STEPS_AFTER = 24, 6


def with_copies(config, rows, **build):
    """A trainer whose experts have the copies of `rows`, with what a run brings for them."""
    from semantic_ep.integrations.megatron.dispatcher import Exchange
    from semantic_ep.integrations.megatron.gradients import FinalizeWithCopies

    exchange = Exchange("torch", num_layers=len(rows))
    return Trainer.build(config, rows, exchange=exchange, finalize=FinalizeWithCopies(), **build)


def copies_of(trainer, rows):
    """(layer, expert) -> weights and whole optimizer states of each copy, from all ranks."""
    own = {}
    for layer in trainer.model.module.decoder.layers:
        group, number = layer.mlp.ep_group, layer.layer_number - 1
        held = rows[number].reshape(group.size(), -1)[group.rank()]
        for expert, module in zip(held.tolist(), layer.mlp.experts.local_experts, strict=True):
            for parameter in module.parameters():
                values = [parameter, *states_of(trainer.optimizer, parameter)]
                own.setdefault((number, expert), []).extend(v.detach().tolist() for v in values)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    found = {}
    for of_rank in everyone:
        for where, values in of_rank.items():
            found.setdefault(where, []).append(values)
    return found


def states_of(optimizer, parameter):
    for each in optimizer.chained_optimizers:
        state = each.optimizer.state.get(getattr(parameter, "main_param", parameter), {})
        yield from (state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)


def assert_copies_are_alike(trainer, rows):
    found = copies_of(trainer, rows)
    assert len(found) == len(rows) * tiny.EXPERTS
    for where, copies in found.items():
        assert all(copy == copies[0] for copy in copies), where


@dataclasses.dataclass(frozen=True)
class Case:
    """How a run is spread over its ranks, and what its optimizer is."""

    ranks: int
    rows: np.ndarray
    expert_parallel: int
    pipeline: int = 1
    divided: bool = False
    overlap: bool = False
    micro_batches: int = 1
    steps: int = STEPS
    moves: bool = False
    optimizer: dict = dataclasses.field(default_factory=dict)


def losses_of(trainer, case, data_rank, steps):
    """Of all micro-batches, on the last pipeline stage."""
    return [
        loss
        for step in steps
        for loss in trainer.step(
            [tiny.batch((step + 2 * micro) % 4, data_rank) for micro in range(case.micro_batches)]
        )
    ]


def losses_of_moved(trainer, case, data_rank):
    """The same, of experts that get other slots and copies twice, and the slots of the last."""
    from semantic_ep.integrations.megatron.replanning import ModelPlacement

    moving, losses = ModelPlacement(trainer.model, trainer.optimizer), []
    rows, third = case.rows, case.steps // 3
    for move in range(3):
        losses += losses_of(trainer, case, data_rank, range(move * third, (move + 1) * third))
        if move == 2:
            break
        new = other_copies(rows, case.expert_parallel, seed=move)
        lost = one_bit_lost(here=dist.get_rank() == case.ranks - 1)
        with lost, pytest.raises(PlacementError, match="differ after the exchange"):
            moving.move(new)
        assert_copies_are_alike(trainer, rows)
        assert moving.move(new).experts_moved > 0
        rows = new.physical_to_logical_map
        assert_copies_are_alike(trainer, rows)
    return losses, rows


def other_copies(rows, ranks, *, seed):
    """Experts elsewhere in as many slots, and copies of others."""
    slots = rows.shape[1] // ranks
    two_layers = [drawn([seed, half], ranks, slots) for half in range(len(rows) // 2)]
    return Placement(
        physical_to_logical_map=np.concatenate(
            [each.physical_to_logical_map for each in two_layers]
        ),
        num_experts=tiny.EXPERTS,
        ep_size=ranks,
    )


def _runs(rank, ranks, directory, case):
    from megatron.core import parallel_state

    tiny.start(expert_parallel=case.expert_parallel, pipeline_parallel=case.pipeline)
    data_rank = parallel_state.get_data_parallel_rank()
    changes = {"num_layers": len(case.rows)}
    build = {
        "distributed_optimizer": case.divided,
        "clip_grad": 0.3,
        "log_num_zeros_in_grad": True,
        "buffers": {"overlap_grad_reduce": case.overlap},
        **case.optimizer,
    }
    contiguous = Trainer.build(tiny.config(**changes), **build)
    losses_of(contiguous, case, data_rank, range(2))
    contiguous.save(directory / "start")
    del contiguous.measured[:]
    copied = with_copies(tiny.config(**changes), case.rows, **build)
    assert_copies_are_alike(copied, case.rows)
    copied.load(directory / "start")
    straight = losses_of(contiguous, case, data_rank, range(case.steps))
    if case.moves:
        losses, rows = losses_of_moved(copied, case, data_rank)
    else:
        losses, rows = losses_of(copied, case, data_rank, range(case.steps)), case.rows
    assert_copies_are_alike(copied, rows)
    measured = [contiguous.measured.copy(), copied.measured.copy()]
    copied.save(directory / "copied")

    # From that checkpoint, a run without copies and one with others go on.
    back = Trainer.build(tiny.config(**changes), **build)
    other = with_copies(tiny.config(**changes), case.rows[::-1], **build)
    for trainer in (back, other):
        trainer.load(directory / "copied")
    after = range(case.steps, case.steps + STEPS_AFTER)
    ends = [losses_of(trainer, case, data_rank, after) for trainer in (contiguous, back, other)]
    assert_copies_are_alike(other, case.rows[::-1])
    return (straight, losses), ends, measured


@pytest.mark.parametrize(
    "case",
    [
        Case(2, ON_TWO, 2),
        Case(2, ON_TWO, 2, divided=True, micro_batches=2),
        Case(4, ON_FOUR, 4, moves=True),
        Case(4, ON_TWO, 2, divided=True, overlap=True, moves=True),
        # Steps in proportion to gradients show a wrong scale of these, which Adam hides else.
        Case(
            8,
            ON_STAGES,
            2,
            pipeline=2,
            divided=True,
            steps=9,
            moves=True,
            optimizer={"adam_eps": 0.1, "lr": 0.1},
        ),
    ],
    ids=[
        "2",
        "2-divided",
        "4-moved",
        "4-in-2-groups-divided-moved",
        "8-in-2-stages-divided-moved",
    ],
)
def test_copies_train_alike_with_the_losses_and_norms_of_single_experts(tmp_path, case):
    for (straight, losses), ends, measured in run_ranks(
        _runs, case.ranks, tmp_path, case, timeout=550
    ):
        if straight:
            half = len(straight) // 2
            assert np.mean(straight[half:]) < np.mean(straight[:half]) - 0.01
        np.testing.assert_allclose(losses, straight, atol=1e-4)
        for end in ends[1:]:
            np.testing.assert_allclose(end, ends[0], atol=1e-4)
        (norms, zeros), (norms_copied, zeros_copied) = (np.transpose(each) for each in measured)
        assert norms.min() > 0.3
        np.testing.assert_allclose(norms_copied, norms, rtol=1e-3)
        np.testing.assert_array_equal(zeros_copied, zeros)


def _low_precision(rank, ranks):
    """Master weights and their states must be alike too, and after a move."""
    from semantic_ep.integrations.megatron.replanning import ModelPlacement

    tiny.start()
    for divided in (False, True):
        config = tiny.config(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
        trainer = with_copies(config, ON_TWO, distributed_optimizer=divided)
        losses = [trainer.step([tiny.batch(0, rank)])[0] for _ in range(4)]
        assert losses[-1] < losses[0] - 0.01
        bare = dataclasses.make_dataclass("Unwrapped", ["model", "optimizer"])
        bare = bare(trainer.model.module, trainer.optimizer)
        assert_copies_are_alike(bare, ON_TWO)
        new = other_copies(ON_TWO, 2, seed=0)
        ModelPlacement(trainer.model, trainer.optimizer).move(new)
        losses += [trainer.step([tiny.batch(0, rank)])[0] for _ in range(3)]
        assert losses[-1] < losses[3] - 0.01
        assert_copies_are_alike(bare, new.physical_to_logical_map)


def test_copies_train_alike_in_bf16():
    run_ranks(_low_precision, 2)


def _other_forms(rank, ranks, directory):
    """(form, evaluation losses) of a model with copies and of what loads its checkpoints."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import (
        get_default_load_sharded_strategy,
        get_default_save_sharded_strategy,
    )
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )

    tiny.start()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def loss(trainer):
        with torch.no_grad():
            return trainer.model.eval()(**tiny.batch(9, rank)).mean().item()

    found = []
    for form in ({"singleton_local_shards": True}, {"parallel": True}):
        parallel, metadata = form.pop("parallel", False), form
        saved = with_copies(tiny.config(), ON_TWO)
        place = directory / str(parallel)
        if rank == 0:
            place.mkdir()
        dist.barrier()
        strategy = get_default_save_sharded_strategy("torch_dist")
        if parallel:
            strategy = FullyParallelSaveStrategyWrapper(strategy, group)
        state = saved.model.module.sharded_state_dict(metadata=metadata)
        dist_checkpointing.save({"model": state}, str(place), strategy)
        dist.barrier()
        losses = [loss(saved)]
        for trainer in (Trainer.build(tiny.config()), with_copies(tiny.config(), ON_TWO[::-1])):
            reader = get_default_load_sharded_strategy(str(place))
            if parallel:
                # Its other ways of exchange go through a GPU.
                reader = FullyParallelLoadStrategyWrapper(
                    reader, group, exchange_algo="gather_object"
                )
            wanted = {"model": trainer.model.module.sharded_state_dict(metadata=metadata)}
            state = dist_checkpointing.load(wanted, str(place), reader)
            trainer.model.module.load_state_dict(state["model"])
            losses.append(loss(trainer))
        found.append(losses)
    return found


def test_checkpoints_of_other_forms_hold_each_expert_once(tmp_path):
    for found in run_ranks(_other_forms, 2, tmp_path):
        for saved, *loaded in found:
            np.testing.assert_allclose(loaded, saved, atol=1e-6)


def _save_plan(directory):
    from semantic_ep.artifacts import ModelFingerprint
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.plan import Plan
    from semantic_ep.plan.schedule import Schedule

    Plan(
        placement=Placement(physical_to_logical_map=ON_TWO, num_experts=8, ep_size=2),
        schedule=Schedule(
            token_to_rank=np.zeros((2, tiny.VOCAB), dtype=np.int8),
            confidence=np.zeros((2, tiny.VOCAB), dtype=np.uint8),
            request_affinity=np.full((tiny.VOCAB, 2), 0.5, dtype=np.float16),
        ),
        verdict={},
        fingerprint=ModelFingerprint(
            architecture="megatron_gpt", layer_ids=(0, 1), num_experts=8, top_k=2
        ),
    ).save(directory)


def _refusals(rank, ranks, plan):
    from megatron.core.distributed import finalize_model_grads

    from semantic_ep.config import SemanticEPConfig
    from semantic_ep.integrations.megatron import SemanticRun
    from semantic_ep.integrations.megatron.gradients import FinalizeWithCopies

    tiny.start()
    messages = []

    def expect(call):
        with pytest.raises(ConfigError) as caught:
            call()
        messages.append(str(caught.value))

    def prepare(**settings):
        section = {"enabled": True, "plan": {"artifact": str(plan)}, **settings}
        settings = SemanticEPConfig.resolve(json_section=section, environment={})
        return SemanticRun.prepare(settings, tiny.config(), vocab_size=tiny.VOCAB)

    ours = {"dispatch": {"backend": "torch"}}
    run = prepare(**ours)
    assert isinstance(run.finalize_model_grads, FinalizeWithCopies)
    assert run.finalize_model_grads is run.finalize_model_grads
    assert run.placed.topology.node_of_rank == (0, 0)
    expect(lambda: tiny.model(tiny.config(), ON_TWO))
    for setting in ("fp8_param", "init_model_with_meta_device"):
        config = tiny.config()
        setattr(config, setting, True)
        expect(lambda config=config: with_copies(config, ON_TWO))
    trainer = with_copies(tiny.config(), ON_TWO)
    trainer.model.ddp_config.num_distributed_optimizer_instances = 2
    expect(lambda: trainer.step([tiny.batch(0, rank)]))
    expect(lambda: FinalizeWithCopies()([trainer.model.module]))
    trainer.model.config.finalize_model_grads_func = finalize_model_grads
    trainer.evaluate([tiny.batch(0, rank)])
    expect(lambda: trainer.step([tiny.batch(0, rank)]))
    return messages


def test_what_copies_do_not_go_with_is_refused_with_the_reason(tmp_path):
    _save_plan(tmp_path / "plan")
    for message, fragment in zip(
        run_ranks(_refusals, 2, tmp_path / "plan")[0],
        [
            "--semantic-ep-dispatch-backend",
            "--fp8-param-gather",
            "--init-model-with-meta-device",
            "--num-distributed-optimizer-instances",
            "--use-megatron-fsdp",
            "run.finalize_model_grads",
        ],
        strict=True,
    ):
        assert fragment in message
