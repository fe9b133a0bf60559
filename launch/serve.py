#!/usr/bin/env python3
"""Serve a model with DeepSpeed-Inference and experts spread over an EP group.

    deepspeed --num_gpus 4 launch/serve.py --deepspeed_config configs/debug/cpu_2rank.json \\
        --model runs/x/model --plan runs/x/plan

starts the HTTP server (`semantic_ep.serve.http`). With `--prompts` a list is served instead:

    OMP_NUM_THREADS=1 deepspeed --num_gpus 4 launch/serve.py \\
        --deepspeed_config configs/debug/cpu_2rank.json --model runs/x/model --plan runs/x/plan \\
        --prompts runs/x/data/prompts.jsonl --compare contiguous semantic --out runs/x/serve.json

Also runs under torchrun. Every rank loads only the experts of its slots and serves its own
requests, or with `--semantic-ep-serve-attention tp` its share of the heads for all of them.
`contiguous` places experts as upstream engines do and deals requests, or tokens, in turn;
`semantic` follows the plan. `--compare` serves the same requests in both, interleaved, and checks
that the tokens equal each other's and those of transformers in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import distributed as dist
from tqdm import tqdm

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.artifacts import write_file_atomically
from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError, SemanticEPError, explain
from semantic_ep.integrations.deepspeed.inference import init_distributed
from semantic_ep.runtime.collectives import from_all_ranks, leave, peer_guard
from semantic_ep.serve.arguments import add_job_arguments, parse_server_arguments
from semantic_ep.serve.compare import ServingMode, compare_modes
from semantic_ep.serve.job import (
    expert_groups,
    load_engine,
    local_device,
    peak_rss_bytes,
    read_plans,
    read_settings,
)
from semantic_ep.serve.plans import ServingPlans
from semantic_ep.serve.reference import generate_in_one_process
from semantic_ep.serve.requests import Request, read_requests, write_responses
from semantic_ep.serve.scheduling.offline import by_affinity, round_robin
from semantic_ep.serve.summary import in_megabytes, parity_line, summary_table, tracked_metrics
from semantic_ep.tracking import Tracker

MODES = ("contiguous", "semantic")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line: of a list of prompts, or of the server."""
    if not names_prompts(argv):
        return parse_server_arguments(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_job_arguments(parser)
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL with "text" in each row')
    parser.add_argument("-o", "--out", type=Path, help="JSON file for counters and times")
    parser.add_argument("--responses", type=Path, help="JSONL file for the generated text")
    parser.add_argument(
        "--compare", nargs="+", choices=MODES, help="modes; default: semantic if there is a plan"
    )
    serve = parser.add_argument_group("serving")
    serve.add_argument("--num-requests", type=int, default=0, help="first rows; 0: all")
    serve.add_argument("--max-prompt-tokens", type=int, default=192, help="longer ones are cut")
    serve.add_argument("--max-new-tokens", type=int, default=32)
    serve.add_argument("--max-batch-size", type=int, default=32, help="sequences a rank at a time")
    serve.add_argument("--rounds", type=int, default=3, help="repetitions in every mode")
    serve.add_argument(
        "--check-requests",
        type=int,
        default=-1,
        help="requests also run in one process without expert parallelism, which needs the whole "
        "model on each rank; -1: all",
    )
    args = parser.parse_args(argv)
    for name in ("max_prompt_tokens", "max_new_tokens", "max_batch_size", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def build_modes(
    args: argparse.Namespace,
    settings: SemanticEPConfig,
    checkpoint: Checkpoint,
    plans: ServingPlans,
    requests: list[Request],
) -> dict[str, ServingMode]:
    """Load an engine for each mode.

    Raises:
        ConfigError: `semantic` was asked for without a plan.
    """
    names = args.compare or (["semantic"] if plans.plan is not None else ["contiguous"])
    if "semantic" in names and plans.plan is None:
        raise ConfigError(
            explain(
                "semantic mode needs a plan",
                where="--plan, semantic_ep.plan.artifact",
                do="Make one with `semantic-ep plan`",
            )
        )
    group_plan = expert_groups(settings, dist.get_world_size())
    group = group_plan.create().expert_parallel
    prompts = [request.prompt for request in requests]
    modes = {}
    for name in names:
        used = plans if name == "semantic" else ServingPlans()
        engine = load_engine(
            args,
            settings,
            checkpoint,
            used,
            group_plan,
            group=group,
            max_sequences=args.max_batch_size,
        )
        ranks = ranks_of_requests(args, settings, prompts, used)
        modes[name] = ServingMode(engine=engine, rank_of_request=ranks)
    return modes


def ranks_of_requests(
    args: argparse.Namespace,
    settings: SemanticEPConfig,
    prompts: list[list[int]],
    plans: ServingPlans,
) -> np.ndarray:
    """[R], the rank that each request is handed to."""
    if settings.serve.attention == "tp":
        return np.zeros(len(prompts), dtype=np.int64)
    if plans.schedule is None or settings.schedule.mode == "off":
        return round_robin(len(prompts), dist.get_world_size())
    return by_affinity(
        prompts,
        plans.schedule,
        max_new_tokens=args.max_new_tokens,
        decode_schedule=plans.decode_schedule,
    )


def check_against_one_process(
    args: argparse.Namespace, prompts: list[list[int]], outputs: list[list[int]]
) -> tuple[bool | None, int]:
    """Compare with transformers' own generation, each rank for its share of the requests.

    Returns:
        Whether all are equal (None if none was checked), and how many were checked.
    """
    count = len(prompts) if args.check_requests < 0 else min(args.check_requests, len(prompts))
    mine = range(dist.get_rank(), count, dist.get_world_size())
    expected = generate_in_one_process(
        args.model,
        [prompts[index] for index in mine],
        max_new_tokens=args.max_new_tokens,
        dtype=getattr(torch, args.dtype),
        device=local_device(args),
        progress=dist.get_rank() == 0,
    )
    differing = [index for index, want in zip(mine, expected) if outputs[index] != want]
    everyone = from_all_ranks(differing, "gathering of the check")
    different = sorted(index for part in everyone for index in part)
    if different and dist.get_rank() == 0:
        print(f"requests that differ from one process: {different}", file=sys.stderr)
    return (not different if count else None), count


def run(args: argparse.Namespace) -> int:
    """Serve; returns 1 if outputs differ where they must not, else 0."""
    from transformers import AutoTokenizer

    settings = read_settings(args)
    checkpoint = Checkpoint.open(args.model)
    plans = read_plans(args, settings, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    requests = read_requests(
        args.prompts,
        tokenizer,
        max_prompt_tokens=args.max_prompt_tokens,
        limit=args.num_requests,
    )
    prompts = [request.prompt for request in requests]

    init_distributed(device_type=local_device(args).type, peer_timeout=args.peer_timeout)
    first = dist.get_rank() == 0
    modes = build_modes(args, settings, checkpoint, plans, requests)
    loaded = peak_rss_bytes()
    if first:
        print(
            f"Serving {len(requests)} requests on {dist.get_world_size()} ranks. "
            f"Peak memory a rank after loading {len(modes)} engines: {in_megabytes(loaded)} MB.",
            flush=True,
        )
    with tqdm(
        total=args.rounds * len(modes),
        desc="Serving",
        unit="round",
        disable=None if first else True,
    ) as bar:
        comparison = compare_modes(
            modes,
            prompts,
            max_new_tokens=args.max_new_tokens,
            max_batch_size=args.max_batch_size,
            rounds=args.rounds,
            on_round=lambda name: bar.update(),
        )
    peak = peak_rss_bytes()
    outputs = next(iter(comparison.outputs.values()))
    same, checked = check_against_one_process(args, prompts, outputs)
    result = {
        "ep_size": dist.get_world_size(),
        "model": dataclasses.asdict(checkpoint.fingerprint()),
        "command": sys.argv,
        "num_requests": len(requests),
        "max_new_tokens": args.max_new_tokens,
        "identical_outputs": {
            "between_modes": comparison.identical_between_modes,
            "to_single_process": same,
            "checked_requests": checked,
        },
        "peak_rss_bytes": peak,
        "modes": dict(comparison.modes),
    }
    if first:
        Console().print(summary_table(result))
        print(parity_line(result), flush=True)
        publish(args, settings, result)
        if args.responses is not None:
            write_responses(args.responses, requests, outputs, tokenizer)
    with peer_guard("final barrier", dist.group.WORLD):
        dist.barrier()
    dist.destroy_process_group()
    return 0 if comparison.identical_between_modes and same is not False else 1


def publish(args: argparse.Namespace, settings: SemanticEPConfig, result: dict[str, Any]) -> None:
    """Write the result and log its numbers; rank 0 only."""
    if args.out is None:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(args.out, json.dumps(result, indent=1).encode())
    with Tracker.start(
        args.out.parent,
        config={
            "model": result["model"],
            "ep_size": result["ep_size"],
            "semantic_ep": settings,
            "arguments": {name: str(value) for name, value in vars(args).items()},
        },
        job_type="serve",
        wandb=settings.tracking.wandb,
        rank=0,
    ) as tracker:
        tracker.log(tracked_metrics(result))
        tracker.log_artifact(args.model, "checkpoint", role="input")
        for plan in (
            args.plan or settings.plan.artifact,
            args.decode_plan or settings.serve.decode_plan,
        ):
            if plan != "auto":
                tracker.log_artifact(plan, "plan", role="input")


def names_prompts(argv: list[str] | None) -> bool:
    """Whether a list of prompts is to be served, not clients."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompts")
    return parser.parse_known_args(argv)[0].prompts is not None


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    args = parse_arguments(argv)
    if not hasattr(args, "prompts"):
        from semantic_ep.serve.http.__main__ import start

        return start(args)
    logging.basicConfig(level=logging.WARNING)
    try:
        return run(args)
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            # An orderly end would wait for the peer that is gone.
            leave(2)
        return 2


if __name__ == "__main__":
    leave(main())
