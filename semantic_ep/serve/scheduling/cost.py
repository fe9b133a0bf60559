"""The one unit of the scheduler and its simulator: predicted seconds."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What one rank's device sustains on these models, which is less than its data sheet says.

    Attributes:
        teraflops: Of matrix products.
        gigabytes_per_second: Of reading its memory.
        step_overhead_microseconds: Of a step, whatever it computes: launches, sampling, control.
    """

    teraflops: float
    gigabytes_per_second: float
    step_overhead_microseconds: float = 0.0

    def __post_init__(self) -> None:
        if min(self.teraflops, self.gigabytes_per_second) <= 0:
            raise ConfigError(
                explain(
                    "an accelerator needs a positive compute rate and memory bandwidth",
                    got=f"{self.teraflops} TFLOP/s, {self.gigabytes_per_second} GB/s",
                )
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of an MoE model that decide how long a step takes.

    Attributes:
        dense_parameters: What every token passes through: attention, shared experts, head.
        expert_parameters: Of one routed expert in one layer.
        num_layers: MoE layers (L).
        num_experts: Routed experts a layer (E).
        top_k: Experts a token activates (K).
        hidden_size: D.
        kv_bytes_per_token: Of all layers.
        element_bytes: Of a weight and of an element on the wire.
    """

    dense_parameters: int
    expert_parameters: int
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    kv_bytes_per_token: int
    element_bytes: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingCost:
    """Seconds that a model takes on an accelerator and a topology.

    Compute and memory count as in the roofline model; attention's part that grows with the square
    of a prompt is left out.

    Attributes:
        model: Sizes.
        accelerator: Of each rank.
        topology: Nodes and links of the ranks.
    """

    model: ModelSize
    accelerator: Accelerator
    topology: Topology

    @property
    def ep_size(self) -> int:
        """Number of EP ranks (G)."""
        return self.topology.ep_size

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's hidden vector on the wire."""
        return self.model.hidden_size * self.model.element_bytes

    @cached_property
    def seconds_per_dense_token(self) -> float:
        """Compute of a token on its home rank, routed experts left out."""
        return 2 * self.model.dense_parameters / (self.accelerator.teraflops * 1e12)

    @cached_property
    def seconds_per_activation(self) -> float:
        """Compute of one (token, expert) pair in one layer."""
        return 2 * self.model.expert_parameters / (self.accelerator.teraflops * 1e12)

    @cached_property
    def seconds_per_token(self) -> float:
        """Compute of a token, with the share of expert compute that it brings to every rank."""
        model = self.model
        activations = model.top_k * model.num_layers
        return self.seconds_per_dense_token + activations * self.seconds_per_activation

    @cached_property
    def seconds_per_kv_token(self) -> float:
        """Reading one position of the KV cache."""
        return self.model.kv_bytes_per_token / (self.accelerator.gigabytes_per_second * 1e9)

    @cached_property
    def dense_weight_seconds(self) -> float:
        """Reading the dense weights, which a step of few tokens cannot be faster than."""
        weights = self.model.dense_parameters * self.model.element_bytes
        return weights / (self.accelerator.gigabytes_per_second * 1e9)

    @cached_property
    def expert_weight_seconds(self) -> float:
        """Reading one layer's routed experts of one rank."""
        model = self.model
        weights = model.expert_parameters * model.num_experts / self.ep_size * model.element_bytes
        return weights / (self.accelerator.gigabytes_per_second * 1e9)

    @cached_property
    def copy_seconds_GG(self) -> np.ndarray:
        """[G, G] float32, a token's row from home [i] to rank [j] and back, in every layer.

        Bandwidth only: the latency of a collective does not depend on who sends.
        """
        topology = self.topology
        same_node = topology.nodes[:, None] == topology.nodes
        bandwidth = np.where(
            same_node,
            topology.intra_node.gigabytes_per_second,
            topology.inter_node.gigabytes_per_second,
        )
        seconds = 2 * self.model.num_layers * self.row_bytes / (bandwidth * 1e9)
        np.fill_diagonal(seconds, 0.0)
        return seconds.astype(np.float32)
