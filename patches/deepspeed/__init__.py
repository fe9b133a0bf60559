"""Seams into DeepSpeed: none is needed with the supported versions of transformers."""

from semantic_ep.patches.registry import Seam

SEAMS: tuple[Seam, ...] = ()
