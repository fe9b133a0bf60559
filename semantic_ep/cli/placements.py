"""The placements that `semantic-ep plan` judges: the wanted one, and what it is compared with."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_ep.errors import ConfigError, explain, nearest

if TYPE_CHECKING:
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.observe.traces import RoutingTrace
    from semantic_ep.plan.compared import Compared
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.plan import Plan
    from semantic_ep.plan.policies import PlacementPolicy
    from semantic_ep.topology import Topology

CURRENT = "current"  # row of the placement in force


def place_all(
    args: argparse.Namespace,
    profile: RoutingProfile,
    current: Plan | None,
    topology: Topology,
    groups: int,
) -> tuple[str, dict[str, Placement], dict[str, float], dict[str, str]]:
    """Solve for what the policy is compared with, and for the policy, which may start from that.

    Args:
        args: The verb's arguments.
        profile: What to plan on.
        current: The plan in force, if there is one.
        topology: Nodes and links of the ranks.
        groups: Router groups to keep whole; placements that do not are left out.

    Returns:
        Name of the chosen placement; placements by name, the chosen one last; seconds by name;
        baselines that were left out, and why.
    """
    from semantic_ep.plan.compared import place_baselines
    from semantic_ep.plan.moving import relabel_ranks
    from semantic_ep.plan.replicas import REQUESTS_SCHEDULED, TOKENS_SCHEDULED, add_replicas
    from semantic_ep.plan.router_groups import check_router_groups

    spare = _spare_slots(args, profile)
    experts = profile.fingerprint.num_experts
    check_router_groups(groups, num_experts=experts, ep_size=args.ep_size)
    compared = place_baselines(
        profile,
        [name for name in _baselines(args) if name != args.policy],
        ep_size=args.ep_size,
        seed=args.seed,
        time_limit=args.time_limit,
        topology=topology,
        router_groups=groups,
    )
    placements, seconds = dict(compared.placements), dict(compared.seconds)
    started = time.perf_counter()
    placements[args.policy] = _policy(args.policy, args, groups, compared).place(
        profile,
        ep_size=args.ep_size,
        seed=args.seed,
        time_limit=args.time_limit,
        topology=topology,
    )
    seconds[args.policy] = time.perf_counter() - started
    if groups != 1:
        _check_groups(placements[args.policy], groups, args)
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
    left_out = {name: why for name, why in compared.left_out.items() if name != args.policy}
    return chosen, {**placements, chosen: wanted}, seconds, left_out


def ceiling_placement(
    args: argparse.Namespace, holdout: RoutingTrace, topology: Topology, groups: int
) -> Placement | None:
    """The placement of `--ceiling placement`, which knows the held-out routes; None without.

    It holds each expert once, like a plan without `--redundant-slots`.
    """
    from semantic_ep.plan.bounds import oracle_placement
    from semantic_ep.plan.solver import SemanticPolicy

    if args.ceiling == "homes":
        return None
    ours = SemanticPolicy(
        mode="requests" if args.mode == "requests" else "tokens", router_groups=groups
    )
    return oracle_placement(
        ours,
        holdout,
        ep_size=args.ep_size,
        seed=args.seed,
        time_limit=args.time_limit,
        topology=topology,
    )


def _baselines(args: argparse.Namespace) -> tuple[str, ...]:
    """The baselines to compare with; unknown names are refused."""
    from semantic_ep.plan.compared import BASELINES

    names: tuple[str, ...] = BASELINES if args.baselines == ["all"] else tuple(args.baselines)
    for name in names:
        if name not in BASELINES:
            close = nearest(name, BASELINES)
            raise ConfigError(
                explain(
                    "unknown baseline",
                    where="--baselines",
                    got=name,
                    allowed=["all", *BASELINES],
                    do=f'Did you mean "{close}"?' if close else "Choose some of them, or all",
                )
            )
    return names


def _policy(
    name: str, args: argparse.Namespace, router_groups: int, compared: Compared
) -> PlacementPolicy:
    """The policy of that name, as the mode and the router need it; ours starts from the others."""
    import dataclasses

    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.solver import SemanticPolicy

    requests = name == "semantic" and args.mode == "requests"
    found = policy("semantic-requests" if requests else name)
    if isinstance(found, SemanticPolicy):
        return dataclasses.replace(found, router_groups=router_groups, known=compared.even)
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


def _check_groups(placement: Placement, groups: int, args: argparse.Namespace) -> None:
    """Refuse a policy whose placement no checkpoint can carry."""
    from semantic_ep.plan.compared import is_even
    from semantic_ep.plan.router_groups import mixed_blocks

    if not is_even(placement) or mixed_blocks(placement.physical_to_logical_map, groups).size:
        raise ConfigError(
            explain(
                "the policy does not keep router groups whole",
                where="--policy with --router-groups",
                got=f"{args.policy}, {groups} groups",
                allowed="semantic, contiguous",
            )
        )


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
