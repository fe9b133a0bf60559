"""Expert-parallel groups by node in Megatron-core: other groups, the same numbers."""

import socket

import numpy as np
import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from tests.distributed import megatron_tiny as tiny
from tests.distributed.launcher import run_ranks
from tests.distributed.megatron_tiny import Trainer

pytestmark = pytest.mark.distributed

ROWS = np.stack([np.random.default_rng(layer).permutation(tiny.EXPERTS) for layer in range(2)])
GROUPS_OF_EXPERTS = (
    "_EXPERT_MODEL_PARALLEL_GROUP",
    "_EXPERT_TENSOR_PARALLEL_GROUP",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP",
)


def _losses(trainer, rank, steps):
    return [trainer.step([tiny.batch(step % 2, rank)])[0] for step in steps]


def _runs(rank, world_size, directory, tensor_parallel, distributed_optimizer):
    from megatron.core import parallel_state
    from torch import distributed as dist

    from semantic_ep.errors import ConfigError
    from semantic_ep.integrations.megatron import SemanticExpertGroup

    socket.gethostname = lambda: f"node-{rank % 2}"
    tiny.start(tensor_parallel=tensor_parallel, seed=1)
    config, sample = tiny.config(), rank // tensor_parallel
    build = {"distributed_optimizer": distributed_optimizer}
    default = Trainer.build(config, **build)
    straight = _losses(default, sample, range(2))
    default.save(directory / "default")
    straight += _losses(default, sample, range(2, 6))

    groups = SemanticExpertGroup.create("node")
    # A bare Megatron model is of the default groups, which the optimizer must not mix with ours.
    with pytest.raises(ConfigError, match="pg_collection=run"):
        groups.check_model(default.model)
    by_rank = [dist.get_process_group_ranks(parallel_state.get_expert_model_parallel_group())]
    by_node = [dist.get_process_group_ranks(groups.collection.ep)]
    by_node.append(dist.get_process_group_ranks(groups.collection.expt_dp))
    for name in GROUPS_OF_EXPERTS:  # Whoever would fall back to them must fail.
        setattr(parallel_state, name, None)
    groups.seed(1)
    fresh = _losses(Trainer.build(config, groups=groups, **build), sample, range(2))
    placed = Trainer.build(config, ROWS, groups=groups, **build)
    placed.load(directory / "default")
    moved = fresh + _losses(placed, sample, range(2, 4))
    placed.save(directory / "by-node")

    parallel_state.destroy_model_parallel()
    tiny.start(tensor_parallel=tensor_parallel, expert_parallel=4, seed=1)
    together = Trainer.build(tiny.config(), **build)
    together.load(directory / "by-node")
    moved += _losses(together, sample, range(4, 6))
    return by_rank, by_node, straight, moved


@pytest.mark.parametrize(("tensor_parallel", "distributed_optimizer"), [(1, False), (2, True)])
def test_groups_by_node_train_like_megatrons_own_and_like_one_large_group(
    tmp_path, tensor_parallel, distributed_optimizer
):
    results = run_ranks(_runs, 4, tmp_path, tensor_parallel, distributed_optimizer)
    for rank, (by_rank, by_node, straight, moved) in enumerate(results):
        assert by_rank == [[rank - rank % 2, rank - rank % 2 + 1]]
        assert by_node == [[rank % 2, rank % 2 + 2], [rank - rank % 2, rank - rank % 2 + 1]]
        assert straight[-2] < straight[0] - 0.1
        np.testing.assert_allclose(moved, straight, atol=1e-4)


def _refusals(rank, world_size):
    from megatron.core import parallel_state

    from semantic_ep.errors import ConfigError
    from semantic_ep.integrations.megatron import SemanticExpertGroup

    socket.gethostname = lambda: f"node-{rank % 2}"
    messages = []
    for settings in (
        {"pipeline_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"},
        {"num_distributed_optimizer_instances": 2},
        {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ):
        parallel_state.initialize_model_parallel(**settings)
        with pytest.raises(ConfigError) as caught:
            SemanticExpertGroup.create("node")
        messages.append(str(caught.value))
        parallel_state.destroy_model_parallel()
    return messages


def test_layouts_that_groups_by_node_do_not_fit_are_refused_with_the_reason():
    for order, instances, alternating in run_ranks(_refusals, 4):
        assert "--use-tp-pp-dp-mapping" in order
        assert "--num-distributed-optimizer-instances" in instances
        assert "alternate between nodes" in alternating
