"""Streaming, atomic, reversible rewrite of Hugging Face checkpoints; needs no torch."""

from semantic_ep.apply.checkpoint.reader import Checkpoint, checkpoint_fingerprint
from semantic_ep.apply.checkpoint.rewrite import RewriteSummary, apply_layout, undo_layout

__all__ = ["Checkpoint", "RewriteSummary", "apply_layout", "checkpoint_fingerprint", "undo_layout"]
