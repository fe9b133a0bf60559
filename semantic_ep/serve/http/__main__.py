"""One rank of a server: `deepspeed --num_gpus G --module semantic_ep.serve.http --model M`.

Every rank loads its experts; rank 0 also listens.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.errors import ConfigError, SemanticEPError, explain
from semantic_ep.integrations.deepspeed.inference import init_distributed
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.runtime.groups import GroupPlan
from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.http.app import Front, HttpSettings
from semantic_ep.serve.http.auth import read_api_keys
from semantic_ep.serve.http.server import HttpServer
from semantic_ep.serve.protocol import RequestScheduler
from semantic_ep.serve.scheduling.make import make_scheduler
from semantic_ep.serve.start import serve_group
from semantic_ep.topology import Topology

# "semantic" needs a cost model of the machine, "prefix-only" a prefix cache.
POLICIES = ("semantic-window", "least-loaded", "round-robin")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="deepspeed --module semantic_ep.serve.http", description=__doc__
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint")
    parser.add_argument("--plan", type=Path, help="plan artefact; without: contiguous experts")
    parser.add_argument(
        "--scheduler",
        choices=POLICIES,
        help="default: semantic-window, or least-loaded if no plan",
    )
    parser.add_argument("--kv-cache-tokens", type=int, default=65536, help="of each rank")
    parser.add_argument("--max-sequences", type=int, default=32, help="of each rank at a time")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--peer-timeout", type=float, default=50, help="seconds to wait for a rank")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--allow-retrained", action="store_true", help="plan of an earlier state")
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="default: loopback")
    http.add_argument("--port", type=int, default=8000)
    http.add_argument("--model-name", help="for clients; default: name of the directory")
    http.add_argument("--api-key-file", type=Path, help="one key a line; or SEMANTIC_EP_API_KEY")
    http.add_argument("--max-body-bytes", type=int, default=4 * 2**20)
    http.add_argument("--max-waiting", type=int, default=896, help="sequences beyond those running")
    http.add_argument("--drain-seconds", type=float, default=20, help="bound after SIGTERM")
    args = parser.parse_args(argv)
    for name in ("kv_cache_tokens", "max_sequences", "max_body_bytes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def load(
    args: argparse.Namespace, checkpoint: Checkpoint, plan: Plan | None
) -> SemanticInferenceEngine:
    """Load this rank's share of the model; all ranks are one EP group."""
    world_size = dist.get_world_size()
    # torchrun and the deepspeed launcher name it differently.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    topology = Topology.uniform(world_size, num_nodes=max(world_size // local, 1))
    group_plan = GroupPlan.build(world_size, world_size, topology=topology)
    if plan is not None:
        placement = plan.placement
    else:
        shape = checkpoint.shape
        placement = Placement.contiguous(
            num_layers=len(shape.layer_ids), num_experts=shape.num_experts, ep_size=world_size
        )
    return SemanticInferenceEngine.from_checkpoint(
        checkpoint,
        placement=placement,
        group=group_plan.create().expert_parallel,
        device=local_device(args),
        dtype=DTYPES[args.dtype],
        node_of_rank=group_plan.nodes_of_group(dist.get_rank()),
    )


def local_device(args: argparse.Namespace) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0))))


def scheduler_of(args: argparse.Namespace, plan: Plan | None, ep_size: int) -> RequestScheduler:
    """The scheduler that was asked for.

    Raises:
        ConfigError: It needs a plan and there is none.
    """
    name = args.scheduler or ("least-loaded" if plan is None else "semantic-window")
    if name == "semantic-window" and plan is None:
        raise ConfigError(explain("needs a plan", where="--scheduler semantic-window", do="--plan"))
    return make_scheduler(
        name,
        ep_size=ep_size,
        schedule=None if plan is None else plan.schedule,
        top_k=1 if plan is None else plan.fingerprint.top_k,
        max_sequences=args.max_sequences,
    )


def run(args: argparse.Namespace) -> None:
    """Serve until told to stop.

    Raises:
        SemanticEPError: A setting or file is wrong, or a rank was lost.
    """
    from transformers import AutoTokenizer

    keys = read_api_keys(args.api_key_file)
    checkpoint = Checkpoint.open(args.model)
    plan = None
    if args.plan is not None:
        plan = Plan.read(args.plan)
        plan.fingerprint.check(
            checkpoint.fingerprint(),
            what=f"--model {args.model}, for --plan {args.plan},",
            allow_retrained=args.allow_retrained,
        )
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    init_distributed(device_type=local_device(args).type, peer_timeout=args.peer_timeout)
    ep_size = dist.get_world_size()
    scheduler = scheduler_of(args, plan, ep_size)
    engine = load(args, checkpoint, plan)
    settings = HttpSettings(
        model_name=args.model_name or args.model.resolve().name,
        vocab_size=engine.model.module.config.get_text_config().vocab_size,
        api_keys=keys,
        max_body_bytes=args.max_body_bytes,
        max_running=args.max_sequences * ep_size,
        max_waiting=args.max_waiting,
    )
    servers: list[HttpServer] = []

    def front(running: Any) -> None:
        server = HttpServer(
            Front(running, tokenizer, settings),
            host=args.host,
            port=args.port,
            drain_seconds=args.drain_seconds,
        )
        servers.append(server)
        if running.healthy:
            server.run()

    serve_group(
        engine,
        scheduler=scheduler,
        front=front,
        on_failure=lambda error: [server.fail(error) for server in servers],
        peer_timeout=args.peer_timeout,
        kv_cache_tokens=args.kv_cache_tokens,
        max_sequences=args.max_sequences,
        tokenizer=tokenizer,
    )


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Launchers signal every rank. Rank 0 drains and then ends the others.
    for sig in (signal.SIGTERM, signal.SIGINT) if int(os.environ.get("RANK", "0")) else ():
        signal.signal(sig, signal.SIG_IGN)
    try:
        run(args)
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # An orderly end would wait for a peer that is gone.
        os._exit(2)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
