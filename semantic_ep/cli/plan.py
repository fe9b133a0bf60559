"""`semantic-ep plan`: from a routing profile to a plan, judged on held-out routing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_ep.cli.tracking import add_wandb_argument, refuse_dry_run

if TYPE_CHECKING:
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.plan.effect import Workload
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.plan import Plan
    from semantic_ep.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--profile",
        type=Path,
        required=True,
        metavar="DIR",
        help="routing profile, or trace, to plan on",
    )
    parser.add_argument(
        "--holdout",
        type=Path,
        metavar="DIR",
        help="trace of other requests to judge the plan on (default: `holdout` beside the profile)",
    )
    parser.add_argument(
        "--allow-retrained",
        action="store_true",
        help="judge on routing of the same model after further training",
    )
    parser.add_argument("--ep-size", type=int, required=True, metavar="G", help="EP ranks")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--policy", default="semantic", help="placement policy (default: semantic)")
    parser.add_argument(
        "--redundant-slots",
        type=int,
        default=0,
        metavar="N",
        help="slots beyond one an expert, over all ranks, for copies of experts (default: 0)",
    )
    parser.add_argument(
        "--router-groups",
        default="1",
        metavar="N|JSON",
        help="groups that a group-limited router picks from, or the model's config.json: plan for "
        "a permuted checkpoint, which must keep them whole (default: 1, no such limit)",
    )
    parser.add_argument(
        "--current",
        type=Path,
        metavar="DIR",
        help="plan in force: name ranks so that fewest experts move, and judge against keeping it",
    )
    parser.add_argument(
        "--horizon-tokens",
        type=float,
        metavar="N",
        help="tokens expected until routing drifts: moving experts must pay within them",
    )
    parser.add_argument(
        "--mode",
        choices=("requests", "tokens"),
        default="requests",
        help="what gets a home rank: whole requests (attention-DP), or tokens anew in each layer "
        "(attention-TP with the shuffled collectives)",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="CHECKPOINT",
        help="schedule token ids that the profile never saw like the one that the model embeds "
        "closest to them (default: as the average token)",
    )
    add_topology_arguments(parser)
    parser.add_argument(
        "--hidden-size",
        type=int,
        metavar="D",
        help="with --expert-bytes: predict the effect on time",
    )
    parser.add_argument(
        "--expert-bytes", type=int, metavar="B", help="bytes of one expert's weights in one layer"
    )
    parser.add_argument(
        "--element-bytes", type=int, default=2, metavar="B", help="bytes of an activation element"
    )
    parser.add_argument(
        "--runtime",
        choices=("all-to-all", "all-gather"),
        default="all-to-all",
        help="how tokens reach experts; all-gather sends every token everywhere",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="published placements to compare with and to start from, besides contiguous "
        "(default: all; with hundreds of experts some take minutes)",
    )
    parser.add_argument(
        "--ceiling",
        choices=("homes", "placement"),
        default="homes",
        help="what may know the held-out routes: home ranks on the placement of the plan, or the "
        "placement too, which takes a second solve on the held-out requests (default: homes)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="seconds for the solver, and as many for all baselines together; those that have not "
        "begun by then are left out, and named",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("--dry-run", action="store_true", help="judge, but write nothing")
    add_wandb_argument(
        parser, "record the verdict, and profile -> plan, in metrics.jsonl beside the plan and in"
    )


def add_topology_arguments(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Declare where nodes and links are read from; one node without. Returns the alternatives."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--topology", type=Path, metavar="JSON", help="nodes and links of the ranks")
    where.add_argument("--hostfile", type=Path, help="DeepSpeed or MPI hostfile")
    where.add_argument("--slurm", action="store_true", help="read nodes from Slurm's variables")
    return where


def run(args: argparse.Namespace) -> int:
    """Solve, judge, print, write."""
    from semantic_ep.cli import EXIT_NO, EXIT_OK
    from semantic_ep.cli.placements import CURRENT, ceiling_placement, place_all, router_groups
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.observe.traces import RoutingTrace
    from semantic_ep.plan.plan import Plan
    from semantic_ep.plan.schedule import Schedule
    from semantic_ep.plan.verdict import verdict

    refuse_dry_run(args)
    groups = router_groups(args)
    profile = RoutingProfile.read(args.profile)
    held_out = _holdout(args)
    holdout = RoutingTrace.load(held_out)
    profile.fingerprint.check(
        holdout.fingerprint, what=f"--holdout {held_out}", allow_retrained=args.allow_retrained
    )
    _check_affinity(profile, args)
    topology = topology_of(args, args.ep_size)
    current = _current(args, profile)
    chosen, placements, seconds, left_out = place_all(args, profile, current, topology, groups)
    scheduled = _scheduled(args, profile)
    account = verdict(
        placements,
        chosen=chosen,
        profile=scheduled,
        holdout=holdout,
        mode=args.mode,
        topology=topology,
        workload=_workload(args),
        in_force="contiguous" if current is None else CURRENT,
        horizon_tokens=args.horizon_tokens,
        without_copies=args.policy if args.redundant_slots else None,
        left_out=left_out,
        known=ceiling_placement(args, holdout, topology, groups),
    )
    for row in account["policies"]:
        row["solve_seconds"] = seconds.get(row["policy"], 0.0)
    parents = {"profile": profile.sha256}
    if current is not None:
        account["moves"] = _moves(placements[chosen], current.placement, topology)
        parents["current"] = current.sha256
    plan = Plan(
        placement=placements[chosen],
        schedule=Schedule.from_profile(scheduled, placements[chosen]),
        verdict=account,
        fingerprint=profile.fingerprint,
    )
    result: dict[str, Any] = {"verdict": account, "output": None, "sha256": None}
    if not args.dry_run:
        result["sha256"] = plan.save(args.output, parents)
        result["output"] = str(args.output)
        if args.wandb != "disabled":
            _track(args, account)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print(account, plan, result)
    return EXIT_OK if account["worth_it"] else EXIT_NO


def _scheduled(args: argparse.Namespace, profile: RoutingProfile) -> RoutingProfile:
    """What the schedule is made from: the profile, with stand-ins for unseen ids if asked for."""
    from semantic_ep.apply.checkpoint.embedding import token_embedding
    from semantic_ep.apply.checkpoint.reader import Checkpoint
    from semantic_ep.plan.stand_ins import with_stand_ins

    if args.embeddings is None:
        return profile
    checkpoint = Checkpoint.open(args.embeddings)
    what = f"--embeddings {args.embeddings}"
    profile.fingerprint.check(checkpoint.fingerprint(), what=what, allow_retrained=True)
    return with_stand_ins(profile, token_embedding(checkpoint))


def _track(args: argparse.Namespace, account: dict[str, Any]) -> None:
    """Record arguments, verdict and lineage beside the plan."""
    from semantic_ep.artifacts import is_artifact
    from semantic_ep.tracking import Tracker

    with Tracker.start(
        args.output.absolute().parent, config=vars(args), job_type="plan", wandb=args.wandb
    ) as tracker:
        tracker.log(
            {
                f"plan/{name}": account[name]
                for name in ("remote_copies_saved", "straggler_rows_saved", "worth_it")
            }
        )
        tracker.log_table("plan/policies", account["policies"])
        # One can plan from a trace, too: it is recorded as what it is.
        kind = "profile" if is_artifact(args.profile, kind="profile") else "trace"
        tracker.log_artifact(args.profile, kind, role="input")
        if args.current is not None:
            tracker.log_artifact(args.current, "plan", role="input")
        tracker.log_artifact(args.output, "plan")


def _current(args: argparse.Namespace, profile: RoutingProfile) -> Plan | None:
    """Read the plan in force, if there is one."""
    from semantic_ep.plan.plan import Plan

    if args.current is None:
        return None
    current = Plan.read(args.current)
    what = f"--current {args.current}"
    profile.fingerprint.check(current.fingerprint, what=what, allow_retrained=True)
    return current


def _moves(wanted: Placement, current: Placement, topology: Topology) -> dict[str, int]:
    """Expert copies that ranks must receive."""
    from semantic_ep.plan.moving import count_moves

    moves = count_moves(wanted, current, bytes_per_expert=1, topology=topology)
    return {
        "expert_copies": int(moves.copies.sum()),
        "from_other_node": int(moves.from_other_node.sum()),
    }


def _holdout(args: argparse.Namespace) -> Path:
    """The trace to judge on; a plan without a judgement is not made."""
    from semantic_ep.errors import ConfigError, explain

    held_out: Path = args.holdout or args.profile.absolute().parent / "holdout"
    if args.holdout is None and not held_out.is_dir():
        raise ConfigError(
            explain(
                "a plan is judged on routing that it was not made from, and none was given",
                where="--holdout",
                got=f"nothing at {held_out}",
                do="Give a trace: record one with semantic_ep.observe.sample_tokens on other "
                "requests, or convert one with `semantic-ep import`",
            )
        )
    return held_out


def _check_affinity(profile: RoutingProfile, args: argparse.Namespace) -> None:
    from semantic_ep.errors import ConfigError, explain

    if args.policy.startswith("semantic") and not profile.has_affinity:
        raise ConfigError(
            explain(
                "the profile holds the load of experts alone, which tells nothing of affinity",
                where=f"--profile {args.profile}",
                do="Plan with --policy eplb, or record routes of tokens",
            )
        )


def _workload(args: argparse.Namespace) -> Workload | None:
    from semantic_ep.errors import ConfigError, explain
    from semantic_ep.plan.effect import Workload

    if args.hidden_size is None and args.expert_bytes is None and args.horizon_tokens is None:
        return None
    if args.hidden_size is None or args.expert_bytes is None:
        raise ConfigError(
            explain(
                "the effect on time, and a horizon for it, need both sizes",
                where="--hidden-size and --expert-bytes",
                got=f"{args.hidden_size} and {args.expert_bytes}",
                do="Give both, or neither and no --horizon-tokens",
            )
        )
    return Workload(
        row_bytes=args.hidden_size * args.element_bytes,
        expert_bytes=args.expert_bytes,
        runtime=args.runtime,
    )


def topology_of(args: argparse.Namespace, ep_size: int) -> Topology:
    """Return the topology that the arguments name, of the first `ep_size` ranks."""
    import os

    from semantic_ep.topology import Topology

    if args.topology:
        return Topology.from_json(args.topology).first(ep_size)
    if args.hostfile:
        return Topology.from_hostfile(args.hostfile).first(ep_size)
    if args.slurm:
        return Topology.from_slurm(os.environ).first(ep_size)
    return Topology.uniform(ep_size)


def _print(account: dict[str, Any], plan: Any, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"EP{account['ep_size']}, {account['mode']}, {account['tokens']} "
        f"{'held-out' if account['held_out'] else 'in-sample'} tokens, mean over layers"
    )
    columns = {
        "policy": "placement",
        "schedule": "home rank",
        "lar": "LAR",
        "remote_copies": "remote\ncopies",
        "node_copies": "node\ncopies",
        "load_max_over_mean": "load\nmax/mean",
        "tokens_max_over_mean": "tokens\nmax/mean",
        "solve_seconds": "solve\nseconds",
    }
    for name, heading in columns.items():
        left = name in ("policy", "schedule")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in account["policies"]:
        table.add_row(
            *(
                f"{row[key]:.{1 if key == 'solve_seconds' else 3}f}"
                if isinstance(row[key], float)
                else str(row[key])
                for key in columns
            )
        )
    console = Console()
    console.print(table)
    console.print(f"schedule tables: {plan.schedule.nbytes / 2**20:.1f} MiB on each rank")
    low, high = account["saved_interval_95"]
    bounds = account["bounds"]
    console.print(f"remote copies saved, 95 % interval over requests: {low:.1%} to {high:.1%}")
    console.print(
        f"LAR: floor {bounds['floor_lar']:.3f} (blind), ceiling {bounds['ceiling_lar']:.3f} (homes "
        f"chosen knowing the routes, same placement: {bounds['ceiling_remote_copies']:.3f} remote "
        "copies)"
    )
    if bounds["placement_ceiling_lar"] is None:
        console.print("ceiling of other placements: not sought (--ceiling placement)")
    else:
        console.print(
            f"ceiling of placements and homes that know the routes: LAR "
            f"{bounds['placement_ceiling_lar']:.3f}, "
            f"{bounds['placement_ceiling_remote_copies']:.3f} remote copies (as far as searched)"
        )
    if "moves" in account:
        moves = account["moves"]
        console.print(
            f"to move from the plan in force: {moves['expert_copies']} expert copies, "
            f"{moves['from_other_node']} of them from another node"
        )
    if account["effect"] is not None:
        console.print(account["effect"]["summary"])
    if account["copies"] is not None:
        console.print(account["copies"]["summary"])
    best = account["best_baseline"]
    for name, why in ({} if best is None else best["left_out"]).items():
        console.print(f"not among the baselines: {name}, {why}")
    console.print(account["summary"])
    console.print(f"written to {result['output']}" if result["output"] else "dry run: not written")
