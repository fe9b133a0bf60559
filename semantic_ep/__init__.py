"""Semantic expert parallelism for Megatron-core and DeepSpeed.

Five verbs, one folder each: observe routing, plan where experts and tokens go, apply the plan to a
checkpoint, run it in a semantic expert-parallel group, serve it. Importing this package imports
neither torch, DeepSpeed nor Megatron, and patches nothing.
"""

__version__ = "0.1.0"
