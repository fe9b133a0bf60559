"""Serving on gloo ranks: contiguous, EPLB and semantic plans with every scheduling policy.

All cells serve the same requests in one run, interleaved, through the loop of the HTTP server, and
every token is checked against transformers in one process. One rank of the engine is then measured
against transformers' `generate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.registry import Result, Row
from benchmarks.serve_results import (
    GENERATE,
    SLO_FACTOR,
    cell_rows,
    cell_tables,
    charts,
    generate_table,
    objective,
)
from semantic_ep.errors import BackendError, ConfigError, explain

if TYPE_CHECKING:
    from benchmarks.serve_inputs import Inputs
    from benchmarks.serve_ranks import Job, Measured
    from semantic_ep.plan.placement import Placement

# Plan -> placement policy.
PLANS = {"contiguous": "contiguous", "eplb": "eplb", "semantic": "semantic-requests"}
LIGHT_REQUESTS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    from benchmarks.serve_inputs import add_input_arguments
    from semantic_ep.serve.scheduling.make import POLICIES

    add_input_arguments(parser)
    parser.add_argument("--ranks", type=int, default=4, metavar="G")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--requests", type=int, default=0, help="drawn from the prompts; 0: all")
    parser.add_argument("--max-prompt-tokens", type=int, default=192, help="longer ones are cut")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-sequences", type=int, default=8, help="of a rank at a time")
    parser.add_argument(
        "--loads", type=float, nargs="+", default=[0.7, float("inf")],
        help="requests a second, in shares of what the baseline serves when all arrive at once; "
        "inf: all at once (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="of every cell at every load")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="G = 1")
    parser.add_argument(
        "--slo-ms", type=float, nargs=2, metavar=("TTFT", "TPOT"),
        help=f"default: {SLO_FACTOR} x the baseline's medians with one request at a time",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model with planted routing"
    )


def run(args: argparse.Namespace) -> Result:
    """Plan, serve every cell, check every token, and measure one rank against `generate`.

    Raises:
        ConfigError: A flag or file is wrong.
        BackendError: Tokens differ from those of transformers in one process.
    """
    _check(args)
    if not args.quick:
        from benchmarks.serve_inputs import read_inputs

        return _measure(args, read_inputs(args))
    from benchmarks.serve_inputs import planted_inputs

    args.max_new_tokens, args.rounds, args.batches = 6, 1, [1, 4]
    with tempfile.TemporaryDirectory() as directory:
        return _measure(args, planted_inputs(Path(directory), requests=12, seed=args.seed))


def _check(args: argparse.Namespace) -> None:
    for name in ("ranks", "max_prompt_tokens", "max_new_tokens", "max_sequences", "rounds"):
        if getattr(args, name) < 1:
            where = f"--{name.replace('_', '-')}"
            raise ConfigError(
                explain("too small", where=where, got=getattr(args, name), allowed="1 or more")
            )
    if min(args.loads) <= 0 or min(args.batches) < 1:
        raise ConfigError(
            explain(
                "too small",
                where="--loads, --batches",
                got=f"{args.loads}, {args.batches}",
                allowed="loads above 0, batches of 1 or more",
            )
        )


def _measure(args: argparse.Namespace, inputs: Inputs) -> Result:
    from benchmarks.gloo_ranks import on_ranks
    from benchmarks.serve_generate import Batches, compare
    from benchmarks.serve_ranks import Job, serve_all
    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.schedule import Schedule

    placements = {
        name: policy(of).place(inputs.profile, ep_size=args.ranks, seed=args.seed)
        for name, of in PLANS.items()
    }
    job = Job(
        model=inputs.model,
        placements=placements,
        schedules={
            name: Schedule.from_profile(inputs.profile, one) for name, one in placements.items()
        },
        policies=args.policies,
        prompts=inputs.prompts,
        max_new_tokens=args.max_new_tokens,
        loads=args.loads,
        rounds=args.rounds,
        light_requests=LIGHT_REQUESTS,
        max_sequences=args.max_sequences,
        seed=args.seed,
    )
    measured: Measured = on_ranks(serve_all, args.ranks, job)
    check_tokens(measured)
    alone = on_ranks(
        compare,
        1,
        Batches(
            model=inputs.model,
            prompts=inputs.prompts,
            sizes=args.batches,
            max_new_tokens=args.max_new_tokens,
            rounds=args.rounds,
        ),
    )
    check_generate(alone)
    slo = tuple(args.slo_ms) if args.slo_ms else objective(measured.light)
    predicted = {name: _predicted(inputs, one) for name, one in placements.items()}
    rows = cell_rows(measured, slo, predicted)
    return Result(
        theme="serve",
        protocol=_protocol(args, inputs, job, measured, slo),
        rows=[*rows, *alone],
        tables=[*cell_tables(rows, slo), generate_table(alone)],
        charts=charts(rows, alone),
    )


def check_tokens(measured: Measured) -> None:
    """Raise unless every cell generated, in every round, what transformers does in one process.

    Raises:
        BackendError: Tokens differ, or a request ended early.
    """
    for served in [*measured.runs, measured.light]:
        different = [
            number
            for number, (request, tokens) in enumerate(
                zip(served.requests, measured.reference, strict=served is not measured.light)
            )
            if request.tokens != tokens or request.end not in ("stop", "length")
        ]
        if different:
            raise BackendError(
                explain(
                    "served tokens differ from those of transformers in one process",
                    where=f"plan {served.plan}, policy {served.policy}",
                    got=f"requests {different[:8]} of {len(served.requests)}",
                    allowed="equal tokens",
                )
            )


def check_generate(rows: Sequence[Row]) -> None:
    """Raise unless both sides generated the same tokens.

    Raises:
        BackendError: They did not.
    """
    different = sorted({row["batch"] for row in rows if not row["same_tokens"]})
    if different:
        raise BackendError(
            explain(
                "one rank's tokens differ from those of transformers' generate",
                where=f"batches of {different}",
                allowed="equal tokens",
            )
        )


def _predicted(inputs: Inputs, placement: Placement) -> float:
    """LAR on the held-out trace with requests where the plan's schedule sends them."""
    from semantic_ep.plan.cost import evaluate
    from semantic_ep.plan.verdict import home_ranks

    home = home_ranks(inputs.holdout, placement, inputs.profile, "requests")
    return float(evaluate(placement, inputs.holdout, home).mean()["lar"])


def _protocol(
    args: argparse.Namespace,
    inputs: Inputs,
    job: Job,
    measured: Measured,
    slo: tuple[float, float],
) -> dict[str, Any]:
    from benchmarks.serve_ranks import BASELINE, LINK

    fingerprint = inputs.profile.fingerprint
    return {
        "source": inputs.source,
        "model": dataclasses.asdict(fingerprint),
        "ranks": f"{args.ranks}, gloo on one machine, one thread each, attention-DP, float32",
        "plans": PLANS,
        "requests": len(job.prompts),
        "prompt_tokens": sum(map(len, job.prompts)),
        "max_new_tokens": args.max_new_tokens,
        "max_sequences": args.max_sequences,
        "rounds": args.rounds,
        "order": "every cell in every round, each round in the reverse order of the one before",
        "warm_up": "all requests once with every plan",
        "load": "Poisson arrivals, the same for all cells of a round; in shares of the "
        f"{measured.burst_rate:.4g} requests/s of {', '.join(BASELINE)} when all arrive at once",
        "baseline": ", ".join(BASELINE),
        "slo_ms": {"ttft": slo[0], "tpot": slo[1]},
        "slo": "as given"
        if args.slo_ms
        else f"{SLO_FACTOR} x the medians of {len(measured.light.requests)} requests that the "
        "baseline served one at a time",
        "ttft, e2e": "from when a request was due, as rank 0's front sees tokens",
        "tpot": "mean gap between a request's tokens",
        "itl": "every gap between two tokens of a request",
        "goodput": "requests a second that met both parts of the SLO",
        "latencies": "pooled over rounds; rates are medians of rounds",
        "mbytes_to_other_ranks": "payload of dispatch and combine of one round, counted",
        "holdout_lar": "predicted from the held-out trace, requests dealt by the plan's schedule",
        "parity": "greedy tokens of every request, cell and round equal transformers' in one "
        "process; of one rank, those of generate on the same batch; else the run fails",
        "schedules": "of the cell's own plan, from the same profile",
        "prefix-only": "is told of prefixes as if ranks cached them, which they do not: it is the "
        "choice of ranks that is measured",
        "semantic": {
            "link": LINK,
            "accelerator, measured": dataclasses.asdict(measured.accelerator),
        },
        GENERATE: "one rank, prompts cut or repeated to their median length, alternating; "
        f"{args.rounds} passes after one",
        "seed": args.seed,
    }
