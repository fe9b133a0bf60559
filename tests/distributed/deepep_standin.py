"""What DeepEP's documentation says of its buffer, over gloo: strict, slow, and on any dtype.

Where the documentation promises nothing the stand-in is as unhelpful as it may be: rows come in
reversed order unless `deterministic` is set, weights of other ranks' experts are NaN, and the
caller's indices must stay as they were while their handle is in use.
"""

import dataclasses
import math

import torch
import torch.distributed as dist

topk_idx_t = torch.int64


@dataclasses.dataclass
class EPHandle:
    num_experts: int
    topk_idx: torch.Tensor
    idx_of_rank: list
    order: list

    def check_unmodified(self, rank):
        assert torch.equal(self.topk_idx, self.idx_of_rank[rank])


class ElasticBuffer:
    def __init__(
        self,
        group,
        *,
        num_max_tokens_per_rank,
        hidden,
        num_topk,
        deterministic=False,
        allow_multiple_reduction=True,
    ):
        self.group = group
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self._shape = hidden, num_topk
        self._deterministic = deterministic

    def dispatch(self, x, topk_idx=None, topk_weights=None, num_experts=None, handle=None):
        assert x.is_contiguous()
        assert 1 <= len(x) <= self.num_max_tokens_per_rank
        assert x.shape[1] == self._shape[0]
        # DeepEP asks for it before it looks into the handle.
        assert num_experts is not None
        assert num_experts % self.group.size() == 0
        if handle is None:
            assert topk_idx.shape == topk_weights.shape == (len(x), self._shape[1])
            assert (topk_idx.dtype, topk_weights.dtype) == (topk_idx_t, torch.float32)
            ranks = self._everyones(topk_idx)
            # DeepEP hands out the order of rows once, in the dispatch that makes the handle.
            handle = EPHandle(num_experts, topk_idx, ranks, self._order(ranks, num_experts))
        else:
            assert topk_idx is None
            assert topk_weights is None
            assert num_experts == handle.num_experts
            handle.check_unmodified(self.group.rank())
        order = handle.order[self.group.rank()]
        recv_x = self._pick(self._everyones(x), order)
        if topk_weights is None:
            return recv_x, None, None, handle, None
        local = num_experts // self.group.size()
        idx = self._pick(handle.idx_of_rank, order) - self.group.rank() * local
        here = (idx >= 0) & (idx < local)
        weights = self._pick(self._everyones(topk_weights), order)
        return recv_x, idx.where(here, -1), weights.where(here, math.nan), handle, None

    def combine(self, x, handle, topk_weights=None):
        assert x.is_contiguous()
        assert len(x) == len(handle.order[self.group.rank()])
        handle.check_unmodified(self.group.rank())
        out_x = self._sum(x, handle)
        if topk_weights is None:
            return out_x, None, None
        assert topk_weights.dtype == torch.float32
        return out_x, self._sum(topk_weights, handle), None

    def _sum(self, rows, handle):
        """Rows of my tokens, summed in rank order, rounded once."""
        mine = self.group.rank()
        exact = torch.promote_types(rows.dtype, torch.float32)
        out = torch.zeros(len(handle.idx_of_rank[mine]), rows.shape[1], dtype=exact)
        for order, part in zip(handle.order, self._everyones(rows), strict=True):
            for (source, token), row in zip(order, part, strict=True):
                if source == mine:
                    out[token] += row
        return out.to(rows.dtype)

    def _order(self, idx_of_rank, num_experts):
        """(source, token) of each row, for every rank."""
        local = num_experts // self.group.size()
        orders = []
        for rank in range(self.group.size()):
            order = [
                (source, token)
                for source, idx in enumerate(idx_of_rank)
                for token in range(len(idx))
                if ((idx[token] >= 0) & (idx[token] // local == rank)).any()
            ]
            orders.append(order if self._deterministic else order[::-1])
        return orders

    def _pick(self, tensors, order):
        width, dtype = tensors[0].shape[1], tensors[0].dtype
        rows = [tensors[source][token] for source, token in order]
        return torch.stack(rows) if rows else torch.empty(0, width, dtype=dtype)

    def _everyones(self, tensor):
        tensors = [None] * self.group.size()
        dist.all_gather_object(tensors, tensor, group=self.group)
        return tensors
