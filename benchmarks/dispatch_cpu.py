"""The CPU half of the dispatch theme: gloo ranks, variants of the exchange, one batch of routes.

Shapes: T tokens of a rank, D hidden, K top-k, E logical experts, G ranks, N = G * T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gloo_ranks import on_ranks
from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.formats import read_npz_trace
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.policies import policy
from semantic_ep.plan.schedule import rank_shares
from semantic_ep.plan.slices import equal_slices
from semantic_ep.runtime.dispatch import ExpertRows
from semantic_ep.runtime.overlap import OverlapMode

VARIANTS = {
    "all_to_all": "all_to_all_single, one row a route, contiguous placement",
    "ours": "torch backend, one row a (token, rank), contiguous placement",
    "ours+plan": "torch backend, semantic placement and token schedule",
}
OVERLAPS = {
    "overlap off": "ours+plan, with a D x D matrix an expert",
    "overlap on": "the same, own rows computed while others travel",
}
# Tokens a rank that the emulated kernels count; they run one thread at a time.
COUNTED_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch under one plan: [G, T, K] physical slots of each rank's tokens."""

    slot_GTK: np.ndarray
    slots_per_rank: int


def run_cpu(args: argparse.Namespace) -> Result:
    """Time all variants at each number of ranks."""
    tokens = (args.tokens or [512])[0]
    hidden = args.hidden or 1024
    trace = synthetic_trace(args.seed) if args.trace is None else read_npz_trace(args.trace)
    rows: list[Row] = []
    for ranks in args.ranks or [2, 4]:
        batches = plan_batches(trace, args.layer, ranks, tokens, args.seed)
        rows += _measure(batches, ranks, hidden, args)
    return Result(
        theme="dispatch",
        protocol={
            "routes": "synthetic topics" if args.trace is None else args.trace.name,
            "layer": args.layer,
            "split": "requests, half profiled, the batch from the rest",
            "tokens_per_rank": tokens,
            "hidden": hidden,
            "dtype": "float32",
            "transport": "gloo on one machine, one thread a rank",
            "timing": f"dispatch, experts, combine; slowest rank; {args.repeats} passes "
            f"after {args.warm_up}, variants interleaved; identity experts but for overlap",
            "variants": VARIANTS | OVERLAPS,
            "sent_rows": "rows to other ranks in dispatch, mean over ranks",
            "emulated_rows": f"the same on the first {COUNTED_TOKENS} tokens of each rank, counted "
            "by the emulated kernels and by the torch backend, which must agree",
        },
        rows=rows,
        tables=[
            Table(
                title="Dispatch and combine over gloo, ms (median)",
                rows=_summary([row for row in rows if row["variant"] in VARIANTS]),
            ),
            Table(title="Local-first overlap over gloo, ms (median)", rows=_overlap_summary(rows)),
        ],
        charts=[
            Chart(
                title="Dispatch + combine, slowest rank",
                kind="bars",
                rows=[
                    {**row, "EP": f"EP{row['ranks']}"} for row in rows if row["variant"] in VARIANTS
                ],
                x="EP",
                y="median_ms",
                y_label="ms",
                series="variant",
            )
        ],
    )


def synthetic_trace(seed: int) -> RoutingTrace:
    """64 requests of 256 tokens on 32 experts, top-4: requests have topics, so have words."""
    rng = np.random.default_rng(seed)
    topics, vocab, experts, topk, requests, length = 8, 2048, 32, 4, 64, 256
    word_topic = rng.integers(topics, size=vocab)
    topic_score = rng.normal(size=(topics, experts))
    word_score = 1.5 * topic_score[word_topic] + rng.normal(size=(vocab, experts))
    routes, ids = [], []
    for _ in range(requests):
        topic = rng.integers(topics)
        on_topic = np.flatnonzero(word_topic == topic)
        words = np.where(
            rng.random(length) < 0.7, rng.choice(on_topic, length), rng.integers(vocab, size=length)
        )
        score = word_score[words] + 0.7 * rng.normal(size=(length, experts))
        routes.append(np.argsort(-score, axis=1)[:, :topk].astype(np.uint8))
        ids.append(words.astype(np.int32))
    return RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="synthetic", layer_ids=(0,), num_experts=experts, top_k=topk
        ),
        experts=np.concatenate(routes)[:, None],
        offsets=np.arange(requests + 1, dtype=np.int64) * length,
        token_id=np.concatenate(ids),
    )


def plan_batches(
    trace: RoutingTrace, layer: int, ranks: int, tokens: int, seed: int
) -> dict[str, Batch]:
    """The same N tokens under the contiguous placement and under a semantic plan."""
    profiled, rest = trace.split(0.5, seed=seed)
    profile = RoutingProfile.from_trace(profiled, vocab_size=int(trace.token_id.max()) + 1)
    shape = trace.fingerprint
    contiguous = Placement.contiguous(
        num_layers=shape.num_layers, num_experts=shape.num_experts, ep_size=ranks
    )
    semantic = policy("semantic").place(profile, ep_size=ranks, seed=seed)
    total = ranks * tokens
    picked = np.resize(np.arange(rest.num_tokens), total)  # repeats a short trace
    routes = rest.experts[picked, layer].astype(np.int64)
    in_order = np.repeat(np.arange(ranks), tokens)
    share_VG, prior_G = rank_shares(profile, semantic, layer)
    ids = rest.token_id[picked]
    scores = np.where(ids[:, None] >= 0, share_VG[np.maximum(ids, 0)], prior_G)
    scheduled = equal_slices(scores)
    return {
        "contiguous": _batch(contiguous, layer, routes, in_order),
        "semantic": _batch(semantic, layer, routes, scheduled),
    }


def _batch(placement: Placement, layer: int, routes: np.ndarray, home: np.ndarray) -> Batch:
    table = placement.logical_to_physical_map[layer, :, 0]
    order = np.argsort(home, kind="stable")
    slot = table[routes[order]]
    return Batch(
        slot_GTK=slot.reshape(placement.ep_size, -1, routes.shape[1]),
        slots_per_rank=placement.slots_per_rank,
    )


def _measure(
    batches: dict[str, Batch], ranks: int, hidden: int, args: argparse.Namespace
) -> list[Row]:
    results: dict[str, Row] = on_ranks(
        *(_time_variants, ranks, batches, hidden, args.repeats, args.warm_up),
        preload=["torch.distributed"],
    )
    return [
        {
            "ranks": ranks,
            "variant": name,
            "median_ms": statistics.median(result["ms"]),
            "p20_ms": float(np.percentile(result["ms"], 20)),
            "p80_ms": float(np.percentile(result["ms"], 80)),
            "n": len(result["ms"]),
            "sent_rows": result["sent_rows"],
            "sent_mbytes": result["sent_rows"] * hidden * 4 / 1e6,
            "emulated_rows": result["emulated_rows"],
            "auto_overlaps": result["auto_overlaps"],
        }
        for name, result in results.items()
    ]


def _time_variants(
    batches: dict[str, Batch], hidden: int, repeats: int, warm_up: int
) -> dict[str, Row]:
    """What all ranks measured, by variant; every rank calls this."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(rank)
    slots = {name: torch.from_numpy(batch.slot_GTK[rank]) for name, batch in batches.items()}
    x = torch.randn(len(slots["contiguous"]), hidden, generator=draw)
    weight = torch.rand(slots["contiguous"].shape, generator=draw)
    per_rank = batches["contiguous"].slots_per_rank
    passes: dict[str, Callable[[], Tensor]] = {
        "all_to_all": lambda: plain_pass(x, slots["contiguous"], weight, per_rank),
        "ours": _dispatcher_pass("torch", x, slots["contiguous"], weight, per_rank),
        "ours+plan": _dispatcher_pass("torch", x, slots["semantic"], weight, per_rank),
        "overlap off": _expert_pass(x, slots["semantic"], weight, per_rank, "off"),
        "overlap on": _expert_pass(x, slots["semantic"], weight, per_rank, "on"),
    }
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(warm_up + repeats):
        for name, one_pass in passes.items():
            dist.barrier()
            started = time.perf_counter()
            one_pass()
            slowest = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if repeat >= warm_up:
                times[name].append(float(slowest) * 1e3)
    counts = {
        "all_to_all": (_routes_sent(slots["contiguous"], rank, per_rank), None),
        "ours": _counted(x, slots["contiguous"], weight, per_rank),
        "ours+plan": _counted(x, slots["semantic"], weight, per_rank),
    }
    counts |= dict.fromkeys(OVERLAPS, (counts["ours+plan"][0], None))
    auto = _dispatcher("torch", per_rank).dispatch(x, slots["semantic"], weight, overlap="auto")
    auto_overlaps = torch.tensor(float(auto.travelling is not None))
    if auto.travelling is not None:
        auto.travelling.wait()
    dist.all_reduce(auto_overlaps)
    results = {}
    for name, (sent, emulated) in counts.items():
        both = torch.tensor([sent, emulated or 0], dtype=torch.float64)
        dist.all_reduce(both)
        results[name] = {
            "ms": times[name],
            "sent_rows": float(both[0]) / ranks,
            "emulated_rows": None if emulated is None else float(both[1]) / ranks,
            "auto_overlaps": int(auto_overlaps) if name in OVERLAPS else None,
        }
    return results


def plain_pass(x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor, slots_per_rank: int) -> Tensor:
    """What a runtime without de-duplication does: a row a route, there and back, weighted sum."""
    ranks, topk = dist.get_world_size(), slot_TK.shape[1]
    flat = slot_TK.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat // slots_per_rank, minlength=ranks)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts)
    sent, arrived = counts.tolist(), received.tolist()
    rows = x_TD[order // topk]
    there = x_TD.new_empty(sum(arrived), x_TD.shape[1])
    dist.all_to_all_single(there, rows, arrived, sent)
    slot = torch.empty(sum(arrived), dtype=flat.dtype)
    dist.all_to_all_single(slot, flat[order], arrived, sent)
    by_slot = torch.argsort(slot, stable=True)
    y = there[by_slot]  # identity experts
    back = torch.empty_like(y)
    back[by_slot] = y
    home = torch.empty_like(rows)
    dist.all_to_all_single(home, back, sent, arrived)
    routed = torch.empty_like(home)
    routed[order] = home
    return (routed.view(len(x_TD), topk, -1) * weight_TK[..., None]).sum(dim=1)


def _dispatcher(backend: str, slots_per_rank: int) -> Any:
    from semantic_ep.runtime.backends import create_dispatcher

    return create_dispatcher(backend, group=dist.group.WORLD, slots_per_rank=slots_per_rank)


def _dispatcher_pass(
    backend: str, x: Tensor, slot: Tensor, weight: Tensor, slots_per_rank: int
) -> Callable[[], Tensor]:
    dispatcher = _dispatcher(backend, slots_per_rank)

    def one_pass() -> Tensor:
        dispatched = dispatcher.dispatch(x, slot, weight)
        out: Tensor = dispatcher.combine(dispatched.rows_RD, dispatched)
        return out

    return one_pass


def _expert_pass(
    x: Tensor, slot: Tensor, weight: Tensor, slots_per_rank: int, overlap: OverlapMode
) -> Callable[[], Tensor]:
    dispatcher = _dispatcher("torch", slots_per_rank)
    hidden = x.shape[1]
    draw = torch.Generator().manual_seed(dist.get_rank())
    matrix_SDD = torch.randn(slots_per_rank, hidden, hidden, generator=draw) / hidden**0.5

    def experts(rows: ExpertRows) -> Tensor:
        blocks = rows.rows_RD.split(rows.tokens_per_slot_S.tolist())
        return torch.cat([block @ matrix for block, matrix in zip(blocks, matrix_SDD, strict=True)])

    def one_pass() -> Tensor:
        dispatched = dispatcher.dispatch(x, slot, weight, overlap=overlap)
        y = experts(dispatched)
        if dispatched.travelling is None:
            out: Tensor = dispatcher.combine(y, dispatched)
        else:
            out = dispatcher.combine(y, dispatched, experts(dispatched.travelling.wait()))
        return out

    return one_pass


def _routes_sent(slot_TK: Tensor, rank: int, slots_per_rank: int) -> int:
    return int((slot_TK // slots_per_rank != rank).sum())


def _rows_sent(backend: str, x: Tensor, slot: Tensor, weight: Tensor, slots_per_rank: int) -> int:
    dispatcher = _dispatcher(backend, slots_per_rank)
    dispatcher.dispatch(x, slot, weight)
    rows = dispatcher.stats.rows_dispatch[0]
    return int(rows.sum() - rows[dist.get_rank()])


def _counted(
    x: Tensor, slot: Tensor, weight: Tensor, slots_per_rank: int
) -> tuple[int, int | None]:
    """Rows sent to other ranks: of the whole batch, and of its first tokens by the kernels."""
    from semantic_ep.runtime.kernels.backend import EmulatedKernelsBackend

    sent = _rows_sent("torch", x, slot, weight, slots_per_rank)
    if not EmulatedKernelsBackend().is_available()[0]:
        return sent, None
    few = (x[:COUNTED_TOKENS, :64], slot[:COUNTED_TOKENS], weight[:COUNTED_TOKENS])
    emulated = _rows_sent("kernels-emulated", *few, slots_per_rank)
    expected = _rows_sent("torch", *few, slots_per_rank)
    if emulated != expected:
        raise RuntimeError(f"emulated kernels sent {emulated} rows, the torch backend {expected}")
    return sent, emulated


def _timing(row: Row) -> Row:
    return {
        "ranks": row["ranks"],
        "variant": row["variant"],
        "ms": row["median_ms"],
        "p20..p80": f"{row['p20_ms']:.3g}..{row['p80_ms']:.3g}",
    }


def _summary(rows: Sequence[Row]) -> list[Row]:
    plain = {row["ranks"]: row["median_ms"] for row in rows if row["variant"] == "all_to_all"}
    return [
        {
            **_timing(row),
            "against all_to_all": f"{plain[row['ranks']] / row['median_ms']:.2f}x",
            "rows to others": row["sent_rows"],
            "MB to others": row["sent_mbytes"],
            "emulated rows": row["emulated_rows"],
        }
        for row in rows
    ]


def _overlap_summary(rows: Sequence[Row]) -> list[Row]:
    off = {row["ranks"]: row["median_ms"] for row in rows if row["variant"] == "overlap off"}
    return [
        {
            **_timing(row),
            "against off": f"{off[row['ranks']] / row['median_ms']:.2f}x",
            "ranks where auto overlaps": row["auto_overlaps"],
        }
        for row in rows
        if row["variant"] in OVERLAPS
    ]
