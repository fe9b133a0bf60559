"""DeepSpeed-Inference with semantic expert parallelism for Hugging Face MoE models.

`deepspeed.init_inference` has no expert parallelism for these models: its `moe` section reaches
`deepspeed.moe` layers only. Here the experts are sharded before the model is handed over.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import BackendError, PlacementError, explain
from semantic_ep.integrations.deepspeed.attention_parallel import (
    check_heads,
    cut_heads,
    prepare_reductions,
    tensor_parallel_config,
)
from semantic_ep.integrations.expert_parallel import (
    SemanticExperts,
    StepContext,
    replace_experts,
    set_slot_tables,
)
from semantic_ep.integrations.few_rows import experts_implementation
from semantic_ep.integrations.look_ahead import LookAheadPredictor
from semantic_ep.integrations.paged_attention import ATTENTION, register_paged_attention
from semantic_ep.integrations.sharded_loading import load_expert_shard
from semantic_ep.integrations.token_slices import TokenSlices
from semantic_ep.plan.phases import PhasePlacements
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.backends import VerifiedDispatcher, create_dispatcher
from semantic_ep.runtime.exchange import Exchanged, exchange_experts
from semantic_ep.runtime.shuffle import create_shuffle

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from semantic_ep.plan.predictors import Predictor
    from semantic_ep.runtime.overlap import OverlapMode


# Which work a rank does in attention: that of its own requests, or that of its heads for all.
AttentionMode = Literal["dp", "tp"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertParallelModel:
    """A model inside DeepSpeed-Inference whose experts are spread over an EP group.

    Attributes:
        engine: `deepspeed.InferenceEngine`; call it like the model, with a `PagedKVCache` and its
            `packed_batch`.
        experts: The expert modules in layer order.
        context: What they share.
        dispatcher: Of the EP group, with its counters.
        placement: Which experts are where.
        phases: Whose experts these are, where prompts and generated tokens have placements of
            their own.
        node_of_rank: [G], node of each EP rank.
        fingerprint: Of the checkpoint.
        token_slices: Attention-TP's division of every step; None in attention-DP.
    """

    engine: Any
    experts: Sequence[SemanticExperts]
    context: StepContext
    dispatcher: VerifiedDispatcher
    placement: Placement
    node_of_rank: np.ndarray
    fingerprint: ModelFingerprint
    token_slices: TokenSlices | None = None
    phases: PhasePlacements | None = None

    @property
    def module(self) -> nn.Module:
        """The Hugging Face model."""
        return self.engine.module

    @property
    def stop_ids(self) -> frozenset[int]:
        """End-of-sequence ids of the checkpoint's generation config."""
        stop = self.module.generation_config.eos_token_id
        if stop is None:
            return frozenset()
        return frozenset(stop if isinstance(stop, list) else [stop])


def init_distributed(*, device_type: str, peer_timeout: float) -> None:
    """Start the default process group through DeepSpeed, from the launcher's variables.

    Args:
        device_type: "cuda" for NCCL, "cpu" for gloo.
        peer_timeout: Seconds after which a silent peer is given up.
    """
    import deepspeed

    # Its shared-memory collectives for CPU ranks need a compiler on first use, ignore process
    # groups, and crash where the launcher does not set LOCAL_SIZE.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device_type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=peer_timeout),
        verbose=False,
    )


def init_inference(
    checkpoint: Checkpoint,
    *,
    placement: Placement,
    group: ProcessGroup,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    overlap: OverlapMode = "auto",
    max_tokens: int | None = None,
    node_of_rank: np.ndarray | None = None,
    attention: AttentionMode = "dp",
    predictor: Predictor | Literal["look-ahead"] | None = None,
    decode_placement: Placement | None = None,
    decode_predictor: Predictor | None = None,
) -> ExpertParallelModel:
    """Load this rank's experts, replace the MoE blocks' experts and start DeepSpeed-Inference.

    Args:
        checkpoint: An opened Hugging Face checkpoint, in logical expert order.
        placement: Experts of its layers on the slots of the group's ranks.
        group: The EP group; its rank r owns the slots r * S .. (r + 1) * S - 1.
        device: Of this rank.
        dtype: Of the weights.
        backend: Dispatch backend, see `semantic_ep.runtime.backends`.
        overlap: Of local experts and exchange, see `semantic_ep.runtime.overlap`.
        max_tokens: Most tokens a rank brings to a step, equal on all ranks: buffers are made for
            them once. None: not known.
        node_of_rank: Node of each EP rank, for the choice between copies; None means one node.
        attention: "dp": ranks bring steps of their own. "tp": heads are sharded over the group,
            all ranks bring the same step; needs `init_distributed`.
        predictor: In attention-TP, what divides a step among ranks; "look-ahead" is the model's
            own `LookAheadPredictor`, None divides in order of the tokens.
        decode_placement: Of generated tokens, if they have one of their own, with `placement` for
            those of prompts; ranks then hold the experts of both.
        decode_predictor: Of generated tokens, where `predictor` is for those of prompts alone.

    Raises:
        PlacementError: The placement is of another model.
        BackendError: The placement is for another number of ranks, or the heads of the model
            cannot be divided among them.
        CheckpointError: As `load_expert_shard`.
    """
    phases = None
    if decode_placement is not None:
        phases = PhasePlacements.of(placement, decode_placement)
        placement = phases.resident
    if placement.ep_size != group.size():
        raise BackendError(
            explain(
                f"the plan is for {placement.ep_size} ranks and the EP group has {group.size()}",
                where="semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size",
                do=f"Start {placement.ep_size} ranks, or plan with --ep-size {group.size()}",
            )
        )
    if node_of_rank is None:
        node_of_rank = np.zeros(group.size(), dtype=np.int64)
    sharded = attention == "tp" and group.size() > 1
    model = load_expert_shard(checkpoint, placement=placement, rank=group.rank(), dtype=dtype)
    register_paged_attention()
    model.set_attn_implementation(ATTENTION)
    # The loader's subclass hid from transformers that its grouped matmul fits this family.
    model.set_experts_implementation(experts_implementation(model, device))
    dispatcher = create_dispatcher(
        backend,
        group=group,
        slots_per_rank=placement.slots_per_rank,
        num_layers=placement.num_layers,
        max_tokens=max_tokens,
    )
    context = StepContext(device, overlap=overlap)
    experts = replace_experts(
        model,
        placement=placement,
        rank=group.rank(),
        dispatcher=dispatcher,
        context=context,
        node_of_rank=node_of_rank,
        phases=phases,
    )
    engine = _start(model, dtype=dtype, heads_over=group if sharded else None)
    token_slices = None
    if sharded:
        if predictor == "look-ahead":
            predictor = LookAheadPredictor.of_model(engine.module)
        token_slices = TokenSlices(
            engine.module,
            group=group,
            shuffle=create_shuffle(backend, group),
            placement=placement,
            predictor=predictor,
            decode_predictor=decode_predictor,
            context=context,
        )
    return ExpertParallelModel(
        engine=engine,
        experts=experts,
        context=context,
        dispatcher=dispatcher,
        placement=placement,
        node_of_rank=node_of_rank,
        fingerprint=checkpoint.fingerprint(),
        token_slices=token_slices,
        phases=phases,
    )


def _start(model: nn.Module, *, dtype: torch.dtype, heads_over: ProcessGroup | None) -> Any:
    """DeepSpeed's engine; attention heads are sharded over a group if there is one."""
    import deepspeed

    config: dict[str, Any] = {"dtype": dtype}
    if heads_over is not None:
        check_heads(model, heads_over.size())
        cut_heads(model, heads_over)
        config |= tensor_parallel_config(model, heads_over)
    # DeepSpeed casts every floating tensor; families keep some in float32 (router biases).
    exact = {name: tensor for name, tensor in _tensors(model) if tensor.dtype == torch.float32}
    engine = deepspeed.init_inference(model, config=config)
    for name, tensor in _tensors(engine.module):
        if name in exact and tensor.dtype != torch.float32:
            tensor.data = exact[name].data.to(tensor.device)
    if heads_over is not None:
        prepare_reductions(engine.module, heads_over)
    return engine


def move_experts(
    model: ExpertParallelModel, placement: Placement, decode_placement: Placement | None = None
) -> tuple[ExpertParallelModel, Exchanged]:
    """Bring experts to the slots of another placement; every rank of the group calls this.

    The model given must not be used after: the returned one shares its modules.

    Args:
        model: As it is.
        placement: The new one; of tokens of prompts if there is another for generated ones.
        decode_placement: Of generated tokens, for a model that has one of them now.

    Raises:
        PlacementError: The placement has another shape, or weights did not verify; nothing changed.
        PeerFailureError: Another rank died or did not answer in time.
    """
    group, phases = model.dispatcher.group, None
    if (decode_placement is None) != (model.phases is None):
        raise PlacementError(
            explain(
                "a model changes neither to nor from placements for each phase while it runs",
                got="one placement" if decode_placement is None else "one for each phase",
                allowed="one placement" if model.phases is None else "one for each phase",
                do="Start anew, or give as many plans as it was started with",
            )
        )
    if decode_placement is not None:
        phases = PhasePlacements.of(placement, decode_placement, current=model.placement)
        placement = phases.resident
    exchanged = exchange_experts(
        [dict(experts.local.named_parameters()) for experts in model.experts],
        old=model.placement,
        new=placement,
        group=group,
    )
    set_slot_tables(
        model.experts,
        placement,
        rank=group.rank(),
        node_of_rank=model.node_of_rank,
        phases=phases,
    )
    if model.token_slices is not None:
        model.token_slices.placement = placement
    return dataclasses.replace(model, placement=placement, phases=phases), exchanged


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
