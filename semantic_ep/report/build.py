"""The truth that a report is drawn from: `report.json`.

Every section names the `source` it was read from, relative to the run, and `sources` gives the
sha256 of each; a manifest stands for its artefact. Numbers are computed here and nowhere else.
L layers, G ranks, E experts; "before" is the contiguous placement, "after" the semantic one.

    schema_version  1
    run             name of the run directory
    made            at, versions
    model           fingerprint, or null
    stages          [{title, source, done, command}], in pipeline order
    sources         [{path, sha256}]
    headline        answer ("yes" | "no" | "unknown"), sentence, notes, basis, and
                    numbers [{id, label, unit, before, after, change, better, source, how}]
    train           steps, loss, first_loss, last_loss                                | null
    observe         tokens, layers, experts, top_k, load [L][E], load_max_over_mean   | null
    plan            the verdict, see `semantic_ep.report.planned`                     | null
    held_out        schedules by layer, see `semantic_ep.report.heldout`              | null
    what_if         other EP degrees and links, see `semantic_ep.report.what_if`      | null
    serve           requests, identical_outputs, links, modes.before / modes.after    | null
    load_curves     latency against throughput, see `semantic_ep.report.load_curves`  | null
    semantics       tokens, kinds, subjects, see `semantic_ep.report.semantics`
    definitions     [{term, text}]
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from semantic_ep.artifacts import MANIFEST, installed_versions
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.plan.cost import max_over_mean
from semantic_ep.plan.placement import Placement
from semantic_ep.report.headline import headline
from semantic_ep.report.heldout import held_out
from semantic_ep.report.load_curves import load_curves
from semantic_ep.report.planned import planned
from semantic_ep.report.semantics import semantics
from semantic_ep.report.sources import (
    MODES,
    PLAN_DIR,
    PROFILE_DIR,
    SERVE_FILE,
    TRAIN_FILE,
    RunSources,
    ServedMode,
    ServeResult,
    TrainRow,
)
from semantic_ep.report.what_if import SHOWN_LINKS, what_if
from semantic_ep.topology import LINKS, Link

SCHEMA_VERSION = 1
DEFINITIONS = (
    (
        "EP rank",
        "One process that holds a share of the experts of every MoE layer. G ranks form an "
        "expert-parallel (EP) group.",
    ),
    (
        "Placement",
        "Which rank holds which expert, chosen for each layer. Contiguous is what runtimes do by "
        "themselves: rank g holds experts g·E/G to (g+1)·E/G − 1.",
    ),
    (
        "Local activation rate (LAR)",
        "Share of (token, expert) activations computed on the token's home rank, counted by the "
        "dispatcher. Blind placement reaches 1/G, the floor.",
    ),
    (
        "Remote copies",
        "Mean number of distinct other ranks that a token is sent to in a layer. An all-to-all "
        "that sends a row once to each rank moves exactly these rows.",
    ),
    (
        "All-to-all bytes",
        "Bytes that left their rank in dispatch and in combine, over all layers, counted where "
        "they are sent.",
    ),
    (
        "Busiest rank",
        "Activations that the most loaded rank computes, over the mean of ranks; mean over "
        "layers. 1.0 is perfect balance; the slowest rank sets the time.",
    ),
    (
        "Ceiling",
        "LAR that this placement would reach on held-out documents if each token's true routes "
        "were known before its rank is chosen, with equal tokens a rank.",
    ),
    (
        "Identical outputs",
        "Greedy decoding gave the same tokens in both modes, and the same as the model in a "
        "single process without expert parallelism.",
    ),
)


def build_report(run_dir: str | Path) -> dict[str, Any]:
    """Merge what the stages of a run measured; the result is JSON-serialisable.

    Raises:
        ArtifactError: Nothing to report on, or a file is malformed.
        FingerprintError: The stages are of different models.
    """
    sources = RunSources.read(run_dir)
    owner = sources.plan or sources.profile
    fingerprint = sources.serve.model if sources.serve else owner.fingerprint if owner else None
    placement = sources.plan.placement if sources.plan else None
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": sources.directory.resolve().name,
        "made": {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": installed_versions(),
        },
        "model": dataclasses.asdict(fingerprint) if fingerprint else None,
        "stages": stages(sources),
        "sources": [{"path": path, "sha256": sha} for path, sha in sorted(sources.files.items())],
        "train": _train(sources.train) if sources.train else None,
        "observe": _observe(sources.profile) if sources.profile else None,
        "plan": planned(sources.plan) if sources.plan else None,
        "held_out": held_out(sources),
        "serve": _serve(sources.serve, placement) if sources.serve else None,
        "load_curves": load_curves(sources),
        "semantics": semantics(sources),
        "definitions": [{"term": term, "text": text} for term, text in DEFINITIONS],
    }
    report["what_if"] = what_if(sources, report["serve"])
    report["headline"] = headline(report)
    return report


def stages(sources: RunSources) -> list[dict[str, Any]]:
    """Which stages left results, and the command that made or would make each.

    Artefacts record their command; the profile's is that of the run that fine-tuned.
    """
    run = sources.directory
    commands = {name: _recorded_command(run / name / MANIFEST) for name in (PROFILE_DIR, PLAN_DIR)}
    if sources.serve and sources.serve.command:
        commands[SERVE_FILE] = _spelled(sources.serve.command)
    rows = (
        (
            "Fine-tune",
            TRAIN_FILE,
            commands[PROFILE_DIR] or f"launch/finetune_deepspeed.py --output {run}",
        ),
        (
            "Observe routing",
            f"{PROFILE_DIR}/{MANIFEST}",
            commands[PROFILE_DIR] or f"launch/finetune_deepspeed.py --output {run}",
        ),
        (
            "Plan placement and schedule",
            f"{PLAN_DIR}/{MANIFEST}",
            commands[PLAN_DIR]
            or f"semantic-ep plan --profile {run}/profile --holdout {run}/holdout -o {run}/plan",
        ),
        (
            "Serve in both modes, interleaved",
            SERVE_FILE,
            commands.get(SERVE_FILE)
            or f"launch/serve.py --model {run}/model --plan {run}/plan "
            f"--compare contiguous semantic --out {run}/serve.json",
        ),
    )
    return [
        {"title": title, "source": source, "done": source in sources.files, "command": command}
        for title, source, command in rows
    ]


def _recorded_command(manifest: Path) -> str:
    if not manifest.is_file():
        return ""
    return _spelled(json.loads(manifest.read_bytes()).get("command", []))


def _spelled(command: list[str]) -> str:
    """The command line, without the machine's path to the program."""
    if not command:
        return ""
    return shlex.join([Path(command[0]).name, *command[1:]])


def _train(rows: tuple[TrainRow, ...]) -> dict[str, Any]:
    losses = [row.loss if np.isfinite(row.loss) else None for row in rows]
    return {
        "source": TRAIN_FILE,
        "steps": [row.step for row in rows],
        "loss": losses,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _observe(profile: RoutingProfile) -> dict[str, Any]:
    return {
        "source": f"{PROFILE_DIR}/{MANIFEST}",
        "tokens": profile.tokens,
        "layers": profile.fingerprint.num_layers,
        "experts": profile.fingerprint.num_experts,
        "top_k": profile.fingerprint.top_k,
        "load": profile.load.tolist(),
        "load_max_over_mean": [max_over_mean(load_E) for load_E in profile.load],
        "dropped_mass": profile.dropped_mass.tolist(),
    }


def _serve(result: ServeResult, placement: Placement | None) -> dict[str, Any]:
    contiguous = _contiguous_or_none(result)
    placements = {"contiguous": contiguous, "semantic": placement}
    names = dict(zip(MODES, ("before", "after"), strict=True))
    return {
        "source": SERVE_FILE,
        "ep_size": result.ep_size,
        "num_requests": result.num_requests,
        "max_new_tokens": result.max_new_tokens,
        "identical_outputs": result.identical_outputs.model_dump(),
        "links": [_on_link(LINKS[name], result) for name in SHOWN_LINKS],
        "modes": {
            names[mode]: _served_mode(result.modes[mode], placements[mode]) for mode in MODES
        },
    }


def _on_link(link: Link, result: ServeResult) -> dict[str, Any]:
    """How long the busiest rank's bytes take at the link's bandwidth; latency is left out.

    Placement changes bytes and not the number of messages, so latency adds the same to both.
    """
    rate = link.gigabytes_per_second * 1e9
    before = result.modes["contiguous"].straggler_bytes() / rate
    after = result.modes["semantic"].straggler_bytes() / rate
    return {
        "link": link.name,
        "gigabytes_per_second": link.gigabytes_per_second,
        "before_seconds": before,
        "after_seconds": after,
        "saved_seconds": before - after,
    }


def _contiguous_or_none(result: ServeResult) -> Placement | None:
    layers, experts = result.model.num_layers, result.model.num_experts
    if experts % result.ep_size:
        return None
    return Placement.contiguous(num_layers=layers, num_experts=experts, ep_size=result.ep_size)


def _served_mode(mode: ServedMode, placement: Placement | None) -> dict[str, Any]:
    wire = mode.wire_bytes()
    busiest = [max_over_mean(np.asarray(load_G)) for load_G in mode.rank_load]
    return {
        "lar": mode.lar,
        "lar_mean": float(np.mean(mode.lar)),
        "remote_copies": mode.remote_copies,
        "remote_copies_mean": float(np.mean(mode.remote_copies)),
        "wire_bytes": wire.tolist(),
        "wire_bytes_total": int(wire.sum()),
        "straggler_bytes": mode.straggler_bytes(),
        "rank_load": mode.rank_load,
        "busiest_rank": busiest,
        "busiest_rank_mean": float(np.mean(busiest)),
        "slot_load": _slot_load(mode, placement),
        "tokens_per_rank": mode.tokens_per_rank,
        "tokens_max_over_mean": max_over_mean(np.asarray(mode.tokens_per_rank)),
        "requests_per_rank": mode.requests_per_rank,
        "seconds": mode.seconds.model_dump(),
        "generated_tokens": mode.generated_tokens,
        "tokens_per_second": mode.tokens_per_second,
        "expert_bytes_resident": mode.expert_bytes_resident,
        "expert_bytes_total": mode.expert_bytes_total,
    }


def _slot_load(mode: ServedMode, placement: Placement | None) -> list[list[int]] | None:
    """[L][G * S] activations of the expert in each slot; None where copies share an expert."""
    if placement is None or placement.has_replicas:
        return None
    load_LE = np.asarray(mode.expert_load, dtype=np.int64)
    slots = placement.physical_to_logical_map
    found = np.take_along_axis(load_LE, np.maximum(slots, 0), axis=1)
    return [[int(n) for n in row] for row in np.where(slots >= 0, found, 0)]
