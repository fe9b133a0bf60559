"""What the scale theme puts together: models, fabrics, and measurements that others published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.scale_routing import RouterShape
from semantic_ep.serve.scheduling.cost import ModelSize
from semantic_ep.topology import LINKS, Link, Topology

GPUS_A_NODE = 8
BF16 = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledModel:
    """The MoE layers of a published model.

    Attributes:
        name: Its name.
        router: Experts, top-k, groups.
        moe_layers: MoE layers of the model.
        hidden_size: D.
        expert_size: Inner size of a routed expert (gate, up and down matrices).
        recorded: Which recording its routing is joined from: the largest expert count that fits.
    """

    name: str
    router: RouterShape
    moe_layers: int
    hidden_size: int
    expert_size: int
    recorded: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row in bf16, one way."""
        return self.hidden_size * BF16

    def size(self) -> ModelSize:
        """One MoE layer's routed experts for the cost model; nothing else of the model."""
        return ModelSize(
            dense_parameters=0,
            expert_parameters=3 * self.hidden_size * self.expert_size,
            num_layers=1,
            num_experts=self.router.num_experts,
            top_k=self.router.top_k,
            hidden_size=self.hidden_size,
            kv_bytes_per_token=0,
        )


# From the models' published configurations.
MODELS = (
    ScaledModel(
        name="DeepSeek-V3",
        router=RouterShape(num_experts=256, top_k=8, groups=8, top_groups=4),
        moe_layers=58,
        hidden_size=7168,
        expert_size=2048,
        recorded=64,
    ),
    ScaledModel(
        name="Qwen3-235B",
        router=RouterShape(num_experts=128, top_k=8),
        moe_layers=94,
        hidden_size=4096,
        expert_size=1536,
        recorded=64,
    ),
    ScaledModel(
        name="gpt-oss-120b",
        router=RouterShape(num_experts=128, top_k=4),
        moe_layers=36,
        hidden_size=2880,
        expert_size=2880,
        recorded=32,
    ),
    ScaledModel(
        name="Mixtral-8x7B",
        router=RouterShape(num_experts=8, top_k=2),
        moe_layers=32,
        hidden_size=4096,
        expert_size=14336,
        recorded=32,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fabric:
    """Links of a cluster of nodes of eight GPUs.

    Attributes:
        name: In tables.
        intra_node, inter_node: As an all-to-all reaches them, a GPU's share.
        wire_intra, wire_inter: Nominal GB/s, one direction, a GPU's share: the limit.
    """

    name: str
    intra_node: Link
    inter_node: Link
    wire_intra: float
    wire_inter: float

    def topology(self, ep_size: int) -> Topology:
        """Ranks of one EP group, filled node by node."""
        return Topology.uniform(
            ep_size,
            num_nodes=max(ep_size // GPUS_A_NODE, 1),
            intra_node=self.intra_node,
            inter_node=self.inter_node,
        )


def _shared(link: Link) -> Link:
    """A node's only port: each GPU has its share."""
    return dataclasses.replace(
        link,
        name=f"{link.name} / {GPUS_A_NODE}",
        gigabytes_per_second=link.gigabytes_per_second / GPUS_A_NODE,
    )


FABRICS = (
    Fabric(
        name="NVLink 4 + IB 400 Gb/s a GPU",
        intra_node=LINKS["nvlink4"],
        inter_node=LINKS["ib_ndr"],
        wire_intra=450.0,
        wire_inter=50.0,
    ),
    Fabric(
        name="PCIe 4 + Ethernet 100 Gb/s a node",
        intra_node=LINKS["pcie4"],
        inter_node=_shared(LINKS["ethernet_100g"]),
        wire_intra=32.0,
        wire_inter=12.5 / GPUS_A_NODE,
    ),
    Fabric(
        name="PCIe 4 + Ethernet 25 Gb/s a node",
        intra_node=LINKS["pcie4"],
        inter_node=_shared(LINKS["ethernet_25g"]),
        wire_intra=32.0,
        wire_inter=3.125 / GPUS_A_NODE,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One measurement of DeepEP, as its documentation states it.

    Attributes:
        kernel: "low latency" (a row a route, no forwarding) or "normal" (a row a rank or, between
            nodes, a row a node that is forwarded over NVLink).
        way: "dispatch" (fp8 and a float32 scale for each 128 elements) or "combine" (bf16).
        ep_size: GPUs, eight a node.
        tokens: A GPU.
        intra_node: The NVLink it ran on.
        microseconds: Stated latency, or None.
        gigabytes_per_second: Stated bandwidth, of rows that count the GPU's own node, or rank.
        source: Document and table.
    """

    kernel: str
    way: str
    ep_size: int
    tokens: int
    intra_node: Link
    source: str
    microseconds: float | None = None
    gigabytes_per_second: float | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of 7168 elements."""
        return 7168 + 7168 // 128 * 4 if self.way == "dispatch" else 7168 * BF16


# "~160 GB/s NVLink maximum bandwidth" of the H800 that V1 was measured on.
_H800 = dataclasses.replace(LINKS["nvlink4"], name="nvlink of H800", gigabytes_per_second=160.0)
_V1 = "DeepEP docs/legacy.md, performance"
_V2 = "DeepEP README.md, performance"


def _pairs(
    kernel: str, tokens: int, link: Link, source: str, rows: Sequence[tuple[int, float, float]]
) -> list[Published]:
    unit = "microseconds" if kernel == "low latency" else "gigabytes_per_second"
    return [
        Published(
            kernel=kernel,
            way=way,
            ep_size=ep_size,
            tokens=tokens,
            intra_node=link,
            source=source,
            **{unit: value},
        )
        for ep_size, *values in rows
        for way, value in zip(("dispatch", "combine"), values, strict=True)
    ]


PUBLISHED = (
    *_pairs(
        "low latency", 128, _H800, _V1,
        [(8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369),
         (256, 194, 360)],
    ),
    *_pairs("normal", 4096, _H800, _V1, [(8, 153, 158), (16, 43, 43), (32, 58, 57), (64, 51, 50)]),
    *_pairs("normal", 8192, LINKS["nvlink4"], _V2, [(16, 90, 81), (32, 61, 61)]),
    *_pairs("normal", 8192, LINKS["nvlink5"], _V2, [(8, 726, 740)]),
)  # fmt: skip
PUBLISHED_ROUTER = RouterShape(num_experts=256, top_k=8, groups=8, top_groups=4)
