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


def test_one_rank_counts_every_route_though_it_counts_them_together():
    stats = DispatchStats(num_layers=2, ep_size=1, slots_per_rank=5, rank=0)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        passes = [torch.randint(5, (rows, 2), generator=draw) for rows in (3, 700, 900, 1, 2)]
    for number, slot_TK in enumerate(passes, 1):
        with torch.inference_mode():
            stats.record_alone(1, slot_TK, row_bytes=8)
        whole = torch.cat(passes[:number])
        if number in (1, 4, 5):  # Asked in between, and not.
            assert stats.slot_activations[1].tolist() == torch.bincount(whole.flatten()).tolist()
    assert stats.tokens.tolist() == [0, 1606]
    assert stats.activations[1, 0] == stats.slot_activations.sum() == 2 * 1606
    assert stats.bytes_dispatch[1, 0] == stats.bytes_combine[1, 0] == 8 * 1606
    stats.record_alone(1, passes[0], row_bytes=8)
    stats.reset()
    assert not stats.slot_activations.any()
