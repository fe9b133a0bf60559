"""Command line of launch/finetune_megatron.py: names as in upstream's pretrain script."""

from __future__ import annotations

import argparse
import ast
import os
from pathlib import Path
from typing import Any

from semantic_ep.config import add_arguments
from semantic_ep.errors import ConfigError, explain

# Upstream's flags, and the variables of W&B that say the same.
_WANDB_VARIABLES = {
    "--wandb-project": "WANDB_PROJECT",
    "--wandb-entity": "WANDB_ENTITY",
    "--wandb-exp-name": "WANDB_NAME",
    "--wandb-save-dir": "WANDB_DIR",
}


def parse_arguments(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `@file` reads arguments from a file, see configs/megatron.

    Raises:
        ConfigError: Arguments contradict each other.
    """
    parser = argparse.ArgumentParser(
        description=description, fromfile_prefix_chars="@", allow_abbrev=False
    )
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()
    for add in (_add_run, _add_network, _add_experts, _add_training, _add_parallelism):
        add(parser)
    add_arguments(parser)
    args = parser.parse_args(argv)
    _fill_in(args)
    _check(args)
    return args


def name_wandb_run(args: argparse.Namespace) -> None:
    """Let Megatron's own W&B flags name the run that is tracked; flags win over variables."""
    for flag, variable in _WANDB_VARIABLES.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value:
            os.environ[variable] = value


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and files")
    group.add_argument(
        "--data-path", type=Path, required=True, help="directory that launch/corpus.py wrote"
    )
    group.add_argument("-o", "--output", type=Path, required=True, help="run directory, for logs")
    group.add_argument("--save", type=Path, help="checkpoints; default OUTPUT/checkpoint")
    group.add_argument("--load", type=Path, help="checkpoints to go on from, if there are any")
    group.add_argument("--save-interval", type=int, help="steps; default: at the end")
    group.add_argument("--no-save-optim", action="store_true", help="leave the optimizer out")
    group.add_argument("--no-load-optim", action="store_true", help="start a new optimizer")
    group.add_argument("--finetune", action="store_true", help="load weights; start at step 0")
    group.add_argument("--log-interval", type=int, default=10, help="steps; default 10")
    for flag, variable in _WANDB_VARIABLES.items():
        group.add_argument(flag, help=f"of the W&B run; default: {variable}")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--num-layers", type=int, required=True)
    group.add_argument("--hidden-size", type=int, required=True)
    group.add_argument("--num-attention-heads", type=int, required=True)
    group.add_argument("--group-query-attention", action="store_true")
    group.add_argument("--num-query-groups", type=int, default=1)
    group.add_argument("--kv-channels", type=int, help="default: hidden size / heads")
    group.add_argument("--ffn-hidden-size", type=int, help="default: 4 * hidden size")
    group.add_argument("--max-position-embeddings", type=int, help="default: --seq-length")
    group.add_argument("--rotary-base", type=int, default=10000)
    group.add_argument("--rotary-percent", type=float, default=1.0, help="share of a head rotated")
    group.add_argument("--normalization", choices=["LayerNorm", "RMSNorm"], default="RMSNorm")
    group.add_argument("--norm-epsilon", type=float, default=1e-5)
    group.add_argument("--qk-layernorm", action="store_true")
    group.add_argument("--add-qkv-bias", action="store_true")
    group.add_argument("--swiglu", action="store_true")
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument(
        "--transformer-impl", choices=["local", "transformer_engine"], default="local"
    )


def _add_experts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixture of experts")
    group.add_argument("--num-experts", type=int, required=True)
    group.add_argument("--moe-ffn-hidden-size", type=int, help="default: --ffn-hidden-size")
    group.add_argument("--moe-shared-expert-intermediate-size", type=int)
    group.add_argument("--moe-shared-expert-gate", action="store_true")
    group.add_argument(
        "--moe-layer-freq",
        type=_layer_frequency,
        default=1,
        help="one MoE layer in so many, or 1 for each MoE and 0 for each dense layer: [0]+[1]*5",
    )
    group.add_argument("--moe-grouped-gemm", action="store_true")
    group.add_argument("--moe-router-topk", type=int, default=2)
    group.add_argument(
        "--moe-router-load-balancing-type",
        choices=["aux_loss", "seq_aux_loss", "sinkhorn", "none"],
        default="aux_loss",
    )
    group.add_argument("--moe-aux-loss-coeff", type=float, default=0.0)
    group.add_argument(
        "--moe-router-score-function", choices=["softmax", "sigmoid"], default="softmax"
    )
    group.add_argument("--moe-router-pre-softmax", action="store_true")
    group.add_argument("--moe-router-num-groups", type=int)
    group.add_argument("--moe-router-group-topk", type=int)
    group.add_argument("--moe-router-topk-scaling-factor", type=float)
    group.add_argument("--moe-router-enable-expert-bias", action="store_true")
    group.add_argument("--moe-expert-capacity-factor", type=float)
    group.add_argument(
        "--moe-token-dispatcher-type",
        choices=["alltoall", "allgather", "flex"],
        default="alltoall",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--seq-length", type=int, required=True)
    group.add_argument("--micro-batch-size", type=int, required=True)
    group.add_argument("--global-batch-size", type=int, help="default: one micro-batch a rank")
    group.add_argument("--train-iters", type=int, required=True)
    group.add_argument("--eval-interval", type=int, default=0, help="steps; 0: no evaluation")
    group.add_argument("--eval-iters", type=int, default=4, help="batches of an evaluation")
    group.add_argument("--lr", type=float, required=True)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument(
        "--lr-decay-style", choices=["constant", "linear", "cosine"], default="cosine"
    )
    group.add_argument("--lr-decay-iters", type=int, help="default: --train-iters")
    group.add_argument("--lr-warmup-iters", type=int, default=0)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.999)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--bf16", action="store_true")
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument("--recompute-granularity", choices=["full", "selective"])
    group.add_argument("--recompute-method", choices=["uniform", "block"])
    group.add_argument("--recompute-num-layers", type=int)


def _add_parallelism(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument("--expert-model-parallel-size", type=int, default=1)
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--expert-tensor-parallel-size", type=int, default=1)
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument(
        "--distributed-backend",
        choices=["nccl", "gloo"],
        default="nccl",
        help="gloo: run on CPU, which is refused where there is a GPU",
    )
    group.add_argument("--distributed-timeout-minutes", type=float, default=1.0)


def _layer_frequency(text: str) -> int | list[int]:
    """A number, or a list of 0 and 1 as a Python expression of lists, + and *."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return number
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [value(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise ValueError(text)

    try:
        found = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError):
        raise ValueError(text) from None
    is_pattern = isinstance(found, list) and all(flag in (0, 1) for flag in found)
    if not is_pattern and not (isinstance(found, int) and found > 0):
        raise ValueError(text)
    return found


def _fill_in(args: argparse.Namespace) -> None:
    defaults: dict[str, Any] = {
        "save": args.output / "checkpoint",
        "ffn_hidden_size": 4 * args.hidden_size,
        "max_position_embeddings": args.seq_length,
        "lr_decay_iters": args.train_iters,
        "save_interval": args.train_iters,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.moe_ffn_hidden_size is None:
        args.moe_ffn_hidden_size = args.ffn_hidden_size


def _check(args: argparse.Namespace) -> None:
    mistakes = []
    for name, divisor in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "tensor_model_parallel_size"),
        ("num_experts", "expert_model_parallel_size"),
    ):
        if getattr(args, name) % getattr(args, divisor):
            mistakes.append(_undivided(name, divisor, args))
    if args.moe_router_topk > args.num_experts:
        mistakes.append(
            explain(
                "more experts a token than there are",
                where="--moe-router-topk",
                got=args.moe_router_topk,
                allowed=f"1..{args.num_experts}",
            )
        )
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        mistakes.append(
            explain(
                "the pattern of MoE and dense layers has another length than the model",
                where="--moe-layer-freq",
                got=f"{len(pattern)} layers",
                allowed=f"{args.num_layers} (--num-layers)",
            )
        )
    if args.moe_shared_expert_gate and not args.moe_shared_expert_intermediate_size:
        mistakes.append(
            explain(
                "there is no shared expert to gate",
                where="--moe-shared-expert-gate",
                do="Set --moe-shared-expert-intermediate-size",
            )
        )
    if args.lr_warmup_iters >= args.lr_decay_iters:
        mistakes.append(
            explain(
                "the warm-up takes all the steps",
                where="--lr-warmup-iters",
                got=args.lr_warmup_iters,
                allowed=f"0..{args.lr_decay_iters - 1}, below --lr-decay-iters",
            )
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _undivided(name: str, divisor: str, args: argparse.Namespace) -> str:
    number = getattr(args, name)
    flags = [f"--{each.replace('_', '-')}" for each in (name, divisor)]
    return explain(
        f"{flags[1]} = {getattr(args, divisor)} does not divide {flags[0]} = {number}",
        allowed=[n for n in range(1, min(number, 64) + 1) if number % n == 0],
    )
