"""Real ranks over NVLink against NCCL: `torchrun --nproc-per-node 8 benchmarks/gpu/many_gpus.py`.

Checks that the kernels give the rows of the torch backend bit for bit and its sums to rounding, and
that own rows first change no bit of either's; times all four, interleaved.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    """Compare and time; 0 if everything agrees or there is nothing to compare on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="a rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32, help="a rank")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if torch.cuda.device_count() < 2:
        print("skipped: fewer than 2 CUDA devices")
        return 0
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        compare(args)
    finally:
        dist.destroy_process_group()
    return 0


def compare(args: argparse.Namespace) -> None:
    """One line a backend on rank 0."""
    from semantic_ep.runtime.dispatch import Dispatcher, LocalFirstDispatcher
    from semantic_ep.runtime.kernels.dispatcher import KernelDispatcher
    from semantic_ep.runtime.stats import DispatchStats
    from semantic_ep.runtime.torch_dispatch import TorchDispatcher

    group = dist.group.WORLD
    rank, ranks = group.rank(), group.size()
    draw = torch.Generator(device="cuda").manual_seed(rank)
    x = torch.randn(args.tokens, args.hidden, generator=draw, device="cuda").bfloat16()
    scores = torch.rand(args.tokens, ranks * args.slots, generator=draw, device="cuda")
    slot = scores.topk(args.topk).indices
    weight = torch.rand(args.tokens, args.topk, generator=draw, device="cuda")

    def new_stats() -> DispatchStats:
        return DispatchStats(num_layers=1, ep_size=ranks, slots_per_rank=args.slots, rank=rank)

    kernels = KernelDispatcher(
        group=group, slots_per_rank=args.slots, stats=new_stats(), max_tokens=args.tokens
    )
    plain = TorchDispatcher(group=group, slots_per_rank=args.slots, stats=new_stats())

    def at_once(backend: Dispatcher) -> tuple[torch.Tensor, torch.Tensor]:
        dispatched = backend.dispatch(x, slot, weight)
        return dispatched.rows_RD, backend.combine(dispatched.rows_RD, dispatched)

    def own_first(backend: LocalFirstDispatcher) -> tuple[torch.Tensor, torch.Tensor]:
        dispatched = backend.dispatch_local_first(x, slot, weight, overlap="on")
        assert dispatched.travelling is not None
        others = dispatched.travelling.wait()
        return others.rows_RD, backend.combine(dispatched.rows_RD, dispatched, others.rows_RD)

    passes = {
        "kernels": lambda: at_once(kernels),
        "torch (NCCL)": lambda: at_once(plain),
        "kernels, own rows first": lambda: own_first(kernels),
        "torch (NCCL), own rows first": lambda: own_first(plain),
    }
    rows, sums = [], []
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(3 + args.repeats):
        for name, one_pass in passes.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            begin.record()
            moved, out = one_pass()
            end.record()
            end.synchronize()
            if repeat == 0:
                rows.append(moved)
                sums.append(out)
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end) * 1e3)
    assert torch.equal(rows[0], rows[1]), "rows differ"
    assert torch.equal(rows[2], rows[3]), "others' rows differ"
    for at_once_sums, own_first_sums in zip(sums[:2], sums[2:], strict=True):
        assert torch.equal(at_once_sums, own_first_sums), "own rows first change the sums"
    torch.testing.assert_close(sums[0], sums[1], rtol=2e-2, atol=2e-2)
    for name, values in times.items():
        slowest = torch.tensor(statistics.median(values), device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if rank == 0:
            print(f"{name}: dispatch + combine {float(slowest):.0f} us, slowest rank's median")


if __name__ == "__main__":
    raise SystemExit(main())
