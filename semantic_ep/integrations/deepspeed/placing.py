"""Spread the experts of a Hugging Face model over the ranks of a DeepSpeed training run, by plan.

The MoE blocks stay transformers' own, as in inference (`semantic_ep.integrations.expert_parallel`):
only their `experts` module is replaced, and exchanges tokens through our dispatcher. DeepSpeed is
told about it in the terms of its own MoE: expert parameters carry `allreduce = False` and the name
of their group, the groups are registered under that name, and one `deepspeed.moe` module without
parameters makes the engine treat the model as one with experts.

AutoEP's module would be the other way. It computes owners as contiguous blocks in its forward,
save and load, sends a token once for each expert instead of once for each rank, and knows fewer
families; following a plan would mean to override all of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import CheckpointError, ConfigError, PlacementError, explain
from semantic_ep.integrations.expert_parallel import SemanticExperts, StepContext, replace_experts
from semantic_ep.integrations.transformers import find_moe_layers, moe_shape
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.backends import VerifiedDispatcher, create_dispatcher
from semantic_ep.runtime.groups import GroupPlan, ProcessGroups, topology_of_job
from semantic_ep.runtime.slots import slot_tables

if TYPE_CHECKING:
    import numpy as np
    from deepspeed.moe.layer import MoE


PARTITIONED = 3
"""The ZeRO stage that partitions parameters too."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PlacedExperts:
    """The experts of one model in training.

    Attributes:
        placement: Which experts are where.
        groups: Ranks of every expert-parallel group of the job.
        ep_rank: Of this rank in its group.
        process_groups: This rank's groups.
        experts: By layer, of a Hugging Face model; parameters hold the S slots of this rank.
        native: By layer, of a model with `deepspeed.moe` layers, which have a module for each slot.
        context: What the layers share.
        dispatcher: Of the EP group, with its counters.
    """

    placement: Placement
    groups: GroupPlan
    ep_rank: int
    process_groups: ProcessGroups
    experts: Sequence[SemanticExperts] = ()
    native: Sequence[MoE] = ()
    context: StepContext
    dispatcher: VerifiedDispatcher

    def under(self, placement: Placement) -> PlacedExperts:
        """The same under another placement, by which tokens are sent from now on.

        The experts themselves must have moved, or be about to.
        """
        nodes = self.groups.nodes_of_group(dist.get_rank())
        tables = torch.from_numpy(slot_tables(placement, rank=self.ep_rank, node_of_rank=nodes))
        routing = self.experts or [layer.deepspeed_moe for layer in self.native]
        for module, table_E in zip(routing, tables, strict=True):
            module.slot_table_E.copy_(table_E)
        return dataclasses.replace(self, placement=placement)

    def held_S(self, layer: int) -> np.ndarray:
        """[S] logical expert in each slot of this rank, -1 for an empty slot."""
        return self.placement.experts_of_rank(layer, self.ep_rank)

    def parameters(self, model: nn.Module) -> Iterator[tuple[str, int, nn.Parameter]]:
        """(name in the model, layer, [S, ...] parameter) of all experts."""
        layer_of = {id(module): layer for layer, module in enumerate(self.experts)}
        for path, module in model.named_modules():
            if id(module) in layer_of:
                for name, parameter in module.local.named_parameters():
                    yield f"{path}.local.{name}", layer_of[id(module)], parameter


def place_experts(
    model: nn.Module,
    placement: Placement,
    settings: SemanticEPConfig,
    *,
    device: torch.device,
    zero_stage: int = 0,
) -> PlacedExperts:
    """Leave each rank the experts of its slots, in place; collective over all ranks.

    Args:
        model: A Hugging Face model with all experts, equal on all ranks. Its parameters stay the
            same objects, so that lists and optimizers made from them stay valid.
        placement: Ranks may hold different numbers of experts. Where some have several copies,
            these start alike, and `semantic_ep.integrations.deepspeed.copies` keeps them so.
        settings: Of the run.
        device: That the model will run on.
        zero_stage: Of the engine to come.

    Raises:
        PlacementError: The placement is of another model.
        ConfigError: No groups of this size can be formed, or the model is partitioned already.
    """
    _check(model, placement)
    groups, process_groups = create_groups(placement, settings)
    ep_rank = process_groups.expert_parallel.rank()
    name = group_name(placement.ep_size)
    partitioned = zero_stage == PARTITIONED
    for layer, site in enumerate(find_moe_layers(model)):
        experts = model.get_submodule(site.experts)
        held_S = placement.experts_of_rank(layer, ep_rank)
        for parameter in experts.parameters():
            parameter.data = rows_of_slots(parameter.data, held_S)
            parameter.allreduce = False
            parameter.group_name = name
            if partitioned:
                # Of experts in AutoEP's layers: each has a group of its own to be partitioned over.
                parameter.ds_zero_placement_family = "autoep_expert"
                parameter.ds_zero_partition_group_name = name
        experts.num_experts = placement.slots_per_rank
    dispatcher = create_dispatcher(
        settings.dispatch.backend,
        group=process_groups.expert_parallel,
        slots_per_rank=placement.slots_per_rank,
        num_layers=placement.num_layers,
    )
    # Parameters are gathered where a module is called, so each rank must call it as often.
    context = StepContext(device, overlap="off" if partitioned else settings.dispatch.overlap)
    replaced = replace_experts(
        model,
        placement=placement,
        rank=ep_rank,
        dispatcher=dispatcher,
        context=context,
        node_of_rank=groups.nodes_of_group(dist.get_rank()),
    )
    marker = (
        partitioned_group(placement.num_experts)
        if partitioned
        else expert_group(placement.num_experts, placement.ep_size, stored=True)
    )
    model.add_module("semantic_ep_group", marker)
    return PlacedExperts(
        placement=placement,
        groups=groups,
        ep_rank=ep_rank,
        process_groups=process_groups,
        experts=replaced,
        context=context,
        dispatcher=dispatcher,
    )


def create_groups(
    placement: Placement, settings: SemanticEPConfig
) -> tuple[GroupPlan, ProcessGroups]:
    """Form the groups of the job, by nodes, and make them known to DeepSpeed; collective."""
    groups = GroupPlan.build(
        dist.get_world_size(),
        placement.ep_size,
        topology=topology_of_job(),
        scope=settings.groups.scope,
    )
    made = groups.create()
    register_groups(made)
    return groups, made


def rows_of_slots(whole: Tensor, held_S: np.ndarray) -> Tensor:
    """[S, ...] rows of a tensor [E, ...] for the experts in slots; zeros for empty ones."""
    held = torch.tensor(held_S, dtype=torch.long, device=whole.device)
    rows = whole.index_select(0, held.clamp(min=0))
    rows[held < 0] = 0
    return rows


def _check(model: nn.Module, placement: Placement) -> None:
    shape = moe_shape(model)
    wanted = (len(shape.layer_ids), shape.num_experts)
    found = (placement.num_layers, placement.num_experts)
    if found != wanted:
        raise PlacementError(
            explain(
                "the plan is of another model",
                where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                got=f"{found[0]} MoE layers of {found[1]} experts",
                allowed=f"{wanted[0]} MoE layers of {wanted[1]} experts",
            )
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            explain(
                "the model was made in pieces already, before its experts could be placed",
                where="deepspeed.zero.Init, or HfDeepSpeedConfig of transformers",
                do="Make the model without them; the engine partitions it",
            )
        )


def expert_group(num_experts: int, ep_size: int, *, stored: bool) -> nn.Module:
    """A `deepspeed.moe` layer without parameters, for the engine to find in a model.

    Args:
        num_experts: Logical experts a layer (E).
        ep_size: Ranks in an expert-parallel group (G).
        stored: Whether something stores the experts beside DeepSpeed's checkpoints; else DeepSpeed
            is kept from writing and reading them.
    """
    from deepspeed.moe.layer import MoE

    class ExpertGroup(MoE):
        """Marks the model as one with experts; the experts themselves are elsewhere."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.expert_group_name = group_name(ep_size)
            self.num_experts = num_experts
            self.ep_size = ep_size

        @property
        def num_local_experts(self) -> int:
            """DeepSpeed writes and reads a file for each of these."""
            if not stored:
                raise CheckpointError(
                    explain(
                        "a DeepSpeed checkpoint of this model would hold the experts of rank 0 "
                        "only",
                        do="Save the model with Megatron's dist_checkpointing",
                    )
                )
            return 0

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups are registered already."""

    return ExpertGroup()


def partitioned_group(num_experts: int) -> nn.Module:
    """An AutoEP layer without parameters, the only kind that the engine accepts at ZeRO 3.

    Args:
        num_experts: Logical experts a layer (E).
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class PartitionedExpertGroup(AutoEPMoELayer):
        """Marks the model as one with experts; the experts themselves are elsewhere."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups are registered already."""

    return PartitionedExpertGroup()


def group_name(ep_size: int) -> str:
    """DeepSpeed reads the size of a group from its name."""
    return f"ep_size_{ep_size}"


def register_groups(made: ProcessGroups) -> None:
    """Make the groups of this rank known to DeepSpeed.

    Raises:
        ConfigError: It has groups of this size over other ranks.
    """
    from deepspeed.utils import groups as registry

    name = group_name(made.expert_parallel.size())
    for group, groups, ranks in (
        (
            made.expert_parallel,
            registry._EXPERT_PARALLEL_GROUP,
            registry._EXPERT_PARALLEL_GROUP_RANKS,
        ),
        (
            made.expert_data_parallel,
            registry._EXPERT_DATA_PARALLEL_GROUP,
            registry._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ),
    ):
        mine = dist.get_process_group_ranks(group)
        if list(ranks.get(name, mine)) != mine:
            raise ConfigError(
                explain(
                    f"DeepSpeed has other groups under the name {name} already",
                    where="semantic_ep.groups.scope, --semantic-ep-groups-scope",
                    got=str(list(ranks[name])),
                    allowed=str(mine),
                    do="Make the engine with the plan first",
                )
            )
        groups[name], ranks[name] = group, mine
