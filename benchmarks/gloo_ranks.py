"""CPU ranks over gloo that a benchmark starts for one function.

Ranks are forked from a server, and end without finalizing an interpreter.
"""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PEER_SECONDS = 120
SERVING = (
    "torch.distributed",
    "transformers.models.auto.modeling_auto",
    "transformers.generation.utils",
    "deepspeed",
)


def on_ranks(
    target: Callable[..., Any], ranks: int, *args: Any, preload: Sequence[str] = SERVING
) -> Any:
    """Call `target(*args)` on CPU ranks over gloo, one thread each, and return rank 0's result.

    Args:
        target: A module-level function; the default process group is all ranks.
        ranks: How many.
        *args: Pickled.
        preload: Modules that ranks find imported; what is set first in a process stays.
    """
    # Read when DeepSpeed is imported, which the ranks' parent does before they start.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload([*preload])
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "output")
        torch.multiprocessing.start_processes(
            _rank_main,
            args=(ranks, str(Path(directory, "store")), output, target, args),
            nprocs=ranks,
            start_method="forkserver",
        )
        return pickle.loads(output.read_bytes())


def _rank_main(
    rank: int,
    ranks: int,
    store: str,
    output: Path,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=PEER_SECONDS),
    )
    result = target(*args)
    if rank == 0:
        output.write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
