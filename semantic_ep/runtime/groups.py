"""Semantic EP groups: which ranks exchange tokens with each other.

`GroupPlan` is plain arithmetic on rank numbers, printable without any process; `create` turns it
into process groups. Ranks are never reordered: `torch.distributed.new_group` sorts them, so the EP
rank is the position of the global rank among those of its group.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """Ranks of every expert-parallel group and of every group of expert replicas.

    Attributes:
        expert_parallel: Rank tuples, each rising. Ranks of one group hold different experts and
            exchange tokens.
        expert_data_parallel: Rank tuples, each rising. Ranks of one group hold the same experts:
            group i has the i-th rank of every expert-parallel group. They reduce the gradients of
            experts in training, and are independent in serving.
        node_of_rank: Node of every rank.
    """

    expert_parallel: tuple[tuple[int, ...], ...]
    expert_data_parallel: tuple[tuple[int, ...], ...]
    node_of_rank: tuple[int, ...]

    @classmethod
    def build(
        cls,
        world_size: int,
        ep_size: int,
        *,
        topology: Topology | None = None,
        scope: Literal["node", "global"] = "node",
    ) -> Self:
        """Group `world_size` ranks by `ep_size`.

        Args:
            world_size: All ranks.
            ep_size: Ranks in an expert-parallel group.
            topology: Node of every rank; None means one node.
            scope: "node" fills groups node by node, so that a group of at most a node's size stays
                inside it; "global" takes ranks in their order.

        Raises:
            ConfigError: The sizes do not divide, or with "node" a group that would fit into a node
                cannot be kept inside one.
        """
        where = "semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size"
        if ep_size < 1 or world_size % ep_size:
            raise ConfigError(
                explain(
                    f"ep_size = {ep_size} does not divide the world size {world_size}",
                    where=where,
                    allowed=[n for n in range(1, world_size + 1) if world_size % n == 0],
                )
            )
        topology = topology or Topology.uniform(world_size)
        if topology.ep_size != world_size:
            raise ConfigError(
                explain(
                    f"the topology has {topology.ep_size} ranks and the job {world_size}",
                    where="topology",
                    do="Give the topology of all ranks of the job",
                )
            )
        order = np.arange(world_size)
        if scope == "node":
            order = np.argsort(topology.nodes, kind="stable")
            _check_fits(topology, ep_size, where)
        groups = np.sort(order.reshape(-1, ep_size), axis=1)
        return cls(
            expert_parallel=_tuples(groups),
            expert_data_parallel=_tuples(np.sort(groups.T, axis=1)),
            node_of_rank=topology.node_of_rank,
        )

    @property
    def world_size(self) -> int:
        """All ranks."""
        return len(self.node_of_rank)

    @property
    def ep_size(self) -> int:
        """Ranks in an expert-parallel group (G)."""
        return len(self.expert_parallel[0])

    def expert_parallel_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that exchange tokens with `rank`, itself included."""
        return next(group for group in self.expert_parallel if rank in group)

    def nodes_of_group(self, rank: int) -> np.ndarray:
        """[G] int64, node of each EP rank of the group of `rank`."""
        return np.array([self.node_of_rank[peer] for peer in self.expert_parallel_group(rank)])

    def describe(self) -> str:
        """One line a group, for people."""
        lines = []
        for name, groups in (
            ("expert parallel", self.expert_parallel),
            ("expert data parallel", self.expert_data_parallel),
        ):
            for group in groups:
                nodes = sorted({self.node_of_rank[rank] for rank in group})
                ranks = " ".join(map(str, group))
                lines.append(f"{name}: ranks {ranks} (nodes {' '.join(map(str, nodes))})")
        return "\n".join(lines)

    def create(self) -> ProcessGroups:
        """Make the process groups; every rank of the job calls this together."""
        import torch.distributed as dist

        rank = dist.get_rank()
        mine: list[ProcessGroup] = []
        for groups in (self.expert_parallel, self.expert_data_parallel):
            # Every rank must create every group, also those that it is not in.
            created = {ranks: dist.new_group(list(ranks)) for ranks in groups}
            mine.append(next(group for ranks, group in created.items() if rank in ranks))
        return ProcessGroups(expert_parallel=mine[0], expert_data_parallel=mine[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """The groups that this rank is in; see `GroupPlan`."""

    expert_parallel: ProcessGroup
    expert_data_parallel: ProcessGroup


def _check_fits(topology: Topology, ep_size: int, where: str) -> None:
    """A group no larger than a node must not straddle nodes, a larger one must fill its nodes."""
    sizes = np.bincount(topology.nodes)
    fits = sizes % ep_size == 0 if ep_size <= sizes.max() else ep_size % sizes == 0
    if not fits.all():
        raise ConfigError(
            explain(
                f"ep_size = {ep_size} cannot keep groups inside nodes",
                where=where,
                got=f"nodes of {sorted(set(sizes.tolist()))} ranks",
                do='Choose a size that divides every node, or set "groups.scope" to "global"',
            )
        )


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in groups.tolist())
