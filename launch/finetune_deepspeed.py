#!/usr/bin/env python3
"""Fine-tune a mixture of experts with DeepSpeed, and observe its routing.

    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 launch/finetune_deepspeed.py \\
        --deepspeed --deepspeed_config configs/debug/cpu_2rank.json \\
        --data runs/x/data --output runs/x

`--data` is a directory that launch/corpus.py wrote. Without `--model` a small Qwen3-MoE starts from
random weights. Written to `--output`: train.jsonl, checkpoint/ (DeepSpeed), model/ (Hugging Face,
experts in logical order), profile/ (routing of the training tokens) and holdout/ (routes of
held-out documents through the trained model). `--semantic-ep-...` flags override the JSON.

Experts are spread contiguously by AutoEP ("expert_parallel" in the JSON), or as a plan says
(--semantic-ep-plan-artifact, without "expert_parallel"). `--load` goes on from a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chunks import Chunks
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm
from trainlog import log_profile, log_step, show_reports

from semantic_ep.apply.checkpoint.writer import check_vacant
from semantic_ep.config import SECTION, SemanticEPConfig, add_arguments, section_of
from semantic_ep.errors import ConfigError, SemanticEPError, explain
from semantic_ep.integrations.deepspeed import (
    LoadBalancingLoss,
    initialize,
    peers_must_answer,
    read_config,
    save_huggingface_checkpoint,
)
from semantic_ep.integrations.deepspeed.inference import init_distributed
from semantic_ep.integrations.deepspeed.observation import find_routers
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.runtime.collectives import leave
from semantic_ep.tracking import Tracker

HOLDOUT_BATCH = 8


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, with DeepSpeed's flags and ours."""
    import deepspeed

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of launch/corpus.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="run directory")
    parser.add_argument("--model", type=Path, help="Hugging Face checkpoint to continue from")
    parser.add_argument(
        "--load", type=Path, help="checkpoint/ of an earlier run to go on from, under any plan"
    )
    parser.add_argument("--config", dest="config", help="another name of --deepspeed_config")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=int, default=420, help="optimizer steps")
    train.add_argument("--sequence-length", type=int, default=128)
    train.add_argument(
        "--balance-loss",
        type=float,
        nargs=2,
        default=(0.1, 0.02),
        metavar=("FIRST", "LAST"),
        help="load-balancing loss: its weight falls linearly between these",
    )
    train.add_argument("--log-interval", type=int, default=10, help="steps")
    train.add_argument("--save-interval", type=int, default=0, help="steps; 0: at the end")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--peer-timeout", type=float, default=50, help="seconds to wait for a rank")
    shape = parser.add_argument_group("a model from random weights")
    shape.add_argument("--num-layers", type=int, default=6)
    shape.add_argument("--hidden-size", type=int, default=256)
    shape.add_argument("--num-experts", type=int, default=16)
    shape.add_argument("--top-k", type=int, default=2)
    shape.add_argument("--moe-intermediate-size", type=int, default=192)
    add_arguments(parser)
    args = deepspeed.add_config_arguments(parser).parse_args(argv)
    args.deepspeed_config = args.deepspeed_config or args.config
    return args


def load_tokenizer(data: Path) -> Any:
    """The corpus's tokenizer as transformers has it.

    Raises:
        ConfigError: `data` is no finished corpus.
    """
    from transformers import PreTrainedTokenizerFast

    if not (data / "corpus.json").is_file():
        raise ConfigError(
            explain("no finished corpus here", where=f"--data {data}", do="Run launch/corpus.py")
        )
    return PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer.json"),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def build_model(args: argparse.Namespace, tokenizer: Any) -> Any:
    """A Hugging Face causal language model, the same on every rank.

    Raises:
        ConfigError: The checkpoint's vocabulary is not the corpus's.
    """
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(args.seed)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        if model.config.vocab_size < len(tokenizer):
            raise ConfigError(
                explain(
                    "the corpus has more token ids than the model",
                    where=f"--model {args.model}",
                    got=f"{len(tokenizer)} ids for a vocabulary of {model.config.vocab_size}",
                    do="Continue with the corpus that the model was trained on",
                )
            )
        return model
    heads = max(args.hidden_size // 32, 1)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        moe_intermediate_size=args.moe_intermediate_size,
        num_experts=args.num_experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        # The usual 0.02 is for widths of thousands; a narrow model would start all but asleep.
        initializer_range=0.8 * args.hidden_size**-0.5,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def load(engine: Any, checkpoint: Path) -> None:
    """Go on from the latest checkpoint in a directory.

    Raises:
        ConfigError: There is none.
    """
    path, _ = engine.load_checkpoint(str(checkpoint))
    if path is None:
        raise ConfigError(explain("there is no checkpoint here", where=f"--load {checkpoint}"))


def train(engine: Any, args: argparse.Namespace, tracker: Tracker, *, pad: int) -> None:
    """Run the training loop; one line in train.jsonl each log interval."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = engine.train_micro_batch_size_per_gpu()
    accumulation = engine.gradient_accumulation_steps()
    chunks = Chunks(
        args.data,
        length=args.sequence_length,
        pad=pad,
        seed=args.seed,
    )
    balance = LoadBalancingLoss(engine.module)
    first_weight, last_weight = args.balance_loss
    started, tokens, window = time.monotonic(), 0, torch.zeros(4, dtype=torch.float64)
    engine.train()
    steps = range(engine.global_steps + 1, args.steps + 1)
    for step in tqdm(steps, desc="train", disable=None if rank == 0 else True):
        weight = first_weight + (last_weight - first_weight) * (step - 1) / args.steps
        for micro_step in range(accumulation):
            number = ((step - 1) * accumulation + micro_step) * ranks + rank
            token_id, mask = (x.to(engine.device) for x in chunks.batch(number, size))
            labels = token_id.masked_fill(mask == 0, -100)
            loss = engine(input_ids=token_id, attention_mask=mask, labels=labels).loss
            imbalance = balance.of_last_pass(mask.reshape(-1))
            engine.backward(loss + weight * imbalance)
            engine.step()
            window += torch.tensor([loss.item(), imbalance.item(), 1.0, float(mask.sum())])
        if step % args.log_interval == 0 or step == args.steps:
            dist.all_reduce(window)
            tokens += int(window[3])
            row = {
                "step": step,
                "loss": float(window[0] / window[2]),
                "balance_loss": float(window[1] / window[2]),
                "expert_load_max_over_mean": balance.max_over_mean(),
                "lr": engine.get_lr()[0],
                "tokens": tokens,
                "seconds": time.monotonic() - started,
            }
            window.zero_()
            shown = f"expert load max/mean {row['expert_load_max_over_mean']:.2f}"
            log_step(row, args.output, tracker, shown=shown)
            if engine.placed_experts is not None:
                tracker.log(engine.placed_experts.dispatcher.stats.metrics(), step=step)
        if args.save_interval and step % args.save_interval == 0 and step < args.steps:
            save_checkpoint(engine, args, tracker)


def save_checkpoint(engine: Any, args: argparse.Namespace, tracker: Tracker) -> None:
    """Write a checkpoint, with it the profile, and track what the profile says."""
    engine.save_checkpoint(str(args.output / "checkpoint"))
    log_profile(engine.semantic_ep.output, tracker, step=engine.global_steps)


def route_documents(
    engine: Any, documents: list[list[int]], *, pad: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Send documents through the model; yield those of this rank with their [T, L, K] experts.

    Collective: expert-parallel ranks run the same number of batches.
    """
    routers = find_routers(engine.module)
    seen: list[Tensor] = []
    handles = [
        router.module.register_forward_hook(
            lambda _module, _args, output, read=router.experts: seen.append(read(output))
        )
        for router in routers
    ]
    ranks, rank = dist.get_world_size(), dist.get_rank()
    engine.eval()
    longest = max(map(len, documents))
    try:
        for begin in range(0, len(documents), HOLDOUT_BATCH * ranks):
            mine = [begin + rank * HOLDOUT_BATCH + row for row in range(HOLDOUT_BATCH)]
            mine = [index for index in mine if index < len(documents)]
            token_id = torch.full((HOLDOUT_BATCH, longest), pad)
            mask = torch.zeros_like(token_id)
            for row, index in enumerate(mine):
                count = len(documents[index])
                token_id[row, :count] = torch.tensor(documents[index])
                mask[row, :count] = 1
            mask[len(mine) :, 0] = 1  # Attention over no token at all has no value.
            seen.clear()
            with torch.no_grad():
                engine(input_ids=token_id.to(engine.device), attention_mask=mask.to(engine.device))
            expert_BTLK = (
                torch.stack(seen, dim=1).cpu().numpy().reshape(*token_id.shape, len(routers), -1)
            )
            for row, index in enumerate(mine):
                yield index, expert_BTLK[row, : len(documents[index])]
    finally:
        for handle in handles:
            handle.remove()


def save_holdout(engine: Any, args: argparse.Namespace, tokenizer: Any) -> None:
    """Write the `holdout` trace: one request a document, cut to the training length."""
    with (args.data / "holdout.jsonl").open() as stream:
        rows = [json.loads(line) for line in stream]
    documents = [tokenizer(row["text"])["input_ids"][: args.sequence_length] for row in rows]
    mine = dict(route_documents(engine, documents, pad=tokenizer.pad_token_id))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
    fingerprint = engine.semantic_ep.fingerprint()
    if dist.get_rank() != 0:
        return
    routed = {index: experts for part in everyone for index, experts in part.items()}
    trace = RoutingTrace(
        fingerprint=fingerprint,
        experts=np.concatenate([routed[i] for i in range(len(rows))]).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in documents])]),
        token_id=np.concatenate(documents).astype(np.int32),
        requests=tuple({"id": row["id"], "kind": row["kind"]} for row in rows),
    )
    trace.save(args.output / "holdout")


def complete_config(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed JSON with what only this run knows filled in for "auto"."""
    config = read_config(None, args)
    scheduler = config.get("scheduler", {}).get("params", {})
    if scheduler.get("total_num_steps") == "auto":
        # DeepSpeed's own schedules end at a ratio of zero for a single step.
        scheduler["total_num_steps"] = max(args.steps, 2)
        scheduler["warmup_num_steps"] = min(scheduler["warmup_num_steps"], max(args.steps // 4, 1))
    section = dict(section_of(config) or {})
    observe = dict(section.get("observe", {}))
    if observe.get("output", "auto") == "auto":
        observe["output"] = str(args.output / "profile")
    return {**config, SECTION: {**section, "observe": observe}}


def run(args: argparse.Namespace) -> None:
    """Train, save, and route the held-out documents."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = complete_config(args)
    settings = SemanticEPConfig.resolve(json_section=config[SECTION], args=args)
    if not settings.enabled:
        raise ConfigError(
            explain(
                "this script observes routing, and observation is off",
                where=f"semantic_ep.enabled in {args.deepspeed_config}",
                do="Set it to true",
            )
        )
    tokenizer = load_tokenizer(args.data)
    check_vacant(args.output / "model")
    init_distributed(device_type=device, peer_timeout=args.peer_timeout)
    show_reports()
    with peers_must_answer():
        args.output.mkdir(parents=True, exist_ok=True)
        model = build_model(args, tokenizer)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        engine, *_ = initialize(
            args,
            model,
            config=config,
            model_parameters=model.parameters(),
            tokenizer_json=tokenizer.backend_tokenizer.to_str(pretty=True).encode(),
        )
        if args.load is not None:
            load(engine, args.load)
        if dist.get_rank() == 0:
            print(f"{parameters / 1e6:.1f} M parameters on {dist.get_world_size()} ranks")
        with Tracker.start(
            args.output,
            config={"deepspeed": config, "semantic_ep": settings},
            job_type="train",
            wandb=settings.tracking.wandb,
            rank=dist.get_rank(),
        ) as tracker:
            train(engine, args, tracker, pad=tokenizer.pad_token_id)
            save_checkpoint(engine, args, tracker)
            save_huggingface_checkpoint(engine, args.output / "model", tokenizer=tokenizer)
            save_holdout(engine, args, tokenizer)
            if dist.get_rank() == 0:
                tracker.log_artifact(engine.semantic_ep.output, "profile")
                tracker.log_artifact(args.output / "model", "checkpoint")
        dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    args = parse_arguments(argv)
    try:
        run(args)
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
