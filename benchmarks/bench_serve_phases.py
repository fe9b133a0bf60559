"""One plan for all tokens, or one for prompts and another for generated tokens.

The model of a quickstart continues documents of its training, which is recorded: routes of prompts
and of generated tokens, and of both. Plans are made from these, and held-out prompts are served
under each on gloo ranks, in turn in one run. Two plans need room for the experts of both; so does
one plan with as many slots, filled with copies, which is what to compare with.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.errors import BackendError, explain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from semantic_ep.observe.traces import RoutingTrace
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.schedule import Schedule

CONTIGUOUS, ONE, COPIES, TWO = "contiguous", "one plan", "one plan and copies", "a plan a phase"
PREFILL, DECODE, BOTH = "prefill", "decode", "both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), help="output of launch/quickstart.sh"
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="G")
    parser.add_argument("--documents", type=int, default=300, help="of the training, to observe")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of a prompt at most")
    parser.add_argument("--new-tokens", type=int, default=64, help="that follow it")
    parser.add_argument("--requests", type=int, default=0, help="held-out prompts; 0: all")
    parser.add_argument("--rounds", type=int, default=3, help="of every cell")
    parser.add_argument("--seed", type=int, default=0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One way to serve.

    Attributes:
        placement, schedule: Of all tokens, or of those of prompts.
        decode_placement, decode_schedule: Of generated tokens, if they have their own.
    """

    placement: Placement
    schedule: Schedule | None
    decode_placement: Placement | None = None
    decode_schedule: Schedule | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What all ranks are told.

    Attributes:
        model: Hugging Face checkpoint.
        cells: By name.
        prompts: Token ids.
        new_tokens: Of each request.
        rounds: Of every cell.
    """

    model: Path
    cells: Mapping[str, Cell]
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    rounds: int


def run(args: argparse.Namespace) -> Result:
    """Observe, plan, serve.

    Raises:
        ConfigError: There is no quickstart's run.
        BackendError: Tokens differ between the cells.
    """
    from benchmarks.gloo_ranks import on_ranks
    from benchmarks.recorded import Recording, by_phase, held_out_documents, training_documents

    routes, data = Recording(args.run / "model"), args.run / "data"
    seen = routes.continued(
        training_documents(data, limit=args.documents),
        max_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        seed=args.seed,
    )
    whole, _ = routes.of_documents(seen, args.prompt_tokens + args.new_tokens)
    cells = make_cells(
        whole,
        by_phase(whole, args.new_tokens),
        vocab_size=routes.vocab_size,
        ep_size=args.ranks,
        seed=args.seed,
    )
    heldout = held_out_documents(data, routes, limit=args.requests or 10**6)
    job = Job(
        model=args.run / "model",
        cells=cells,
        prompts=[document.ids[: args.prompt_tokens] for document in heldout],
        new_tokens=args.new_tokens,
        rounds=args.rounds,
    )
    rows: list[dict[str, Any]] = on_ranks(serve, args.ranks, job)
    return Result(
        theme="serve_phases",
        protocol=_protocol(args, whole, job),
        rows=rows,
        tables=[_table(rows)],
        charts=[_chart(rows)],
    )


def make_cells(
    whole: RoutingTrace, parts: RoutingTrace, *, vocab_size: int, ep_size: int, seed: int
) -> dict[str, Cell]:
    """Plan on requests, and on their parts, which are labelled by phase."""
    from semantic_ep.observe.profile import RoutingProfile
    from semantic_ep.plan.moving import relabel_ranks
    from semantic_ep.plan.phases import PhasePlacements
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.policies import policy
    from semantic_ep.plan.replicas import REQUESTS_SCHEDULED, add_replicas
    from semantic_ep.plan.schedule import Schedule

    observed = {BOTH: whole}
    for phase in (PREFILL, DECODE):
        of_phase = [n for n, part in enumerate(parts.requests) if part["phase"] == phase]
        observed[phase] = parts.select_requests(of_phase)
    profiles = {
        phase: RoutingProfile.from_trace(trace, vocab_size=vocab_size)
        for phase, trace in observed.items()
    }
    planned = {
        phase: policy("semantic-requests").place(profile, ep_size=ep_size, seed=seed)
        for phase, profile in profiles.items()
    }
    # Ranks of the second plan take the names under which most experts are where they are.
    planned[DECODE] = relabel_ranks(planned[DECODE], planned[PREFILL], shared_ranks=True)
    schedules = {
        phase: Schedule.from_profile(profiles[phase], placement)
        for phase, placement in planned.items()
    }
    held = PhasePlacements.of(planned[PREFILL], planned[DECODE]).resident.slots_per_rank
    copied = add_replicas(
        planned[BOTH],
        profiles[BOTH],
        slots_per_rank=held - planned[BOTH].slots_per_rank,
        scheduled=REQUESTS_SCHEDULED,
    )
    fingerprint = whole.fingerprint
    contiguous = Placement.contiguous(
        num_layers=fingerprint.num_layers, num_experts=fingerprint.num_experts, ep_size=ep_size
    )
    return {
        CONTIGUOUS: Cell(placement=contiguous, schedule=None),
        ONE: Cell(placement=planned[BOTH], schedule=schedules[BOTH]),
        COPIES: Cell(placement=copied, schedule=Schedule.from_profile(profiles[BOTH], copied)),
        TWO: Cell(
            placement=planned[PREFILL],
            schedule=schedules[PREFILL],
            decode_placement=planned[DECODE],
            decode_schedule=schedules[DECODE],
        ),
    }


def serve(job: Job) -> list[dict[str, Any]] | None:
    """Serve every cell and count by phase; every rank calls this. The rows are rank 0's."""
    import torch.distributed as dist

    from semantic_ep.serve.compare import ServingMode, compare_modes
    from semantic_ep.serve.engine import SemanticInferenceEngine
    from semantic_ep.serve.scheduling.offline import by_affinity, round_robin

    modes = {}
    for name, cell in job.cells.items():
        homes = round_robin(len(job.prompts), dist.get_world_size())
        if cell.schedule is not None:
            homes = by_affinity(
                job.prompts,
                cell.schedule,
                max_new_tokens=job.new_tokens,
                decode_schedule=cell.decode_schedule,
            )
        engine = SemanticInferenceEngine.from_checkpoint(
            job.model,
            placement=cell.placement,
            decode_placement=cell.decode_placement,
            group=dist.group.WORLD,
        )
        modes[name] = ServingMode(engine=engine, rank_of_request=homes)
    # What is counted is the same in every round: a first token alone needs prompts only.
    prompts_only = compare_modes(modes, job.prompts, max_new_tokens=1, rounds=1)
    served = compare_modes(modes, job.prompts, max_new_tokens=job.new_tokens, rounds=job.rounds)
    if not served.identical_between_modes:
        raise BackendError(
            explain("tokens differ between the plans", where=", ".join(modes), allowed="equal ones")
        )
    if dist.get_rank():
        return None
    return [
        row
        for name in modes
        for row in rows_of_cell(
            name,
            prompts_only.modes[name],
            served.modes[name],
            slots_per_rank=modes[name].engine.model.placement.slots_per_rank,
        )
    ]


def rows_of_cell(
    name: str, prompts_only: Row, whole: Row, *, slots_per_rank: int
) -> list[dict[str, Any]]:
    """A row for each phase and for both, from two summaries of `compare_modes`."""
    before, after = counts_of(prompts_only), counts_of(whole)
    of_phase = {
        PREFILL: before,
        DECODE: {what: after[what] - before[what] for what in after},
        BOTH: after,
    }
    return [
        {
            "plan": name,
            "phase": phase,
            "slots_per_rank": slots_per_rank,
            "tokens": counted["tokens"],
            "lar": counted["local"] / counted["activations"],
            "remote_copies": counted["remote_rows"] / counted["tokens"],
            "mbytes_to_other_ranks": counted["remote_bytes"] / 1e6,
            "busiest_rank": float(counted["rank_load"].max() / counted["rank_load"].mean()),
            **({"new_tokens_per_second": whole["tokens_per_second"]} if phase == BOTH else {}),
        }
        for phase, counted in of_phase.items()
    ]


def counts_of(summary: Row) -> dict[str, Any]:
    """Counters over all ranks and layers, where a token counts once for every layer."""
    rank_load_LG = np.asarray(summary["rank_load"])
    layers = len(rank_load_LG)
    sent = sum(np.asarray(summary[name]) for name in ("bytes_dispatch", "bytes_combine"))
    tokens = sum(summary["tokens_per_rank"]) * layers
    activations = int(rank_load_LG.sum())
    return {
        "tokens": tokens,
        "activations": activations,
        "local": float(np.mean(summary["lar"])) * activations,
        "remote_rows": float(np.mean(summary["remote_copies"])) * tokens,
        "remote_bytes": int(sent.sum() - np.trace(sent)),
        "rank_load": rank_load_LG.sum(axis=0),
    }


def _table(rows: Sequence[Row]) -> Table:
    shown = {
        "plan": "plan",
        "slots_per_rank": "slots a rank",
        "phase": "tokens",
        "lar": "LAR",
        "remote_copies": "remote copies",
        "mbytes_to_other_ranks": "MB to others",
        "busiest_rank": "busiest rank",
    }
    return Table(
        title="Held-out prompts and what follows them; greedy tokens of all plans are the same",
        rows=[{label: row[key] for key, label in shown.items()} for row in rows],
    )


def _chart(rows: Sequence[Row]) -> Chart:
    return Chart(
        title="Remote copies by phase",
        kind="bars",
        rows=rows,
        x="phase",
        y="remote_copies",
        series="plan",
        y_label="remote copies a token and layer",
    )


def _protocol(args: argparse.Namespace, whole: RoutingTrace, job: Job) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(whole.fingerprint),
        "observed": f"{whole.num_requests} training documents, cut to {args.prompt_tokens} tokens, "
        f"and {args.new_tokens} that the model draws after them at temperature 1",
        "served": f"{len(job.prompts)} held-out documents, cut to {args.prompt_tokens} tokens, and "
        f"up to {args.new_tokens} greedy tokens",
        "ranks": f"{args.ranks}, gloo on one machine, attention-DP, float32",
        ONE: "made from both phases; requests on ranks by its schedule",
        COPIES: f"as many slots as {TWO!r} needs, filled with copies by the same profile",
        TWO: "each made from its phase alone; the second's ranks named so that most experts are "
        "where the first has them; an expert on a token's own rank is used there in any case",
        CONTIGUOUS: "baseline; requests in turn",
        "rounds": args.rounds,
        "order": "every cell in every round, each round in the reverse order of the one before",
        "counted": "exactly, in one round; prefill is what a first token takes, decode the rest",
        "parity": "equal greedy tokens of all cells in every request; else the run fails",
        "seed": args.seed,
    }
