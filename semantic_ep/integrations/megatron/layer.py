"""A Megatron MoE layer whose physical slots hold the logical experts that a placement says.

Router, losses, expert bias and checkpoints stay in logical order. Between the router and the
dispatcher the columns of the routing map move to the slots, so that every upstream dispatcher
(allgather, alltoall, flex) works unchanged on contiguous slots, and ours in their place.
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

from semantic_ep.errors import CheckpointError, ConfigError, PlacementError, explain
from semantic_ep.integrations.megatron.checkpoint import to_logical_order
from semantic_ep.integrations.megatron.dispatcher import Exchange, SemanticTokenDispatcher
from semantic_ep.plan.placement import Placement

# Formats of the distributed optimizer that store its buffers as they lie, so that they follow
# the slots of a rank and not the experts in them.
_BUFFER_FORMATS = ("dp_reshardable", "fully_sharded_bucket_space", "dp_zero_gather_scatter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedLayers:
    """The placement of a model's MoE layers, and which model layers these are.

    Attributes:
        placement: [L, G * S] logical expert of each slot; one copy of each expert, no empty slot.
        layer_ids: Model layer index (from 0) of each MoE layer, in the order of the placement.
    """

    placement: Placement
    layer_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        slots = self.placement.slots_per_rank * self.placement.ep_size
        if slots != self.placement.num_experts:
            raise PlacementError(
                explain(
                    "Megatron's dispatchers take exactly one slot an expert",
                    got=f"{slots} slots for {self.placement.num_experts} experts",
                    do="Make the plan with --redundant-slots 0 and as many experts on every rank",
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

    def slots_of(self, layer_number: int) -> np.ndarray:
        """[E] logical expert in each slot of a layer.

        Args:
            layer_number: Number that Megatron gives the layer; it counts from 1.
        """
        try:
            row = self.layer_ids.index(layer_number - 1)
        except ValueError:
            raise PlacementError(
                explain(
                    f"layer {layer_number - 1} of the model is an MoE layer without a placement",
                    allowed=f"MoE layers {list(self.layer_ids)}",
                    do="Use a plan that was made for this model",
                )
            ) from None
        return self.placement.physical_to_logical_map[row]


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

        Without an `exchange` Megatron's own dispatcher sends the tokens.
        """
        super().__init__(
            config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            **kwargs,
        )
        self.placed = placed
        _check_supported(self, placed.placement)
        self.register_buffer("slot_to_logical", None, persistent=False)
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
            self._take_slots(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Learn which layer of the model this is, and with it which experts its slots hold."""
        super().set_layer_number(layer_number)
        self._take_slots(layer_number)

    def take_placement(self, placed: PlacedLayers) -> None:
        """Send tokens by another placement from now on; the experts must have moved."""
        self.placed = placed
        self._take_slots(self.layer_number)

    def route(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Route in logical experts and answer in slots: (probs, routing_map), both [T, E]."""
        probs, routing_map = super().route(*args, **kwargs)
        assert self.slot_to_logical is not None, "the layer has no number yet"
        return probs[:, self.slot_to_logical], routing_map[:, self.slot_to_logical]

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
        to_logical_order(
            [entry for key, entry in state.items() if key.startswith(experts)],
            axis=len(sharded_offsets),
            slot_to_logical=self.placed.slots_of(self.layer_number),
        )
        return state

    def _take_slots(self, layer_number: int) -> None:
        slots = torch.as_tensor(self.placed.slots_of(layer_number).copy(), dtype=torch.long)
        self.slot_to_logical = slots.to(next(self.router.parameters()).device)
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
