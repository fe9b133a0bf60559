"""Cut the corpus that launch/corpus.py wrote into training sequences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHORTEST_CHUNK = 32


class Chunks:
    """Training sequences: each is a piece of one document, in an order fixed by the seed."""

    def __init__(self, data: Path, *, length: int, pad: int, seed: int) -> None:
        """Cut the documents of a corpus into pieces of at most `length` tokens."""
        self._tokens = np.load(data / "train.npy", mmap_mode="r")
        self._length, self._pad = length, pad
        self._pieces = []
        with (data / "documents.jsonl").open() as stream:
            for document in map(json.loads, stream):
                end = document["first"] + document["tokens"]
                for first in range(document["first"], end, length):
                    if end - first >= SHORTEST_CHUNK:
                        self._pieces.append((first, min(first + length, end)))
        self._order = np.random.default_rng(seed).permutation(len(self._pieces))

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """Batch `number` of `size` sequences: token ids and mask, both [size, length] int64."""
        token_id = torch.full((size, self._length), self._pad)
        mask = torch.zeros((size, self._length), dtype=torch.int64)
        for row in range(size):
            index = self._order[(number * size + row) % len(self._order)]
            first, last = self._pieces[index]
            piece = torch.from_numpy(self._tokens[first:last].astype(np.int64))
            token_id[row, : len(piece)], mask[row, : len(piece)] = piece, 1
        return token_id, mask
