"""Balance of placements with spare slots, planned on one workload and weighed on another.

The part of the theme `plan` that needs no trace: expert load counts alone. The load of an expert
with several copies splits evenly over them, which is EPLB's convention and what a runtime does that
deals tokens to copies in turn.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.errors import ConfigError, explain

# [L, slots] logical expert of each physical slot, rank after rank.
Slots = np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of this part."""
    group = parser.add_argument_group("expert loads instead of traces")
    group.add_argument(
        "--loads", action="append", type=Path, default=[], metavar="JSON",
        help="logical_count of the workload to weigh placements on; repeat for several",
    )  # fmt: skip
    group.add_argument(
        "--plan-on", action="append", type=Path, default=[], metavar="JSON",
        help="logical_count of the workload to plan on; repeat for several (default: with several "
        "--loads, every ordered pair of them)",
    )  # fmt: skip
    group.add_argument(
        "--redundant-slots", type=int, default=0, metavar="N",
        help="slots beyond one an expert, over all ranks; with traces, for semantic+replicas",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """Plan with every method on each `--plan-on`, weigh on each `--loads`.

    Raises:
        ConfigError: There is no pair of workloads.
    """
    pairs = _pairs(args)
    loads = {path: _read(path) for path in dict.fromkeys(itertools.chain(*pairs))}
    shapes = {load.shape for load in loads.values()}
    if len(shapes) != 1:
        raise ConfigError(
            explain(
                "the workloads are of different models",
                where="--loads, --plan-on",
                got={path.name: load.shape for path, load in loads.items()},
                allowed="one number of MoE layers and experts",
            )
        )
    rows = []
    for ep_size in args.ep:
        for name, solve in _methods(args, ep_size).items():
            planned: dict[Path, tuple[Slots, float]] = {}
            for plan_on, weighed in pairs:
                if plan_on not in planned:
                    started = time.perf_counter()
                    slots = solve(loads[plan_on])
                    planned[plan_on] = slots, time.perf_counter() - started
                slots, seconds = planned[plan_on]
                balance = mean_over_max(slots, loads[weighed], ep_size)
                rows.append(
                    {
                        "method": name,
                        "plan_on": plan_on.stem,
                        "loads": weighed.stem,
                        "ep_size": ep_size,
                        "redundant_slots": args.redundant_slots,
                        "balance_mean_over_max": float(balance.mean()),
                        "balance_worst_layer": float(balance.min()),
                        "solve_seconds": seconds,
                    }
                )
    return Result(
        theme="plan",
        protocol=_protocol(args),
        rows=rows,
        tables=list(_tables(rows)),
        charts=_charts(rows),
    )


def mean_over_max(slots: Slots, load: np.ndarray, ep_size: int) -> np.ndarray:
    """[L] mean over max of the ranks' load, an expert's load split evenly over its copies."""
    experts = load.shape[1]
    copies = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in slots])
    share = np.take_along_axis(load / copies, np.maximum(slots, 0), axis=1)
    ranks = np.where(slots >= 0, share, 0.0).reshape(len(slots), ep_size, -1).sum(axis=2)
    return np.asarray(ranks.mean(axis=1) / ranks.max(axis=1))


def _methods(args: argparse.Namespace, ep_size: int) -> dict[str, Callable[[np.ndarray], Slots]]:
    """Methods by name: [L, E] load -> slots. Those without spare slots show what spares buy."""
    from semantic_ep.plan.balance import place_for_load
    from semantic_ep.plan.baselines import (
        contiguous_placement,
        greedy_load_placement,
        rebalance_experts,
    )

    spare = args.redundant_slots

    def eplb(load: np.ndarray) -> Slots:
        # As published: it may put two copies of an expert on one rank.
        return rebalance_experts(
            load, load.shape[1] + spare, ep_size=ep_size
        ).physical_to_logical_map

    def contiguous(load: np.ndarray) -> Slots:
        layers, experts = load.shape
        return contiguous_placement(
            num_layers=layers, num_experts=experts, ep_size=ep_size
        ).physical_to_logical_map

    def semantic(load: np.ndarray) -> Slots:
        placement = place_for_load(load, ep_size=ep_size, redundant_slots=spare)
        return placement.physical_to_logical_map

    return {
        "contiguous": contiguous,
        "greedy": lambda load: greedy_load_placement(load, ep_size=ep_size).physical_to_logical_map,
        "eplb": eplb,
        "semantic": semantic,
    }


def _pairs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(planned on, weighed on), in order."""
    if args.plan_on:
        return list(itertools.product(args.plan_on, args.loads))
    if len(args.loads) < 2:
        raise ConfigError(
            explain(
                "a placement must be planned on some workload",
                where="--plan-on",
                do="Give --plan-on, or several --loads to compare every ordered pair",
            )
        )
    return list(itertools.permutations(args.loads, 2))


def _read(path: Path) -> np.ndarray:
    from semantic_ep.observe.formats import read_logical_count

    return read_logical_count(path)[0]


def _protocol(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "loads": [path.name for path in args.loads],
        "plan_on": [path.name for path in args.plan_on] or "every ordered pair of the loads",
        "redundant_slots": args.redundant_slots,
        "balance_mean_over_max": "mean over max of the ranks' load on the workload weighed on, "
        "mean over MoE layers; an expert's load splits evenly over its copies",
    }


def _tables(rows: Sequence[Row]) -> Iterator[Table]:
    for ep_size in dict.fromkeys(row["ep_size"] for row in rows):
        here = [row for row in rows if row["ep_size"] == ep_size]
        by_pair: dict[tuple[str, str], dict[str, Any]] = {}
        for row in here:
            pair = by_pair.setdefault(
                (row["plan_on"], row["loads"]),
                {"planned on": row["plan_on"], "weighed on": row["loads"]},
            )
            pair[row["method"]] = row["balance_mean_over_max"]
        yield Table(
            title=f"EP{ep_size}, {here[0]['redundant_slots']} redundant slots: mean/max rank load, "
            "mean over layers",
            rows=list(by_pair.values()),
        )
        wins = sum(pair["semantic"] > pair["eplb"] for pair in by_pair.values())
        yield Table(
            title=f"EP{ep_size}: over {len(by_pair)} pairs of workloads",
            rows=[
                {
                    "method": name,
                    "mean/max": statistics.fmean(
                        row["balance_mean_over_max"] for row in here if row["method"] == name
                    ),
                    "worst pair": min(
                        row["balance_mean_over_max"] for row in here if row["method"] == name
                    ),
                    "solve s": statistics.fmean(
                        row["solve_seconds"] for row in here if row["method"] == name
                    ),
                    "better than EPLB": f"{wins} of {len(by_pair)}" if name == "semantic" else "",
                }
                for name in dict.fromkeys(row["method"] for row in here)
            ],
        )


def _charts(rows: Sequence[Row]) -> list[Chart]:
    return [
        Chart(
            title=f"EP{ep_size}, planned on one workload, weighed on others",
            kind="bars",
            rows=[row for row in rows if row["ep_size"] == ep_size],
            x="plan_on",
            y="balance_mean_over_max",
            series="method",
            y_label="mean/max rank load",
        )
        for ep_size in dict.fromkeys(row["ep_size"] for row in rows)
    ]
