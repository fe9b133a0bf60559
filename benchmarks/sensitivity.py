"""One trace, a few of its layers, planned on some requests and counted on others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.bounds import oracle_home_ranks
from semantic_ep.plan.cost import evaluate
from semantic_ep.plan.history_predictors import NGramPredictor, PairPredictor
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import Predictor, RidgePredictor, TablePredictor, context_of
from semantic_ep.plan.samples import Evidence
from semantic_ep.plan.slices import BATCH_TOKENS, natural_slices, slices_in_batches
from semantic_ep.plan.solver import SemanticPolicy
from semantic_ep.plan.verdict import rows_of_cost

# Previous layers that the standard predictor looks at.
DEPTH = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What was planned, for the chosen layers alone.

    Attributes:
        placement: Experts of the chosen layers.
        predictor: Scores ranks for tokens, in all layers.
        profile: Counts of the chosen layers.
        seconds: Time of predictor and placement.
        tokens: Tokens profiled.
    """

    placement: Placement
    predictor: Predictor
    profile: RoutingProfile
    seconds: float
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Layers to plan; predictors still see every earlier layer's experts.

    Attributes:
        layers: Indices into the trace's MoE layers, rising.
        vocab_size: Token ids of the whole trace (V).
        seed: Seed of the solver.
    """

    layers: tuple[int, ...]
    vocab_size: int
    seed: int

    def plan(
        self, trace: RoutingTrace, *, ep_size: int, policy: SemanticPolicy | None = None
    ) -> Planned:
        """Plan with all that a trace tells: sampled batches, and a predictor with history.

        Args:
            trace: What is profiled.
            ep_size: EP ranks (G).
            policy: The solver's settings, for single tokens (default: the usual ones).
        """
        started = time.perf_counter()
        whole = self._profile(trace)
        part, profile = self.restrict(trace), self._profile(self.restrict(trace))
        predictor = self.ridge(trace, whole, depth=DEPTH)
        scores = _OfSomeLayers(predictor=predictor, trace=trace, layers=self.layers)
        evidence = Evidence(trace=part, predictor=scores)
        policy = dataclasses.replace(policy or SemanticPolicy(), evidence=evidence)
        placement = policy.place(profile, ep_size=ep_size, seed=self.seed)
        return Planned(
            placement=placement,
            predictor=predictor,
            profile=profile,
            seconds=time.perf_counter() - started,
            tokens=trace.num_tokens,
        )

    def plan_from_counts(self, trace: RoutingTrace, *, ep_size: int, min_count: int) -> Planned:
        """Plan from a profile alone, as recorded with a minimum count a (token, expert) cell."""
        started = time.perf_counter()
        profile = without_rare(self._profile(self.restrict(trace)), min_count)
        placement = SemanticPolicy().place(profile, ep_size=ep_size, seed=self.seed)
        predictor = TablePredictor(profile=without_rare(self._profile(trace), min_count))
        return Planned(
            placement=placement,
            predictor=predictor,
            profile=profile,
            seconds=time.perf_counter() - started,
            tokens=trace.num_tokens,
        )

    def ridge(self, trace: RoutingTrace, profile: RoutingProfile, *, depth: int) -> RidgePredictor:
        """Fit a predictor for the chosen layers."""
        return RidgePredictor.fit(trace, profile, depth=depth, layers=self.layers)

    def predictors(
        self, trace: RoutingTrace, placement: Placement, depths: Sequence[int]
    ) -> dict[str, Predictor]:
        """Every predictor by name; one of them counts devices of a placement."""
        profile = self._profile(trace)
        table = TablePredictor(profile=profile)
        everywhere = self._in_all_layers(placement, trace.fingerprint.num_layers)
        found: dict[str, Predictor] = {
            one.name: one
            for one in (
                table,
                PairPredictor.fit(trace, profile, layers=self.layers),
                NGramPredictor.fit(trace, table, everywhere),
            )
        }
        for depth in depths:
            name = f"ridge, {depth} previous layers" if depth else "ridge, token table alone"
            found[name] = self.ridge(trace, profile, depth=depth)
        return found

    def restrict(self, trace: RoutingTrace) -> RoutingTrace:
        """Return the trace of the chosen layers."""
        ids = tuple(trace.fingerprint.layer_ids[layer] for layer in self.layers)
        return dataclasses.replace(
            trace,
            experts=trace.experts[:, self.layers],
            fingerprint=dataclasses.replace(trace.fingerprint, layer_ids=ids),
        )

    def measure(
        self, placement: Placement, trace: RoutingTrace, predictor: Predictor | str
    ) -> list[dict[str, Any]]:
        """Count a trace's tokens; one row a layer, by the model's number, and one of means.

        Args:
            placement: Experts of the chosen layers.
            trace: Tokens to count.
            predictor: Chooses equal slices, or "in order", or "true routes".
        """
        part = self.restrict(trace)
        if predictor == "in order":
            home = natural_slices(trace.num_tokens, placement.ep_size, batch=BATCH_TOKENS)
        elif predictor == "true routes":
            home = oracle_home_ranks(placement, part, "tokens")
        else:
            assert not isinstance(predictor, str), predictor
            home = self._homes(placement, trace, predictor)
        rows = rows_of_cost(evaluate(placement, part, home))
        named = dict(enumerate(part.fingerprint.layer_ids))
        return [{**row, "layer": named.get(row["layer"], "mean")} for row in rows]

    def _homes(self, placement: Placement, trace: RoutingTrace, predictor: Predictor) -> np.ndarray:
        everywhere = self._in_all_layers(placement, trace.fingerprint.num_layers)
        homes = [
            slices_in_batches(
                predictor.rank_scores(context_of(trace, layer), everywhere), batch=BATCH_TOKENS
            )
            for layer in self.layers
        ]
        return np.stack(homes, axis=1)

    def _in_all_layers(self, placement: Placement, num_layers: int) -> Placement:
        """The placement where it was planned, contiguous placement elsewhere."""
        plain = Placement.contiguous(
            num_layers=num_layers, num_experts=placement.num_experts, ep_size=placement.ep_size
        )
        table = np.full((num_layers, placement.ep_size, placement.slots_per_rank), -1)
        own = plain.physical_to_logical_map.reshape(num_layers, placement.ep_size, -1)
        table[:, :, : own.shape[2]] = own
        flat = table.reshape(num_layers, -1)
        flat[list(self.layers)] = placement.physical_to_logical_map
        return dataclasses.replace(plain, physical_to_logical_map=flat)

    def _profile(self, trace: RoutingTrace) -> RoutingProfile:
        return RoutingProfile.from_trace(trace, vocab_size=self.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfSomeLayers:
    """`TrainingScores` of the chosen layers, from a predictor of all.

    Attributes:
        predictor: Fitted on `trace`.
        trace: All layers of what was learned from.
        layers: The chosen ones.
    """

    predictor: RidgePredictor
    trace: RoutingTrace
    layers: tuple[int, ...]

    def training_scores(self, trace: RoutingTrace, layer: int, rows: np.ndarray) -> np.ndarray:
        """See `TrainingScores.training_scores`; `trace` is the restricted one, of equal rows."""
        assert trace.num_tokens == self.trace.num_tokens
        return self.predictor.training_scores(self.trace, self.layers[layer], rows)


def without_rare(profile: RoutingProfile, min_count: int) -> RoutingProfile:
    """The profile as if (token, expert) cells below a count had not been recorded."""
    tables, dropped = [], []
    for table in profile.token_expert:
        kept = sparse.csr_array(table * (table >= min_count)) if min_count > 1 else table
        kept.eliminate_zeros()
        tables.append(kept)
        dropped.append(1 - float(kept.sum()) / max(float(table.sum()), 1e-12))
    return dataclasses.replace(
        profile, token_expert=tuple(tables), dropped_mass=np.asarray(dropped)
    )


def domains_of(
    trace: RoutingTrace, *, key: str, domains: Mapping[str, Sequence[str]] | None
) -> dict[str, np.ndarray]:
    """Requests of each domain: those whose label is listed for it, or with the label itself."""
    labels = [str(request.get(key, "")) for request in trace.requests]
    if domains is None:
        domains = {label: [label] for label in sorted(set(labels) - {""})}
    found = {
        name: np.flatnonzero([label in set(members) for label in labels])
        for name, members in domains.items()
    }
    return {name: requests for name, requests in found.items() if len(requests)}


def up_to(trace: RoutingTrace, order: np.ndarray, tokens: int) -> np.ndarray:
    """The first requests of an order that hold about so many tokens, at least one."""
    held = np.cumsum(np.diff(trace.offsets)[order])
    return order[: max(int(np.searchsorted(held, tokens, side="right")), 1)]
