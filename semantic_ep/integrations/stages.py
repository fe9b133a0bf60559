"""What pipeline stages tell each other so that each can count its own MoE layers.

All stages run the same micro-batches in the same order, but only the first has the token ids, and
pairs of experts in successive layers may lie on two stages. Both travel once a step, on the host: a
few bytes a token, next to the activations that stages exchange anyway. Sampled sequences are put
together when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from semantic_ep.errors import BackendError, explain
from semantic_ep.observe.micro_batch import MicroBatch
from semantic_ep.observe.reduction import receive_part, send_part
from semantic_ep.observe.samples import Part, join_layers, no_samples
from semantic_ep.runtime.collectives import from_all_ranks


class StageExchange:
    """The exchange of one pipeline; calls are collective over its stages."""

    def __init__(self, group: dist.ProcessGroup, layers: Sequence[int], *, top_k: int) -> None:
        """Tell each other who runs what.

        Args:
            group: The stages, on gloo; the first one has the token ids.
            layers: MoE layers of this stage, as indices among those of the model.
            top_k: Experts a token activates (K).
        """
        self._group, self._top_k = group, top_k
        everyone = from_all_ranks(tuple(layers), "agreement on the layers of stages", group)
        self.owner = {layer: stage for stage, owned in enumerate(everyone) for layer in owned}
        """MoE layer -> the stage that runs it."""

    def complete(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Add token ids, and routes of layers that precede a stage, to a step's micro-batches.

        Raises:
            BackendError: Stages ran different micro-batches.
        """
        lengths = self._share_tokens(batches)
        if lengths:
            self._pass_routes_on(batches, lengths)
        return batches

    def join_samples(self, own: Part, *, num_layers: int) -> Part:
        """Sampled sequences with the routes of all stages, on the first stage; none on the others.

        Args:
            own: With the routes of this stage's layers. All stages sample by the same keys.
            num_layers: MoE layers of the model (L).
        """
        if self._group.rank():
            send_part(own, self._global(0), self._group)
            return no_samples(num_layers, self._top_k)
        stages = range(self._group.size())
        parts = [own, *(receive_part(self._global(each), self._group) for each in stages[1:])]
        layers = [sorted(n for n, owner in self.owner.items() if owner == each) for each in stages]
        return join_layers(parts, layers, num_layers)

    def weights(self, own: dict[int, Tensor]) -> list[Tensor]:
        """The tensors of all stages in layer order, on the host; `own` are this stage's."""
        found = []
        for layer, stage in sorted(self.owner.items()):
            message = [tuple(own[layer].shape) if layer in own else None]
            dist.broadcast_object_list(message, self._global(stage), group=self._group)
            tensor = own[layer].detach().float().cpu() if layer in own else torch.empty(message[0])
            dist.broadcast(tensor, self._global(stage), group=self._group)
            found.append(tensor)
        return found

    def _global(self, stage: int) -> int:
        return dist.get_global_rank(self._group, stage)

    def _share_tokens(self, batches: list[MicroBatch]) -> list[int]:
        """Send the first stage's token ids, masks and sequences; returns tokens a micro-batch."""
        first = self._group.rank() == 0
        own = [batch.token_id_T.numel() if first else -1 for batch in batches]
        passes = from_all_ranks(own, "sharing of token ids among stages", self._group)
        # All stages know, so that all stop, and none waits for another.
        if len({len(each) for each in passes}) > 1:
            raise BackendError(
                explain(
                    "pipeline stages ran different numbers of training passes in one step",
                    got=", ".join(f"stage {n}: {len(each)}" for n, each in enumerate(passes)),
                    do="Call step() of the observation on every stage after each optimizer step",
                )
            )
        lengths = passes[0]
        if not lengths:
            return lengths
        tokens = torch.empty(3, sum(lengths), dtype=torch.int32)
        if first:
            tokens = torch.cat([_described(batch) for batch in batches], dim=1)
        dist.broadcast(tokens, self._global(0), group=self._group)
        for batch, (ids, mask, sequence) in zip(batches, tokens.split(lengths, 1), strict=True):
            batch.token_id_T, batch.mask_T, batch.sequence_T = ids, mask, sequence
        return lengths

    def _pass_routes_on(self, batches: list[MicroBatch], lengths: list[int]) -> None:
        here = self._group.rank()
        sent, awaited = [], []
        for layer, stage in self.owner.items():
            following = self.owner.get(layer + 1, stage)
            if stage == following:
                continue
            if stage == here:
                routes = torch.cat([batch.experts[layer].to(torch.int16) for batch in batches])
                destination = self._global(following)
                # The request does not keep the tensor alive.
                request = dist.isend(routes, destination, group=self._group, tag=layer)
                sent.append((request, routes))
            elif following == here:
                awaited.append((layer, self._global(stage)))
        for layer, source in awaited:
            routes = torch.empty(sum(lengths), self._top_k, dtype=torch.int16)
            dist.recv(routes, source, group=self._group, tag=layer)
            for batch, part in zip(batches, routes.split(lengths), strict=True):
                batch.experts[layer] = part.to(torch.int32)
        for request, _ in sent:
            request.wait()


def join_parts(batches: list[MicroBatch], parts: Sequence[int]) -> list[MicroBatch]:
    """One micro-batch for the passes of all parts of the model that this stage runs over it.

    Args:
        batches: Passes of a step in the order in which they ran; those of a part are in the order
            of the micro-batches, whatever the schedule.
        parts: The part of each; part 0 has the token ids, where this stage has them.

    Raises:
        BackendError: Parts ran different numbers of passes.
    """
    by_part: dict[int, list[MicroBatch]] = {part: [] for part in sorted(set(parts))}
    for part, batch in zip(parts, batches, strict=True):
        by_part[part].append(batch)
    first, *others = by_part.values() if by_part else [[]]
    if any(len(other) != len(first) for other in others):
        raise BackendError(
            explain(
                "the parts of an interleaved pipeline stage ran different numbers of passes",
                got=", ".join(f"part {part}: {len(ran)}" for part, ran in by_part.items()),
                do="Call step() of the observation after each optimizer step",
            )
        )
    for other in others:
        for batch, more in zip(first, other, strict=True):
            batch.experts |= more.experts
    return first


def _described(batch: MicroBatch) -> Tensor:
    """[3, T] int32: token ids, 1 for real tokens, sequence numbers."""
    ids = batch.token_id_T.reshape(-1).to(torch.int32)
    mask = torch.ones_like(ids) if batch.mask_T is None else batch.mask_T.reshape(-1).ne(0).int()
    sequence = batch.sequence_T
    sequence = torch.zeros_like(ids) if sequence is None else sequence.reshape(-1).int()
    return torch.stack([ids, mask, sequence])
