"""The GPU half of the dispatch theme: virtual ranks on one device.

All heaps lie in one memory, so the limit is the device's own copy bandwidth, measured in the same
run: bytes read and written by the kernels over time, against a large copy's. "Wire" counts what
would cross NVLink: rows to other ranks; "logical" also those that stay.

Shapes: T tokens of a rank, D hidden, K top-k, S slots a rank, G ranks, R rows of a rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.registry import Result, Row, Table
from benchmarks.virtual_ranks import Rows, VirtualRanks, check, random_inputs
from benchmarks.virtual_torch import TorchRanks
from semantic_ep.errors import BackendError, explain

TOPK, SLOTS = 8, 32
COPY_BYTES = 1 << 30


def run_gpu(args: argparse.Namespace) -> Result:
    """Time kernels and the torch path, interleaved, at each number of tokens and ranks."""
    if not torch.cuda.is_available():
        raise BackendError(
            explain("torch sees no CUDA device", where="--device", do="Use --device cpu")
        )
    device = torch.device("cuda", torch.cuda.current_device())
    hidden = args.hidden or 7168
    copy_rate = copy_bandwidth(device, args.repeats)
    rows: list[Row] = []
    for ranks in args.ranks or [8]:
        for tokens in args.tokens or [128, 4096]:
            rows += _measure(device, ranks, tokens, hidden, copy_rate, args)
    return Result(
        theme="dispatch",
        protocol={
            "device": torch.cuda.get_device_name(device),
            "ranks": "virtual, one stream each, on one device",
            "hidden": hidden,
            "dtype": "bfloat16",
            "topk": TOPK,
            "slots_per_rank": SLOTS,
            "routes": "uniform, distinct",
            "timing": f"all ranks, launch: {args.launch}, events, {args.repeats} runs after "
            f"{args.warm_up}, variants interleaved",
            "copy_gbytes_per_s": copy_rate / 1e9,
            "of_copy": "(bytes read + written by rows) / time / copy rate; a copy of n bytes "
            "reads and writes 2 n",
            "torch": "index_select, all-to-all as copies, index_select; a row a route, no waits; "
            "where rows go is not timed",
            "launch_floor_us": "the same with as many empty kernels",
        },
        rows=rows,
        tables=[Table(title="Virtual ranks on one GPU (median)", rows=_summary(rows))],
    )


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second that a device-to-device copy reads and writes together."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_replays({"copy": lambda: target.copy_(source)}, repeats, warm_up=3)["copy"]
    return 2 * COPY_BYTES / statistics.median(times)


def time_replays(
    steps: dict[str, Callable[[], Any]], repeats: int, warm_up: int, *, graphs: bool = True
) -> dict[str, list[float]]:
    """Seconds of each run of each step, as a CUDA graph or as it is; steps take turns."""
    for step in steps.values():  # before any capture, which gives cached memory back
        step()
        torch.cuda.synchronize()
    runs = {name: _captured(step) if graphs else step for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        for name, run in runs.items():
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= warm_up:
                times[name].append(begin.elapsed_time(end) / 1e3)
    return times


def _captured(step: Callable[[], Any]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _measure(
    device: torch.device,
    ranks: int,
    tokens: int,
    hidden: int,
    copy_rate: float,
    args: argparse.Namespace,
) -> list[Row]:
    inputs = random_inputs(
        ranks,
        tokens=tokens,
        hidden=hidden,
        slots_per_rank=SLOTS,
        topk=TOPK,
        dtype=torch.bfloat16,
        device=device,
        seed=args.seed,
    )
    x, slot, weight = inputs
    per_rank = [sum(int((s // SLOTS == rank).sum()) for s in slot) for rank in range(ranks)]
    virtual = VirtualRanks(
        num_ranks=ranks,
        slots_per_rank=SLOTS,
        max_tokens=tokens,
        topk=TOPK,
        hidden=hidden,
        dtype=torch.bfloat16,
        device=device,
        max_rows=max(per_rank),
    )
    received = virtual.dispatch(x, slot, weight)
    virtual.finish()
    check(x, slot, weight, received, SLOTS)
    y = [here.rows_RD.clone() for here in received]
    steps = _steps(virtual, inputs, received, y)
    times = time_replays(steps, args.repeats, args.warm_up, graphs=args.launch == "graph")
    virtual.finish()
    traffic = _traffic(slot, ranks, hidden)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        {
            "ranks": ranks,
            "tokens": tokens,
            "step": name,
            "median_us": medians[name] * 1e6,
            "p20_us": float(np.percentile(seconds, 20)) * 1e6,
            "p80_us": float(np.percentile(seconds, 80)) * 1e6,
            "n": len(seconds),
            **_rates(name, medians, traffic, ranks, copy_rate),
        }
        for name, seconds in times.items()
    ]


def _steps(
    virtual: VirtualRanks,
    inputs: tuple[list[Tensor], list[Tensor], list[Tensor]],
    received: list[Rows],
    y: list[Tensor],
) -> dict[str, Callable[[], Any]]:
    """Kernels and torch's way, each for all ranks, and as many empty kernels."""
    x, slot, weight = inputs
    torch_ranks = TorchRanks(slot, SLOTS)
    used = [rows[: len(order)] for rows, order in zip(y, torch_ranks.dispatch(x), strict=True)]
    empty = torch.empty(1, device=x[0].device)

    def forked(step: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            virtual.fork()
            step()
            virtual.join()

        return run

    def launches(count: int) -> Callable[[], None]:
        def run() -> None:
            for rank in range(len(x)):
                with virtual.stream(rank):
                    for _ in range(count):
                        empty.fill_(0)

        return forked(run)

    return {
        "dispatch": forked(lambda: virtual.dispatch(x, slot, weight)),
        "combine": forked(lambda: virtual.combine(y, received)),
        "torch dispatch": lambda: torch_ranks.dispatch(x),
        "torch combine": lambda: torch_ranks.combine(used, weight),
        "launch floor dispatch": launches(4),
        "launch floor combine": launches(2),
    }


def _traffic(slot: list[Tensor], ranks: int, hidden: int) -> dict[str, int]:
    """Bytes of all ranks together: copies (token, rank), those to others, and rows a route."""
    row = hidden * 2
    hit = [torch.stack([(s // SLOTS == r).any(1) for r in range(ranks)], 1) for s in slot]
    copies = sum(int(one.sum()) for one in hit)
    own = sum(int(one[:, rank].sum()) for rank, one in enumerate(hit))
    tokens = sum(len(s) for s in slot)
    routes = sum(s.numel() for s in slot)
    return {
        "tokens": tokens * row,
        "copies": copies * row,
        "remote": (copies - own) * row,
        "routes": routes * row,
    }


def _rates(
    step: str, medians: dict[str, float], traffic: dict[str, int], ranks: int, copy_rate: float
) -> dict[str, float | None]:
    """Wire and logical GB/s of one rank, and time against the limits and torch's way.

    Two limits: the device's copy rate for the bytes moved, and as many empty kernels.
    """
    # dispatch: read x, write remote copies; read copies, write rows. combine: the way back.
    moved = {
        "dispatch": traffic["tokens"] + traffic["remote"] + traffic["copies"] + traffic["routes"],
        "combine": traffic["routes"] + 2 * traffic["copies"] + traffic["tokens"],
    }.get(step)
    seconds = medians[step]
    if moved is None:
        return dict.fromkeys(("wire_gb_s", "logical_gb_s", "of_copy", "over_floor", "over_torch"))
    return {
        "wire_gb_s": traffic["remote"] / ranks / seconds / 1e9,
        "logical_gb_s": traffic["copies"] / ranks / seconds / 1e9,
        "of_copy": moved / seconds / copy_rate,
        "over_floor": seconds / medians[f"launch floor {step}"],
        "over_torch": medians[f"torch {step}"] / seconds,
    }


def _summary(rows: Sequence[Row]) -> list[Row]:
    return [
        {
            "ranks": row["ranks"],
            "tokens": row["tokens"],
            "step": row["step"],
            "us": row["median_us"],
            "p20..p80": f"{row['p20_us']:.4g}..{row['p80_us']:.4g}",
            "wire GB/s": row["wire_gb_s"],
            "logical GB/s": row["logical_gb_s"],
            "% of copy": None if row["of_copy"] is None else 100 * row["of_copy"],
            "x launch floor": row["over_floor"],
            "faster than torch": row["over_torch"],
        }
        for row in rows
    ]
