"""`semantic-ep simulate groups`: the groups that a job would form, without running it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semantic_ep.runtime.groups import GroupPlan
    from semantic_ep.topology import Topology

_KINDS = {
    "ep": "expert parallel",
    "expt_tp": "expert tensor parallel",
    "expt_dp": "expert data parallel",
    "tp_ep": "expert tensor x expert",
    "tp_ep_pp": "expert tensor x expert x pipeline",
    "tp": "tensor parallel",
    "cp": "context parallel",
    "dp": "data parallel",
    "pp": "pipeline parallel",
    "mp": "tensor x pipeline",
    "tp_cp": "tensor x context",
    "dp_cp": "data x context",
    "tp_dp_cp": "tensor x data x context",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    from semantic_ep.cli.plan import add_topology_arguments

    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="all ranks")
    for name, what in (
        ("expert-parallel", "ranks that divide the experts of a layer"),
        ("tensor-parallel", "ranks that divide a dense matrix"),
        ("pipeline-parallel", "pipeline stages"),
        ("context-parallel", "ranks that divide a sequence"),
    ):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what} (1)")
    parser.add_argument(
        "--expert-tensor-parallel",
        type=int,
        metavar="N",
        help="ranks that divide an expert (default: as --tensor-parallel)",
    )
    nodes = add_topology_arguments(parser)
    nodes.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of equal size (1)")
    parser.add_argument(
        "--distribution",
        choices=("block", "cyclic"),
        default="block",
        help="consecutive ranks share a node, or come to nodes in turn, as Slurm calls it "
        "(default: block)",
    )
    parser.add_argument(
        "--scope",
        choices=("node", "global"),
        default="node",
        help="fill expert-parallel groups node by node, or in the order of ranks as Megatron does "
        "(default: node)",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=_KINDS,
        default=("ep", "expt_tp", "expt_dp"),
        metavar="KIND",
        help="groups of more than one rank to list, of "
        f"{', '.join(_KINDS)} (default: ep expt_tp expt_dp)",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON, with all ranks")


def run(args: argparse.Namespace) -> int:
    """Plan the groups and print them."""
    from semantic_ep.cli import EXIT_OK
    from semantic_ep.runtime.groups import GroupPlan

    topology = _topology(args)
    plans = {
        scope: GroupPlan.build(
            args.world_size,
            args.expert_parallel,
            topology=topology,
            scope=scope,
            tensor_parallel=args.tensor_parallel,
            pipeline_parallel=args.pipeline_parallel,
            context_parallel=args.context_parallel,
            expert_tensor_parallel=args.expert_tensor_parallel,
        )
        for scope in dict.fromkeys((args.scope, "global"))
    }
    result = _account(plans[args.scope], args.scope)
    result["crossing_nodes_in_rank_order"] = plans["global"].crossing_nodes("ep")
    if args.json:
        print(json.dumps(result))
    else:
        _print(result, args.kinds)
    return EXIT_OK


def _topology(args: argparse.Namespace) -> Topology:
    from semantic_ep.cli.plan import topology_of
    from semantic_ep.topology import Topology

    if args.topology or args.hostfile or args.slurm:
        topology = topology_of(args, args.world_size)
    else:
        topology = Topology.uniform(args.world_size, num_nodes=args.nodes)
    return topology.dealt_in_turn() if args.distribution == "cyclic" else topology


def _account(plan: GroupPlan, scope: str) -> dict[str, Any]:
    sizes = plan.sizes
    return {
        "scope": scope,
        "sizes": dataclasses.asdict(sizes) | {"data": sizes.data, "expert_data": sizes.expert_data},
        "node_of_rank": plan.node_of_rank,
        "groups": {
            kind: {"ranks": plan.groups(kind), "crossing_nodes": plan.crossing_nodes(kind)}
            for kind in _KINDS
        },
    }


def _print(result: dict[str, Any], kinds: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes, groups, nodes = result["sizes"], result["groups"], result["node_of_rank"]
    table = Table(title=f"{sizes['world_size']} ranks on {max(nodes) + 1} nodes")
    for name in ("groups", "size", "number", "cross nodes"):
        table.add_column(name, justify="left" if name == "groups" else "right")
    for kind, name in _KINDS.items():
        ranks = groups[kind]["ranks"]
        numbers = (len(ranks[0]), len(ranks), groups[kind]["crossing_nodes"])
        table.add_row(f"{name} ({kind})", *map(str, numbers))
    console = Console()
    console.print(table)
    for kind in kinds:
        for number, ranks in enumerate(groups[kind]["ranks"]):
            if len(ranks) == 1:
                continue
            on = sorted({nodes[rank] for rank in ranks})
            console.print(
                f"{_KINDS[kind]} {number}: ranks {' '.join(map(str, ranks))} "
                f"(nodes {' '.join(map(str, on))})",
                highlight=False,
            )
    of = len(groups["ep"]["ranks"])
    console.print(
        f"expert-parallel groups that cross nodes: {groups['ep']['crossing_nodes']} of {of}; in "
        f"the order of ranks: {result['crossing_nodes_in_rank_order']} of {of}"
    )
