"""What a semantic plan's worth depends on: profile, EP degree, domain, and each of its parts.

Every study plans some layers of a trace (`--layers`, evenly spread; predictors still see all
earlier ones) on some requests, and counts tokens of others in equal slices of 512-token batches:

* profile size: shares of all requests, nested;
* minimum count: plans from a profile alone that dropped rare (token, expert) cells;
* EP degree;
* ablations: placement and schedule alone and together, each predictor, copies of experts;
* search: how far the solver goes, and how much expert load it is allowed;
* domains: planned on one domain's requests, counted on another's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import Result, Row
from benchmarks.sensitivity import Planned, Study, domains_of, up_to
from benchmarks.sensitivity_results import charts, tables
from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import DEPTHS
from semantic_ep.plan.replicas import add_replicas
from semantic_ep.plan.solver import SemanticPolicy

logger = logging.getLogger(__name__)

STUDIES = ("profile size", "minimum count", "EP degree", "ablations", "search", "domains")
# Share of all requests that the studies plan on unless they vary it.
STANDARD = 0.2
_USUAL = SemanticPolicy()
# Of the study of the solver: effort in multiples of the usual, and expert load that is allowed.
SEARCH_FACTORS = (0.1, 0.25, 1.0, 4.0)
MAX_LOADS = (1.05, 1.1, 1.15, 1.2, 1.3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument(
        "--trace", action="append", type=Path, default=[], metavar="NPZ",
        help="routing trace with token ids; repeat for several",
    )  # fmt: skip
    parser.add_argument(
        "--run", type=Path, metavar="DIR",
        help="output of launch/quickstart.sh: its model's routes are recorded, training documents "
        "profiled, and held-out ones counted",
    )  # fmt: skip
    parser.add_argument(
        "--documents", type=int, default=600, help="of --run, for training (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="of a document of --run (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=0, metavar="N",
        help="of --run: let the model go on from each document by so many tokens, and take both "
        "parts for requests, which --labels phase tells apart",
    )  # fmt: skip
    parser.add_argument("--num-experts", type=int, metavar="E", help="experts a layer")
    parser.add_argument(
        "--ep", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="G",
        help="EP degrees; those that do not divide the experts are left out",
    )  # fmt: skip
    parser.add_argument(
        "--at-ep", type=int, default=8, metavar="G", help="EP degree of all other studies"
    )
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4, 0.7],
        metavar="F", help="profiled shares of all requests",
    )  # fmt: skip
    parser.add_argument("--min-counts", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument(
        "--redundant-slots", type=int, nargs="+", default=[8, 32], metavar="N",
        help="slots for copies of experts, over all ranks",
    )  # fmt: skip
    parser.add_argument(
        "--labels", metavar="KEY", help="label of requests that tells their domain, if they have it"
    )
    parser.add_argument(
        "--domains", type=Path, metavar="JSON",
        help="domain -> labels, for many fine labels (default: each label is a domain)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, default=3, metavar="N", help="MoE layers to plan, evenly spread"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="random splits, 0..N-1")
    parser.add_argument(
        "--evaluate-tokens", type=int, default=24_576, metavar="T", help="tokens counted, about"
    )
    parser.add_argument(
        "--studies", nargs="+", default=list(STUDIES), choices=STUDIES, metavar="STUDY",
        help=f"of {', '.join(STUDIES)} (default: all)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """Run the studies on all traces.

    Raises:
        ConfigError: A trace has no token ids, or slots do not spread over the ranks.
    """
    rows: list[dict[str, Any]] = []
    for name, trace, held_out in _traces(args):
        _check(args, name, trace)
        for seed in range(args.seeds):
            for row in _Runner(args, trace, seed, held_out).rows():
                rows.append({"trace": name, "seed": seed, **row})
    return Result(
        theme="plan_sensitivity",
        protocol=_protocol(args),
        rows=rows,
        tables=list(tables(rows)),
        charts=list(charts(rows)),
    )


def _traces(
    args: argparse.Namespace,
) -> Iterator[tuple[str, RoutingTrace, np.ndarray | None]]:
    """Name, trace, and [R] which requests are held out; None: a random part of them.

    Raises:
        ConfigError: None is named, or the run has no model.
    """
    from semantic_ep.observe.formats import read_npz_trace

    if not args.trace and args.run is None:
        raise ConfigError(
            explain("there is nothing to plan on", where="--trace, --run", do="Name one")
        )
    for path in args.trace:
        yield path.stem, read_npz_trace(path, num_experts=args.num_experts), None
    if args.run is not None:
        from benchmarks.recorded import (
            Recording,
            by_phase,
            held_out_documents,
            training_documents,
        )

        routes, data = Recording(args.run / "model"), args.run / "data"
        training = training_documents(data, limit=args.documents)
        others = held_out_documents(data, routes, limit=args.documents)
        documents, longest = [*training, *others], args.max_tokens
        held_out = np.arange(len(documents)) >= len(training)
        if args.new_tokens:
            documents = routes.continued(
                documents, max_tokens=longest, new_tokens=args.new_tokens, seed=0
            )
            longest += args.new_tokens
        trace, _ = routes.of_documents(documents, longest)
        if args.new_tokens:
            trace, held_out = by_phase(trace, args.new_tokens), np.repeat(held_out, 2)
        yield args.run.resolve().name, trace, held_out


class _Runner:
    """The studies on one trace, with one random split.

    Args:
        args: Of the theme.
        trace: To plan on and to count.
        seed: Of the split.
        held_out: [R] requests to count alone; None: some at random.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        trace: RoutingTrace,
        seed: int,
        held_out: np.ndarray | None,
    ) -> None:
        self.args, self.trace, self.held_out = args, trace, held_out
        count = trace.fingerprint.num_layers
        layers = np.unique(np.linspace(0, count - 1, min(args.layers, count) + 2).astype(int)[1:-1])
        self.study = Study(
            layers=tuple(layers.tolist()), vocab_size=int(trace.token_id.max()) + 1, seed=seed
        )
        order = np.random.default_rng(seed).permutation(trace.num_requests)
        if held_out is None:
            counted = up_to(trace, order[::-1], args.evaluate_tokens)
            self.order, self.available = order, len(order) - len(counted)
        else:
            counted = up_to(trace, order[held_out[order]], args.evaluate_tokens)
            self.order = order[~held_out[order]]
            self.available = len(self.order)
        self.counted = trace.select_requests(np.sort(counted))
        self._standard: Planned | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the studies asked for."""
        studies: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "profile size": self._profile_size,
            "minimum count": self._minimum_count,
            "EP degree": self._ep_degree,
            "ablations": self._ablations,
            "search": self._search,
            "domains": self._domains,
        }
        for name in self.args.studies:
            logger.info("%s", name)
            for row in studies[name]():
                yield {"study": name, **row}

    def _profiled(self, fraction: float) -> RoutingTrace:
        requests = round(fraction * len(self.order))
        return self.trace.select_requests(np.sort(self.order[: min(requests, self.available)]))

    def standard(self) -> Planned:
        """The plan that most studies vary one thing of."""
        if self._standard is None:
            self._standard = self.study.plan(self._profiled(STANDARD), ep_size=self.args.at_ep)
        return self._standard

    def _plan(
        self,
        *,
        fraction: float = STANDARD,
        ep_size: int | None = None,
        policy: SemanticPolicy = _USUAL,
    ) -> Planned:
        """The standard plan with something else, or itself."""
        ep_size = ep_size or self.args.at_ep
        if (fraction, ep_size, policy) == (STANDARD, self.args.at_ep, _USUAL):
            return self.standard()
        return self.study.plan(self._profiled(fraction), ep_size=ep_size, policy=policy)

    def _contiguous(self, ep_size: int) -> Placement:
        return Placement.contiguous(
            num_layers=len(self.study.layers),
            num_experts=self.trace.fingerprint.num_experts,
            ep_size=ep_size,
        )

    def _rows_of(
        self, setting: str, value: float, planned: Planned, counted: RoutingTrace | None = None
    ) -> Iterator[dict[str, Any]]:
        """A plan's rows beside contiguous placement with home ranks in order."""
        trace = self.counted if counted is None else counted
        ep_size = planned.placement.ep_size
        plain = self.study.measure(self._contiguous(ep_size), trace, "in order")
        ours = self.study.measure(planned.placement, trace, planned.predictor)
        for before, after in zip(plain, ours, strict=True):
            yield {
                "setting": setting,
                "value": value,
                "ep_size": ep_size,
                "profiled_tokens": planned.tokens,
                **_compared(before, after),
                "plan_seconds": planned.seconds,
            }

    def _profile_size(self) -> Iterator[dict[str, Any]]:
        for fraction in self.args.fractions:
            planned = self._plan(fraction=fraction)
            yield from self._rows_of(f"{fraction:.0%} of requests", fraction, planned)

    def _minimum_count(self) -> Iterator[dict[str, Any]]:
        for least in self.args.min_counts:
            planned = self.study.plan_from_counts(
                self._profiled(STANDARD), ep_size=self.args.at_ep, min_count=least
            )
            dropped = float(planned.profile.dropped_mass.mean())
            yield from self._rows_of(f"{least} ({dropped:.0%} dropped)", least, planned)

    def _ep_degree(self) -> Iterator[dict[str, Any]]:
        for ep_size in self.args.ep:
            if self.trace.fingerprint.num_experts % ep_size:
                continue
            yield from self._rows_of(f"EP{ep_size}", ep_size, self._plan(ep_size=ep_size))

    def _ablations(self) -> Iterator[dict[str, Any]]:
        planned, ep_size = self.standard(), self.args.at_ep
        plain = self._contiguous(ep_size)
        cases: list[tuple[str, Placement, Any]] = [
            ("neither", plain, "in order"),
            ("placement alone", planned.placement, "in order"),
            ("schedule alone", plain, planned.predictor),
            ("both", planned.placement, planned.predictor),
        ]
        predictors = self.study.predictors(self._profiled(STANDARD), planned.placement, DEPTHS)
        cases += [(name, planned.placement, one) for name, one in predictors.items()]
        cases.append(("true routes", planned.placement, "true routes"))
        for slots in self.args.redundant_slots:
            copied = add_replicas(
                planned.placement, planned.profile, slots_per_rank=slots // ep_size
            )
            cases.append((f"{slots} slots for copies", copied, planned.predictor))
        first = self.study.measure(plain, self.counted, "in order")
        for name, placement, predictor in cases:
            measured = self.study.measure(placement, self.counted, predictor)
            for before, after in zip(first, measured, strict=True):
                yield {
                    "setting": name,
                    "ep_size": ep_size,
                    "profiled_tokens": planned.tokens,
                    **_compared(before, after),
                }

    def _search(self) -> Iterator[dict[str, Any]]:
        for factor in SEARCH_FACTORS:
            steps, starts = (max(round(factor * of), 1) for of in (_USUAL.steps, _USUAL.starts))
            policy = dataclasses.replace(_USUAL, steps=steps, starts=starts)
            setting = f"{factor:g}x steps and starts"
            yield from self._rows_of(setting, factor, self._plan(policy=policy))
        for load in MAX_LOADS:
            policy = dataclasses.replace(_USUAL, max_load=load)
            yield from self._rows_of(f"load up to {load:g}", load, self._plan(policy=policy))

    def _domains(self) -> Iterator[dict[str, Any]]:
        if self.args.labels is None or not self.trace.requests:
            return
        listed = json.loads(self.args.domains.read_text()) if self.args.domains else None
        found = domains_of(self.trace, key=self.args.labels, domains=listed)
        if len(found) < 2:
            logger.warning("requests have no label %r: no study of domains", self.args.labels)
            return
        rng = np.random.default_rng(self.study.seed)
        halves = {name: self._halves(rng.permutation(own)) for name, own in found.items()}
        tokens = np.diff(self.trace.offsets)
        # Every plan sees equally many tokens, so that what differs is their domain.
        budget = min(int(tokens[first].sum()) for first, _ in halves.values())
        mixed = rng.permutation(np.concatenate([first for first, _ in halves.values()]))
        sources = {name: first for name, (first, _) in halves.items()} | {"all domains": mixed}
        for source, requests in sources.items():
            profiled = self.trace.select_requests(np.sort(up_to(self.trace, requests, budget)))
            planned = self.study.plan(profiled, ep_size=self.args.at_ep)
            for target, (_, held_out) in halves.items():
                counted = self.trace.select_requests(np.sort(held_out))
                for row in self._rows_of(source, 0.0, planned, counted):
                    yield {**row, "counted_on": target}

    def _halves(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Requests to plan on, and others to count."""
        if self.held_out is None:
            first, second = np.array_split(requests, 2)
            return first, second
        held_out = self.held_out[requests]
        return requests[~held_out], requests[held_out]


def _compared(before: Row, after: Row) -> dict[str, Any]:
    saved = 1 - after["remote_copies"] / max(before["remote_copies"], 1e-12)
    return {**after, "contiguous_remote_copies": before["remote_copies"], "saved": saved}


def _check(args: argparse.Namespace, name: str, trace: RoutingTrace) -> None:
    problem = None
    if not (trace.token_id >= 0).any():
        problem = "the trace has no token ids to plan a schedule from", f"--trace {name}", None
    elif trace.fingerprint.num_experts % args.at_ep:
        problem = "EP ranks must divide the experts", "--at-ep", args.at_ep
    elif any(slots % args.at_ep for slots in args.redundant_slots):
        problem = "slots must spread over the ranks", "--redundant-slots", args.redundant_slots
    if problem is not None:
        what, where, got = problem
        raise ConfigError(explain(what, where=where, got=got))


def _protocol(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "traces": [path.name for path in args.trace],
        "run": None
        if args.run is None
        else f"the model of {args.run} on {args.documents} training documents, cut to "
        f"{args.max_tokens} tokens, which are profiled, and those held out, which are counted",
        "new_tokens": args.new_tokens,
        "phases": None
        if not args.new_tokens
        else "prefill: documents as cut; decode: what the model draws after them, at temperature 1",
        "studies": args.studies,
        "at_ep": args.at_ep,
        "layers": f"{args.layers} MoE layers, evenly spread, without the first and the last",
        "profiled": f"{STANDARD:.0%} of all requests unless the study varies it",
        "counted": f"about {args.evaluate_tokens} tokens of other requests; domains: half of each",
        "predictor": "ridge regression on token table and two previous layers; minimum count: the "
        "token table",
        "contiguous_remote_copies": "contiguous placement, slices in order, the same tokens",
        "saved": "1 - remote_copies / contiguous_remote_copies",
        "plan_seconds": "wall time of profile, predictor and placement of the planned layers; it "
        "depends on what else the machine does, all other figures do not",
        "seeds": args.seeds,
    }
