"""Seams into Megatron-core."""

from semantic_ep.patches.megatron.cpu_gloo import SEAMS

__all__ = ["SEAMS"]
