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
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.link_bytes import SLACK_BYTES, SLACK_SHARE
from benchmarks.link_hosts import Network, burst_bytes, connected, run_on_hosts, why_not
from benchmarks.link_results import BASELINE, MODES, UNLIMITED, charts, compared, rows_of, tables
from benchmarks.registry import Result, Table
from semantic_ep.errors import BackendError, ConfigError, explain

if TYPE_CHECKING:
    from benchmarks.serve_inputs import Inputs

MODULE = "benchmarks.link_ranks"
# Of the planted model's router: a plan then saves a part of the bytes, as it does on real routing.
PLANTED_LOOSENESS = 1.5
PLANTED_REQUESTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    from benchmarks.serve_inputs import add_input_arguments

    add_input_arguments(parser)
    parser.add_argument(
        "--planted", type=int, metavar="WIDTH",
        help="serve a random model of this width with planted routing and light experts instead: "
        "more bytes for the compute, as on accelerators",
    )  # fmt: skip
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4], metavar="G")
    parser.add_argument(
        "--gigabits", type=float, nargs="+", default=[0.1, 1.0, 10.0], metavar="RATE",
        help="of every link, each way; links without a limit are measured besides "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=0, help="drawn from the prompts; 0: all")
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

    if args.planted:
        return planted_inputs(
            folder / "model",
            requests=args.requests or PLANTED_REQUESTS,
            seed=args.seed,
            hidden=args.planted,
            longest=args.max_prompt_tokens,
            looseness=PLANTED_LOOSENESS,
        )
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
        tables=[*tables(rows), Table(title="The links as gloo finds them, one way", rows=links)],
        charts=charts(rows),
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
        f"the former and {SLACK_BYTES} bytes a message, or else no more than TCP sent again, on "
        "every host in every round",
        "parity": "greedy tokens of every request and round equal transformers' in one process",
        "seed": args.seed,
    }
