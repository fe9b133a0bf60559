"""Seams into DeepSpeed."""

from semantic_ep.patches.deepspeed.initialize import SEAMS

__all__ = ["SEAMS"]
