"""Our exchange of tokens as a token dispatcher of Megatron: a token once for each rank it needs.

Megatron's alltoall sends a token once for each of its experts on another rank. Here it travels once
for each such rank, which sums what its experts make of it, and one row comes back. Routing weights
are applied in that sum, and not inside of the experts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from semantic_ep.errors import ConfigError, explain
from semantic_ep.runtime.backends import VerifiedDispatcher, create_dispatcher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.runtime.dispatch import Dispatched

WHERE = "semantic_ep.dispatch.backend, --semantic-ep-dispatch-backend"


class Exchange:
    """One dispatcher for all MoE layers of a model on this rank.

    Attributes:
        dispatcher: None until the first layer is built; its `stats` count by MoE layer.
    """

    def __init__(self, backend: str, *, num_layers: int) -> None:
        """Make none yet.

        Args:
            backend: See `create_dispatcher`.
            num_layers: MoE layers of the whole model (L).
        """
        self.dispatcher: VerifiedDispatcher | None = None
        self._backend = backend
        self._num_layers = num_layers

    def of(self, group: ProcessGroup, slots_per_rank: int) -> VerifiedDispatcher:
        """The dispatcher of an expert-parallel group, the same for all layers.

        Raises:
            BackendError: The backend is not available here.
        """
        if self.dispatcher is None or self.dispatcher.group is not group:
            self.dispatcher = create_dispatcher(
                self._backend,
                group=group,
                slots_per_rank=slots_per_rank,
                num_layers=self._num_layers,
            )
        return self.dispatcher


class SemanticTokenDispatcher(MoETokenDispatcher):
    """Stands where an MoE layer has Megatron's dispatcher; `token_...` communicate, others do not.

    Attributes:
        layer: Index of the MoE layer, which counters are kept under.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        exchange: Exchange,
        slots_per_rank: int,
    ) -> None:
        """Take the place of Megatron's.

        Args:
            config: Of the model.
            pg_collection: Groups of the layer.
            exchange: Shared by the layers of the model.
            slots_per_rank: S.

        Raises:
            ConfigError: The model uses what Megatron's dispatchers do beside the exchange.
            BackendError: The backend is not available here.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        _check_supported(config, self.tp_size)
        self.layer = 0
        self._dispatcher = exchange.of(self.ep_group, slots_per_rank)
        self._slot_TK: Tensor
        self._shape: torch.Size
        self._dispatched: Dispatched

    def dispatch_preprocess(
        self, tokens: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[..., D] tokens and their [T, G * S] routes as [T, D] tokens and [T, K] weights."""
        self._shape = tokens.shape
        # As many routes as a token can have; those that a capacity dropped are missing.
        routed_TK, slot_TK = routing_map.to(torch.uint8).topk(self.config.moe_router_topk, dim=1)
        slot_TK = slot_TK.masked_fill(routed_TK == 0, -1)
        self._slot_TK = slot_TK.sort(dim=1).values
        return tokens.reshape(-1, self._shape[-1]), probs.gather(1, self._slot_TK.clamp(min=0))

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send [T, D] tokens with their weights; returns [R, D] rows and their weights."""
        self._dispatched = self._dispatcher.dispatch(
            hidden_states.contiguous(), self._slot_TK, probs, layer=self.layer
        )
        return self._dispatched.rows_RD, self._dispatched.weight_R

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, already sorted by slot, rows of each slot [S], and weights of one."""
        return hidden_states, self._dispatched.tokens_per_slot_S, torch.ones_like(probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing to do."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send [R, D] results home; returns [T, D], the weighted sum for each token."""
        dispatched = self._dispatched
        # Rows of a pass must not outlive it.
        del self._dispatched
        return self._dispatcher.combine(hidden_states, dispatched)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, D] in the shape that the tokens came in."""
        return hidden_states.view(self._shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Refused:
    flag: str
    value: Any
    why: str


def _check_supported(config: TransformerConfig, expert_tensor_parallel: int) -> None:
    """Refuse what would run and be wrong, and what only Megatron's own dispatchers know.

    Raises:
        ConfigError: For each of these that is set.
    """
    refused = [
        _Refused(
            flag="--expert-tensor-parallel-size",
            value=expert_tensor_parallel > 1,
            why="experts that are divided over ranks need their tokens on all of them",
        ),
        _Refused(
            flag="--moe-token-dispatcher-type flex",
            value=config.moe_token_dispatcher_type == "flex",
            why="two settings choose the exchange",
        ),
        _Refused(
            flag="--moe-shared-expert-overlap",
            value=config.moe_shared_expert_overlap,
            why="Megatron's dispatchers run the shared experts inside of their exchange",
        ),
        _Refused(
            flag="--moe-pad-expert-input-to-capacity",
            value=config.moe_pad_expert_input_to_capacity,
            why="rows are never padded",
        ),
        _Refused(
            flag="--moe-apply-probs-on-input",
            value=config.moe_apply_probs_on_input,
            why="weights are applied to what experts return",
        ),
        _Refused(
            flag="--moe-router-padding-for-quantization",
            value=getattr(config, "moe_router_padding_for_quantization", False)
            or getattr(config, "moe_router_padding_for_fp8", False),
            why="it gives tokens more experts than --moe-router-topk",
        ),
        _Refused(
            flag="--overlap-moe-expert-parallel-comm",
            value=getattr(config, "overlap_moe_expert_parallel_comm", False),
            why="it has two passes through a dispatcher under way at once",
        ),
        _Refused(
            flag="--cuda-graph-impl",
            value=getattr(config, "cuda_graph_impl", "none") not in (None, "none"),
            why="numbers of rows are read on the host",
        ),
    ]
    mistakes = [
        explain(
            f"not with our exchange: {each.why}",
            where=f"{each.flag}, and {WHERE}",
            do='Drop the one, or leave the backend at "auto" for Megatron\'s own dispatcher',
        )
        for each in refused
        if each.value
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
