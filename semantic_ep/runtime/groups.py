"""Semantic EP groups: which ranks exchange tokens with each other.

`GroupPlan` is plain arithmetic on rank numbers, printable without any process; `create` turns it
into process groups. Ranks are never reordered: `torch.distributed.new_group` sorts them, so the EP
rank is the position of the global rank among those of its group.
"""

from __future__ import annotations

import dataclasses
import datetime
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.runtime.collectives import from_all_ranks
from semantic_ep.runtime.grid import (
    DENSE_AXES,
    DENSE_KINDS,
    EXPERT_AXES,
    EXPERT_KINDS,
    ParallelSizes,
    groups_along,
    order_by_node,
)
from semantic_ep.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Scope = Literal["node", "global"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """Ranks of every group of a job.

    Attributes:
        sizes: Ranks along each axis of parallelism.
        stage_order: [stage] places within a pipeline stage in the order in which they are dealt to
            expert-parallel groups; the same in every stage.
        node_of_rank: Node of every rank.
    """

    sizes: ParallelSizes
    stage_order: tuple[int, ...]
    node_of_rank: tuple[int, ...]

    @classmethod
    def build(
        cls,
        world_size: int,
        ep_size: int,
        *,
        topology: Topology | None = None,
        scope: Scope = "node",
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        context_parallel: int = 1,
        expert_tensor_parallel: int | None = None,
    ) -> Self:
        """Group `world_size` ranks by `ep_size`.

        Args:
            world_size: All ranks.
            ep_size: Ranks in an expert-parallel group.
            topology: Node of every rank; None means one node.
            scope: "node" fills expert-parallel groups node by node, so that a group of at most a
                node's size stays inside it; "global" takes ranks in their order, as Megatron does.
                The groups of dense layers are Megatron's in both.
            tensor_parallel: Ranks that divide each dense matrix.
            pipeline_parallel: Stages.
            context_parallel: Ranks that divide a sequence.
            expert_tensor_parallel: Ranks that divide each expert; None: as `tensor_parallel`.

        Raises:
            ConfigError: The sizes do not divide, or with "node" a group that would fit into a node
                cannot be kept inside one.
        """
        sizes = ParallelSizes(
            world_size=world_size,
            expert=ep_size,
            tensor=tensor_parallel,
            pipeline=pipeline_parallel,
            context=context_parallel,
            expert_tensor=tensor_parallel
            if expert_tensor_parallel is None
            else expert_tensor_parallel,
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
        order = np.arange(sizes.stage)
        if scope == "node":
            order = order_by_node(sizes, topology)
        return cls(
            sizes=sizes, stage_order=tuple(order.tolist()), node_of_rank=topology.node_of_rank
        )

    def groups(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """Rank tuples of every group of a kind, each rising.

        Args:
            kind: One of `grid.DENSE_KINDS` or `grid.EXPERT_KINDS`.
        """
        if kind in DENSE_KINDS:
            return groups_along(self.sizes.dense_grid(), DENSE_AXES, DENSE_KINDS[kind])
        grid = self.sizes.expert_grid(np.array(self.stage_order))
        groups = groups_along(grid, EXPERT_AXES, EXPERT_KINDS[kind])
        # By node, copies of an expert need not come in the order of their ranks.
        return tuple(tuple(sorted(group)) for group in groups)

    @property
    def expert_parallel(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of one group hold different experts and exchange tokens."""
        return self.groups("ep")

    @property
    def expert_data_parallel(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of one group hold the same experts.

        They reduce the gradients of experts in training, and are independent in serving.
        """
        return self.groups("expt_dp")

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.sizes.world_size

    @property
    def ep_size(self) -> int:
        """Ranks in an expert-parallel group (G)."""
        return self.sizes.expert

    def expert_parallel_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that exchange tokens with `rank`, itself included."""
        return next(group for group in self.expert_parallel if rank in group)

    def nodes_of_group(self, rank: int) -> np.ndarray:
        """[G] int64, node of each EP rank of the group of `rank`."""
        return np.array([self.node_of_rank[peer] for peer in self.expert_parallel_group(rank)])

    def crossing_nodes(self, kind: str) -> int:
        """Number of groups of a kind whose ranks are not all on one node."""
        groups = self.groups(kind)
        return sum(len({self.node_of_rank[rank] for rank in group}) > 1 for group in groups)

    def create(self) -> ProcessGroups:
        """Make the process groups that exchange tokens and experts' gradients; collective."""
        return ProcessGroups(
            expert_parallel=create_groups(self.expert_parallel),
            expert_data_parallel=create_groups(self.expert_data_parallel),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessGroups:
    """The groups that this rank is in; see `GroupPlan`."""

    expert_parallel: ProcessGroup
    expert_data_parallel: ProcessGroup


def topology_of_job() -> Topology:
    """Node of every rank of the job, by host name; collective."""
    names = from_all_ranks(socket.gethostname(), "gathering of host names")
    nodes = list(dict.fromkeys(names))
    return Topology(node_of_rank=tuple(nodes.index(name) for name in names))


def create_groups(
    groups: Iterable[tuple[int, ...]],
    *,
    backend: str | None = None,
    timeout: datetime.timedelta | None = None,
) -> ProcessGroup:
    """Make process groups that divide all ranks; returns that of this rank. Collective.

    Args:
        groups: Rank tuples, the same on every rank.
        backend: As in `torch.distributed.new_group`; None: that of the job.
        timeout: Of their collectives; None: torch's own.
    """
    import torch.distributed as dist

    # Every rank must create every group, also those that it is not in.
    created = {
        ranks: dist.new_group(list(ranks), backend=backend, timeout=timeout) for ranks in groups
    }
    return next(group for ranks, group in created.items() if dist.get_rank() in ranks)
