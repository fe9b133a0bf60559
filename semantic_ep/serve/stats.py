"""Loads and counters of the ranks, as rank 0 knows them; free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankLoad:
    """What one rank has to do, as of its last step.

    Attributes:
        running: Sequences that hold KV blocks.
        waiting: Requests assigned to the rank that hold none yet, pre-empted ones included.
        pending_tokens: Tokens of all of these that are still to be prefilled.
        kv_tokens_used: KV cache positions in blocks that sequences hold.
        kv_tokens_total: KV cache positions of the rank.
    """

    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStats:
    """Counters of one rank since the start, and its load now.

    Attributes:
        load: See there.
        prompt_tokens: Prompt tokens of requests that were started.
        new_tokens: Tokens generated.
        preemptions: Times a sequence lost its KV blocks to an older one.
        prefix_cache_queries: Prompt tokens looked for in the prefix cache; 0 without one.
        prefix_cache_hits: Of these, found.
        routed_tokens: Tokens dispatched, summed over layers.
        activations: (token, expert) pairs of this rank's tokens, summed over layers.
        local_activations: Of these, computed on this rank.
        computed_activations: Rows that this rank's experts computed, for all ranks.
        rows: Copies of tokens sent by dispatch, by link tier: "rank" (to itself), "node" (to
            another rank of its node) and "network".
        bytes: Payload of dispatch and combine by link tier.
        phase_seconds: "dispatch", "experts", "combine"; they include waiting for other ranks.
        slot_rows_LS: [L, S] rows that each slot computed under the placement in use; None before
            the first report of these.
    """

    load: RankLoad
    prompt_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    routed_tokens: int = 0
    activations: int = 0
    local_activations: int = 0
    computed_activations: int = 0
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    phase_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    slot_rows_LS: np.ndarray | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """State of the whole group; counters of other ranks may be a second old.

    Attributes:
        ranks: One for each EP rank.
        queued: Requests in the scheduler's queue.
        steps: Lockstep steps in which some rank had tokens.
        step_seconds: Time of these.
        plan_reloads: Placements taken over since the start.
        physical_to_logical_map: [L, G * S], the placement in use.
    """

    ranks: tuple[RankStats, ...]
    queued: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    plan_reloads: int = 0
    physical_to_logical_map: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def running(self) -> int:
        """Sequences that hold KV blocks, over all ranks."""
        return sum(rank.load.running for rank in self.ranks)

    @property
    def waiting(self) -> int:
        """Requests that do not run yet, queued or handed to a rank."""
        return self.queued + sum(rank.load.waiting for rank in self.ranks)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache positions of all ranks in use, 0..1."""
        total = sum(rank.load.kv_tokens_total for rank in self.ranks)
        return sum(rank.load.kv_tokens_used for rank in self.ranks) / max(total, 1)

    @property
    def local_activation_rate(self) -> float:
        """Share of (token, expert) activations computed on the token's rank; 0 before any."""
        total = sum(rank.activations for rank in self.ranks)
        return sum(rank.local_activations for rank in self.ranks) / max(total, 1)

    @property
    def remote_copies(self) -> float:
        """Mean number of other ranks that a token is sent to in a layer; 0 before any."""
        rows = sum(n for rank in self.ranks for tier, n in rank.rows.items() if tier != "rank")
        return rows / max(sum(rank.routed_tokens for rank in self.ranks), 1)

    @property
    def balance(self) -> float:
        """Mean over max of the activations that ranks computed, 0..1; 1 is even, 1 before any."""
        computed = [rank.computed_activations for rank in self.ranks]
        return sum(computed) / len(computed) / max(computed) if any(computed) else 1.0

    def expert_load(self, num_experts: int) -> np.ndarray:
        """[L, E] activations of each expert since the placement in use was taken over."""
        slot_experts, rows = self.physical_to_logical_map, [r.slot_rows_LS for r in self.ranks]
        assert slot_experts is not None
        load = np.zeros((len(slot_experts), num_experts))
        if all(of_rank is not None for of_rank in rows):
            for layer, counted in enumerate(np.concatenate(rows, axis=1)):
                used = slot_experts[layer] >= 0
                np.add.at(load[layer], slot_experts[layer][used], counted[used])
        return load

    def bytes_by_tier(self) -> dict[str, int]:
        """Payload of dispatch and combine by link tier, over all ranks."""
        total: dict[str, int] = {}
        for rank in self.ranks:
            for tier, count in rank.bytes.items():
                total[tier] = total.get(tier, 0) + count
        return total
