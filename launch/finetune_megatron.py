#!/usr/bin/env python3
"""Fine-tune a mixture of experts with Megatron-core, and observe its routing.

    torchrun --nproc-per-node 2 launch/finetune_megatron.py @configs/megatron/cpu_2rank.args \\
        --data-path runs/x/data --output runs/x

The names of the arguments are those of upstream's pretrain script; `--semantic-ep-...` arguments
switch observation on and name a plan to follow. No Megatron-LM checkout is needed. Written to
`--output`: train.jsonl, checkpoint/ (`torch_dist`, experts in logical order whatever the plan), and
the routing profile where `--semantic-ep-observe-output` says.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import logging
import os
import sys
import time
from typing import Any

import torch
from chunks import Chunks
from megatron_arguments import name_wandb_run, parse_arguments
from megatron_model import Training, build, load, model_config, save
from torch import distributed as dist
from tqdm import tqdm
from trainlog import log_profile, log_step, show_reports

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import BackendError, ConfigError, SemanticEPError, explain
from semantic_ep.runtime.collectives import leave
from semantic_ep.tracking import Tracker


def start_ranks(args: argparse.Namespace) -> torch.device:
    """Initialise torch.distributed and Megatron's groups.

    Raises:
        ConfigError: The backend does not fit the machine.
    """
    use_gpu = args.distributed_backend == "nccl"
    if use_gpu != torch.cuda.is_available():
        raise ConfigError(
            explain(
                "this backend does not fit the machine",
                where="--distributed-backend",
                got=args.distributed_backend,
                allowed="nccl with GPUs, gloo without",
            )
        )
    device = torch.device("cpu")
    if use_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        import semantic_ep.patches

        semantic_ep.patches.apply("megatron")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        # Compiling Megatron's small fused functions costs more than it gains on a CPU.
        torch.compiler.set_stance("force_eager")
        # It reports the CPU's random state as changed, which here is the state that it manages.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    dist.init_process_group(args.distributed_backend, timeout=timeout_of(args))
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    return device


def timeout_of(args: argparse.Namespace) -> datetime.timedelta:
    """Time after which a collective gives up."""
    return datetime.timedelta(minutes=args.distributed_timeout_minutes)


class Batches:
    """Micro-batches of this data-parallel rank, in an order that only the seed fixes."""

    def __init__(self, args: argparse.Namespace, chunks: Chunks, device: torch.device) -> None:
        """Divide the global batch.

        Raises:
            ConfigError: It does not divide into micro-batches.
        """
        from megatron.core import parallel_state

        ranks = parallel_state.get_data_parallel_world_size()
        together = args.micro_batch_size * ranks
        total = args.global_batch_size or together
        if total % together:
            raise ConfigError(
                explain(
                    "the global batch is no multiple of micro-batch size x data-parallel ranks",
                    where="--global-batch-size",
                    got=total,
                    allowed=f"multiples of {together}",
                )
            )
        self.accumulation = total // together
        self._rank, self._ranks = parallel_state.get_data_parallel_rank(), ranks
        self._chunks, self._device, self._size = chunks, device, args.micro_batch_size
        length = args.seq_length
        self._position_ids = torch.arange(length, device=device).expand(self._size, -1)
        self._later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[
            None, None
        ]

    def of_step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of optimizer step `step`, from 0; negative ones never train."""
        return [
            self._batch((step * self.accumulation + micro) * self._ranks + self._rank)
            for micro in range(self.accumulation)
        ]

    def _batch(self, number: int) -> dict[str, torch.Tensor]:
        token_id, mask = self._chunks.batch(number, self._size)
        labels, real = token_id.roll(-1, dims=1), mask.roll(-1, dims=1)
        real[:, -1] = 0
        return {
            "input_ids": token_id.to(self._device),
            "position_ids": self._position_ids,
            "attention_mask": self._later,
            "labels": labels.to(self._device),
            "loss_mask": real.float().to(self._device),
        }


def forward_backward(training: Training, batches: list[Any], *, evaluate: bool) -> torch.Tensor:
    """Run the micro-batches of a step; returns (sum of losses, tokens) of all ranks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(iterator: Any, model: Any) -> Any:
        batch = dict(next(iterator))
        mask = batch.pop("loss_mask")

        def mean_loss(losses: torch.Tensor) -> Any:
            total = (losses.float() * mask).sum()
            count = mask.sum().clamp(min=1)
            return total / count, {"sums": torch.stack([total.detach(), count])}

        return model(**batch), mean_loss

    rows, length = batches[0]["input_ids"].shape
    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=training.model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=evaluate,
    )
    sums = torch.stack([result["sums"] for result in results]).sum(0)
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return sums


def train(training: Training, args: argparse.Namespace, batches: Batches, tracker: Tracker) -> None:
    """Run the training loop; one line in train.jsonl each log interval."""
    rank = dist.get_rank()
    started, tokens, window = time.monotonic(), 0, torch.zeros(2)
    steps = range(training.step, args.train_iters)
    for step in tqdm(steps, desc="train", disable=None if rank == 0 else True):
        training.model.train()
        training.model.zero_grad_buffer()
        training.optimizer.zero_grad()
        window += forward_backward(training, batches.of_step(step), evaluate=False).cpu()
        updated, gradient_norm, _ = training.optimizer.step()
        if not updated:
            raise BackendError(
                explain(f"step {step + 1} gave gradients that are not finite", do="Lower --lr")
            )
        training.schedule.step(increment=1)
        training.step = step + 1
        if training.observation is not None:
            training.observation.step()
        if training.replanning is not None:
            training.replanning.step(training.step)
        last = training.step == args.train_iters
        if training.step % args.log_interval == 0 or last:
            tokens += int(window[1])
            row = {
                "step": training.step,
                "loss": float(window[0] / window[1]),
                "lr": training.optimizer.param_groups[0]["lr"],
                "tokens": tokens,
                "seconds": time.monotonic() - started,
                "gradient_norm": float(gradient_norm),
            }
            window.zero_()
            log_step(row, args.output, tracker, shown=f"lr {row['lr']:.2e}")
        if args.eval_interval and training.step % args.eval_interval == 0:
            evaluate(training, args, batches, tracker)
        if training.step % args.save_interval == 0 or last:
            save(training, args)
            if training.observation is not None:
                log_profile(training.observation.output, tracker, step=training.step)


def evaluate(
    training: Training, args: argparse.Namespace, batches: Batches, tracker: Tracker
) -> None:
    """Track the loss of batches from the end of the corpus."""
    training.model.eval()
    sums = torch.zeros(2)
    with torch.no_grad():
        for number in range(1, args.eval_iters + 1):
            sums += forward_backward(training, batches.of_step(-number), evaluate=True).cpu()
    tracker.log({"train/eval_loss": float(sums[0] / sums[1])}, step=training.step)


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    try:
        args = parse_arguments(__doc__.split("\n\n")[0], argv)
        run_training(args)
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def run_training(args: argparse.Namespace) -> None:
    """Start the ranks, train, and leave checkpoint, log and profile."""
    semantic = SemanticEPConfig.resolve(args=args)
    corpus = args.data_path / "corpus.json"
    if not corpus.is_file():
        raise ConfigError(
            explain(
                "no finished corpus here",
                where=f"--data-path {args.data_path}",
                do="Run launch/corpus.py",
            )
        )
    from tokenizers import Tokenizer

    tokenizer_file = args.data_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    pad = tokenizer.token_to_id("<|pad|>")
    device = start_ranks(args)
    show_reports()
    from semantic_ep.integrations.megatron import SemanticRun

    config = model_config(args)
    run = SemanticRun.prepare(
        semantic,
        config,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer_sha256=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        timeout=timeout_of(args),
    )
    torch.manual_seed(args.seed)
    run.seed(args.seed)
    training = build(args, run, config, pad=pad)
    load(training, args)
    chunks = Chunks(args.data_path, length=args.seq_length, pad=pad, seed=args.seed)
    batches = Batches(args, chunks, device)
    rank = dist.get_rank()
    args.output.mkdir(parents=True, exist_ok=True)
    name_wandb_run(args)
    with Tracker.start(
        args.output,
        config={
            **{name: str(value) for name, value in vars(args).items()},
            "semantic_ep": semantic,
        },
        job_type="train",
        wandb=semantic.tracking.wandb,
        rank=rank,
    ) as tracker:
        train(training, args, batches, tracker)
        if training.observation is not None and rank == 0:
            tracker.log_artifact(training.observation.output, "profile")
    dist.barrier()
    dist.destroy_process_group()


# Megatron's checkpoint writer starts processes that import this file again.
if __name__ == "__main__":
    leave(main())
