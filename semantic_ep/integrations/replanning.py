"""Re-planning a training run that goes on, whatever the framework.

Every `semantic_ep.replan.interval` optimizer steps rank 0 plans on the routing up to the last
decision, and judges the plan on whole sequences sampled since (`semantic_ep.plan.replan`). If it
pays, all ranks exchange experts and optimizer state and go on under it. Between decisions, drift is
reported at checkpoints. Reports go to the log, and as lines of JSON to a file beside the profile.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import distributed as dist

from semantic_ep.config import SemanticEPConfig
from semantic_ep.errors import ConfigError, SemanticEPError, explain
from semantic_ep.integrations.observation import RoutingObservation
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.drift import measure_drift
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.replan import propose
from semantic_ep.runtime.exchange import Exchanged
from semantic_ep.topology import Topology

logger = logging.getLogger(__name__)

# Sampled between two decisions, in memory only, to judge plans on.
WINDOW_TOKENS = 16384
# All other ranks wait for the planner.
PLANNING_SECONDS = 20.0


class PlacedModel(Protocol):
    """A model in training whose experts can move."""

    @property
    def placement(self) -> Placement:
        """Where its experts are."""
        ...

    @property
    def sources(self) -> Placement:
        """The slots of its placement that a move can take experts from; see `propose`."""
        ...

    @property
    def topology(self) -> Topology:
        """Nodes of the EP group of rank 0."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's hidden vector."""
        ...

    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer with its optimizer state; collective."""
        ...

    def move(self, placement: Placement) -> Exchanged:
        """Exchange experts and optimizer state, all or nothing; collective over all ranks."""
        ...


class Replanning:
    """Decides, the same on every rank, where the experts of one run shall be."""

    def __init__(
        self,
        settings: SemanticEPConfig,
        observation: RoutingObservation,
        model: PlacedModel | None,
    ) -> None:
        """Start the first window; collective over all ranks.

        Args:
            settings: Of the run; see `check_settings`.
            observation: Counts the routing of the model.
            model: Whose experts move; None without an interval, where drift is reported alone.
        """
        self._settings, self._observation, self._model = settings.replan, observation, model
        output = Path(settings.observe.output)
        self._file = output.with_name(f"{output.name}-replanning.jsonl")
        # Reports and placements travel on the host.
        self._everyone = dist.new_group(backend="gloo")
        self._earlier: RoutingProfile | None = None  # On rank 0.
        self._earlier_steps = 0
        self._start_window(None)

    @property
    def moves_experts(self) -> bool:
        """Whether the placement may change."""
        return self._model is not None

    def step(self, step: int) -> None:
        """After optimizer step number `step`: decide if it is time; collective over all ranks.

        Raises:
            PlacementError: The exchange did not verify. Nothing has changed on any rank.
            PeerFailureError: Another rank died or did not answer in time.
        """
        if self._model is None or step % self._settings.interval:
            return
        seen = self._observation.look()
        expert_bytes = self._model.expert_bytes()
        decision: list[Any] = [None, {}]
        if dist.get_rank() == 0:
            assert seen is not None
            decision = self._decide(*seen, expert_bytes)
        dist.broadcast_object_list(decision, src=0, group=self._everyone)
        table, report = decision
        if table is not None:
            report = report | self._move(table)
        self._report({"step": step, "applied": table is not None, **report})
        self._start_window(seen[0] if seen else None)

    def at_checkpoint(self, step: int, profile: RoutingProfile | None) -> None:
        """Report drift since the last decision.

        Args:
            step: Optimizer steps so far.
            profile: Of the run so far, on rank 0.
        """
        if profile is None:
            return
        if self._earlier is not None:
            self._report({"step": step, "drift": self._drift(profile)})
        elif not self.moves_experts:
            self._earlier, self._earlier_steps = profile, _steps(profile)

    def resume(self, profile: RoutingProfile | None) -> None:
        """Compare with, and plan on, the routing of the run before; the profile is rank 0's."""
        self._earlier, self._earlier_steps = profile, 0

    def _decide(
        self, profile: RoutingProfile, window: RoutingTrace, tokens: int, expert_bytes: int
    ) -> list[Any]:
        """[map of the placement to change to, or None; report]; on rank 0."""
        if self._earlier is None:
            reason = "not judged: there is no routing from before this window to plan on"
            return [None, {"reason": reason}]
        report: dict[str, Any] = {"drift": self._drift(profile)}
        horizon = self._settings.horizon_tokens
        try:
            proposal = propose(
                self._earlier,
                window,
                self._model.placement,
                topology=self._model.topology,
                row_bytes=self._model.row_bytes,
                expert_bytes=expert_bytes,
                horizon_tokens=tokens if horizon == "auto" else horizon,
                sources=self._model.sources,
                time_limit=PLANNING_SECONDS,
            )
        except SemanticEPError as error:
            return [None, {**report, "reason": f"not planned: {error}"}]
        new = proposal.placement
        return [None if new is None else new.physical_to_logical_map, report | {**proposal.report}]

    def _move(self, table: np.ndarray) -> dict[str, Any]:
        current = self._model.placement
        started = time.perf_counter()
        exchanged = self._model.move(
            Placement(
                physical_to_logical_map=table,
                num_experts=current.num_experts,
                ep_size=current.ep_size,
            )
        )
        return {**dataclasses.asdict(exchanged), "seconds": time.perf_counter() - started}

    def _drift(self, profile: RoutingProfile) -> dict[str, float]:
        """Means of `measure_drift` since the last decision, in numbers that JSON has."""
        assert self._earlier is not None
        halflife = profile.meta["halflife_steps"]
        steps = _steps(profile) - self._earlier_steps
        drift = measure_drift(
            self._earlier, profile, included=0.5 ** (steps / halflife) if halflife else 1.0
        )
        return {
            "load_distance": float(drift.load_distance.mean()),
            "token_distance": drift.token_distance,
            "unseen_tokens": drift.unseen_tokens,
        }

    def _start_window(self, profile: RoutingProfile | None) -> None:
        if profile is not None:
            self._earlier, self._earlier_steps = profile, _steps(profile)
        if self.moves_experts:
            self._observation.recorder.start_window(WINDOW_TOKENS)

    def _report(self, report: Mapping[str, Any]) -> None:
        if dist.get_rank() != 0:
            return
        logger.info("%s", in_words(report))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as stream:
            stream.write(json.dumps(report) + "\n")


def in_words(report: Mapping[str, Any]) -> str:
    """One line of a report."""
    parts = [f"step {report['step']}"]
    if "drift" in report:
        drift = report["drift"]
        parts.append(
            f"routing since the last decision differs by {drift['load_distance']:.1%} of expert "
            f"load and {drift['token_distance']:.1%} of tokens, {drift['unseen_tokens']:.1%} of "
            "them new"
        )
    if "remote_copies" in report:
        before, after = report["remote_copies"]
        low, high = report["saved_interval_95"]
        parts.append(
            f"remote copies a token {before:.3f}, under a new plan {after:.3f} ({low:.1%} to "
            f"{high:.1%} less)"
        )
    if "reason" in report:
        parts.append(f"a new plan {report['reason']}")
    if report.get("applied"):
        parts.append(
            f"moved {report['experts_moved']} experts, {report['bytes_moved'] / 1e6:,.1f} MB, in "
            f"{report['seconds']:.2f} s"
        )
    return "; ".join(parts)


def check_settings(settings: SemanticEPConfig) -> None:
    """Raise `ConfigError` if a run shall re-plan without a plan or without being observed."""
    if settings.replan.interval == "auto":
        return
    for name, value in (
        ("semantic_ep.plan.artifact, --semantic-ep-plan-artifact", settings.plan.artifact),
        ("semantic_ep.observe.output, --semantic-ep-observe-output", settings.observe.output),
    ):
        if value == "auto" or not settings.enabled:
            raise ConfigError(
                explain(
                    "a run re-plans from a plan, on the routing that it observes, and lacks one",
                    where="semantic_ep.replan.interval, --semantic-ep-replan-interval",
                    got=f"{settings.replan.interval}, without {name}",
                    do="Set it, and semantic_ep.enabled; a contiguous plan to start from is made "
                    "by `semantic-ep plan --policy contiguous`",
                )
            )


def _steps(profile: RoutingProfile) -> int:
    return int(profile.meta["steps"])
