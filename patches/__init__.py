"""Opt-in seams into upstream code, installed as `semantic_ep.patches`.

`semantic_ep.patches.apply("megatron")` in a script of your own, or
`SEMANTIC_EP_AUTOLOAD=megatron` with `patches/autoload` on `PYTHONPATH` for an unmodified one.
"""

from semantic_ep.patches.registry import Seam, SeamStatus, apply, check, revert, seams

__all__ = ["Seam", "SeamStatus", "apply", "check", "revert", "seams"]
