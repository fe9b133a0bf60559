"""Which predictor deals single tokens best: table, n-gram of devices, ridge, or look-ahead.

Runs the model of a quickstart on documents it was trained on, which are the profile, and on those
held out, and records in each MoE layer the experts that the router chose and those that the same
router would have chosen before attention. Held-out tokens are then cut into equal slices as
attention-TP does, by each predictor's scores, on the same placements.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recorded import Recording, held_out_documents, training_documents
from benchmarks.registry import Chart, Result, Table
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.bounds import oracle_home_ranks
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.history_predictors import NGramPredictor
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictor_choice import choose_predictor
from semantic_ep.plan.predictors import Context, Predictor, RidgePredictor, TablePredictor
from semantic_ep.plan.samples import Evidence
from semantic_ep.plan.slices import BATCH_TOKENS, natural_slices
from semantic_ep.plan.solver import SemanticPolicy
from semantic_ep.plan.verdict import home_ranks

RIDGE_DEPTH = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument(
        "--run", type=Path, default=Path("runs/quickstart"), help="output of launch/quickstart.sh"
    )
    parser.add_argument("--ep", type=int, nargs="+", default=[4])
    parser.add_argument("--profile-documents", type=int, default=160)
    parser.add_argument("--holdout-documents", type=int, default=80)
    parser.add_argument("--max-tokens", type=int, default=256, help="of a document")
    parser.add_argument("--seed", type=int, default=0, help="of the planner")


def run(args: argparse.Namespace) -> Result:
    """Record, plan and compare."""
    routes = Recording(args.run / "model")
    data = args.run / "data"
    profiled, _ = routes.of_documents(
        training_documents(data, limit=args.profile_documents), args.max_tokens
    )
    holdout, ahead = routes.of_documents(
        held_out_documents(data, routes, limit=args.holdout_documents), args.max_tokens
    )
    profile = RoutingProfile.from_trace(profiled, vocab_size=routes.vocab_size)
    rows = []
    for ep_size in args.ep:
        for kind, placement in placements(profiled, profile, ep_size, args.seed).items():
            homes = {
                "none: slices in order": natural_slices(
                    holdout.num_tokens, ep_size, batch=BATCH_TOKENS
                )
            }
            for predictor in predictors(profiled, profile, placement, ahead):
                homes[predictor.name] = home_ranks(
                    holdout, placement, profile, "tokens", predictor=predictor
                )
            homes["oracle"] = oracle_home_ranks(placement, holdout, "tokens")
            rows += [
                {"ep_size": ep_size, "placement": kind, "predictor": name, **measured}
                for name, home in homes.items()
                for measured in [evaluate(placement, holdout, home).mean()]
            ]
    protocol = {
        "model": dataclasses.asdict(holdout.fingerprint),
        "profile": f"{profiled.num_requests} training documents, {profiled.num_tokens} tokens",
        "holdout": f"{holdout.num_requests} documents, {holdout.num_tokens} tokens",
        "slices": f"equal, of {BATCH_TOKENS} consecutive tokens, anew in each layer",
        "look_ahead_recall": float(recall(ahead, holdout.experts)),
    }
    return Result(theme="lookahead", protocol=protocol, rows=rows, **shown(rows, protocol))


def placements(
    profiled: RoutingTrace, profile: RoutingProfile, ep_size: int, seed: int
) -> dict[str, Placement]:
    """The contiguous one, and the planner's for single tokens."""
    chosen = choose_predictor(profiled, profile, ep_size=ep_size, batch=BATCH_TOKENS, seed=seed)
    policy = SemanticPolicy(mode="tokens", evidence=Evidence(trace=profiled, predictor=chosen))
    fingerprint = profile.fingerprint
    return {
        "contiguous": Placement.contiguous(
            num_layers=fingerprint.num_layers, num_experts=fingerprint.num_experts, ep_size=ep_size
        ),
        "semantic": policy.place(profile, ep_size=ep_size, seed=seed),
    }


def predictors(
    profiled: RoutingTrace, profile: RoutingProfile, placement: Placement, ahead_NLE: np.ndarray
) -> list[Predictor]:
    """What is compared; the look-ahead's experts were recorded for the held-out tokens."""
    table = TablePredictor(profile=profile)
    return [
        table,
        NGramPredictor.fit(profiled, table, placement),
        RidgePredictor.fit(profiled, profile, depth=RIDGE_DEPTH),
        SeenAhead(scores=ahead_NLE),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenAhead:
    """A `LookAheadPredictor` whose scores for a whole trace were recorded.

    Attributes:
        scores: [N, L, E].
    """

    scores: np.ndarray

    @property
    def name(self) -> str:
        """Name in tables."""
        return "look-ahead"

    def rank_scores(self, context: Context, placement: Placement) -> np.ndarray:
        """See `Predictor.rank_scores`; the context must be of all tokens."""
        on_ranks: np.ndarray = (
            self.scores[:, context.layer] @ placement.expert_on_rank[context.layer]
        )
        return on_ranks


def recall(ahead_NLE: np.ndarray, experts_NLK: np.ndarray) -> float:
    """Share of the experts chosen that the look-ahead puts among its first K."""
    top_k = experts_NLK.shape[2]
    first_NLK = np.argsort(-ahead_NLE, axis=2)[..., :top_k]
    return float((first_NLK[..., :, None] == experts_NLK[..., None, :]).any(axis=2).mean())


def shown(rows: list[dict[str, Any]], protocol: dict[str, Any]) -> dict[str, Any]:
    """Table and chart."""
    names = ("ep_size", "placement", "predictor", "lar", "remote_copies", "load_max_over_mean")
    title = (
        f"Equal slices of {BATCH_TOKENS} held-out tokens, mean over layers "
        f"(recall of the look-ahead {protocol['look_ahead_recall']:.2f})"
    )
    largest = max(row["ep_size"] for row in rows)
    return {
        "tables": [Table(title=title, rows=[{n: row[n] for n in names} for row in rows])],
        "charts": [
            Chart(
                title=f"Local activation rate, {largest} ranks",
                kind="bars",
                rows=[row for row in rows if row["ep_size"] == largest],
                x="predictor",
                y="lar",
                series="placement",
                y_label="local activation rate",
            )
        ],
    }
