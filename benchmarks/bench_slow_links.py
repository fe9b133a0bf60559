"""Serving across hosts on 0.1, 1 and 10 Gb/s: contiguous against semantic plan, bytes as counted.

Hosts are network namespaces of this machine, joined by veth pairs (four by a bridge) whose ends
send no faster than a token bucket allows. DeepSpeed's launcher starts one rank a host from a
hostfile. Every round serves the same requests with both plans, and what the interfaces sent must
be what the dispatcher says, plus what protocols add.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.link_bytes import SLACK_BYTES, SLACK_SHARE, Sent, accounted, messages
from benchmarks.link_hosts import Network, burst_bytes, connected, run_on_hosts, why_not
from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.errors import BackendError, ConfigError, explain

if TYPE_CHECKING:
    from benchmarks.serve_inputs import Inputs

# Mode -> placement policy.
MODES = {"contiguous": "contiguous", "semantic": "semantic-requests"}
BASELINE = "contiguous"
UNLIMITED = "unlimited"
MODULE = "benchmarks.link_ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    from benchmarks.serve_inputs import add_input_arguments

    add_input_arguments(parser)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4], metavar="G")
    parser.add_argument(
        "--gigabits", type=float, nargs="+", default=[0.1, 1.0, 10.0], metavar="RATE",
        help="of every link, each way; links without a limit are measured besides "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=0, help="first prompts; 0: all")
    parser.add_argument("--max-prompt-tokens", type=int, default=192, help="longer ones are cut")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-batch-size", type=int, default=32, help="sequences of a rank")
    parser.add_argument("--rounds", type=int, default=5, help="of each plan, after one to warm up")
    parser.add_argument("--seconds", type=float, default=1800, help="bound on one number of hosts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true",
        help="a tiny random model with planted routing, 2 hosts, 1 Gb/s",
    )  # fmt: skip


def unavailable() -> str | None:
    """Why the theme cannot run here; None if it can."""
    return why_not()


def run(args: argparse.Namespace) -> Result:
    """Serve in every setting, and check every token and every byte.

    Raises:
        ConfigError: A flag or file is wrong.
        BackendError: Namespaces are not permitted; a rank failed; tokens differ from those of
            transformers in one process; or an interface sent what nothing explains.
    """
    _check(args)
    # A kill must not leave the network behind.
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="semantic-ep-links-") as folder:
            return _measure(args, _inputs(args, Path(folder)), Path(folder))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _check(args: argparse.Namespace) -> None:
    if min(args.hosts) < 2 or max(args.hosts) > 250:
        raise ConfigError(
            explain("hosts are connected", where="--hosts", got=args.hosts, allowed="2 to 250")
        )
    if min(args.gigabits) < 0.001:
        raise ConfigError(
            explain("too slow", where="--gigabits", got=args.gigabits, allowed="0.001 or more")
        )
    if args.rounds < 1:
        raise ConfigError(
            explain("too few", where="--rounds", got=args.rounds, allowed="1 or more")
        )
    reason = why_not()
    if reason is not None:
        raise BackendError(explain(reason, where="slow_links"))


def _inputs(args: argparse.Namespace, folder: Path) -> Inputs:
    from benchmarks.serve_inputs import planted_inputs, read_inputs

    if not args.quick:
        return read_inputs(args)
    args.hosts, args.gigabits = args.hosts[:1], [1.0]
    args.rounds, args.max_new_tokens = min(args.rounds, 2), 6
    return planted_inputs(folder / "model", requests=12, seed=args.seed)


def _measure(args: argparse.Namespace, inputs: Inputs, folder: Path) -> Result:
    import torch

    from semantic_ep.serve.reference import generate_in_one_process

    expected = generate_in_one_process(
        inputs.model,
        inputs.prompts,
        max_new_tokens=args.max_new_tokens,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rows: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    for hosts in args.hosts:
        with connected(hosts) as network:
            job = _job(args, inputs, folder, network, expected)
            ranks = _serve(network, job, seconds=args.seconds)
        rows += [{"hosts": hosts, **row} for row in rows_of(ranks, rates_of(args))]
        links += [
            {"hosts": hosts, "link": link, **speed} for link, speed in ranks[0]["links"].items()
        ]
    rows = compared(rows)
    return Result(
        theme="slow_links",
        protocol=_protocol(args, inputs),
        rows=[*rows, *({"block": "link", **link} for link in links)],
        tables=[*_tables(rows), Table(title="The links as gloo finds them, one way", rows=links)],
        charts=_charts(rows),
    )


def rates_of(args: argparse.Namespace) -> dict[str, float | None]:
    """Name of each kind of link -> Gb/s; None without a limit."""
    return {UNLIMITED: None, **{f"{rate:g} Gb/s": rate for rate in args.gigabits}}


def _job(
    args: argparse.Namespace,
    inputs: Inputs,
    folder: Path,
    network: Network,
    expected: list[list[int]],
) -> Path:
    """Plan for so many hosts, and write what ranks need; returns the job's file."""
    from benchmarks.link_ranks import Job
    from semantic_ep.plan.plan import Plan
    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.schedule import Schedule
    from semantic_ep.serve.scheduling.offline import by_affinity, round_robin

    hosts = network.hosts
    here = folder / f"hosts{hosts}"
    here.mkdir()
    plans, ranks = {}, {}
    for mode, of in MODES.items():
        placement = policy(of).place(inputs.profile, ep_size=hosts, seed=args.seed)
        schedule = Schedule.from_profile(inputs.profile, placement)
        Plan(
            placement=placement,
            schedule=schedule,
            verdict={},
            fingerprint=inputs.profile.fingerprint,
        ).save(here / mode)
        plans[mode] = str(here / mode)
        rank_of_request = (
            round_robin(len(inputs.prompts), hosts)
            if mode == BASELINE
            else by_affinity(inputs.prompts, schedule, max_new_tokens=args.max_new_tokens)
        )
        ranks[mode] = rank_of_request.tolist()
    Job(
        model=str(inputs.model.resolve()),
        plans=plans,
        rank_of_request=ranks,
        prompts=inputs.prompts,
        expected=expected,
        max_new_tokens=args.max_new_tokens,
        max_batch_size=args.max_batch_size,
        links={link: network.limit(rate) for link, rate in rates_of(args).items()},
        rounds=args.rounds + 1,
    ).write(here / "job.json")
    return here / "job.json"


def _serve(network: Network, job: Path, *, seconds: float) -> list[dict[str, Any]]:
    """Run the job on the hosts; what each rank left."""
    run_on_hosts(network, folder=job.parent, module=MODULE, arguments=[str(job)], seconds=seconds)
    files = [job.parent / f"rank{rank}.json" for rank in range(network.hosts)]
    return [json.loads(file.read_text()) for file in files]


def rows_of(
    ranks: Sequence[Mapping[str, Any]], rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """One row a link and mode: times of the slowest rank, medians of rounds; bytes of all hosts.

    Args:
        ranks: What each rank left; the first round warms up.
        rates: Link -> Gb/s; None without a limit.

    Raises:
        BackendError: Tokens differ, or bytes are not explained.
    """
    cells: dict[tuple[str, str], list[Sequence[Mapping[str, Any]]]] = {}
    for calls in zip(*(rank["calls"] for rank in ranks), strict=True):
        if calls[0]["round"]:
            cells.setdefault((calls[0]["link"], calls[0]["mode"]), []).append(calls)
    return [
        {"link": link, **_row(mode, cells[link, mode], layers=ranks[0]["layers"], gigabits=rate)}
        for link, rate in rates.items()
        for mode in MODES
    ]


def _row(
    mode: str,
    rounds: Sequence[Sequence[Mapping[str, Any]]],
    *,
    layers: int,
    gigabits: float | None,
) -> dict[str, Any]:
    """`rounds` holds the calls of all ranks, by round."""
    steps = rounds[0][0]["steps"]
    bytes_of_rounds = [_bytes(mode, calls, layers) for calls in rounds]
    sent = {name: statistics.fmean(one[name] for one in bytes_of_rounds) for name in _BYTES}
    layer_ms = {
        phase: [
            max(call["seconds"][phase] for call in calls) / steps / layers * 1e3 for calls in rounds
        ]
        for phase in ("dispatch", "experts", "combine")
    }
    whole_ms = [
        max(sum(call["seconds"][phase] for phase in layer_ms) for call in calls)
        / steps / layers * 1e3
        for calls in rounds
    ]  # fmt: skip
    tokens = sum(call["tokens"] for call in rounds[0])
    per_second = [tokens / max(call["seconds"]["total"] for call in calls) for calls in rounds]
    # In a round every host's link is busy for this long, whatever waits for it.
    busiest = max(one["busiest_wire"] for one in bytes_of_rounds)
    link_ms = None if gigabits is None else busiest * 8 / gigabits / 1e6 / steps / layers
    median = statistics.median(whole_ms)
    return {
        "block": "serving",
        "mode": mode,
        "n": len(rounds),
        "steps": steps,
        "layer_median_ms": median,
        "layer_p20_ms": float(np.percentile(whole_ms, 20)),
        "layer_p80_ms": float(np.percentile(whole_ms, 80)),
        **{f"{phase}_median_ms": statistics.median(of) for phase, of in layer_ms.items()},
        "compute_share": statistics.median(layer_ms["experts"]) / median,
        "link_share": None if link_ms is None else link_ms / median,
        "new_tokens_per_second": statistics.median(per_second),
        "new_tokens_per_second_p20": float(np.percentile(per_second, 20)),
        "new_tokens_per_second_p80": float(np.percentile(per_second, 80)),
        "seconds": statistics.median(max(c["seconds"]["total"] for c in calls) for calls in rounds),
        **{f"bytes_{name}": value for name, value in sent.items()},
        "protocol_share": sent["interface"] / sent["counted"] - 1,
        "wire_share": sent["wire"] / sent["counted"] - 1,
        "same_tokens": True,
    }


_BYTES = ("rows", "metadata", "counted", "gloo", "other", "headers", "interface", "wire")


def _bytes(mode: str, calls: Sequence[Mapping[str, Any]], layers: int) -> dict[str, int]:
    """Bytes that all hosts sent in a round, and those of the busiest on the wire.

    Raises:
        BackendError: Tokens differ, or a host sent what nothing explains.
    """
    total: dict[str, int] = dict.fromkeys(_BYTES, 0)
    busiest = 0
    for rank, call in enumerate(calls):
        if call["different"]:
            raise BackendError(
                explain(
                    "served tokens differ from those of transformers in one process",
                    where=f"{mode}, rank {rank}",
                    got=f"requests {call['different'][:8]}",
                    allowed="equal tokens",
                )
            )
        exchanged = messages(steps=call["steps"], layers=layers, ranks=len(calls))
        found = accounted(
            Sent(**call["sent"]), counted=sum(call["counted"].values()), messages=exchanged
        )
        if not found["explained"]:
            raise BackendError(
                explain(
                    "counters and protocols do not explain what the interface sent",
                    where=f"{mode}, rank {rank}",
                    got=f"{found}, {exchanged} messages",
                    allowed=f'"other" within {SLACK_SHARE:.1%} of the counted bytes and '
                    f"{SLACK_BYTES} bytes a message",
                )
            )
        for name, value in {**call["counted"], **found}.items():
            if name in total:
                total[name] += value
        busiest = max(busiest, found["wire"])
    return {**total, "busiest_wire": busiest}


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with what they are of the baseline's, and of themselves without a limit."""
    by_name = {(row["hosts"], row["link"], row["mode"]): row for row in rows}
    found = []
    for row in rows:
        base = by_name[row["hosts"], row["link"], BASELINE]
        free = by_name[row["hosts"], UNLIMITED, row["mode"]]
        found.append(
            {
                **row,
                "bytes_of_baseline": row["bytes_counted"] / base["bytes_counted"],
                "layer_of_baseline": row["layer_median_ms"] / base["layer_median_ms"],
                "throughput_of_baseline": row["new_tokens_per_second"]
                / base["new_tokens_per_second"],
                "unlimited_share": free["layer_median_ms"] / row["layer_median_ms"],
            }
        )
    return found


def _tables(rows: Sequence[Row]) -> list[Table]:
    times = [
        {
            "hosts": row["hosts"],
            "link": row["link"],
            "plan": row["mode"],
            "ms a MoE layer": row["layer_median_ms"],
            "p20..p80": f"{row['layer_p20_ms']:.3g}..{row['layer_p80_ms']:.3g}",
            "dispatch": row["dispatch_median_ms"],
            "experts": row["experts_median_ms"],
            "combine": row["combine_median_ms"],
            "tok/s": row["new_tokens_per_second"],
            "compute": f"{row['compute_share']:.1%}",
            "link busy": "" if row["link_share"] is None else f"{row['link_share']:.0%}",
            "as fast unlimited": f"{row['unlimited_share']:.1%}",
            "bytes": f"{row['bytes_of_baseline']:.3f}",
            "layer time": f"{row['layer_of_baseline']:.3f}",
            "throughput": f"{row['throughput_of_baseline']:.3f}",
        }
        for row in rows
    ]
    sent = [
        {
            "hosts": row["hosts"],
            "link": row["link"],
            "plan": row["mode"],
            "rows MB": row["bytes_rows"] / 1e6,
            "metadata MB": row["bytes_metadata"] / 1e6,
            "gloo MB": row["bytes_gloo"] / 1e6,
            "other MB": row["bytes_other"] / 1e6,
            "headers MB": row["bytes_headers"] / 1e6,
            "interfaces MB": row["bytes_interface"] / 1e6,
            "over counted": f"{row['protocol_share']:.2%}",
            "with 1500-byte packets": f"{row['wire_share']:.2%}",
        }
        for row in rows
    ]
    return [
        Table(
            title="Time of a MoE layer in a step, slowest rank, median of rounds; the last three "
            "columns are of contiguous",
            rows=times,
        ),
        Table(title="Bytes that all hosts sent in a round, and what they are", rows=sent),
    ]


def _charts(rows: Sequence[Row]) -> list[Chart]:
    figures = {
        "layer_median_ms": ("time of a MoE layer", "ms"),
        "new_tokens_per_second": ("throughput", "new tokens/s"),
    }
    return [
        Chart(
            title=f"{hosts} hosts: {title}",
            kind="bars",
            rows=[row for row in rows if row["hosts"] == hosts],
            x="link",
            y=figure,
            series="mode",
            y_label=label,
            log=True,
        )
        for hosts in dict.fromkeys(row["hosts"] for row in rows)
        for figure, (title, label) in figures.items()
    ]


def _protocol(args: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    return {
        "source": inputs.source,
        "model": dataclasses.asdict(inputs.profile.fingerprint),
        "hosts": "network namespaces of one machine, a rank and a thread each, gloo; two are the "
        "ends of a veth pair, more are ports of a bridge",
        "launch": "python -m deepspeed.launcher.runner --hostfile H --no_ssh --node_rank N "
        f"--master_addr A --module {MODULE} JOB, in each namespace",
        "links": {
            f"{rate:g} Gb/s": f"tc tbf both ways, burst {burst_bytes(rate)} bytes"
            for rate in args.gigabits
        }
        | {UNLIMITED: "veth alone; no latency is added to any link"},
        "plans": MODES,
        "requests": len(inputs.prompts),
        "requests_dealt": "contiguous: in turn; semantic: by the plan's affinity, tokens balanced",
        "prompt_tokens": sum(map(len, inputs.prompts)),
        "max_new_tokens": args.max_new_tokens,
        "max_batch_size": args.max_batch_size,
        "rounds": f"{args.rounds} of every link and plan, alternating and in turning order, after "
        "one",
        "layer_ms": "dispatch, experts and combine of a rank, waiting included, over steps and MoE "
        "layers; of the slowest rank; median of rounds",
        "compute_share": "experts of the slowest rank over layer_ms",
        "link_share": "bytes on the wire of the busiest host over the rate, over layer_ms",
        "unlimited_share": "layer_ms on links without limit over layer_ms: what is not the link's",
        "bytes": "of all hosts in a round; counted = rows (hidden states of dispatch and combine) "
        "and metadata for other ranks, by the dispatcher; gloo = a header and two notices a "
        "message; headers = 66 bytes a packet of up to 64 KiB, as the interface counts; wire = "
        "with those of every 1500-byte packet, as the queue counts",
        "check": f"interface = counted + gloo + headers + other, other within {SLACK_SHARE:.1%} of "
        f"the former and {SLACK_BYTES} bytes a message, on every host in every round",
        "parity": "greedy tokens of every request and round equal transformers' in one process",
        "seed": args.seed,
    }
