"""A tiny GPT-MoE of Megatron-core on gloo, as a user would build it, for the tests."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import warnings

import numpy as np
import torch
import torch.distributed as dist

VOCAB, SEQUENCE, BATCH, EXPERTS, LAYERS, TOP_K = 96, 16, 3, 8, 2, 2


def start(
    *,
    tensor_parallel=1,
    pipeline_parallel=1,
    interleaved=None,
    expert_parallel=2,
    context_parallel=1,
    seed=1,
):
    """Initialise Megatron's groups and random state over the ranks of the test."""
    # Megatron's checkpoint writer starts a process, which ranks of a test may otherwise not.
    multiprocessing.current_process()._config["daemon"] = False
    warnings.filterwarnings("ignore")
    torch.compiler.set_stance("force_eager")
    import semantic_ep.patches

    semantic_ep.patches.apply("megatron")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_parallel,
        pipeline_parallel,
        virtual_pipeline_model_parallel_size=interleaved,
        expert_model_parallel_size=expert_parallel,
        expert_tensor_parallel_size=1,
        context_parallel_size=context_parallel,
    )
    model_parallel_cuda_manual_seed(seed)


def config(**changes):
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": LAYERS,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 48,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": 1,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "sequence_parallel": parallel_state.get_tensor_model_parallel_world_size() > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        # Two stages that are interleaved would mix up what they batch.
        "batch_p2p_comm": not parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "overlap_p2p_comm": bool(parallel_state.get_virtual_pipeline_model_parallel_world_size()),
        "pipeline_dtype": torch.float32,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**settings, **changes})


def model(transformer_config, rows=None, *, groups=None, part=None, exchange=None):
    """Build a GPT model; `rows` [L, E] are the experts in the slots of each layer.

    `part` numbers the parts of the model that an interleaved pipeline stage runs. `groups` is a
    `SemanticExpertGroup`; None means Megatron's own groups. `exchange` is an `Exchange`; None means
    Megatron's own dispatcher.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    spec = get_gpt_layer_local_spec(
        num_experts=EXPERTS, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    if transformer_config.moe_layer_freq != 1:
        spec = get_gpt_decoder_block_spec(
            transformer_config,
            use_transformer_engine=False,
            normalization="RMSNorm",
            vp_stage=part,
        )
    if transformer_config.sequence_parallel:
        # Megatron's norm without Transformer Engine or Apex refuses sequence parallelism.
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = _Norm
        layers = transformer_config.num_layers
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=_Norm)
    if transformer_config.context_parallel_size > 1:
        # Megatron's attention without Transformer Engine refuses context parallelism.
        spec.submodules.self_attention.submodules.core_attention = _ContextParallelAttention
    if rows is not None:
        from semantic_ep.integrations.megatron.layer import PlacedLayers
        from semantic_ep.integrations.megatron.run import moe_layer_ids
        from semantic_ep.integrations.megatron.specs import place_experts
        from semantic_ep.plan.placement import Placement

        placement = Placement(
            physical_to_logical_map=np.asarray(rows),
            num_experts=EXPERTS,
            ep_size=transformer_config.expert_model_parallel_size,
        )
        spec = place_experts(
            spec,
            PlacedLayers(placement=placement, layer_ids=moe_layer_ids(transformer_config)),
            pg_collection=groups and groups.collection,
            exchange=exchange,
        )
    return GPTModel(
        config=transformer_config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        # Rotary embeddings are cut to context-parallel ranks in pinned memory, which needs a GPU.
        position_embedding_type=(
            "rope" if transformer_config.context_parallel_size == 1 else "learned_absolute"
        ),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=part),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=part),
        vp_stage=part,
        pg_collection=groups and groups.collection,
    )


class _ContextParallelAttention(torch.nn.Module):
    """Causal attention over the keys and values of all context-parallel ranks."""

    def __init__(self, config, *args, pg_collection, **kwargs):
        super().__init__()
        self.group = pg_collection.cp

    def forward(self, query, key, value, *args, **kwargs):
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        key, value = (
            gather_from_sequence_parallel_region(x, group=self.group) for x in (key, value)
        )
        places = [
            places_on_rank(len(query), rank, self.group.size()) for rank in range(self.group.size())
        ]
        may_see = torch.cat(places) <= places[self.group.rank()][:, None]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=may_see)
        return out.permute(2, 0, 1, 3).flatten(2)


def places_on_rank(length, rank, ranks):
    """Places in a row of the `length` tokens that a context-parallel rank holds."""
    if ranks == 1:
        return torch.arange(length)
    half = torch.arange(length // 2)
    return torch.cat([half + rank * len(half), half + (2 * ranks - 1 - rank) * len(half)])


class _Norm(torch.nn.RMSNorm):
    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__(hidden_size, eps)
        # Each tensor-parallel rank sees a part of the tokens: Megatron must sum the gradients.
        self.weight.sequence_parallel = config.sequence_parallel


def batch(step, rank):
    """Keyword arguments of one forward pass, other for each step and rank."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=draw)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(SEQUENCE).expand(BATCH, -1).contiguous(),
        "attention_mask": mask,
        "labels": tokens[:, 1:].contiguous(),
    }


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A model with Megatron's own gradient buffers, optimizer and schedule."""

    model: object  # All parts of it on this rank, in a module list, with interleaved stages.
    optimizer: object
    schedule: object
    # Norm of the gradients, and how many of them are zero, of each step.
    measured: list = dataclasses.field(default_factory=list)

    @classmethod
    def build(
        cls,
        config,
        rows=None,
        *,
        distributed_optimizer=False,
        groups=None,
        exchange=None,
        finalize=None,
        buffers=None,
        **optimizer,
    ):
        """Wrap and optimise a model.

        `finalize` is a run's `finalize_model_grads`; None means Megatron's own. `buffers` are
        further settings of Megatron's gradient buffers.
        """
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer.module import Float16Module

        def wrapped(part):
            bare = model(config, rows, groups=groups, part=part, exchange=exchange)
            return DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    use_distributed_optimizer=distributed_optimizer, **(buffers or {})
                ),
                Float16Module(config, bare) if config.bf16 else bare,
                pg_collection=groups and groups.collection,
            )

        interleaved = config.virtual_pipeline_model_parallel_size
        parts = [wrapped(part) for part in (range(interleaved) if interleaved else [None])]
        config.finalize_model_grads_func = finalize or finalize_model_grads
        settings = {"optimizer": "adam", "lr": 3e-3, "weight_decay": 0.01, "clip_grad": 1.0}
        settings |= {
            "use_distributed_optimizer": distributed_optimizer,
            "bf16": config.bf16,
            "params_dtype": config.params_dtype,
        }
        make = groups.optimizer if groups else get_megatron_optimizer
        optimizer = make(OptimizerConfig(**settings | optimizer), parts)
        whole = torch.nn.ModuleList(parts) if interleaved else parts[0]
        return cls(whole, optimizer, get_forward_backward_func())

    @property
    def parts(self):
        """What this rank runs of the model: more than one part with interleaved stages."""
        return list(self.model) if isinstance(self.model, torch.nn.ModuleList) else [self.model]

    def step(self, batches):
        """One optimizer step over micro-batches; returns their losses, on the last stage."""
        for part in self.parts:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(batches, forward_only=False)
        self.measured.append(self.optimizer.step()[1:])
        return [result["loss"] for result in results]

    def evaluate(self, batches):
        """Run micro-batches in evaluation."""
        self.model.eval()
        self._run(batches, forward_only=True)
        self.model.train()

    def _run(self, batches, *, forward_only):
        def forward(iterator, model):
            return model(**next(iterator)), lambda loss: (loss.mean(), {"loss": loss.mean().item()})

        return self.schedule(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in self.parts],
            model=self.parts,
            num_microbatches=len(batches),
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=forward_only,
        )

    def state(self, *, loading):
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
        model = self.model.module.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def save(self, directory):
        from megatron.core import dist_checkpointing

        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self.state(loading=False), str(directory))
        dist.barrier()

    def load(self, directory, *, optimizer=True):
        from megatron.core import dist_checkpointing

        state = self.state(loading=True)
        if not optimizer:
            del state["optimizer"]
        state = dist_checkpointing.load(state, str(directory))
        self.model.module.load_state_dict(state["model"])
        if optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
