"""Serve the same requests in several modes, interleaved, and report what was counted.

A mode is a placement with a schedule. Rounds alternate between the modes, in turning order, so that
whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from semantic_ep.integrations.token_slices import SHUFFLE_COUNTERS
from semantic_ep.runtime.collectives import from_all_ranks, peer_guard
from semantic_ep.serve.engine import SemanticInferenceEngine

PHASES = ("dispatch", "experts", "combine")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServingMode:
    """One way to serve.

    Attributes:
        engine: With the experts placed.
        rank_of_request: [R], the rank that serves each request; in attention-TP always 0, which
            speaks for all.
    """

    engine: SemanticInferenceEngine
    rank_of_request: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Round:
    """One rank's share of one round of one mode."""

    outputs: dict[int, list[int]]
    seconds: dict[str, float]
    counters: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Results of all ranks, equal on every rank.

    Attributes:
        outputs: Mode -> new tokens of each request, in request order.
        modes: Mode -> JSON-serialisable counters and times.
    """

    outputs: Mapping[str, list[list[int]]]
    modes: Mapping[str, dict[str, Any]]

    @property
    def identical_between_modes(self) -> bool:
        """Whether every mode generated the same tokens for every request."""
        first, *others = self.outputs.values()
        return all(other == first for other in others)


def compare_modes(
    modes: Mapping[str, ServingMode],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    max_batch_size: int = 32,
    rounds: int = 3,
    on_round: Callable[[str], object] | None = None,
) -> Comparison:
    """Serve all prompts `rounds` times in every mode; all ranks of the group call this together.

    Args:
        modes: Name -> mode; their engines share one EP group.
        prompts: Token ids of all requests, the same on every rank.
        max_new_tokens: Tokens each request may generate.
        max_batch_size: Sequences that run together on a rank.
        rounds: Repetitions; times are medians over them.
        on_round: Called with the mode's name after each of its rounds.

    Raises:
        PeerFailureError: Another rank died or did not answer in time.
    """
    measured: dict[str, list[list[_Round]]] = {name: [] for name in modes}
    for number in range(rounds):
        order = list(modes) if number % 2 == 0 else list(reversed(modes))
        for name in order:
            mine = _serve(modes[name], prompts, max_new_tokens, max_batch_size)
            group = modes[name].engine.group
            measured[name].append(from_all_ranks(mine, "gathering of results", group))
            if on_round is not None:
                on_round(name)
    outputs = {}
    for name, per_round in measured.items():
        merged = {index: ids for rank in per_round[0] for index, ids in rank.outputs.items()}
        outputs[name] = [merged[index] for index in range(len(prompts))]
    return Comparison(
        outputs=outputs,
        modes={name: _summarise(modes[name], measured[name], outputs[name]) for name in modes},
    )


def _serve(
    mode: ServingMode, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_batch_size: int
) -> _Round:
    engine = mode.engine
    mine = np.flatnonzero(mode.rank_of_request == engine.group.rank()).tolist()
    stats, slices = engine.model.dispatcher.stats, engine.model.token_slices
    stats.reset()
    if slices is not None:
        slices.stats.reset()
    with peer_guard("barrier before a round", engine.group):
        dist.barrier(group=engine.group)
    start = time.perf_counter()
    generation = engine.generate(
        [prompts[index] for index in mine],
        max_new_tokens=max_new_tokens,
        max_batch_size=max_batch_size,
    )
    total = time.perf_counter() - start
    return _Round(
        outputs=dict(zip(mine, generation.outputs)),
        seconds={**{phase: generation.seconds[phase] for phase in PHASES}, "total": total},
        counters=stats.snapshot() | ({} if slices is None else slices.stats.snapshot()),
    )


def _summarise(
    mode: ServingMode, per_round: list[list[_Round]], outputs: list[list[int]]
) -> dict[str, Any]:
    """Counters of one round (they are equal in all) and times of every round."""
    ranks = per_round[0]
    counted = {name: np.stack([r.counters[name] for r in ranks]) for name in ranks[0].counters}
    home = np.arange(len(ranks))
    # [G, L, G], from a token's home rank, in a layer, to the rank that computes.
    activations, rows = counted["activations"], counted["rows_dispatch"]
    tokens_L = np.maximum(counted["tokens"].sum(axis=0), 1)
    local_L = activations[home, :, home].sum(axis=0)
    remote_rows_L = rows.sum(axis=(0, 2)) - rows[home, :, home].sum(axis=0)
    engine = mode.engine
    generated = sum(map(len, outputs))
    seconds = [
        {phase: float(np.mean([r.seconds[phase] for r in one])) for phase in one[0].seconds}
        for one in per_round
    ]
    median = {phase: float(np.median([one[phase] for one in seconds])) for phase in seconds[0]}
    resident = from_all_ranks(engine.expert_bytes_resident, "gathering of results", engine.group)
    return {
        "lar": (local_L / np.maximum(activations.sum(axis=(0, 2)), 1)).tolist(),
        "remote_copies": (remote_rows_L / tokens_L).tolist(),
        "bytes_dispatch": counted["bytes_dispatch"].sum(axis=1).tolist(),
        "bytes_combine": counted["bytes_combine"].sum(axis=1).tolist(),
        "bytes_metadata": counted["bytes_metadata"].sum(axis=1).tolist(),
        "bytes_shuffle": int(
            sum(counted[name].sum() for name in SHUFFLE_COUNTERS if name in counted)
        ),
        "rank_load": activations.sum(axis=0).tolist(),
        "expert_load": _expert_load(engine, counted["slot_activations"]).tolist(),
        "tokens_per_rank": counted["tokens"][:, 0].tolist(),
        "requests_per_rank": np.bincount(mode.rank_of_request, minlength=len(ranks)).tolist(),
        "seconds": median,
        "generated_tokens": generated,
        "tokens_per_second": generated / median["total"],
        "rounds": seconds,
        "expert_bytes_resident": resident,
        "expert_bytes_total": engine.expert_bytes_total,
    }


def _expert_load(engine: SemanticInferenceEngine, slot_activations_GLS: np.ndarray) -> np.ndarray:
    """[L, E] int64, activations of each logical expert over all its copies."""
    placement = engine.model.placement
    slots_L = slot_activations_GLS.transpose(1, 0, 2).reshape(placement.num_layers, -1)
    load = np.zeros((placement.num_layers, placement.num_experts), dtype=np.int64)
    layer, slot = np.nonzero(placement.physical_to_logical_map >= 0)
    np.add.at(load, (layer, placement.physical_to_logical_map[layer, slot]), slots_L[layer, slot])
    return load
