"""Expert-parallel groups that follow the nodes of a Megatron run.

Megatron takes its groups as a collection, from which model, gradient buffers and optimizer choose.
Ours has Megatron's own groups for dense layers and planned ones for experts. Pipeline schedules
and the final reduction of gradients use dense groups alone and need no collection.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import Any, Self

from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from torch import nn

from semantic_ep.errors import ConfigError, explain
from semantic_ep.runtime.grid import DENSE_KINDS, EXPERT_KINDS
from semantic_ep.runtime.groups import GroupPlan, Scope, create_groups, topology_of_job

WHERE = "semantic_ep.groups.scope, --semantic-ep-groups-scope"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticExpertGroup:
    """The groups of this rank.

    Attributes:
        plan: Ranks of every group of the job.
        collection: The groups, for `GPTModel`, `DistributedDataParallel` and `place_experts`.
        expert_data_on_host: Gloo group of the ranks of `collection.expt_dp`.
    """

    plan: GroupPlan
    collection: ProcessGroupCollection
    expert_data_on_host: dist.ProcessGroup

    @classmethod
    def create(cls, scope: Scope, *, timeout: datetime.timedelta | None = None) -> Self:
        """Make the groups of experts; collective.

        Megatron's own groups must have been made, with the same sizes, by
        `parallel_state.initialize_model_parallel`.

        Args:
            scope: See `GroupPlan.build`; the host name of a rank is its node.
            timeout: Of the collectives of the new groups.

        Raises:
            ConfigError: Nodes and sizes do not suit, or Megatron orders its ranks in another way.
        """
        plan = GroupPlan.build(
            dist.get_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            topology=topology_of_job(),
            scope=scope,
            tensor_parallel=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline_parallel=parallel_state.get_pipeline_model_parallel_world_size(),
            context_parallel=parallel_state.get_context_parallel_world_size(),
            expert_tensor_parallel=parallel_state.get_expert_tensor_parallel_world_size(),
        )
        collection = ProcessGroupCollection.use_mpu_process_groups()
        _check_order(plan, collection)
        if plan.stage_order == tuple(range(plan.sizes.stage)):
            on_host = parallel_state.get_expert_data_parallel_group_gloo()
            return cls(plan=plan, collection=collection, expert_data_on_host=on_host)
        for kind in EXPERT_KINDS:
            setattr(collection, kind, create_groups(plan.groups(kind), timeout=timeout))
        collection.intra_expt_dp = collection.expt_dp
        on_host = create_groups(plan.groups("expt_dp"), backend="gloo", timeout=timeout)
        return cls(plan=plan, collection=collection, expert_data_on_host=on_host)

    def seed(self, seed: int) -> None:
        """Seed Megatron's random states, so that each expert starts the same whatever the groups.

        Args:
            seed: As for `model_parallel_cuda_manual_seed`, whose place this takes.
        """
        model_parallel_cuda_manual_seed(
            seed,
            ep_rank=self.collection.ep.rank(),
            etp_rank=self.collection.expt_tp.rank(),
        )

    def optimizer(
        self, config: OptimizerConfig, model_chunks: Sequence[nn.Module], **options: Any
    ) -> Any:
        """Megatron's optimizer over these groups.

        Args:
            config: As for `get_megatron_optimizer`, whose place this takes.
            model_chunks: `DistributedDataParallel` modules built with the collection.
            **options: Further arguments of `get_megatron_optimizer`.

        Raises:
            ConfigError: A module was built with other groups.
        """
        for chunk in model_chunks:
            self.check_model(chunk)
        made = get_megatron_optimizer(
            config,
            list(model_chunks),
            pg_collection=self.collection,
            use_gloo_process_groups=False,
            **options,
        )
        # With a collection Megatron cannot be given the groups that checkpoints gather over.
        for optimizer in _distributed(made):
            if optimizer.data_parallel_group is self.collection.expt_dp:
                optimizer.data_parallel_group_gloo = self.expert_data_on_host
            else:
                optimizer.data_parallel_group_gloo = parallel_state.get_data_parallel_group_gloo(
                    with_context_parallel=True
                )
        return made

    def check_model(self, model: nn.Module) -> None:
        """Raise `ConfigError` if a model or its gradient buffers use other groups of experts."""
        found = {}
        while True:
            if hasattr(model, "intra_expt_dp_group"):
                found[type(model).__name__] = model.intra_expt_dp_group is self.collection.expt_dp
            if not hasattr(model, "module"):
                break
            model = model.module
        found[type(model).__name__] = model.pg_collection.ep is self.collection.ep
        for name, right in found.items():
            if not right:
                raise ConfigError(
                    explain(
                        f"{name} was built with other expert-parallel groups than this says",
                        where=WHERE,
                        do=f"Pass pg_collection=run.pg_collection to {name}, or leave it out",
                    )
                )


def _distributed(optimizer: Any) -> Iterator[DistributedOptimizer]:
    if isinstance(optimizer, ChainedOptimizer):
        for each in optimizer.chained_optimizers:
            yield from _distributed(each)
    elif isinstance(optimizer, DistributedOptimizer):
        yield optimizer


def _check_order(plan: GroupPlan, collection: ProcessGroupCollection) -> None:
    """Refuse ranks in another order, of which the groups of experts would be no part."""
    rank = dist.get_rank()
    for kind in DENSE_KINDS:
        found = dist.get_process_group_ranks(getattr(collection, kind))
        wanted = next(group for group in plan.groups(kind) if rank in group)
        if tuple(found) != wanted:
            raise ConfigError(
                explain(
                    "Megatron orders the ranks of this run in another way",
                    where=WHERE,
                    got=f"ranks {found} in one group ({kind})",
                    allowed=f"ranks {list(wanted)}, order tp-cp-ep-dp-pp",
                    do="Drop --use-tp-pp-dp-mapping, or leave it out",
                )
            )
    if collection.intra_expt_dp.size() != collection.expt_dp.size():
        raise ConfigError(
            explain(
                "groups by node are not divided among several distributed optimizers",
                where="--num-distributed-optimizer-instances",
                allowed=1,
                do=f"Set it to 1, or leave {WHERE} out",
            )
        )
