"""How the ranks of a job divide among the kinds of parallelism.

The same ranks form two grids. Attention and dense layers use [pipeline, data, context, tensor],
experts [pipeline, expert data, expert, expert tensor], the last axis fastest, which is Megatron's
order "tp-cp-ep-dp-pp". Pipeline stages are the same ranks in both.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.topology import Topology

DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "expt_dp", "ep", "expt_tp")

# Kinds of groups: the axes along which the ranks of one group differ. The names are the fields of
# Megatron's ProcessGroupCollection.
DENSE_KINDS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "mp": ("pp", "tp"),
    "tp_cp": ("cp", "tp"),
    "dp_cp": ("dp", "cp"),
    "tp_dp_cp": ("dp", "cp", "tp"),
}
EXPERT_KINDS = {
    "ep": ("ep",),
    "expt_tp": ("expt_tp",),
    "expt_dp": ("expt_dp",),
    "tp_ep": ("ep", "expt_tp"),
    "tp_ep_pp": ("pp", "ep", "expt_tp"),
}

EP_SIZE = "semantic_ep.groups.ep_size, --semantic-ep-groups-ep-size"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """Ranks along each axis of parallelism; data parallelism takes what the others leave.

    Attributes:
        world_size: All ranks.
        expert: Ranks that divide the experts of a layer between them (G).
        tensor: Ranks that divide each dense matrix.
        pipeline: Stages.
        context: Ranks that divide a sequence.
        expert_tensor: Ranks that divide each expert.
    """

    world_size: int
    expert: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        self._check_divides("ep_size", "expert", "expert_tensor", "pipeline", where=EP_SIZE)
        where = "tensor, pipeline and context parallel sizes"
        self._check_divides("tensor", "tensor", "pipeline", "context", where=where)

    @property
    def data(self) -> int:
        """Copies of the dense layers, each on its own batches."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Copies of the experts of each stage."""
        return self.world_size // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def stage(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world_size // self.pipeline

    def dense_grid(self) -> np.ndarray:
        """[PP, DP, CP, TP] rank at each place of the grid of the dense layers."""
        return np.arange(self.world_size).reshape(
            self.pipeline, self.data, self.context, self.tensor
        )

    def expert_grid(self, stage_order: np.ndarray) -> np.ndarray:
        """[PP, EDP, EP, ETP] rank at each place of the grid of the experts.

        Args:
            stage_order: [stage] places within a stage, in the order in which they are dealt to
                expert-parallel groups. Inside a group ranks always rise, see `GroupPlan`.
        """
        blocks = np.sort(stage_order.reshape(self.expert_data, -1), axis=1)
        stages = np.arange(self.pipeline)[:, None, None] * self.stage + blocks
        return stages.reshape(self.pipeline, self.expert_data, self.expert, self.expert_tensor)

    def _check_divides(self, name: str, *axes: str, where: str) -> None:
        sizes = [getattr(self, axis) for axis in axes]
        if min(sizes) >= 1 and self.world_size % math.prod(sizes) == 0:
            return
        own, rest = sizes[0], math.prod(sizes[1:])
        product = f"{name} = {own}"
        if rest != 1:
            others = " x ".join(f"{axis} {getattr(self, axis)}" for axis in axes[1:])
            product += f" times {others}"
        left = self.world_size // rest if rest > 0 and self.world_size % rest == 0 else 0
        raise ConfigError(
            explain(
                f"{product} does not divide the world size {self.world_size}",
                where=where,
                allowed=[n for n in range(1, left + 1) if left % n == 0]
                or "sizes whose product divides it",
            )
        )


def groups_along(
    grid: np.ndarray, axes: tuple[str, ...], kind: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    """Ranks of every group of a kind, groups and ranks in the order of the grid.

    Args:
        grid: Rank at each place.
        axes: Name of each axis of the grid.
        kind: Axes along which the ranks of one group differ.
    """
    within = [axes.index(axis) for axis in kind]
    across = [number for number in range(grid.ndim) if number not in within]
    size = math.prod(grid.shape[number] for number in within)
    rows = grid.transpose(across + within).reshape(-1, size)
    return tuple(tuple(row) for row in rows.tolist())


def order_by_node(sizes: ParallelSizes, topology: Topology) -> np.ndarray:
    """[stage] places within a stage, node by node, in rising order on each node.

    Every stage gets the same order, because the ranks of a pipeline group hold the same place in
    their stages.

    Raises:
        ConfigError: Stages lie on their nodes in different ways, or groups that would fit into a
            node cannot be kept inside one.
    """
    layouts = [_relabelled(stage) for stage in topology.nodes.reshape(sizes.pipeline, -1)]
    for stage, layout in enumerate(layouts):
        if not np.array_equal(layout, layouts[0]):
            raise ConfigError(
                explain(
                    "pipeline stages lie on nodes in different ways, so that no order of their "
                    "ranks suits all",
                    where="pipeline parallel size, topology",
                    got=f"nodes {layouts[0].tolist()} of stage 0, {layout.tolist()} of {stage}",
                    do='Choose another pipeline parallel size, or set "groups.scope" to "global"',
                )
            )
    order = np.argsort(layouts[0], kind="stable")
    _check_fits(np.bincount(layouts[0]), sizes)
    _check_tensor_groups(layouts[0], sizes.expert_grid(order)[0], sizes.expert_tensor)
    return order


def _relabelled(nodes: np.ndarray) -> np.ndarray:
    """Number nodes by their first appearance."""
    _, first, label = np.unique(nodes, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[label]


def _check_fits(on_node: np.ndarray, sizes: ParallelSizes) -> None:
    """A group no larger than a node must not straddle nodes, a larger one must fill its nodes."""
    block = sizes.expert * sizes.expert_tensor
    fits = on_node % block == 0 if block <= on_node.max() else block % on_node == 0
    if not fits.all():
        name = f"ep_size = {sizes.expert}"
        if sizes.expert_tensor > 1:
            name += f" times expert_tensor {sizes.expert_tensor}"
        raise ConfigError(
            explain(
                f"{name} cannot keep groups inside nodes",
                where=EP_SIZE,
                got=f"nodes of {sorted(set(on_node.tolist()))} ranks",
                do='Choose a size that divides every node, or set "groups.scope" to "global"',
            )
        )


def _check_tensor_groups(node: np.ndarray, grid: np.ndarray, expert_tensor: int) -> None:
    """Ranks that share one expert talk most of all, so they stay inside a node if they fit."""
    if expert_tensor > np.bincount(node).min():
        return
    of_group = node[grid]
    if (of_group != of_group[..., :1]).any():
        raise ConfigError(
            explain(
                "ranks alternate between nodes, so that the ranks that share an expert would too",
                where="expert tensor parallel size, topology",
                got=f"nodes {node.tolist()} of a pipeline stage",
                do="Number ranks node by node, or set the expert tensor parallel size to 1, or "
                '"groups.scope" to "global"',
            )
        )
