"""Counters of a dispatcher as a tracker keeps them."""

from __future__ import annotations

import torch

from semantic_ep.runtime.stats import DispatchStats


def test_only_what_goes_to_other_ranks_is_tracked_as_sent():
    stats = DispatchStats(num_layers=2, ep_size=2, slots_per_rank=1, rank=1)
    assert set(stats.metrics().values()) == {0.0}
    for layer in range(2):
        stats.record_dispatch(
            layer,
            tokens=4,
            activations=[3, 5],
            rows=[2, 4],
            row_bytes=10,
            metadata_bytes=[7, 9],
            tokens_per_slot=torch.tensor([5]),
        )
        stats.record_combine(layer, rows=[1, 4], row_bytes=10)
    assert stats.metrics() == {
        "a2a/tokens": 8.0,
        "a2a/local_activation_rate": 5 / 8,
        "a2a/remote_copies": 0.5,
        "a2a/bytes_dispatch": 40.0,
        "a2a/bytes_combine": 20.0,
        "a2a/bytes_metadata": 14.0,
    }
