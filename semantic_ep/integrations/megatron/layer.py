"""A Megatron MoE layer whose physical slots hold the logical experts that a placement says.

Router, losses, expert bias and checkpoints stay in logical order. Between the router and the
dispatcher the columns of the routing map move to the slots, so that every upstream dispatcher
(allgather, alltoall, flex) works unchanged on contiguous slots, and ours in their place. With ours
an expert may have several copies; the tokens of one rank all go to one of them.

Shapes: T tokens, E logical experts, P = G * S physical slots of the expert-parallel group.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed as dist

from semantic_ep.errors import CheckpointError, ConfigError, PlacementError, explain
from semantic_ep.integrations.megatron.checkpoint import SlotLabels, to_logical_order
from semantic_ep.integrations.megatron.copies import (
    check_copies,
    check_summed,
    start_alike,
    with_slots,
)
from semantic_ep.integrations.megatron.dispatcher import Exchange, SemanticTokenDispatcher
from semantic_ep.plan.cost import nearest_copy
from semantic_ep.plan.placement import Placement
from semantic_ep.topology import Topology

# Formats of the distributed optimizer that store its buffers as they lie, so that they follow
# the slots of a rank and not the experts in them.
_BUFFER_FORMATS = ("dp_reshardable", "fully_sharded_bucket_space", "dp_zero_gather_scatter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedLayers:
    """The placement of a model's MoE layers, and which model layers these are.

    Attributes:
        placement: [L, P] logical expert of each slot, no slot empty.
        layer_ids: Model layer index (from 0) of each MoE layer, in the order of the placement.
        topology: Nodes of all ranks of the job, for the choice between copies; None: one node.
    """

    placement: Placement
    layer_ids: tuple[int, ...]
    topology: Topology | None = None

    def __post_init__(self) -> None:
        empty = np.argwhere(self.placement.physical_to_logical_map < 0)
        if len(empty):
            raise PlacementError(
                explain(
                    "a slot without an expert cannot be trained",
                    where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                    got=f"{len(empty)} empty slots, first layer {empty[0][0]}, slot {empty[0][1]}",
                    allowed="an expert or a copy of one in every slot",
                    do="Make the plan with as many experts on every rank, and with "
                    f"--redundant-slots 0 or a multiple of {self.placement.ep_size}",
                )
            )
        if len(self.layer_ids) != self.placement.num_layers:
            raise PlacementError(
                explain(
                    "the placement has another number of MoE layers than the model",
                    got=self.placement.num_layers,
                    allowed=f"{len(self.layer_ids)}, layers {list(self.layer_ids)}",
                )
            )

    def row_of(self, layer_number: int) -> int:
        """Row of a layer in the placement.

        Args:
            layer_number: Number that Megatron gives the layer; it counts from 1.
        """
        try:
            return self.layer_ids.index(layer_number - 1)
        except ValueError:
            raise PlacementError(
                explain(
                    f"layer {layer_number - 1} of the model is an MoE layer without a placement",
                    allowed=f"MoE layers {list(self.layer_ids)}",
                    do="Use a plan that was made for this model",
                )
            ) from None

    def slots_of(self, layer_number: int) -> np.ndarray:
        """[P] logical expert in each slot of a layer; see `row_of`."""
        return self.placement.physical_to_logical_map[self.row_of(layer_number)]

    def serving(self, layer_number: int, group: dist.ProcessGroup) -> np.ndarray:
        """[P] bool, slots that this rank's own tokens go to, one for each expert.

        Args:
            layer_number: See `row_of`.
            group: The EP group.
        """
        nodes = None
        if self.topology is not None:
            nodes = self.topology.of_ranks(dist.get_process_group_ranks(group)).nodes
        row = self.row_of(layer_number)
        slot_E = nearest_copy(self.placement, row, node_of_rank=nodes)[group.rank()]
        serves = np.zeros(self.placement.physical_to_logical_map.shape[1], dtype=bool)
        serves[slot_E] = True
        return serves


class SemanticMoELayer(MoELayer):
    """`MoELayer` with placed experts; takes the place of `MoELayer` in a layer spec."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        placed: PlacedLayers,
        exchange: Exchange | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the layer; `kwargs` are those that newer releases add to `MoELayer`.

        Without an `exchange` Megatron's own dispatcher sends the tokens. With copies of experts
        this is collective over the expert-parallel group, as is `set_layer_number`.

        Raises:
            ConfigError: The plan, or something that is set, does not go with the model.
        """
        copied = placed.placement.has_replicas
        if copied:
            check_copies(config, placed.placement, has_exchange=exchange is not None)
            assert submodules is not None
            submodules = with_slots(submodules, placed.placement.slots_per_rank)
        super().__init__(
            config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            **kwargs,
        )
        self.placed = placed
        _check_supported(self, placed.placement)
        if copied:
            slots = placed.placement.slots_per_rank
            self.num_local_experts = slots
            first = self.ep_group.rank() * slots
            self.local_expert_indices = list(range(first, first + slots))
        self._trains_copies = copied
        self.register_buffer("slot_to_logical", None, persistent=False)
        self.register_buffer("elsewhere", None, persistent=False)
        if exchange is not None:
            theirs = self.token_dispatcher
            self.token_dispatcher = SemanticTokenDispatcher(
                config,
                ProcessGroupCollection(
                    ep=theirs.ep_group, expt_tp=theirs.tp_group, tp_ep=theirs.tp_ep_group
                ),
                exchange=exchange,
                slots_per_rank=placed.placement.slots_per_rank,
            )
        if layer_number is not None:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Learn which layer of the model this is, and with it which experts its slots hold."""
        super().set_layer_number(layer_number)
        self._take_slots(layer_number)
        if self._trains_copies:
            start_alike(
                self.experts,
                placement=self.placed.placement,
                layer=self.placed.row_of(layer_number),
                group=self.ep_group,
            )

    def take_placement(self, placed: PlacedLayers) -> None:
        """Send tokens by another placement from now on; the experts must have moved."""
        self.placed = placed
        self._take_slots(self.layer_number)

    def route(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Route in logical experts and answer in slots: (probs, routing_map), both [T, P].

        Raises:
            ConfigError: Copies of an expert would be trained apart.
        """
        probs, routing_map = super().route(*args, **kwargs)
        assert self.slot_to_logical is not None, "the layer has no number yet"
        probs, routing_map = probs[:, self.slot_to_logical], routing_map[:, self.slot_to_logical]
        if self.elsewhere is None:
            return probs, routing_map
        if self.training and torch.is_grad_enabled():
            check_summed(self.config)
        return probs.masked_fill(self.elsewhere, 0), routing_map & ~self.elsewhere

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """State for `dist_checkpointing`, in the order of logical experts.

        Raises:
            CheckpointError: The optimizer's checkpoint format does not know experts.
        """
        chosen = (metadata or {}).get("distrib_optim_sharding_type")
        if chosen in _BUFFER_FORMATS:
            raise CheckpointError(
                explain(
                    "this format of the distributed optimizer stores slots and not experts, so "
                    "that another placement could not load it",
                    where='metadata["distrib_optim_sharding_type"]',
                    got=chosen,
                    allowed="fully_reshardable",
                    do="Pass --dist-ckpt-optim-fully-reshardable, or set it in the metadata",
                )
            )
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        experts = f"{prefix}experts."
        row = self.placed.row_of(self.layer_number)
        to_logical_order(
            [entry for key, entry in state.items() if key.startswith(experts)],
            SlotLabels(
                axis=len(sharded_offsets),
                expert=self.placed.placement.physical_to_logical_map[row].tolist(),
                copy=self.placed.placement.copy_of_slot[row].tolist(),
            ),
        )
        return state

    def _take_slots(self, layer_number: int) -> None:
        device = next(self.router.parameters()).device
        slots = torch.as_tensor(self.placed.slots_of(layer_number).copy(), dtype=torch.long)
        self.slot_to_logical = slots.to(device)
        if self.placed.placement.has_replicas:
            serving = self.placed.serving(layer_number, self.ep_group)
            self.elsewhere = torch.as_tensor(~serving).to(device)
        if isinstance(self.token_dispatcher, SemanticTokenDispatcher):
            self.token_dispatcher.layer = self.placed.layer_ids.index(layer_number - 1)


def _check_supported(layer: MoELayer, placement: Placement) -> None:
    """Refuse what would run and be wrong."""
    config = layer.config
    ep_size = layer.ep_group.size()
    if placement.ep_size != ep_size:
        raise ConfigError(
            explain(
                "the plan is for another number of expert-parallel ranks",
                where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                got=f"{placement.ep_size} ranks",
                allowed=f"{ep_size} (--expert-model-parallel-size)",
                do=f"Make a plan with --ep-size {ep_size}",
            )
        )
    if placement.num_experts != config.num_moe_experts:
        raise ConfigError(
            explain(
                "the plan is for another number of experts",
                where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                got=placement.num_experts,
                allowed=f"{config.num_moe_experts} (--num-experts)",
            )
        )
    if config.mtp_num_layers:
        raise ConfigError(
            explain(
                "placements do not reach the layers of multi-token prediction",
                where="--mtp-num-layers",
                got=config.mtp_num_layers,
                do="Train without them, or without a plan",
            )
        )
    if not isinstance(layer.experts, SequentialMLP | TEGroupedMLP):
        raise ConfigError(
            explain(
                "checkpoints of these experts cannot be written in logical order",
                got=type(layer.experts).__name__,
                allowed="SequentialMLP, TEGroupedMLP",
                do="Drop --moe-use-legacy-grouped-gemm",
            )
        )
