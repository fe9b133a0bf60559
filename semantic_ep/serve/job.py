"""What starting to serve takes, whether prompts come from a list or over HTTP."""

from __future__ import annotations

import argparse
import os
import resource

import torch
from torch import distributed as dist

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.config import SemanticEPConfig, section_of
from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.deepspeed import read_config
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.plan import Plan
from semantic_ep.runtime.collectives import from_all_ranks
from semantic_ep.runtime.groups import GroupPlan
from semantic_ep.serve.attention import attention_options
from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.plans import ServingPlans
from semantic_ep.serve.worker import MAX_STEP_TOKENS
from semantic_ep.topology import LINKS, Topology


def read_settings(args: argparse.Namespace) -> SemanticEPConfig:
    """Settings of flags, variables and the DeepSpeed configuration, if there is one.

    Raises:
        ConfigError: Listing every mistake.
    """
    section = section_of(read_config(None, args)) if args.deepspeed_config else None
    return SemanticEPConfig.resolve(json_section=section, args=args)


def read_plans(
    args: argparse.Namespace, settings: SemanticEPConfig, checkpoint: Checkpoint
) -> ServingPlans:
    """Read the plans and check that they are the model's.

    Raises:
        ArtifactError: One is damaged. FingerprintError: It belongs to another model.
        ConfigError: There is a plan for generated tokens alone.
    """
    read: dict[str, Plan | None] = {}
    for flag, path in (
        ("--plan", args.plan or settings.plan.artifact),
        ("--decode-plan", args.decode_plan or settings.serve.decode_plan),
    ):
        read[flag] = plan = None if path == "auto" else Plan.read(path)
        if plan is not None:
            plan.fingerprint.check(
                checkpoint.fingerprint(),
                what=f"--model {args.model}, for {flag} {path},",
                allow_retrained=args.allow_retrained,
            )
    plans = ServingPlans(plan=read["--plan"], decode=read["--decode-plan"])
    if plans.decode is not None and plans.plan is None:
        raise ConfigError(
            explain(
                "a plan for generated tokens needs another for those of prompts",
                where="semantic_ep.serve.decode_plan, --semantic-ep-serve-decode-plan, "
                "--decode-plan",
                do="Give that as --plan",
            )
        )
    return plans


def expert_groups(
    settings: SemanticEPConfig, world_size: int, *, topology: Topology | None = None
) -> GroupPlan:
    """All ranks as one EP group.

    Args:
        settings: Of the run.
        world_size: Ranks that were started.
        topology: Nodes and links; None: the nodes that the launcher tells of.

    Raises:
        ConfigError: The settings ask for something else.
    """
    wanted = settings.groups.ep_size
    if wanted not in ("auto", world_size):
        raise ConfigError(
            explain(
                f"ep_size is {wanted} and {world_size} ranks were started",
                where="semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size",
                do=f'Start {wanted} ranks, or set it to "auto"',
            )
        )
    if topology is None:
        topology = Topology.uniform(world_size, num_nodes=num_nodes(world_size))
    return GroupPlan.build(world_size, world_size, topology=topology, scope=settings.groups.scope)


def read_topology(args: argparse.Namespace, world_size: int) -> Topology:
    """Nodes and links of the ranks: of `--topology`, or of the launcher and a usual machine.

    Raises:
        ConfigError: The file is wrong, or is for other ranks.
    """
    if args.topology is None:
        on_cpu = local_device(args).type == "cpu"
        link = LINKS["shared_memory" if on_cpu else "nvlink4"]
        return Topology.uniform(world_size, num_nodes=num_nodes(world_size), intra_node=link)
    topology = Topology.from_json(args.topology)
    if topology.ep_size != world_size:
        raise ConfigError(
            explain(
                "this topology is for other ranks",
                where=f"--topology {args.topology}",
                got=f"{topology.ep_size} ranks",
                allowed=f"{world_size}, as many as were started",
            )
        )
    return topology


def num_nodes(world_size: int) -> int:
    """Nodes that the launcher spread the ranks over."""
    # torchrun and the deepspeed launcher name it differently.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return max(world_size // local, 1)


def local_device(args: argparse.Namespace) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", max(args.local_rank, 0))))


def peak_rss_bytes() -> list[int]:
    """Largest resident memory of every rank's process so far; all ranks call this together."""
    # Linux counts in KiB.
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return from_all_ranks(mine, "gathering of memory sizes")


def load_engine(
    args: argparse.Namespace,
    settings: SemanticEPConfig,
    checkpoint: Checkpoint,
    plans: ServingPlans,
    group_plan: GroupPlan,
    *,
    group: dist.ProcessGroup,
    max_sequences: int,
) -> SemanticInferenceEngine:
    """Load this rank's share of the model; every rank calls this together.

    Args:
        args: See `add_job_arguments`.
        settings: Of the run.
        checkpoint: Opened.
        plans: To place experts by.
        group_plan: Of `expert_groups`.
        group: The EP group.
        max_sequences: That run together on a rank.

    Raises:
        BackendError, ConfigError, PlacementError: Plan, settings and ranks do not fit each other.
    """
    if plans.plan is not None:
        placement = plans.plan.placement
    else:
        shape = checkpoint.shape
        placement = Placement.contiguous(
            num_layers=len(shape.layer_ids), num_experts=shape.num_experts, ep_size=group.size()
        )
    return SemanticInferenceEngine.from_checkpoint(
        checkpoint,
        placement=placement,
        group=group,
        device=local_device(args),
        dtype=getattr(torch, args.dtype),
        backend=settings.dispatch.backend,
        overlap=settings.dispatch.overlap,
        max_tokens=max(MAX_STEP_TOKENS, max_sequences),
        node_of_rank=group_plan.nodes_of_group(dist.get_rank()),
        decode_placement=plans.decode_placement,
        **attention_options(settings, plans.schedule, plans.decode_schedule),
    )
