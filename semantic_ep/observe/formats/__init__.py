"""Routing recorded by other tools, read as `RoutingTrace` or as expert load.

One module a tool: `npz` (the plain file of public trace collections), `megatron` (the router
tracer's JSONL), `sglang` (expert-distribution dumps), `vllm` (routed experts of responses).
"""

from semantic_ep.observe.formats.megatron import read_megatron_trace, write_megatron_trace
from semantic_ep.observe.formats.npz import read_npz_trace, write_npz_trace
from semantic_ep.observe.formats.sglang import (
    read_logical_count,
    read_sglang_trace,
    write_logical_count,
)
from semantic_ep.observe.formats.vllm import read_vllm_trace, write_vllm_trace

__all__ = [
    "read_logical_count",
    "read_megatron_trace",
    "read_npz_trace",
    "read_sglang_trace",
    "read_vllm_trace",
    "write_logical_count",
    "write_megatron_trace",
    "write_npz_trace",
    "write_vllm_trace",
]
