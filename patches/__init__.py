"""Opt-in seams into upstream code, installed as `semantic_ep.patches`.

A script of your own calls `semantic_ep.patches.apply("megatron")`. For an unmodified one, put the
directory that `semantic-ep patches autoload` prints on `PYTHONPATH` and set
`SEMANTIC_EP_AUTOLOAD=megatron`.
"""

from semantic_ep.patches.registry import Seam, SeamStatus, apply, check, revert, seams

__all__ = ["Seam", "SeamStatus", "apply", "check", "revert", "seams"]
