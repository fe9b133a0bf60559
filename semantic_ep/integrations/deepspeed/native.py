"""Native `deepspeed.moe` layers under a plan: placed experts and an exchange without padding.

DeepSpeed pads what it sends to each expert to one capacity, so that its all-to-all moves the same
bytes wherever experts are. Here the gate stays DeepSpeed's, with its losses and its capacity, and
what it kept is sent through our dispatcher: once for each rank that a token needs, to the rank
that holds its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError, PlacementError, explain
from semantic_ep.integrations.deepspeed.placing import (
    PARTITIONED,
    PlacedExperts,
    create_groups,
)
from semantic_ep.integrations.expert_parallel import StepContext
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.backends import create_dispatcher
from semantic_ep.runtime.exchange import exchange_experts
from semantic_ep.runtime.slots import remap, slot_tables

if TYPE_CHECKING:
    from deepspeed.moe.layer import MoE

    from semantic_ep.runtime.dispatch import Dispatched

WHERE = "semantic_ep.plan.artifact, --semantic-ep-plan-artifact"


def native_layers(model: nn.Module) -> list[MoE]:
    """The `deepspeed.moe.layer.MoE` of a model, in module order."""
    from deepspeed.moe.layer import MoE

    return [module for module in model.modules() if isinstance(module, MoE)]


def place_native_experts(
    model: nn.Module,
    placement: Placement,
    settings: SemanticEPConfig,
    *,
    device: torch.device,
    zero_stage: int,
) -> PlacedExperts:
    """Move experts to the ranks of the plan and replace the exchange, in place; collective.

    Args:
        model: With native layers, whose experts are in DeepSpeed's contiguous order.
        placement: One copy of each expert, equally many on every rank.
        settings: Of the run.
        device: That the model will run on.
        zero_stage: Of the engine to come.

    Raises:
        PlacementError: The placement does not fit the layers, or has copies.
        ConfigError: No groups of this size can be formed, or the stage is 3.
    """
    if zero_stage == PARTITIONED:
        raise ConfigError(
            explain(
                "DeepSpeed refuses its own MoE layers at ZeRO 3, with a plan or without "
                "(deepspeed/runtime/engine.py, _validate_zero3_moe_compatibility)",
                where="zero_optimization.stage",
                got=zero_stage,
                allowed=[0, 1, 2],
            )
        )
    layers = native_layers(model)
    _check(layers, placement)
    groups, process_groups = create_groups(placement, settings)
    group = process_groups.expert_parallel
    dispatcher = create_dispatcher(
        settings.dispatch.backend,
        group=group,
        slots_per_rank=placement.slots_per_rank,
        num_layers=placement.num_layers,
    )
    context = StepContext(device, overlap=settings.dispatch.overlap)
    tables = torch.from_numpy(slot_tables(placement, rank=group.rank()))
    exchange = _exchange_class()
    _move_experts(layers, placement, group)
    for index, layer in enumerate(layers):
        # A change of class keeps the names of parameters, and so DeepSpeed's checkpoint files.
        layer.deepspeed_moe.__class__ = exchange
        layer.deepspeed_moe.dispatcher = dispatcher
        layer.deepspeed_moe.layer = index
        layer.deepspeed_moe.register_buffer("slot_table_E", tables[index], persistent=False)
    return PlacedExperts(
        placement=placement,
        groups=groups,
        ep_rank=group.rank(),
        process_groups=process_groups,
        native=layers,
        context=context,
        dispatcher=dispatcher,
    )


def _check(layers: Sequence[MoE], placement: Placement) -> None:
    if placement.has_replicas:
        raise PlacementError(
            explain(
                "copies of experts have no place in deepspeed.moe layers: DeepSpeed gives each "
                "rank a module for every expert once, and checkpoints a file "
                "(deepspeed/moe/layer.py, MoE)",
                where=WHERE,
                got="a plan with copies of experts",
                do="Make the plan with --redundant-slots 0",
            )
        )
    found = {(layer.num_experts, layer.ep_size, layer.num_local_experts) for layer in layers}
    wanted = (placement.num_experts, placement.ep_size, placement.slots_per_rank)
    if found != {wanted} or len(layers) != placement.num_layers:
        raise PlacementError(
            explain(
                "the plan does not fit the model's deepspeed.moe layers",
                where=WHERE,
                got=f"{placement.num_layers} layers of (experts, ep_size, slots a rank) {wanted}",
                allowed=f"{len(layers)} layers of {sorted(found)}",
                do="Plan for this model and its ep_size, with as many experts on every rank",
            )
        )
    for layer in layers:
        if layer.deepspeed_moe.use_tutel or layer.enable_expert_tensor_parallelism:
            raise PlacementError(
                explain(
                    "a plan replaces the exchange, which Tutel and expert tensor parallelism "
                    "bring too",
                    where=WHERE,
                    do="Build the layers with use_tutel=False and without "
                    "enable_expert_tensor_parallelism, or remove the plan",
                )
            )


def _move_experts(layers: Sequence[MoE], placement: Placement, group: dist.ProcessGroup) -> None:
    """From contiguous order to the slots of the plan."""
    exchange_experts(
        [native_rows(layer) for layer in layers],
        old=Placement.contiguous(
            num_layers=placement.num_layers,
            num_experts=placement.num_experts,
            ep_size=placement.ep_size,
        ),
        new=placement,
        group=group,
    )


def native_rows(layer: MoE) -> dict[str, list[Tensor]]:
    """Parameters and buffers of a layer's experts by their name in an expert, one a slot."""
    experts = [
        expert.state_dict(keep_vars=True)
        for expert in layer.deepspeed_moe.experts.deepspeed_experts
    ]
    return {name: [expert[name] for expert in experts] for name in experts[0]}


def _exchange_class() -> type:
    from deepspeed.moe.sharded_moe import MOELayer

    class SemanticMOELayer(MOELayer):
        """`MOELayer` whose tokens travel through a dispatcher."""

        def forward(self, *inputs: Tensor, **_: Any) -> Tensor:
            """Route [..., D] tokens as DeepSpeed does, and run them where their experts are."""
            hidden, used_token = inputs
            x_TD = hidden.reshape(-1, hidden.shape[-1])
            self.l_aux, _, _, expert_KT, _, weight_KT, self.exp_counts = self.gate(
                x_TD, used_token, True, False
            )
            expert_TK = expert_KT.t().long()
            # The gate marks what exceeds the capacity with -1.
            kept_TK = expert_TK >= 0
            slot_TK = remap(self.slot_table_E, expert_TK.clamp(min=0)).masked_fill(~kept_TK, -1)
            dispatched = self.dispatcher.dispatch(
                x_TD, slot_TK, weight_KT.t().contiguous(), layer=self.layer
            )
            y_TD = self.dispatcher.combine(self._compute(dispatched), dispatched)
            return y_TD.reshape(hidden.shape)

        def _compute(self, dispatched: Dispatched) -> Tensor:
            # Experts without a row run too, or their gradients would be missing on this rank only.
            parts = dispatched.rows_RD.split(dispatched.tokens_per_slot_S.tolist())
            outputs = []
            for part, expert in zip(parts, self.experts.deepspeed_experts, strict=True):
                output = expert(part)
                outputs.append(output[0] if isinstance(output, tuple) else output)
            return torch.cat(outputs)

    return SemanticMOELayer
