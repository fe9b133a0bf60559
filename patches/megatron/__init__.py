"""Seams into Megatron-core."""

from semantic_ep.patches.megatron import cpu_gloo, optimizer

SEAMS = (*cpu_gloo.SEAMS, *optimizer.SEAMS)
