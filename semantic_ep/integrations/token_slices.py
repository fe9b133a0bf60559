"""Attention-TP: every rank runs attention for all tokens of a step, and MoE layers for a slice.

Heads are sharded, so attention leaves partial sums on every rank. Where plain tensor parallelism
would reduce them to all ranks, a shuffled reduce-scatter gives each rank the sums of the tokens
that were scheduled to it. Residual, norm, router, shared experts and the exchange with the other
ranks' experts then run on that slice, and a shuffled all-gather restores all tokens in order for
the next layer. Bytes are those of the all-reduce it replaces; what a good schedule saves is the
exchange in between.

Models run unchanged: hooks on the decoder layers swap tensors at three places. The layer is
entered with its slice of the residual stream; its first norm gets the whole stream; the output of
its attention is reduced to the slice; what the layer returns is gathered.

Shapes: N tokens of a step, M = ceil(N / G) rows of a slice, D hidden, L MoE layers, G EP ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from semantic_ep.errors import BackendError, explain
from semantic_ep.integrations.look_ahead import LookAheadPredictor, ResidualContext
from semantic_ep.integrations.transformers import decoder_layer_of, find_moe_layers
from semantic_ep.plan.predictors import Context
from semantic_ep.plan.token_schedule import home_ranks
from semantic_ep.runtime.collectives import peer_guard
from semantic_ep.runtime.shuffle import permutation_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from semantic_ep.integrations.expert_parallel import StepContext
    from semantic_ep.plan.placement import Placement
    from semantic_ep.plan.predictors import Predictor
    from semantic_ep.runtime.shuffle import Shuffle


SHUFFLE_COUNTERS = ("bytes_reduce_scatter", "bytes_all_gather")


class ShuffleStats:
    """Payload that left this rank around the MoE layers, since the last `reset`.

    Attributes:
        bytes_reduce_scatter: [L] int64.
        bytes_all_gather: [L] int64.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.reset()

    def reset(self) -> None:
        """Set every counter to zero."""
        for name in SHUFFLE_COUNTERS:
            setattr(self, name, np.zeros(self._num_layers, dtype=np.int64))

    def snapshot(self) -> dict[str, np.ndarray]:
        """Copies of all counters by name."""
        return {name: getattr(self, name).copy() for name in SHUFFLE_COUNTERS}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slices:
    """How the tokens of a step are divided at one layer, equal on all ranks.

    Attributes:
        permutation: See `semantic_ep.runtime.shuffle.permutation_of`.
        own_T: int64, this rank's tokens, at most M.
    """

    permutation: Tensor
    own_T: Tensor

    @classmethod
    def of(cls, home_N: np.ndarray, *, rank: int, ranks: int, device: torch.device) -> Slices:
        """Slices of a schedule."""
        permutation = permutation_of(torch.from_numpy(home_N), ranks).to(device)
        mine = permutation.view(ranks, -1)[rank].long()
        return cls(permutation=permutation, own_T=mine[mine >= 0])


class TokenSlices:
    """Divides a model's steps among the ranks of an EP group.

    Args:
        model: A Hugging Face model whose attention is sharded over the group and leaves partial
            sums in the decoder layers that have an MoE block.
        group: The EP group.
        shuffle: Its collectives.
        placement: Of the experts.
        predictor: What tokens will want; None: slices in order of the tokens. All ranks must
            come to the same scores.
        decode_predictor: What generated tokens will want, if another knows that.
        context: Of the model's MoE layers; its timer takes the phases "schedule" and "shuffle".

    Attributes:
        placement: As given, or what took its place.
        stats: Bytes of the shuffles.
        current: Slices of the layer that runs.
    """

    current: Slices

    def __init__(
        self,
        model: nn.Module,
        *,
        group: ProcessGroup,
        shuffle: Shuffle,
        placement: Placement,
        predictor: Predictor | None,
        context: StepContext,
        decode_predictor: Predictor | None = None,
    ) -> None:
        self.group = group
        self.shuffle = shuffle
        self.placement = placement
        self.predictor = predictor
        self.decode_predictor = decode_predictor
        self.context = context
        self.timer = context.timer
        self.stats = ShuffleStats(placement.num_layers)
        self._id_N = np.empty(0, dtype=np.int64)
        self._generated_N: Tensor | None = None
        self._known: Mapping[int, Slices] = {}
        for layer, site in enumerate(find_moe_layers(model)):
            _SlicedLayer(self, layer, decoder_layer_of(model, site))

    @property
    def num_tokens(self) -> int:
        """Tokens of the current step (N), those of other ranks' slices included."""
        return len(self._id_N)

    def start_step(self, id_N: Tensor, generated_N: Tensor | None = None) -> None:
        """Take the token ids of a step, in the order in which they lie in its row.

        Args:
            id_N: Token ids.
            generated_N: [N] bool, which of them were generated, where that makes a difference.
        """
        self._id_N = id_N.cpu().numpy()
        self._generated_N = generated_N
        if isinstance(self.predictor, LookAheadPredictor):
            self._known = {}
            return
        with self.timer.phase("schedule"):
            self._known = self._before_the_step(id_N.device)

    def agree(self, tokens: list[int]) -> list[int]:
        """Rank 0's choice of the next tokens, on every rank. Communicates."""
        chosen = torch.tensor(tokens, device=self.timer.device)
        with peer_guard("broadcast of the chosen tokens", self.group):
            dist.broadcast(chosen, group_src=0, group=self.group)
        return chosen.tolist()

    def at(self, layer: int, residual_ND: Tensor) -> Slices:
        """Slices of the current step at a layer that this residual stream enters."""
        if layer in self._known:
            return self._known[layer]
        assert self.predictor is not None
        with self.timer.phase("schedule"):
            context = ResidualContext.of(layer, self._id_N, residual_ND)
            home_N = home_ranks(self.predictor.rank_scores(context, self.placement))
            return self._slices(home_N, residual_ND.device)

    def _before_the_step(self, device: torch.device) -> Mapping[int, Slices]:
        """Slices of all layers, where token ids are all that counts."""
        layers, tokens = range(self.placement.num_layers), len(self._id_N)
        if self.predictor is None:
            per_slice = max(-(-tokens // self.group.size()), 1)
            same = self._slices(np.arange(tokens) // per_slice, device)
            return dict.fromkeys(layers, same)
        scores_LNG = self._scores(self.predictor)
        if self.decode_predictor is not None and self._generated_N is not None:
            generated_N = self._generated_N.cpu().numpy()
            scores_LNG[:, generated_N] = self._scores(self.decode_predictor)[:, generated_N]
        return {
            layer: self._slices(home_N, device)
            for layer, home_N in zip(layers, home_ranks(scores_LNG), strict=True)
        }

    def _scores(self, predictor: Predictor) -> np.ndarray:
        nothing = np.empty((len(self._id_N), 0, 0), dtype=np.int64)
        contexts = [
            Context(layer=layer, token_id=self._id_N, history=nothing)
            for layer in range(self.placement.num_layers)
        ]
        return np.stack([predictor.rank_scores(context, self.placement) for context in contexts])

    def own_phases(self) -> Tensor | None:
        """[T] bool, which tokens of this rank's slice at the current layer were generated."""
        return None if self._generated_N is None else self._generated_N[self.current.own_T]

    def _slices(self, home_N: np.ndarray, device: torch.device) -> Slices:
        return Slices.of(home_N, rank=self.group.rank(), ranks=self.group.size(), device=device)


class _SlicedLayer:
    """The hooks of one decoder layer."""

    def __init__(self, steps: TokenSlices, layer: int, module: nn.Module) -> None:
        self._steps = steps
        self._layer = layer
        self._stream_1ND: Tensor | None = None
        # A bias would be summed once for every rank.
        self._bias = module.self_attn.o_proj.bias
        module.self_attn.o_proj.bias = None
        module.register_forward_pre_hook(self._enter)
        module.input_layernorm.register_forward_pre_hook(self._whole)
        module.self_attn.register_forward_hook(self._reduce)
        module.register_forward_hook(self._gather)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stream_1ND = args[0]
        if len(stream_1ND) != 1:
            raise BackendError(
                explain(
                    "attention-TP takes packed steps only",
                    got=f"a batch of {len(stream_1ND)} rows",
                    allowed="one row, with a PackedBatch",
                )
            )
        self._stream_1ND = stream_1ND
        self._steps.current = self._steps.at(self._layer, stream_1ND[0])
        self._steps.context.generated_T = self._steps.own_phases()
        return (stream_1ND[:, self._steps.current.own_T], *args[1:])

    def _whole(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._stream_1ND, *args[1:])

    def _reduce(self, module: nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        steps, slices = self._steps, self._steps.current
        with steps.timer.phase("shuffle"):
            mine_MD = steps.shuffle.reduce_scatter(output[0][0], slices.permutation)
        steps.stats.bytes_reduce_scatter[self._layer] += self._wire_bytes(mine_MD)
        mine_TD = mine_MD[: len(slices.own_T)]
        if self._bias is not None:
            mine_TD = mine_TD + self._bias
        return (mine_TD[None], *output[1:])

    def _gather(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        steps, permutation = self._steps, self._steps.current.permutation
        per_slice, num_rows = len(permutation) // steps.group.size(), self._stream_1ND.shape[1]
        self._stream_1ND = None
        padded_MD = nn.functional.pad(output[0], (0, 0, 0, per_slice - output.shape[1]))
        with steps.timer.phase("shuffle"):
            stream_ND = steps.shuffle.all_gather(padded_MD, permutation, num_rows)
        steps.stats.bytes_all_gather[self._layer] += self._wire_bytes(padded_MD)
        return stream_ND[None]

    def _wire_bytes(self, slice_MD: Tensor) -> int:
        """A slice's worth of rows for every other rank, in either direction."""
        others = self._steps.group.size() - 1
        return others * slice_MD.numel() * slice_MD.element_size()
