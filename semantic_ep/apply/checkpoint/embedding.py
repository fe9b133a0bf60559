"""The token embedding of a checkpoint: which token ids mean alike."""

from __future__ import annotations

import numpy as np

from semantic_ep.apply.checkpoint.reader import Checkpoint, read_float32
from semantic_ep.errors import CheckpointError, explain

# What every family of transformers that we know calls it, below any prefix.
_NAME = "embed_tokens.weight"


def token_embedding(checkpoint: Checkpoint) -> np.ndarray:
    """[V, D] float32, one row a token id.

    Raises:
        CheckpointError: The checkpoint has none, has several, or stores it quantised.
    """
    found = [name for name in checkpoint.tensors if name.endswith(_NAME)]
    if len(found) != 1:
        raise CheckpointError(
            explain(
                f"the checkpoint has {len(found)} token embeddings",
                where=str(checkpoint.directory),
                got=", ".join(found) or "none",
                allowed=f"one tensor *{_NAME}",
            )
        )
    return read_float32(checkpoint.tensors[found[0]])
