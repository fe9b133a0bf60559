"""Topology: which node each EP rank is on, and what the links between ranks carry.

Read from JSON (see `configs/topology`), a DeepSpeed/MPI hostfile, or the variables Slurm sets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from semantic_ep.errors import ConfigError, explain, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank can send, and what one message costs.

    Attributes:
        name: Field name of the link, e.g. "nvlink4".
        gigabytes_per_second: One direction, for one rank, as a large all-to-all reaches it.
        latency_microseconds: Fixed cost of one collective over this link.
    """

    name: str
    gigabytes_per_second: float
    latency_microseconds: float

    def __post_init__(self) -> None:
        if self.gigabytes_per_second <= 0 or self.latency_microseconds < 0:
            raise ConfigError(
                explain(
                    "a link needs a positive bandwidth and a latency of at least 0",
                    where=f"topology link {self.name!r}",
                    got=f"{self.gigabytes_per_second} GB/s, {self.latency_microseconds} us",
                )
            )


# Order-of-magnitude figures for one GPU, one direction, below the data sheets' peaks because an
# all-to-all does not reach them. A user who measured better ones states them in the JSON.
LINKS = {
    link.name: link
    for link in (
        Link(name="nvlink3", gigabytes_per_second=240.0, latency_microseconds=10.0),
        Link(name="nvlink4", gigabytes_per_second=360.0, latency_microseconds=10.0),
        Link(name="nvlink5", gigabytes_per_second=720.0, latency_microseconds=10.0),
        Link(name="pcie4", gigabytes_per_second=20.0, latency_microseconds=15.0),
        Link(name="pcie5", gigabytes_per_second=40.0, latency_microseconds=15.0),
        Link(name="ib_hdr", gigabytes_per_second=20.0, latency_microseconds=25.0),
        Link(name="ib_ndr", gigabytes_per_second=42.0, latency_microseconds=25.0),
        Link(name="ethernet_25g", gigabytes_per_second=2.6, latency_microseconds=60.0),
        Link(name="ethernet_100g", gigabytes_per_second=10.0, latency_microseconds=60.0),
        Link(name="shared_memory", gigabytes_per_second=5.0, latency_microseconds=20.0),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks of one EP group on their nodes.

    Attributes:
        node_of_rank: Node index of each EP rank, in rank order; its length is G.
        intra_node: Link between ranks of a node.
        inter_node: Link between nodes, as one rank's share of it.
    """

    node_of_rank: tuple[int, ...]
    intra_node: Link = LINKS["nvlink4"]
    inter_node: Link = LINKS["ib_ndr"]

    def __post_init__(self) -> None:
        nodes = sorted(set(self.node_of_rank))
        if not nodes or nodes != list(range(len(nodes))):
            raise ConfigError(
                explain(
                    "node indices must be 0, 1, ... without a gap",
                    where="topology node_of_rank",
                    got=str(self.node_of_rank),
                )
            )

    @property
    def ep_size(self) -> int:
        """Number of EP ranks (G)."""
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return max(self.node_of_rank) + 1

    @property
    def nodes(self) -> np.ndarray:
        """[G] int64, node of each rank."""
        return np.asarray(self.node_of_rank, dtype=np.int64)

    @classmethod
    def uniform(
        cls,
        ep_size: int,
        *,
        num_nodes: int = 1,
        intra_node: Link = LINKS["nvlink4"],
        inter_node: Link = LINKS["ib_ndr"],
    ) -> Self:
        """Ranks dealt to nodes in order, the same number on each."""
        if num_nodes < 1 or ep_size % num_nodes:
            raise ConfigError(
                explain(
                    f"{ep_size} EP ranks cannot be spread evenly over {num_nodes} nodes",
                    where="topology (--nodes)",
                    allowed=[n for n in range(1, ep_size + 1) if ep_size % n == 0],
                )
            )
        per_node = ep_size // num_nodes
        return cls(
            node_of_rank=tuple(rank // per_node for rank in range(ep_size)),
            intra_node=intra_node,
            inter_node=inter_node,
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read `{"ranks_per_node": [8, 8], "intra_node": "nvlink4", "inter_node": {...}}`.

        A link is a name of `LINKS` or an object with the fields of `Link`.
        """
        file = Path(path)
        try:
            data = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                explain(
                    f"cannot read this topology: {error}",
                    where=str(file),
                    do="See configs/topology for examples",
                )
            ) from error
        known = {"ranks_per_node", "intra_node", "inter_node", "description"}
        if not isinstance(data, dict) or set(data) - known or "ranks_per_node" not in data:
            raise ConfigError(
                explain(
                    "a topology is an object with ranks_per_node and, optionally, its links",
                    where=str(file),
                    got=sorted(data) if isinstance(data, dict) else type(data).__name__,
                    allowed=sorted(known),
                )
            )
        ranks = data["ranks_per_node"]
        if not isinstance(ranks, list) or not all(isinstance(n, int) and n > 0 for n in ranks):
            raise ConfigError(
                explain("ranks_per_node is a list of positive integers", where=str(file), got=ranks)
            )
        return cls(
            node_of_rank=_spread(ranks),
            intra_node=_link(data.get("intra_node", "nvlink4"), f"{file}: intra_node"),
            inter_node=_link(data.get("inter_node", "ib_ndr"), f"{file}: inter_node"),
        )

    @classmethod
    def from_hostfile(cls, path: str | os.PathLike[str]) -> Self:
        """Read a DeepSpeed or MPI hostfile: `host slots=8`, comments with #."""
        file = Path(path)
        try:
            lines = file.read_text().splitlines()
        except OSError as error:
            raise ConfigError(
                explain(f"cannot read this hostfile: {error.strerror}", where=str(file))
            ) from error
        slots: list[int] = []
        for number, line in enumerate(lines, start=1):
            entry = line.split("#")[0].strip()
            if not entry:
                continue
            match = re.fullmatch(r"\S+\s+slots\s*=\s*([1-9]\d*)(\s+.*)?", entry)
            if not match:
                raise ConfigError(
                    explain(
                        "not a hostfile line",
                        where=f"{file}:{number}",
                        got=entry,
                        allowed="<host> slots=<ranks>",
                    )
                )
            slots.append(int(match.group(1)))
        if not slots:
            raise ConfigError(explain("the hostfile names no host", where=str(file)))
        return cls(node_of_rank=_spread(slots))

    @classmethod
    def from_slurm(cls, environ: Mapping[str, str]) -> Self:
        """Read SLURM_TASKS_PER_NODE (e.g. "8(x2),4"), one task a rank, block distribution."""
        text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
        counts: list[int] = []
        for part in text.split(",") if text else []:
            match = re.fullmatch(r"\s*([1-9]\d*)(?:\(x([1-9]\d*)\))?\s*", part)
            if not match:
                counts = []
                break
            counts += [int(match.group(1))] * int(match.group(2) or 1)
        if not counts:
            raise ConfigError(
                explain(
                    "no Slurm task layout here",
                    where="SLURM_TASKS_PER_NODE",
                    got=text or "not set",
                    allowed='such as "8(x2),4"',
                    do="Run inside a Slurm allocation, or give a topology JSON or a hostfile",
                )
            )
        return cls(node_of_rank=_spread(counts))

    def first(self, ep_size: int) -> Topology:
        """Return the topology of the first `ep_size` ranks: one EP group of a larger job."""
        if not 1 <= ep_size <= self.ep_size:
            raise ConfigError(
                explain(
                    "the topology has fewer ranks than the EP group",
                    where="topology",
                    got=f"ep_size {ep_size}",
                    allowed=f"1..{self.ep_size}",
                )
            )
        return dataclasses.replace(self, node_of_rank=self.node_of_rank[:ep_size])

    def dealt_in_turn(self) -> Topology:
        """Return the same nodes with ranks dealt to them in turn: Slurm's cyclic distribution."""
        seats = [(self.node_of_rank[:rank].count(n), n) for rank, n in enumerate(self.node_of_rank)]
        return dataclasses.replace(self, node_of_rank=tuple(node for _, node in sorted(seats)))

    def of_ranks(self, ranks: Sequence[int]) -> Topology:
        """Return the topology of some ranks, in the given order: any EP group of a larger job."""
        nodes = [self.node_of_rank[rank] for rank in ranks]
        numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
        return dataclasses.replace(self, node_of_rank=tuple(numbers[node] for node in nodes))


def _spread(ranks_per_node: list[int]) -> tuple[int, ...]:
    return tuple(node for node, count in enumerate(ranks_per_node) for _ in range(count))


def _link(value: Any, where: str) -> Link:
    if isinstance(value, str):
        if value not in LINKS:
            close = nearest(value, LINKS)
            raise ConfigError(
                explain(
                    "unknown link",
                    where=where,
                    got=value,
                    allowed=sorted(LINKS),
                    do=f'Did you mean "{close}"?'
                    if close
                    else "Or give an object with its figures",
                )
            )
        return LINKS[value]
    fields = [field.name for field in dataclasses.fields(Link)]
    if not isinstance(value, dict) or sorted(value) != sorted(fields):
        raise ConfigError(
            explain("a link is a name or an object", where=where, got=value, allowed=fields)
        )
    return Link(**value)
