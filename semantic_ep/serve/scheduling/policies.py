"""Policies: what it costs to serve a request on each rank.

All share one interface, and `semantic_ep.serve.scheduling.queue` gives them all the same queue,
bounds and bookkeeping, so that a comparison compares the choice of the rank alone.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from semantic_ep.serve.scheduling.cost import ServingCost


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A queued request, as policies see it.

    Attributes:
        prompt_tokens: Its length.
        new_tokens: Tokens that it is expected to generate.
        hits_G: [G], see `RankHits.of_prompt`; None without a plan.
        new_hits_G: [G], of tokens that it will generate; the same object where one plan is for all.
        cached_G: [G], leading prompt tokens in each rank's prefix cache.
    """

    prompt_tokens: int
    new_tokens: float
    hits_G: np.ndarray | None
    new_hits_G: np.ndarray | None
    cached_G: np.ndarray


@dataclasses.dataclass(kw_only=True, eq=False)
class GroupLoad:
    """What the ranks have to do; grows with every assignment.

    Attributes:
        work_2G: [2, G] float64: prompt tokens still to be computed, and KV positions that requests
            handed over and not finished take, or are expected to.
        sequences_G: [G], requests handed over and not finished.
        kv_total_G: [G], KV positions of each rank.
    """

    work_2G: np.ndarray
    sequences_G: np.ndarray
    kv_total_G: np.ndarray

    @property
    def kv_G(self) -> np.ndarray:
        """[G], KV positions taken."""
        taken_G: np.ndarray = self.work_2G[1]
        return taken_G

    def add(self, candidate: Candidate, rank: int) -> None:
        """Count a request that was handed to a rank."""
        self.work_2G[0, rank] += candidate.prompt_tokens - candidate.cached_G[rank]
        self.work_2G[1, rank] += candidate.prompt_tokens + candidate.new_tokens
        self.sequences_G[rank] += 1


class Policy(Protocol):
    """Ranks the ranks for a request."""

    def costs(self, candidate: Candidate, load: GroupLoad) -> np.ndarray:
        """[G], lowest is best, in a unit of the policy's own; infinite: not this rank now.

        At least one rank has a finite cost.
        """
        ...

    def assigned(self, rank: int) -> None:
        """The request last asked about went to this rank."""
        ...


class RoundRobin:
    """Ranks in turn."""

    def __init__(self) -> None:
        self._next = 0

    def costs(self, candidate: Candidate, load: GroupLoad) -> np.ndarray:
        """See `Policy`: turns to wait."""
        ranks = len(load.sequences_G)
        return (np.arange(ranks) - self._next) % ranks

    def assigned(self, rank: int) -> None:
        """See `Policy`."""
        self._next = rank + 1


class LeastLoaded:
    """The rank with the least work, in tokens: prompts to compute, then KV positions held."""

    def costs(self, candidate: Candidate, load: GroupLoad) -> np.ndarray:
        """See `Policy`: tokens."""
        total_G: np.ndarray = load.work_2G.sum(axis=0)
        return total_G

    def assigned(self, rank: int) -> None:
        """See `Policy`."""


class PrefixOnly:
    """The rank with the longest cached prefix, if that is half of the prompt; else least loaded.

    Without the threshold a short beginning that all prompts share would draw all to one rank.
    """

    def costs(self, candidate: Candidate, load: GroupLoad) -> np.ndarray:
        """See `Policy`: tokens not cached where that counts, and a fraction of one for load."""
        work_G = load.work_2G.sum(axis=0)
        counts_G = 2 * candidate.cached_G >= candidate.prompt_tokens
        costs_G: np.ndarray = work_G / (1 + work_G.max()) - counts_G * candidate.cached_G
        return costs_G

    def assigned(self, rank: int) -> None:
        """See `Policy`."""


class SemanticWindow:
    """The published rule (arXiv 2503.04398): most affinity, every window of G covers every rank."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def costs(self, candidate: Candidate, load: GroupLoad) -> np.ndarray:
        """See `Policy`: affinity, negated."""
        ranks = len(load.sequences_G)
        if len(self._used) == ranks:
            self._used.clear()
        costs = np.zeros(ranks) if candidate.hits_G is None else -candidate.hits_G.astype(float)
        costs[list(self._used)] = np.inf
        return costs

    def assigned(self, rank: int) -> None:
        """See `Policy`."""
        self._used.add(rank)


class Semantic:
    """Predicted seconds that serving a request on a rank takes, and that it makes others wait.

    Summed for a rank:

    * computing the prompt tokens that its prefix cache lacks;
    * sending the copies of prompt and new tokens that other ranks' experts need, over the links
      between them;
    * waiting for the prompts handed to it before;
    * reading, with every new token, the KV cache of all its sequences: ranks step together, so
      the whole group waits for the fullest one.
    """

    def __init__(self, cost: ServingCost) -> None:
        self._seconds_per_token = cost.seconds_per_token
        self._seconds_per_kv_token = cost.seconds_per_kv_token
        self._copy_seconds_GG = cost.copy_seconds_GG
        # What a queued prompt token takes on average: its compute, and half of all copies.
        copies = min(cost.model.top_k, cost.ep_size - 1) / 2
        seconds_per_pending = cost.seconds_per_token + copies * float(
            cost.copy_seconds_GG.sum() / max(cost.ep_size * (cost.ep_size - 1), 1)
        )
        # The second is set with every request.
        self._seconds_per_work_2 = np.array([seconds_per_pending, 0.0])

    def costs(self, candidate: Candidate, load: GroupLoad) -> np.ndarray:
        """See `Policy`: seconds."""
        weights_2 = self._seconds_per_work_2
        weights_2[1] = candidate.new_tokens * self._seconds_per_kv_token
        seconds_G: np.ndarray = np.dot(weights_2, load.work_2G)
        per_token_G = self._seconds_per_token
        if candidate.hits_G is not None:
            copies_G = np.dot(self._copy_seconds_GG, candidate.hits_G)
            new_copies_G = copies_G
            if candidate.new_hits_G is not candidate.hits_G:
                new_copies_G = np.dot(self._copy_seconds_GG, candidate.new_hits_G)
            seconds_G += candidate.new_tokens * new_copies_G
            copies_G += per_token_G
            per_token_G = copies_G
        seconds_G += (candidate.prompt_tokens - candidate.cached_G) * per_token_G
        return seconds_G

    def assigned(self, rank: int) -> None:
        """See `Policy`."""
