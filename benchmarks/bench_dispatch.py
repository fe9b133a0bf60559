"""Dispatch and combine: plain all-to-all, ours, and ours with a semantic plan.

On the CPU: gloo ranks in processes, routes from a trace (`--trace`) or from a synthetic text
with topics, variants interleaved; the rows that each must send are counted once more by the
emulated kernels. On a GPU: virtual ranks on one device, kernels against index_select and copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.registry import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the theme."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 2 4 (cpu), 8 (cuda)")
    parser.add_argument("--tokens", type=int, nargs="+", help="a rank; default: 512, 128 4096")
    parser.add_argument("--hidden", type=int, help="default: 1024 (cpu), 7168 (cuda)")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes of each variant")
    parser.add_argument("--warm-up", type=int, default=3, help="passes that are not counted")
    parser.add_argument(
        "--launch",
        choices=["graph", "streams"],
        default="graph",
        help="run all virtual ranks as one CUDA graph, or from the host (cuda)",
    )
    parser.add_argument("--trace", type=Path, metavar="NPZ", help="routing trace (cpu)")
    parser.add_argument("--layer", type=int, default=0, help="MoE layer of the trace (cpu)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> Result:
    """Measure on the device asked for."""
    if args.device == "cuda":
        from benchmarks.dispatch_gpu import run_gpu

        return run_gpu(args)
    from benchmarks.dispatch_cpu import run_cpu

    return run_cpu(args)
