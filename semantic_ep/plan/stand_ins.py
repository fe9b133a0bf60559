"""Token ids that a profile never saw: let the most similar id that it saw stand in for them.

Similar means close in the model's own token embedding, by cosine. This is for lookups alone: a
placement is planned on what was counted.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.profile import RoutingProfile

# Wider embeddings are projected at random to this width, which keeps cosines to about 0.06.
_WIDTH = 256
_CHUNK = 2048


def with_stand_ins(profile: RoutingProfile, embedding_VD: np.ndarray) -> RoutingProfile:
    """Return the profile with a row for every token id of the embedding.

    An id that was seen keeps its row. Another one gets the row of the nearest id that was seen,
    with the weight of a single occurrence, so that tables shrink it towards popularity.

    Args:
        profile: Counts by token id.
        embedding_VD: One row a token id; ids beyond its rows get no stand-in.

    Raises:
        ConfigError: The embedding has fewer ids than the profile saw, or the profile saw none.
    """
    ids = len(embedding_VD)
    seen = np.flatnonzero(profile.token_count > 0)
    if len(seen) == 0 or seen[-1] >= ids:
        raise ConfigError(
            explain(
                "the embedding is not of the tokens that were profiled",
                where="--embeddings",
                got=f"{ids} rows; ids seen: {f'up to {seen[-1]}' if len(seen) else 'none'}",
                do="Name the checkpoint that was profiled",
            )
        )
    vocab = max(ids, profile.vocab_size)
    count = np.zeros(vocab)
    count[: profile.vocab_size] = profile.token_count
    unseen = np.flatnonzero(count[:ids] <= 0)
    stand_in = seen[_nearest(embedding_VD, unseen, seen)]
    onto = sparse.csr_array(
        (
            np.concatenate([np.ones(len(seen)), 1 / count[stand_in]]).astype(np.float32),
            (np.concatenate([seen, unseen]), np.concatenate([seen, stand_in])),
        ),
        shape=(vocab, profile.vocab_size),
    )
    count[unseen] = 1
    return dataclasses.replace(
        profile,
        token_count=count.astype(profile.token_count.dtype),
        token_expert=tuple(sparse.csr_array(onto @ table) for table in profile.token_expert),
    )


def _nearest(embedding_VD: np.ndarray, ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """[len(ids)] index into `among` of the most similar id."""
    width = embedding_VD.shape[1]
    project = None
    if width > _WIDTH:
        project = np.random.default_rng(0).normal(size=(width, _WIDTH)).astype(np.float32)
    candidates = _directions(embedding_VD[among], project)
    found = [
        (_directions(embedding_VD[ids[start : start + _CHUNK]], project) @ candidates.T).argmax(1)
        for start in range(0, len(ids), _CHUNK)
    ]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _directions(rows: np.ndarray, project: np.ndarray | None) -> np.ndarray:
    rows = rows.astype(np.float32)
    # Sizes first, so that no square overflows.
    rows = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30))
    rows = rows if project is None else rows @ project
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
