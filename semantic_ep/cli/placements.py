"""The placements that `semantic-ep plan` judges: the wanted one, and what it is compared with."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_ep.errors import ConfigError, explain

if TYPE_CHECKING:
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.plan import Plan
    from semantic_ep.plan.policies import PlacementPolicy
    from semantic_ep.topology import Topology

COMPARED = ("contiguous", "random", "eplb")
CURRENT = "current"  # row of the placement in force


def place_all(
    args: argparse.Namespace,
    profile: RoutingProfile,
    current: Plan | None,
    topology: Topology,
    groups: int,
) -> tuple[str, dict[str, Placement], dict[str, float]]:
    """Solve for the policy and what it is compared with.

    Args:
        args: The verb's arguments.
        profile: What to plan on.
        current: The plan in force, if there is one.
        topology: Nodes and links of the ranks.
        groups: Router groups to keep whole; placements that do not are left out.

    Returns:
        Name of the chosen placement; placements by name, the chosen one last; seconds by name.
    """
    from semantic_ep.plan.moving import relabel_ranks
    from semantic_ep.plan.replicas import REQUESTS_SCHEDULED, TOKENS_SCHEDULED, add_replicas
    from semantic_ep.plan.router_groups import check_router_groups

    spare = _spare_slots(args, profile)
    experts = profile.fingerprint.num_experts
    check_router_groups(groups, num_experts=experts, ep_size=args.ep_size)
    placements: dict[str, Placement] = {}
    seconds: dict[str, float] = {}
    for name in [name for name in COMPARED if name != args.policy] + [args.policy]:
        started = time.perf_counter()
        placed = _policy(name, args, groups).place(
            profile,
            ep_size=args.ep_size,
            seed=args.seed,
            time_limit=args.time_limit,
            topology=topology,
        )
        if groups == 1 or _keeps_groups(placed, groups, name, args):
            placements[name] = placed
            seconds[name] = time.perf_counter() - started
    chosen = args.policy
    wanted = placements[chosen]
    if spare:
        started = time.perf_counter()
        wanted = add_replicas(
            wanted,
            profile,
            slots_per_rank=spare,
            topology=topology,
            scheduled=REQUESTS_SCHEDULED if args.mode == "requests" else TOKENS_SCHEDULED,
        )
        chosen = f"{args.policy}+replicas"
        seconds[chosen] = seconds[args.policy] + time.perf_counter() - started
    if current is not None:
        placements[CURRENT] = current.placement
        shared = args.mode == "requests"
        wanted = relabel_ranks(wanted, current.placement, shared_ranks=shared, topology=topology)
    placements.pop(chosen, None)  # the chosen one goes last
    return chosen, {**placements, chosen: wanted}, seconds


def _policy(name: str, args: argparse.Namespace, router_groups: int) -> PlacementPolicy:
    """The policy of that name, as the mode and the router need it."""
    import dataclasses

    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.solver import SemanticPolicy

    requests = name == "semantic" and args.mode == "requests"
    found = policy("semantic-requests" if requests else name)
    if isinstance(found, SemanticPolicy):
        return dataclasses.replace(found, router_groups=router_groups)
    return found


def router_groups(args: argparse.Namespace) -> int:
    """Return the router groups to keep whole, from the flag or from the model's config."""
    from semantic_ep.apply.checkpoint.reader import read_shape

    if args.router_groups.isdecimal():
        groups = int(args.router_groups)
    else:
        shape = read_shape(Path(args.router_groups))
        groups = 1 if shape.router_groups is None else shape.router_groups.num_groups
    beside = "--redundant-slots" if args.redundant_slots else "--current"
    if groups != 1 and (args.redundant_slots or args.current is not None):
        raise ConfigError(
            explain(
                "router groups bind permuted checkpoints alone, which hold each expert once and "
                "are written anew",
                where=f"--router-groups with {beside}",
                do=f"Leave out {beside}, or --router-groups: integrations and exported plans remap "
                "ids after the router",
            )
        )
    return groups


def _keeps_groups(placement: Placement, groups: int, name: str, args: argparse.Namespace) -> bool:
    """Whether a checkpoint can carry the placement; the policy asked for must see to that."""
    from semantic_ep.plan.router_groups import mixed_blocks

    table = placement.physical_to_logical_map
    fits = table.shape[1] == placement.num_experts and not mixed_blocks(table, groups).size
    if not fits and name == args.policy:
        raise ConfigError(
            explain(
                "the policy does not keep router groups whole",
                where="--policy with --router-groups",
                got=f"{name}, {groups} groups",
                allowed="semantic, contiguous",
            )
        )
    return fits


def _spare_slots(args: argparse.Namespace, profile: RoutingProfile) -> int:
    """Spare slots of each rank."""
    total, ranks = args.redundant_slots, args.ep_size
    if total < 0 or total % ranks:
        raise ConfigError(
            explain(
                "ranks must have equally many spare slots",
                where="--redundant-slots",
                got=total,
                allowed=f"multiples of --ep-size {ranks}: 0, {ranks}, {2 * ranks}, ...",
            )
        )
    if total and not profile.token_count.any():
        raise ConfigError(
            explain(
                "copies are chosen by where tokens run, and the profile knows no token ids",
                where="--redundant-slots",
                got=total,
                do="Record token ids, or plan without spare slots",
            )
        )
    return int(total // ranks)
