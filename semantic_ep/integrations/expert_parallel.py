"""Expert-parallel experts for the MoE blocks of Hugging Face models.

Only the `experts` module of a block is replaced. Router, shared experts and the block itself stay
transformers' own and logical: router ids are mapped to slots after routing, so that any placement,
with or without replicas, serves any router, group-limited ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from semantic_ep.integrations.transformers import find_moe_layers
from semantic_ep.runtime.slots import remap, slot_tables
from semantic_ep.runtime.stats import PhaseTimer

if TYPE_CHECKING:
    import numpy as np

    from semantic_ep.observe.recorder import RoutingSink
    from semantic_ep.plan.phases import PhasePlacements
    from semantic_ep.plan.placement import Placement
    from semantic_ep.runtime.backends import VerifiedDispatcher
    from semantic_ep.runtime.dispatch import ExpertRows
    from semantic_ep.runtime.overlap import OverlapMode


class StepContext:
    """What the MoE layers of one model share.

    Attributes:
        timer: Seconds in dispatch, experts and combine, over all layers.
        overlap: Whether experts start on own rows while others travel.
        recorder: Told of the router's choices, if there is one.
        generated_T: [T] bool, which of the tokens that routers see were generated, for models with
            a placement of their own for these; None where the placement is one for all.
    """

    def __init__(self, device: torch.device, *, overlap: OverlapMode) -> None:
        self.timer = PhaseTimer(device)
        self.overlap = overlap
        self.recorder: RoutingSink | None = None
        self.generated_T: Tensor | None = None


class SemanticExperts(nn.Module):
    """Stands where a Hugging Face MoE block has its fused experts.

    Args:
        local: The family's own experts module, with the S slots of this rank.
        dispatcher: Of the EP group.
        layer: Index of the MoE layer, 0..L-1.
        slot_table_E: int64, slot of each logical expert for tokens of this rank.
        generated_table_E: The same for generated tokens; None: there is one table for all.
        hidden_size: D.
        top_k: Experts a token activates (K).
        context: Shared by the layers of the model.
    """

    slot_table_E: Tensor
    generated_table_E: Tensor | None

    def __init__(
        self,
        local: nn.Module,
        *,
        dispatcher: VerifiedDispatcher,
        layer: int,
        slot_table_E: Tensor,
        hidden_size: int,
        top_k: int,
        context: StepContext,
        generated_table_E: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.local = local
        self.dispatcher = dispatcher
        self.layer = layer
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.context = context
        self.register_buffer("slot_table_E", slot_table_E, persistent=False)
        self.register_buffer("generated_table_E", generated_table_E, persistent=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run [T, D] tokens through their top-k experts, wherever these live.

        Args:
            hidden_states: [T, D].
            top_k_index: [T, K] logical expert ids.
            top_k_weights: [T, K].

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        if self.context.recorder is not None:
            self.context.recorder.record(self.layer, top_k_index)
        if self.dispatcher.group.size() == 1:
            return self._forward_alone(hidden_states, top_k_index, top_k_weights)
        slot_TK = self._slots(top_k_index)
        # Equal on all ranks, also on those that have no token to learn it from.
        exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        timer = self.context.timer
        with timer.phase("dispatch"):
            dispatched = self.dispatcher.dispatch(
                hidden_states,
                slot_TK,
                top_k_weights.to(exact),
                layer=self.layer,
                overlap=self.context.overlap,
            )
        with timer.phase("experts"):
            y_RD = self._compute(dispatched)
        y_travelled_RD = None
        if dispatched.travelling is not None:
            with timer.phase("dispatch"):
                travelled = dispatched.travelling.wait()
            with timer.phase("experts"):
                y_travelled_RD = self._compute(travelled)
        with timer.phase("combine"):
            return self.dispatcher.combine(y_RD, dispatched, y_travelled_RD)

    def _forward_alone(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One rank has nobody to exchange with: the family's own forward, and the counters."""
        slot_TK = self._slots(index_TK)
        with self.context.timer.phase("experts"):
            out_TD = self.local(hidden_TD, slot_TK, weights_TK)
        self.dispatcher.stats.record_alone(
            self.layer, slot_TK, row_bytes=hidden_TD.shape[1] * hidden_TD.element_size()
        )
        return out_TD

    def _slots(self, index_TK: Tensor) -> Tensor:
        """[T, K] physical slots of logical experts, by each token's phase if that counts."""
        slot_TK, generated_T = remap(self.slot_table_E, index_TK), self.context.generated_T
        if self.generated_table_E is None or generated_T is None:
            return slot_TK
        return torch.where(generated_T[:, None], remap(self.generated_table_E, index_TK), slot_TK)

    def run_idle(self) -> None:
        """Take part in the exchange of this layer without a token, for the other ranks."""
        self.context.generated_T = None
        weight = next(self.local.parameters())
        hidden = weight.new_empty(0, self.hidden_size)
        index = torch.empty(0, self.top_k, dtype=torch.long, device=weight.device)
        self(hidden, index, hidden.new_empty(0, self.top_k))

    def _compute(self, rows: ExpertRows) -> Tensor:
        rows_RD = rows.rows_RD
        if len(rows_RD) == 0:
            if any(hasattr(p, "ds_id") for p in self.local.parameters()):
                # ZeRO 3 gathers parameters, and reduces gradients, where the module is called.
                one = rows_RD.new_zeros(1, self.hidden_size)
                slot = torch.zeros(1, 1, dtype=torch.long, device=one.device)
                return self.local(one, slot, one.new_zeros(1, 1))[:0]
            if torch.is_grad_enabled():
                # A gradient of zero and not none: replicas of these experts on other ranks wait
                # for this rank to reduce theirs.
                rows_RD = rows_RD + 0 * sum(p.flatten()[0] for p in self.local.parameters())
            return rows_RD
        # The family's own forward, with one expert a row; combine applies the weights.
        return self.local(rows_RD, rows.slot_R[:, None], rows_RD.new_ones(len(rows_RD), 1))


def replace_experts(
    model: nn.Module,
    *,
    placement: Placement,
    rank: int,
    dispatcher: VerifiedDispatcher,
    context: StepContext,
    node_of_rank: np.ndarray | None = None,
    phases: PhasePlacements | None = None,
) -> Sequence[SemanticExperts]:
    """Replace the experts of every MoE block, in place; returns them in layer order.

    Args:
        model: From `semantic_ep.integrations.sharded_loading.load_expert_shard`.
        placement: The placement it was loaded for.
        rank: EP rank.
        dispatcher: Of the EP group, with L layers.
        context: Shared by the layers.
        node_of_rank: Node of each EP rank, for the choice between copies; None means one node.
        phases: Whose resident experts the placement is of, if each phase has one of its own.
    """
    tables = _tables(placement, phases, rank=rank, node_of_rank=node_of_rank)
    replaced = []
    for layer, site in enumerate(find_moe_layers(model)):
        experts = SemanticExperts(
            model.get_submodule(site.experts),
            dispatcher=dispatcher,
            layer=layer,
            **{name: table_LE[layer] for name, table_LE in tables.items()},
            hidden_size=model.config.get_text_config().hidden_size,
            top_k=site.top_k,
            context=context,
        )
        model.set_submodule(site.experts, experts)
        replaced.append(experts)
    return replaced


def set_slot_tables(
    replaced: Sequence[SemanticExperts],
    placement: Placement,
    *,
    rank: int,
    node_of_rank: np.ndarray | None = None,
    phases: PhasePlacements | None = None,
) -> None:
    """Go on with the tables of another placement; arguments as of `replace_experts`."""
    tables = _tables(placement, phases, rank=rank, node_of_rank=node_of_rank)
    for name, table_LE in tables.items():
        for experts, table_E in zip(replaced, table_LE, strict=True):
            getattr(experts, name).copy_(table_E)


def _tables(
    placement: Placement,
    phases: PhasePlacements | None,
    *,
    rank: int,
    node_of_rank: np.ndarray | None,
) -> dict[str, Tensor]:
    """[L, E] tables by the name that `SemanticExperts` has for them."""
    serving = {"slot_table_E": placement}
    if phases is not None:
        serving = dict(
            zip(("slot_table_E", "generated_table_E"), phases.serving(rank), strict=True)
        )
    return {
        name: torch.from_numpy(slot_tables(one, rank=rank, node_of_rank=node_of_rank))
        for name, one in serving.items()
    }
