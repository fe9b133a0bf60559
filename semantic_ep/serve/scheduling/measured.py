"""The cost model of a loaded engine: sizes from its model, rates measured on its device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from semantic_ep.serve.engine import SemanticInferenceEngine
from semantic_ep.serve.scheduling.cost import Accelerator, ModelSize, ServingCost
from semantic_ep.topology import Topology

_REPEATS = 5
# Large enough to fill the device, small enough to take milliseconds.
_SIDE = {"cpu": 512, "cuda": 4096}
_ELEMENTS_READ = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}


def measured_accelerator(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Accelerator:
    """What a device sustains: a matrix product, and reading memory.

    Args:
        device: Of a rank; a CPU rank is as many threads as torch uses.
        dtype: Of the weights.
    """
    device = torch.device(device)
    side, elements = _SIDE[device.type], _ELEMENTS_READ[device.type]
    matrix = torch.rand(side, side, device=device, dtype=dtype)
    vector = torch.rand(elements, device=device)
    product = _seconds(lambda: matrix @ matrix, device)
    reading = _seconds(vector.sum, device)
    return Accelerator(
        teraflops=2 * side**3 / product / 1e12,
        gigabytes_per_second=vector.nbytes / reading / 1e9,
    )


def serving_cost(
    engine: SemanticInferenceEngine, *, accelerator: Accelerator, topology: Topology
) -> ServingCost:
    """What serving the engine's model on these ranks takes.

    Args:
        engine: Of any rank, in attention-DP.
        accelerator: Of each rank.
        topology: Nodes and links of the ranks.
    """
    config = engine.model.module.config.get_text_config()
    fingerprint = engine.model.fingerprint
    parameters = list(engine.model.module.parameters())
    element = parameters[0].element_size()
    held = sum(parameter.nbytes for parameter in parameters) - engine.expert_bytes_resident
    experts = fingerprint.num_layers * fingerprint.num_experts
    return ServingCost(
        model=ModelSize(
            dense_parameters=held // element,
            expert_parameters=engine.expert_bytes_total // experts // element,
            num_layers=fingerprint.num_layers,
            num_experts=fingerprint.num_experts,
            top_k=fingerprint.top_k,
            hidden_size=config.hidden_size,
            kv_bytes_per_token=config.num_hidden_layers * _kv_elements(config) * element,
            element_bytes=element,
        ),
        accelerator=accelerator,
        topology=topology,
    )


def _kv_elements(config: object) -> int:
    """Elements of one position of one layer's cache."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:  # DeepSeek caches latents and the rotary part of the keys.
        return int(latent + config.qk_rope_head_dim)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of a few calls."""
    return min(_timed(call, device) for _ in range(_REPEATS))


def _timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
