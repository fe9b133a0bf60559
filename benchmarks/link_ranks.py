"""One rank of the slow_links theme: serve on every link, and read the counters of the interface.

Started by DeepSpeed's launcher in the namespace of its host:

    python -m deepspeed.launcher.runner --hostfile H --no_ssh --node_rank N --master_addr A \\
        --module benchmarks.link_ranks JOB.json

The job names files that all hosts see, and each rank leaves `rank<N>.json` beside it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.link_bytes import Sent, sent_to_others
from benchmarks.link_hosts import INTERFACE, Command, execute
from semantic_ep.artifacts import write_file_atomically
from semantic_ep.integrations.deepspeed.inference import init_distributed
from semantic_ep.plan.plan import Plan
from semantic_ep.runtime.collectives import leave
from semantic_ep.serve.compare import ServingMode, compare_modes
from semantic_ep.serve.engine import Generation, SemanticInferenceEngine

_PEER_SECONDS = 120
_BULK_BYTES, _BULK_REPEATS, _PING_REPEATS = 2_000_000, 5, 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks are told; written as JSON.

    Attributes:
        model: Hugging Face checkpoint.
        plans: Mode -> plan artefact.
        rank_of_request: Mode -> [R].
        prompts: [R], token ids.
        expected: [R], new tokens of transformers in one process.
        max_new_tokens: Of each request.
        max_batch_size: Sequences that run together on a rank.
        links: Name -> commands that make all links so, which rank 0 runs.
        rounds: Of every mode on every link; the first warms up.
    """

    model: str
    plans: dict[str, str]
    rank_of_request: dict[str, list[int]]
    prompts: list[list[int]]
    expected: list[list[int]]
    max_new_tokens: int
    max_batch_size: int
    links: dict[str, list[Command]]
    rounds: int

    def write(self, path: Path) -> None:
        """Write for the ranks."""
        path.write_text(json.dumps(dataclasses.asdict(self)))


class CountedEngine(SemanticInferenceEngine):
    """An engine that keeps what every call took and sent.

    Attributes:
        last: Of the last call of `generate`: "seconds" by phase and in "total", "steps", "counted"
            by the dispatcher for other ranks, "sent" by the interface, and "outputs".
    """

    last: dict[str, Any]

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generation:
        """See `SemanticInferenceEngine.generate`."""
        before, start = read_counters(), time.perf_counter()
        done = super().generate(prompts, **options)
        total = time.perf_counter() - start
        sent = read_counters() - before
        stats = self.model.dispatcher.stats
        self.last = {
            "seconds": {**done.seconds, "total": total},
            "steps": done.steps,
            # Whoever compares modes resets the counters before each call.
            "counted": sent_to_others(stats.snapshot(), stats.rank),
            "sent": dataclasses.asdict(sent),
            "outputs": done.outputs,
        }
        return done


def read_counters() -> Sent:
    """What this host has sent since its interface was made."""
    folder = Path("/sys/class/net", INTERFACE, "statistics")
    queue = json.loads(
        subprocess.run(
            ["tc", "-s", "-j", "qdisc", "show", "dev", INTERFACE, "root"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )[0]
    return Sent(
        interface_bytes=int((folder / "tx_bytes").read_text()),
        interface_packets=int((folder / "tx_packets").read_text()),
        wire_bytes=queue["bytes"],
        wire_packets=queue["packets"],
        segments_again=_segments_again(),
    )


def _segments_again() -> int:
    """TCP segments that this network namespace has sent again (RFC 4022, tcpRetransSegs)."""
    lines = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))["RetransSegs"])


def link_speed() -> dict[str, float] | None:
    """What rank 0 reaches to rank 1 through gloo: "mbits" with messages of 2 MB, "ping_us" back
    and forth with one byte. None on other ranks.
    """
    rank = dist.get_rank()
    if rank > 1:
        return None
    byte, bulk = torch.zeros(1, dtype=torch.uint8), torch.zeros(_BULK_BYTES, dtype=torch.uint8)

    def there_and_back(message: torch.Tensor) -> float:
        start = time.perf_counter()
        if rank == 0:
            dist.send(message, 1)
            dist.recv(byte, 1)
        else:
            dist.recv(message, 0)
            dist.send(byte, 0)
        return time.perf_counter() - start

    pings = [there_and_back(byte) for _ in range(_PING_REPEATS)]
    bulks = [there_and_back(bulk) for _ in range(_BULK_REPEATS)]
    return {
        "mbits": _BULK_BYTES * 8 / float(np.median(bulks)) / 1e6,
        "ping_us": float(np.median(pings)) * 1e6,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, and write what was measured; returns 0."""
    path = Path((sys.argv[1:] if argv is None else argv)[0])
    job = Job(**json.loads(path.read_text()))
    init_distributed(device_type="cpu", peer_timeout=_PEER_SECONDS)
    torch.set_num_threads(1)
    group = dist.group.WORLD
    assert group is not None
    modes = {
        name: ServingMode(
            engine=CountedEngine.from_checkpoint(
                Path(job.model), placement=Plan.read(plan).placement, group=group
            ),
            rank_of_request=np.asarray(job.rank_of_request[name]),
        )
        for name, plan in job.plans.items()
    }
    speeds, calls = {}, []
    for number in range(job.rounds):
        # As modes do, links take turns, so that what else happens falls on all alike.
        links = list(job.links) if number % 2 else list(reversed(job.links))
        for link in links:
            if dist.get_rank() == 0:
                execute(job.links[link])
            dist.barrier()
            if number == 0:
                speeds[link] = link_speed()
            order = dict(modes if number % 2 else reversed(modes.items()))
            for call in _serve(job, order):
                calls.append({"link": link, "round": number, **call})
    measured = {
        "layers": next(iter(modes.values())).engine.model.placement.num_layers,
        "links": speeds,
        "calls": calls,
    }
    target = path.parent / f"rank{dist.get_rank()}.json"
    write_file_atomically(target, json.dumps(measured).encode())
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _serve(job: Job, modes: Mapping[str, ServingMode]) -> Iterator[dict[str, Any]]:
    """Serve once in every mode; this rank's calls, with requests whose tokens are wrong."""
    compare_modes(
        modes,
        job.prompts,
        max_new_tokens=job.max_new_tokens,
        max_batch_size=job.max_batch_size,
        rounds=1,
    )
    for name, mode in modes.items():
        engine = mode.engine
        assert isinstance(engine, CountedEngine)
        mine = np.flatnonzero(mode.rank_of_request == engine.group.rank()).tolist()
        outputs = engine.last.pop("outputs")
        yield {
            "mode": name,
            **engine.last,
            "tokens": sum(map(len, outputs)),
            "different": [
                request
                for request, tokens in zip(mine, outputs, strict=True)
                if tokens != job.expected[request]
            ],
        }


if __name__ == "__main__":
    leave(main())
