"""One rank of a server: `deepspeed --num_gpus G --module semantic_ep.serve.http --model M`.

Every rank loads its experts; rank 0 also listens. `semantic-ep serve` and `launch/serve.py` start
the same.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import Any

from torch import distributed as dist

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import SemanticEPError
from semantic_ep.integrations.deepspeed.inference import init_distributed
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.runtime.collectives import leave
from semantic_ep.serve.arguments import parse_server_arguments
from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.http.auth import read_api_keys
from semantic_ep.serve.http.front import Front, HttpSettings
from semantic_ep.serve.http.server import HttpServer
from semantic_ep.serve.job import (
    expert_groups,
    load_engine,
    local_device,
    peak_rss_bytes,
    read_plans,
    read_settings,
    read_topology,
)
from semantic_ep.serve.scheduling.of_server import server_scheduler
from semantic_ep.serve.start import serve_group
from semantic_ep.serve.summary import in_megabytes

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Serve until told to stop.

    Raises:
        SemanticEPError: A setting or file is wrong, or a rank was lost.
    """
    from transformers import AutoTokenizer

    settings = read_settings(args)
    keys = read_api_keys(args.api_key_file)
    checkpoint = Checkpoint.open(args.model)
    plans = read_plans(args, settings, checkpoint)
    profile = None if args.profile is None else RoutingProfile.read(args.profile)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    init_distributed(device_type=local_device(args).type, peer_timeout=args.peer_timeout)
    topology = read_topology(args, dist.get_world_size())
    group_plan = expert_groups(settings, dist.get_world_size(), topology=topology)
    engine = load_engine(
        args,
        settings,
        checkpoint,
        plans,
        group_plan,
        group=group_plan.create().expert_parallel,
        max_sequences=settings.serve.max_sequences,
    )
    peak = peak_rss_bytes()
    if dist.get_rank() == 0:
        logger.warning(
            "loaded: experts of %s of %s MB on each rank; peak memory of the ranks %s MB",
            in_megabytes([engine.expert_bytes_resident]),
            in_megabytes([engine.expert_bytes_total]),
            in_megabytes(peak),
        )
    scheduler = server_scheduler(engine, settings=settings, plans=plans, topology=topology)
    serve_group(
        engine,
        scheduler=scheduler,
        **_front_of(args, settings, engine, tokenizer, keys, profile),
        peer_timeout=args.peer_timeout,
        kv_cache_tokens=settings.serve.kv_cache_tokens,
        max_sequences=settings.serve.max_sequences,
        prefix_cache=settings.serve.prefix_cache,
        tokenizer=tokenizer,
    )


def _front_of(
    args: argparse.Namespace,
    settings: SemanticEPConfig,
    engine: SemanticInferenceEngine,
    tokenizer: Any,
    keys: tuple[str, ...],
    profile: RoutingProfile | None,
) -> dict[str, Any]:
    """What `serve_group` calls on rank 0."""
    homes = 1 if settings.serve.attention == "tp" else engine.group.size()
    http = HttpSettings(
        model_name=args.model_name or args.model.resolve().name,
        vocab_size=engine.model.module.config.get_text_config().vocab_size,
        fingerprint=engine.model.fingerprint,
        api_keys=keys,
        max_body_bytes=args.max_body_bytes,
        max_running=settings.serve.max_sequences * homes,
        max_waiting=args.max_waiting,
        admin_dir=args.admin_dir,
    )
    servers: list[HttpServer] = []

    def front(running: Any) -> None:
        server = HttpServer(
            Front(running, tokenizer, http, profile=profile),
            host=args.host,
            port=args.port,
            drain_seconds=args.drain_seconds,
        )
        servers.append(server)
        if running.healthy:
            server.run()

    return {
        "front": front,
        "on_failure": lambda error: [server.fail(error) for server in servers],
    }


def start(args: argparse.Namespace) -> int:
    """Run one rank; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Launchers signal every rank. Rank 0 drains and then ends the others.
    for sig in (signal.SIGTERM, signal.SIGINT) if int(os.environ.get("RANK", "0")) else ():
        signal.signal(sig, signal.SIG_IGN)
    try:
        run(args)
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # An orderly end would wait for a peer that is gone.
        leave(2)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(start(parse_server_arguments()))
