"""Model, optimizer and checkpoints of launch/finetune_megatron.py, built from its arguments."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import distributed as dist

from semantic_ep.artifacts import write_file_atomically

LATEST = "latest_checkpointed_iteration.txt"
# The format of the distributed optimizer that 0.16 and 0.19 write in logical order.
# "mem_efficient" gathers it over gloo, as a CPU must and a GPU can.
CHECKPOINT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


@dataclasses.dataclass(kw_only=True)
class Training:
    """What is trained, and how far it is."""

    model: Any
    optimizer: Any
    schedule: Any
    observation: Any
    replanning: Any
    step: int = 0


def model_config(args: argparse.Namespace) -> Any:
    """Megatron's configuration of the model; same-named arguments go in as they are."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    settings = {name: value for name, value in vars(args).items() if name in known}
    settings |= {
        "num_moe_experts": args.num_experts,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "layernorm_epsilon": args.norm_epsilon,
        "gated_linear_unit": args.swiglu,
        "activation_func": torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**settings)


def build(args: argparse.Namespace, run: Any, config: Any, *, pad: int) -> Training:
    """Build model, optimizer and schedule, with Megatron's own gradient buffers."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module

    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
    )
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    model = GPTModel(
        config=config,
        transformer_layer_spec=run.place(spec),
        vocab_size=-(-run.vocab_size // multiple) * multiple,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        pg_collection=run.pg_collection,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
    )
    if args.distributed_backend == "nccl":
        model.cuda()
    observation = run.observe(model, pad_token_id=pad)
    if args.bf16:
        model = Float16Module(config, model)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=args.use_distributed_optimizer
        ),
        model,
        pg_collection=run.pg_collection,
    )
    config.finalize_model_grads_func = run.finalize_model_grads
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    settings = {name: value for name, value in vars(args).items() if name in known}
    settings |= {"optimizer": "adam", "params_dtype": config.params_dtype}
    optimizer = run.optimizer(OptimizerConfig(**settings), [model])
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters,
        wd_incr_style="constant",
    )
    return Training(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        observation=observation,
        replanning=run.replan(model, optimizer, observation),
    )


def checkpoint_state(training: Training, *, optimizer: bool, loading: bool) -> dict[str, Any]:
    """What `dist_checkpointing` saves or loads."""
    model = training.model
    while hasattr(model, "module"):
        model = model.module
    state = {"model": model.sharded_state_dict(metadata=CHECKPOINT_METADATA)}
    if optimizer:
        state["optimizer"] = training.optimizer.sharded_state_dict(
            state["model"], is_loading=loading, metadata=CHECKPOINT_METADATA
        )
        state["opt_param_scheduler"] = training.schedule.state_dict()
    return state


def save(training: Training, args: argparse.Namespace) -> None:
    """Write a checkpoint and the profile so far; the tracker file moves on last."""
    from megatron.core import dist_checkpointing

    directory = args.save / f"iter_{training.step:07d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = checkpoint_state(training, optimizer=not args.no_save_optim, loading=False)
    arguments = {name: str(value) for name, value in vars(args).items()}
    dist_checkpointing.save(
        {**state, "iteration": training.step, "args": arguments, "checkpoint_version": 3.0},
        str(directory),
    )
    if training.observation is not None:
        profile = training.observation.save(directory)
        if training.replanning is not None:
            training.replanning.at_checkpoint(training.step, profile)
    dist.barrier()
    if dist.get_rank() == 0:
        write_file_atomically(args.save / LATEST, str(training.step).encode())


def load(training: Training, args: argparse.Namespace) -> None:
    """Go on from the latest checkpoint of `--load`, if there is one."""
    from megatron.core import dist_checkpointing

    from semantic_ep.integrations.megatron import check_optimizer_fits

    if args.load is None or not (args.load / LATEST).is_file():
        return
    directory = args.load / f"iter_{int((args.load / LATEST).read_text()):07d}"
    optimizer = not (args.finetune or args.no_load_optim)
    if optimizer:
        check_optimizer_fits(directory, training.optimizer)
    state = checkpoint_state(training, optimizer=optimizer, loading=True)
    loaded = dist_checkpointing.load(state, str(directory))
    model = training.model
    while hasattr(model, "module"):
        model = model.module
    model.load_state_dict(loaded["model"])
    if optimizer:
        training.optimizer.load_state_dict(loaded["optimizer"])
        training.schedule.load_state_dict(loaded["opt_param_scheduler"])
    else:
        training.optimizer.reload_model_params()
    if not args.finetune:
        training.step = loaded["iteration"]
        if training.observation is not None:
            profile = training.observation.restore(directory)
            if training.replanning is not None:
                training.replanning.resume(profile)
