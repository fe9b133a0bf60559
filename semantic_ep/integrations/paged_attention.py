"""Attention of Hugging Face models over a paged KV cache, for sequences packed without padding.

A step packs the new tokens of all its sequences into one row, [1, T]: linear layers and experts
never see padding. Only attention needs to know sequences apart. The cache stands where a model
expects transformers' `Cache`: `update` stores the new keys and values in the blocks of their
sequences and returns those of every sequence, gathered. The attention function, registered with
transformers, then runs group by group: sequences with about as many queries and keys are padded
to a rectangle. Models that expand latent keys after the cache (DeepSeek) work unchanged.

On a CPU, copying keys and values costs more than attending to them: there, sequences whose blocks
follow each other read them where they are (`paged_decoding`).

Shapes: T new tokens, N gathered cache positions, H query heads, J key/value heads, D head size,
B sequences of a group, Q queries of each, P positions of each, S positions of the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from semantic_ep.integrations.paged_decoding import Row, decode, rows_of

ATTENTION = "semantic_ep_paged"

# A group is closed when padding would make its rectangle this much larger than its content.
_PADDING_LIMIT = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """New tokens of one sequence.

    Attributes:
        start: Position of the first.
        count: How many, at least 1.
        blocks: Blocks of the sequence in order of position; they reach to the last new token.
    """

    start: int
    count: int
    blocks: Sequence[int]

    @property
    def in_one_piece(self) -> bool:
        """Whether the blocks follow each other."""
        return all(b - a == 1 for a, b in itertools.pairwise(self.blocks))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Sequences that attend together.

    Attributes:
        tokens: Range of T.
        positions: Range of N, B * P long; of S if the group reads in place.
        query_BQ: int64, index of each query in the range of tokens; padding repeats the last.
        kept: int64, indices of real queries in the flattened B * Q; None if all are.
        position_BQ: int64, position of each query in its sequence.
        in_place: Whether it is one sequence that reads the cache where it is.
        from_start: Whether it is the whole of one sequence, from its first token.
        biases: Additive masks by window, made on first use.
    """

    tokens: tuple[int, int]
    positions: tuple[int, int]
    query_BQ: Tensor
    kept: Tensor | None
    position_BQ: Tensor
    in_place: bool = False
    from_start: bool = False
    biases: dict[int | None, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        """P."""
        return (self.positions[1] - self.positions[0]) // len(self.query_BQ)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, Q, P]: 0 where a query may look, -inf elsewhere."""
        if window not in self.biases:
            key_P = torch.arange(self.length, device=self.position_BQ.device)
            query_BQ1 = self.position_BQ[:, :, None]
            visible = key_P <= query_BQ1
            if window is not None:
                visible &= key_P > query_BQ1 - window
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self.biases[window] = bias.masked_fill_(~visible, -torch.inf)
        return self.biases[window]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """How the chunks of a step lie in the packed row.

    Attributes:
        order: Indices of the chunks in the order in which they lie in the row.
        position_T: int64, position of each token in its sequence.
        slot_T: int64, where its key and value are stored, block * block size + offset.
        block_N: int64, blocks to gather, group by group.
        last_C: int64, index in the row of the last token of each chunk, in the order given.
        groups: See there.
        decoding: Sequences with one token that read the cache where they lie; these tokens are
            the last of the row.
        pools: [J, S, D] and [J, S, D'] by layer for who reads in place, set by the cache.
    """

    order: list[int]
    position_T: Tensor
    slot_T: Tensor
    block_N: Tensor
    last_C: Tensor
    groups: list[_Group]
    decoding: list[Row]
    pools: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(
        cls,
        chunks: Sequence[Chunk],
        *,
        block_size: int,
        device: torch.device,
        in_place: bool = False,
    ) -> PackedBatch:
        """Group chunks by size and lay them out.

        Args:
            chunks: New tokens of sequences, each of another sequence.
            block_size: Positions of a block.
            device: Of the model.
            in_place: Whether sequences may read the cache where it is.
        """
        alone = {c for c, chunk in enumerate(chunks) if in_place and chunk.in_one_piece}
        ones = sorted((c for c in alone if chunks[c].count == 1), key=lambda c: chunks[c].blocks[0])
        others = set(range(len(chunks))).difference(ones)
        order = sorted(others, key=lambda c: (chunks[c].count, chunks[c].start, -c), reverse=True)
        position, slot, gathered, last = [], [], [], [0] * len(chunks)
        groups, ranges = [], []
        for members in _grouped(order, chunks, alone):
            own = members[0] in alone
            first_token, first_block = len(position), len(gathered)
            width = max(len(chunks[c].blocks) for c in members)
            queries = max(chunks[c].count for c in members)
            rows, positions, kept = [], [], []
            for number, c in enumerate(members):
                chunk, offset = chunks[c], len(position) - first_token
                mine = range(chunk.start, chunk.start + chunk.count)
                slot += [chunk.blocks[p // block_size] * block_size + p % block_size for p in mine]
                position += mine
                # Blocks past the end are never visible; any valid block will do.
                gathered += [] if own else [*chunk.blocks, *[0] * (width - len(chunk.blocks))]
                padding = queries - chunk.count
                rows.append(
                    [*range(offset, offset + chunk.count)]
                    + [len(position) - 1 - first_token] * padding
                )
                positions.append([*mine] + [mine[-1]] * padding)
                kept += range(number * queries, number * queries + chunk.count)
                last[c] = len(position) - 1
            begin, end = first_block * block_size, len(gathered) * block_size
            if own:
                begin = chunks[members[0]].blocks[0] * block_size
                end = begin + position[-1] + 1
            groups.append(
                _Group(
                    tokens=(first_token, len(position)),
                    positions=(begin, end),
                    query_BQ=torch.tensor(rows, device=device),
                    kept=None
                    if len(kept) == len(members) * queries
                    else torch.tensor(kept, device=device),
                    position_BQ=torch.tensor(positions, device=device),
                    in_place=own,
                    from_start=own and positions[0][0] == 0,
                )
            )
        for c in ones:
            begin = chunks[c].blocks[0] * block_size
            ranges.append((begin, begin + chunks[c].start + 1))
            last[c] = len(position)
            position.append(chunks[c].start)
            slot.append(begin + chunks[c].start)
        return cls(
            order=[*order, *ones],
            position_T=torch.tensor(position, device=device),
            slot_T=torch.tensor(slot, device=device),
            block_N=torch.tensor(gathered, dtype=torch.int64, device=device),
            last_C=torch.tensor(last, device=device),
            groups=groups,
            decoding=rows_of(ranges),
        )

    @functools.cached_property
    def num_decoding(self) -> int:
        """Sequences in `decoding`."""
        return sum(row.count for row in self.decoding)

    def store(self, pool_JSD: Tensor, new_JTD: Tensor) -> None:
        """Write what the tokens bring to their slots, in as few pieces as they lie in."""
        if not all(group.in_place for group in self.groups) or len(self.decoding) > 1:
            pool_JSD.index_copy_(1, self.slot_T, new_JTD)
            return
        for group in self.groups:
            (first, after), (_, end) = group.tokens, group.positions
            pool_JSD[:, end - (after - first) : end] = new_JTD[:, first:after]
        for row in self.decoding:
            row.newest(pool_JSD).copy_(new_JTD[:, -row.count :])


def _grouped(
    order: Sequence[int], chunks: Sequence[Chunk], alone: Collection[int]
) -> list[list[int]]:
    """Split an order by falling size where padding would waste too much.

    Decoding sequences (one query) stay apart from chunks of prompts, and some are to be alone.
    """
    groups: list[list[int]] = []
    content, width, queries = 0.0, 0, 0
    for c in order:
        count, blocks = chunks[c].count, len(chunks[c].blocks)
        if c in alone:
            groups.append([c])
            queries = 0
            continue
        if queries and (count == 1) == (queries == 1):
            area = (len(groups[-1]) + 1) * queries * max(width, blocks)
            if area <= _PADDING_LIMIT * (content + count * blocks):
                groups[-1].append(c)
                content, width = content + count * blocks, max(width, blocks)
                continue
        groups.append([c])
        content, width, queries = count * blocks, blocks, count
    return groups


class PagedKVCache:
    """Keys and values of all sequences of a rank, in blocks.

    Stands where transformers' models expect a `Cache`. Memory is taken at the first step, when
    the shapes are known.

    Args:
        num_blocks: Blocks.
        block_size: Positions of a block.

    Attributes:
        batch: The step that runs.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.batch: PackedBatch | None = None
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}
        self._nothing: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [1, J, T, D] of the step's tokens; return [1, J, N, D] of their sequences."""
        assert self.batch is not None
        if layer_idx not in self._pools:
            size = self.num_blocks * self.block_size
            self._pools[layer_idx] = tuple(
                new.new_zeros(new.shape[1], size, new.shape[3]) for new in (key, value)
            )
            self._nothing[layer_idx] = tuple(
                pool_JSD[None, :, :0] for pool_JSD in self._pools[layer_idx]
            )
        pools = self._pools[layer_idx]
        self.batch.pools[layer_idx] = pools
        for pool_JSD, new in zip(pools, (key, value)):
            self.batch.store(pool_JSD, new[0])
        if not len(self.batch.block_N):  # All sequences are read where they lie.
            return self._nothing[layer_idx]
        return tuple(self._gather(pool_JSD) for pool_JSD in pools)

    def _gather(self, pool_JSD: Tensor) -> Tensor:
        heads, _, size = pool_JSD.shape
        blocks = pool_JSD.view(heads, self.num_blocks, self.block_size * size)
        gathered = blocks.index_select(1, self.batch.block_N)
        return gathered.view(1, heads, -1, size)


def register_paged_attention() -> None:
    """Make the attention function known to transformers under `ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, paged_attention)


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_batch: PackedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of a packed step, as transformers calls it.

    Args:
        module: The attention module.
        query: [1, H, T, D].
        key: [1, J, N, D], from `PagedKVCache.update`, or expanded from it.
        value: [1, J, N, D'].
        attention_mask: None: the batch says what is visible.
        packed_batch: Passed to the model's forward by that name.
        scaling: Of the scores; None: one over the root of D.
        sliding_window: Positions that a query sees, itself included; None: all.
        s_aux: [H], a learned score of attending to nothing (gpt-oss).

    Returns:
        [1, T, H, D'] and None.
    """
    assert attention_mask is None
    window = sliding_window or getattr(module, "sliding_window", None)
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    sources = {False: (key[0], value[0])}
    if packed_batch.pools:
        sources[True] = packed_batch.pools[module.layer_idx]
    out = [
        _attend(group, query[0], *sources[group.in_place], window, scaling, s_aux)
        for group in packed_batch.groups
    ]
    if packed_batch.decoding:
        query_HTD = query[0, :, -packed_batch.num_decoding :]
        out.append(decode(packed_batch.decoding, query_HTD, sources[True], window, scaling, s_aux))
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def _attend(
    group: _Group,
    query_HTD: Tensor,
    key_JND: Tensor,
    value_JND: Tensor,
    window: int | None,
    scaling: float,
    sink_H: Tensor | None,
) -> Tensor:
    """[tokens of the group, H, D']."""
    sequences, queries = group.query_BQ.shape
    heads = len(key_JND)
    shared = len(query_HTD) // heads
    if group.from_start and sink_H is None and (window is None or window >= queries):
        return _attend_causally(group, query_HTD, key_JND, value_JND, scaling)
    bias_BQP = group.bias(window, query_HTD.dtype)
    # Query heads that share a key head become further queries: keys are not repeated.
    mine = query_HTD[:, group.tokens[0] : group.tokens[1]]
    if group.kept is not None:
        mine = mine[:, group.query_BQ.flatten()]
    query_JBSQD = mine.reshape(heads, shared, sequences, queries, -1).transpose(1, 2)
    query = query_JBSQD.reshape(heads, sequences, shared * queries, -1)
    bias = bias_BQP[:, None].expand(-1, shared, -1, -1).reshape(sequences, shared * queries, -1)
    begin, end = group.positions
    key = key_JND[:, begin:end].unflatten(1, (sequences, -1))
    value = value_JND[:, begin:end].unflatten(1, (sequences, -1))
    if sink_H is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.expand(heads, -1, -1, -1), scale=scaling
        )
    else:
        sink = sink_H.view(heads, 1, shared, 1, 1).expand(-1, sequences, -1, queries, -1)
        scores = query @ key.transpose(-1, -2) * scaling + bias
        scores = torch.cat([scores, sink.reshape(heads, sequences, -1, 1)], dim=-1)
        out = scores.softmax(dim=-1)[..., :-1] @ value
    out_BQHD = out.unflatten(2, (shared, queries)).permute(1, 3, 0, 2, 4)
    out_NHD = out_BQHD.reshape(sequences * queries, heads * shared, -1)
    return out_NHD if group.kept is None else out_NHD[group.kept]


def _attend_causally(
    group: _Group, query_HTD: Tensor, key_JSD: Tensor, value_JSD: Tensor, scaling: float
) -> Tensor:
    """[Q, H, D'] of a whole sequence: torch needs no mask for it."""
    tokens, positions = slice(*group.tokens), slice(*group.positions)
    query_JGQD = query_HTD[:, tokens].unflatten(0, (len(key_JSD), -1))
    shared = query_JGQD.shape[1]
    out_JGQD = torch.nn.functional.scaled_dot_product_attention(
        query_JGQD,
        key_JSD[:, None, positions].expand(-1, shared, -1, -1),
        value_JSD[:, None, positions].expand(-1, shared, -1, -1),
        is_causal=True,
        scale=scaling,
    )
    return out_JGQD.permute(2, 0, 1, 3).flatten(1, 2)
