"""Routing counters of one process: exact, decayed, and bounded in memory.

A count added at step s weighs 2 ** (-(now - s) / half-life). Instead of multiplying every table at
every step, new counts are added with a growing weight and all are divided by it when read.

The counters of several processes are combined part by part, so that no process ever holds more
than one part of another: `part` exports, `combine` adds two exports, `profile` finishes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.errors import ArtifactError, explain
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.samples import Part, merge_samples, no_samples
from semantic_ep.observe.sequences import (
    RESTORED,
    SequenceLoads,
    merge_sequences,
    sampling_keys,
    sequence_names,
)
from semantic_ep.observe.tables import TokenExpertTable

_LARGEST_WEIGHT = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Routes of the real (unmasked) tokens of one micro-batch.

    Attributes:
        experts: Layer -> [T, K] logical experts; -1 where a token was dropped. Of layers that this
            process does not count, those that precede a counted one are there for transitions.
        token_id: [T] vocabulary ids, -1 where unknown.
        sequence: [T] number of the sequence that a token belongs to, from 0, not decreasing.
    """

    experts: Mapping[int, np.ndarray]
    token_id: np.ndarray
    sequence: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class CounterLimits:
    """Bounds on memory.

    Attributes:
        table_bytes: For the token -> expert counts of one layer; beyond it the smallest counts
            are dropped and their share is stated in the profile.
        sequence_bytes: For the expert histograms of sampled sequences, all layers together.
        max_sequences: Sampled sequences, whatever their size.
        sample_tokens: Tokens of whole sequences kept with their routes; 0 keeps none.
    """

    table_bytes: int = 48 << 20
    sequence_bytes: int = 64 << 20
    max_sequences: int = 4096
    sample_tokens: int = 0


class RoutingCounters:
    """Counts routes; not thread-safe."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        vocab_size: int,
        halflife_steps: float | None = None,
        limits: CounterLimits | None = None,
        seed: int = 0,
        layers: Collection[int] | None = None,
        counts_tokens: bool = True,
    ) -> None:
        """Start at zero.

        Args:
            num_layers: MoE layers of the whole model (L).
            num_experts: Logical experts a layer (E).
            top_k: Experts a token activates (K).
            vocab_size: Token ids (V).
            halflife_steps: Optimizer steps after which a count weighs half; None keeps all.
            limits: Bounds on memory.
            seed: Of the sampling of sequences. Processes that see parts of the same sequences,
                other tokens or other layers, in equally many micro-batches, have the same one;
                all others must differ.
            layers: Layers that this process counts; None for all.
            counts_tokens: Whether this process counts the tokens themselves; of processes that see
                other layers of the same tokens, one does.
        """
        self.limits = limits or CounterLimits()
        self._layers, self._experts, self._top_k = num_layers, num_experts, top_k
        self._vocab = vocab_size
        self._decay_rate = math.log(2) / halflife_steps if halflife_steps else 0.0
        self._halflife = halflife_steps
        self._weight, self._step = 1.0, 0
        self._totals: Part = {
            "load": np.zeros((num_layers, num_experts)),
            "token_count": np.zeros(vocab_size),
            "coactivation": np.zeros((num_layers, num_experts**2)),
            "transition": np.zeros((max(num_layers - 1, 0), num_experts**2)),
            "tokens": np.zeros(1),
        }
        self._tables = {
            layer: TokenExpertTable(vocab_size * num_experts, self.limits.table_bytes)
            for layer in (range(num_layers) if layers is None else sorted(layers))
        }
        self._own = tuple(self._tables)
        self._pairs = np.triu_indices(top_k, k=1)
        self._counts_tokens = counts_tokens
        self._seed, self._micro_batches = seed, 0
        affordable = self.limits.sequence_bytes // (4 * num_layers * num_experts)
        self._capacity = min(self.limits.max_sequences, affordable)
        self._sequences = SequenceLoads(
            self._capacity, num_layers=num_layers, num_experts=num_experts
        )
        self._samples = no_samples(len(self._own), top_k)
        self._window, self._window_tokens = no_samples(len(self._own), top_k), 0

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        parts = (self._totals, self._samples, self._window)
        return (
            sum(array.nbytes for part in parts for array in part.values())
            + sum(table.nbytes for table in self._tables.values())
            + self._sequences.nbytes
        )

    def add(self, routed: RoutedTokens) -> None:
        """Count a micro-batch."""
        # A dropped activation goes to an expert of its own, E, which is cut off after counting.
        dropped = self._experts
        experts = {
            layer: np.where(e < 0, dropped, e).astype(np.int64)
            for layer, e in routed.experts.items()
        }
        ids = routed.token_id.astype(np.int64)
        known = ids >= 0
        if self._counts_tokens:
            self._totals["tokens"] += self._weight * len(ids)
            counts = np.bincount(ids[known], minlength=self._vocab)
            self._totals["token_count"] += self._weight * counts
        all_known = bool(known.all())
        for layer in self._tables.keys() & experts.keys():
            e = experts[layer]
            self._count("load", layer, e)
            self._count("coactivation", layer, e[:, self._pairs[0]], e[:, self._pairs[1]])
            if layer - 1 in experts:
                self._count("transition", layer - 1, experts[layer - 1][:, :, None], e[:, None, :])
            cells = ids[:, None] * self._experts + e
            if not all_known or e.max(initial=0) == dropped:
                cells = cells[known[:, None] & (e < dropped)]
            self._tables[layer].add(cells.ravel(), self._weight)
        self._sample(experts, routed)
        self._micro_batches += 1

    def step(self) -> None:
        """Advance the clock of the decay by one optimizer step."""
        self._step += 1
        self._weight *= math.exp(self._decay_rate)
        if self._weight > _LARGEST_WEIGHT:
            self._rescale()

    def start_window(self, max_tokens: int) -> None:
        """Sample whole sequences anew, beside all else, from now on."""
        self._window, self._window_tokens = no_samples(len(self._own), self._top_k), max_tokens

    def restore(self, profile: RoutingProfile) -> None:
        """Go on from a profile, as one that was saved before an interruption.

        Raises:
            ArtifactError: The profile's shapes are those of another model.
        """
        found = (*profile.load.shape, profile.vocab_size)
        wanted = (self._layers, self._experts, self._vocab)
        if found != wanted:
            raise ArtifactError(
                explain(
                    "the profile to go on from belongs to another model",
                    got=f"(layers, experts, vocabulary) {found}",
                    allowed=str(wanted),
                    do="Choose another observe.output, or move the old profile away",
                )
            )
        upper = np.triu(np.ones((self._experts, self._experts)), k=1)
        if self._counts_tokens:
            self._totals["token_count"] += self._weight * profile.token_count
            self._totals["tokens"] += self._weight * profile.tokens
        loads = np.zeros_like(profile.sequence_load)
        for layer, table in self._tables.items():
            self._totals["load"][layer] += self._weight * profile.load[layer]
            together = profile.coactivation[layer] * upper
            self._totals["coactivation"][layer] += self._weight * together.ravel()
            if layer:
                before = profile.transition[layer - 1]
                self._totals["transition"][layer - 1] += self._weight * before.ravel()
            saved, lost = profile.token_expert[layer], profile.dropped_mass[layer]
            coordinates = saved.tocoo()
            cells = coordinates.row.astype(np.int64) * self._experts + coordinates.col
            table.add_counts(cells, self._weight * coordinates.data.astype(np.float64))
            table.dropped += self._weight * float(saved.sum()) * lost / max(1 - lost, 1e-12)
            loads[:, layer] = profile.sequence_load[:, layer]
        names = sequence_names(self._seed, RESTORED, np.arange(len(loads)))
        self._sequences.add(names, self._keys(names), loads)

    def part_names(self) -> list[str]:
        """Names of a profile's parts, in the order in which every process must combine them."""
        tables = [f"table.{layer}" for layer in range(self._layers)]
        return ["totals", *tables, "sequences"]

    def part(self, name: str) -> Part:
        """A copy of one part, in units of tokens as of now.

        Besides the parts of a profile there are "samples", sequences of the whole run, and
        "window", those since `start_window`; both hold routes of the layers counted here, in order.
        """
        if name == "totals":
            return {key: array / self._weight for key, array in self._totals.items()}
        if name == "sequences":
            return self._sequences.part()
        if name == "samples":
            return dict(self._samples)
        if name == "window":
            return dict(self._window)
        table = self._tables.get(int(name.removeprefix("table.")), TokenExpertTable(0, 0))
        cells, counts = table.counts()
        return {
            "cells": cells,
            "counts": counts / self._weight,
            "dropped": np.array([table.dropped / self._weight]),
        }

    def combine(self, name: str, one: Part, other: Part) -> Part:
        """Add two exports of the same part, within the same bounds."""
        if name == "totals":
            return {key: one[key] + other[key] for key in one}
        if name == "sequences":
            return merge_sequences(one, other, self._capacity)
        if name == "samples":
            return merge_samples(one, other, self.limits.sample_tokens)
        if name == "window":
            return merge_samples(one, other, self._window_tokens)
        table = TokenExpertTable(self._vocab * self._experts, self.limits.table_bytes)
        for part in (one, other):
            table.add_counts(part["cells"], part["counts"])
            table.dropped += float(part["dropped"][0])
        cells, counts = table.counts()
        return {"cells": cells, "counts": counts, "dropped": np.array([table.dropped])}

    def profile(
        self,
        parts: Mapping[str, Part],
        fingerprint: ModelFingerprint,
        *,
        min_count: int = 1,
        meta: Mapping[str, Any] | None = None,
    ) -> RoutingProfile:
        """Make a profile of (combined) parts; cells below `min_count` join the dropped mass."""
        totals, shape = parts["totals"], (self._vocab, self._experts)
        pairs = totals["coactivation"].reshape(self._layers, self._experts, self._experts)
        tables, dropped = [], np.zeros(self._layers)
        for layer in range(self._layers):
            part = parts[f"table.{layer}"]
            cells, counts, lost = part["cells"], part["counts"], float(part["dropped"][0])
            # Decayed counts of a whole number of tokens may fall short of it by rounding.
            kept = counts >= min_count * (1 - 1e-9) if min_count > 1 else counts > 0
            lost += float(counts[~kept].sum())
            cells, counts = cells[kept], counts[kept]
            dropped[layer] = lost / max(lost + float(counts.sum()), 1e-300)
            rows, columns = cells // self._experts, cells % self._experts
            tables.append(
                sparse.csr_array((counts.astype(np.float32), (rows, columns)), shape=shape)
            )
        return RoutingProfile(
            fingerprint=fingerprint,
            load=totals["load"],
            token_count=totals["token_count"],
            token_expert=tuple(tables),
            coactivation=pairs + pairs.transpose(0, 2, 1),
            transition=totals["transition"].reshape(-1, self._experts, self._experts),
            sequence_load=parts["sequences"]["load"],
            dropped_mass=dropped,
            tokens=float(totals["tokens"][0]),
            meta={
                "source": "recorder",
                "steps": self._step,
                "halflife_steps": self._halflife,
                "min_count": min_count,
                **(meta or {}),
            },
        )

    def _count(self, name: str, layer: int, *experts: np.ndarray) -> None:
        """Add how often each combination of experts occurs, those with a dropped one left out."""
        size = self._experts + 1
        codes = experts[0] if len(experts) == 1 else experts[0] * size + experts[1]
        counts = np.bincount(codes.ravel(), minlength=size ** len(experts))
        kept = counts.reshape((size,) * len(experts))[(slice(-1),) * len(experts)]
        self._totals[name][layer] += self._weight * kept.ravel()

    def _keys(self, names: np.ndarray) -> np.ndarray:
        return sampling_keys(names, self._decay_rate * self._step)

    def _sample(self, experts: Mapping[int, np.ndarray], routed: RoutedTokens) -> None:
        numbers, lengths = np.unique(routed.sequence, return_counts=True)
        names = sequence_names(self._seed, self._micro_batches, numbers)
        keys = self._keys(names)
        wanted = self._sequences.wanted(keys)
        if wanted.any():
            loads = np.zeros((len(keys), self._layers, self._experts), np.float32)
            row = np.repeat(np.arange(len(keys)), lengths)
            first = row[:, None] * (self._experts + 1)
            for layer in self._tables.keys() & experts.keys():
                codes = (first + experts[layer]).ravel()
                counts = np.bincount(codes, minlength=len(keys) * (self._experts + 1))
                loads[:, layer] = counts.reshape(len(keys), -1)[:, :-1]
            self._sequences.add(names[wanted], keys[wanted], loads[wanted])
        own = [experts[layer] for layer in self._own if layer in experts]
        complete = len(own) == len(self._own) and all(e.max(initial=0) < self._experts for e in own)
        if self._counts_tokens:
            self._window["seen"] += len(routed.token_id)
        if complete and (self.limits.sample_tokens or self._window_tokens):
            routes = np.zeros((len(routed.token_id), len(own), self._top_k), np.uint16)
            for place, e in enumerate(own):
                routes[:, place] = e
            arrived: Part = {
                "key": keys,
                "length": lengths,
                "experts": routes,
                "token_id": routed.token_id.astype(np.int32),
                "seen": np.zeros(1),
            }
            self._samples = merge_samples(self._samples, arrived, self.limits.sample_tokens)
            self._window = merge_samples(self._window, arrived, self._window_tokens)

    def _rescale(self) -> None:
        for array in self._totals.values():
            array /= self._weight
        for table in self._tables.values():
            table.scale(1 / self._weight)
        self._weight = 1.0
