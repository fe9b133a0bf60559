"""Expert histograms of a random sample of sequences, bounded in number.

The sequences with the smallest keys of all processes are the sample. A sequence has a name that
every process derives for itself, so that processes which see parts of it, other tokens or other
layers, sample the same sequences, and their parts add up.
"""

from __future__ import annotations

import numpy as np

from semantic_ep.observe.samples import Part

RESTORED = -1
"""Takes the place of the micro-batch in names of sequences that come from a saved profile."""


class SequenceLoads:
    """The sample of one process."""

    def __init__(self, capacity: int, *, num_layers: int, num_experts: int) -> None:
        """Start with no sequence; memory is taken as rows fill."""
        self._name = np.zeros(capacity, np.uint64)
        self._key = np.full(capacity, np.inf)
        self._load = np.zeros((capacity, num_layers, num_experts), np.float32)
        self._held = 0

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        row = self._load[:1].nbytes + self._key.itemsize + self._name.itemsize
        return self._held * row if len(self._key) else 0

    def wanted(self, key: np.ndarray) -> np.ndarray:
        """[R] bool, which sequences of these keys would enter the sample."""
        bound: float = self._key.max(initial=-np.inf)
        smaller: np.ndarray = key < bound
        return smaller

    def add(self, name: np.ndarray, key: np.ndarray, load: np.ndarray) -> None:
        """Offer new sequences: names [R], keys [R], histograms [R, L, E]."""
        for one_name, one_key, one_load in zip(name, key, load, strict=True):
            if self._held < len(self._key):
                row, self._held = self._held, self._held + 1
            else:
                row = int(self._key.argmax())
                if one_key >= self._key[row]:
                    continue
            self._name[row], self._key[row], self._load[row] = one_name, one_key, one_load

    def part(self) -> Part:
        """A copy: name [M] uint64, key [M], load [M, L, E], in order of keys."""
        order = np.argsort(self._key[: self._held], kind="stable")
        return {"name": self._name[order], "key": self._key[order], "load": self._load[order]}


def merge_sequences(one: Part, other: Part, capacity: int) -> Part:
    """The sample of both; histograms of the same sequence add up."""
    name, key = (np.concatenate([one[field], other[field]]) for field in ("name", "key"))
    names, first, whose = np.unique(name, return_index=True, return_inverse=True)
    best = np.argsort(key[first], kind="stable")[:capacity]
    row = np.full(len(names), -1)
    row[best] = np.arange(len(best))
    load = np.zeros((len(best), *one["load"].shape[1:]), np.float32)
    for part, target in zip((one, other), np.split(row[whose], [len(one["name"])]), strict=True):
        load[target[target >= 0]] += part["load"][target >= 0]
    return {"name": names[best], "key": key[first][best], "load": load}


def sequence_names(seed: int, micro_batch: int, sequence: np.ndarray) -> np.ndarray:
    """[R] uint64 names: random numbers that only the arguments decide.

    Mixing as in SplitMix64 (G. Steele, D. Lea, C. Flood, 2014), once for each argument.
    """
    state = np.zeros(len(sequence), np.uint64)
    for word in (np.array([seed]), np.array([micro_batch]), np.asarray(sequence)):
        state = state + word.astype(np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def sampling_keys(name: np.ndarray, age: float) -> np.ndarray:
    """[R] priorities of sequences: the smallest ones of all processes are a random sample.

    Weighted sampling without replacement (P. Efraimidis, P. Spirakis, 2006) in logarithms.

    Args:
        name: [R] random names.
        age: Logarithm of the weight that a count has now.
    """
    uniform = ((name >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return np.log(-np.log1p(-uniform)) - age
