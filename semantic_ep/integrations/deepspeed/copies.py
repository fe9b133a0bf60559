"""Experts with several copies under a DeepSpeed engine: the first is trained, the others follow.

Each copy has seen tokens of its own. When DeepSpeed has reduced the gradients of every slot over
the ranks that train the same slots, the copies of an expert are summed. The first copy keeps the
sum, and the others a gradient of zero, so that the norm of all gradients counts each expert once.
After the step they get the weights of the first, bit for bit, whatever the optimizer makes of a
zero (weight decay, momentum).

What the optimizer keeps of the other copies is therefore of no account. Checkpoints are read by the
first copy, and experts that move take its state with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.deepspeed.optimizer_state import full_shape
from semantic_ep.integrations.deepspeed.placing import PlacedExperts
from semantic_ep.integrations.deepspeed.replanning import without_padding
from semantic_ep.runtime.copies import CopyGradient, CopySums
from semantic_ep.runtime.exchange import fill_copies

WHERE = "semantic_ep.plan.artifact, --semantic-ep-plan-artifact"


class EngineCopies:
    """Sums gradients and spreads weights of the copies in one placement.

    Attributes:
        placed: The experts that it was made for.
    """

    def __init__(self, engine: Any) -> None:
        """Check that gradients can be summed.

        Args:
            engine: With `placed_experts`, some of which have copies.

        Raises:
            ConfigError: Gradients are kept in a way that copies cannot be summed in.
        """
        _check(engine)
        self.placed: PlacedExperts = engine.placed_experts
        self._engine = engine
        self._sums: _SumsOfStep | None = None
        self._weights: _SumsOfStep | None = None
        zero, partitioned = engine.optimizer, engine.zero_optimization_partition_weights()
        # Where ZeRO 3 has the gradient of a parameter.
        self._place = {
            id(parameter): (group, index)
            for group, parameters in enumerate(zero.fp16_groups if partitioned else ())
            for index, parameter in enumerate(parameters)
        }

    def sum_gradients(self) -> None:
        """Before a step, give the first copy of each expert the sum; collective over all ranks.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        pieces = list(self._pieces(self._reduced))
        if self._sums is None:
            self._sums = _SumsOfStep(pieces, self._group())
        self._sums.sum_anew(pieces)
        for piece in pieces:
            if self._follows(piece):
                piece.values.zero_()

    def follow(self) -> None:
        """Give all copies of an expert the weights of the first; collective over all ranks.

        Raises:
            PeerFailureError: Another rank died or did not answer in time.
        """
        if self._engine.zero_optimization_partition_weights():
            self._follow_in_pieces()
            return
        of_layer: dict[int, dict[str, Tensor]] = {}
        for name, layer, parameter in self.placed.parameters(self._engine.module):
            of_layer.setdefault(layer, {})[name] = parameter.data
        for layer, tensors in of_layer.items():
            fill_copies(
                tensors,
                placement=self.placed.placement,
                layer=layer,
                group=self.placed.process_groups.expert_parallel,
            )

    def _follow_in_pieces(self) -> None:
        """At ZeRO 3 the pieces of a slot are other than those of another: add them to zeros."""
        zero = self._engine.optimizer
        trained = [p for *_, p in self.placed.parameters(self._engine.module)]
        # What is kept whole would not learn of another piece.
        whole = any(parameter.data.numel() == parameter.ds_numel for parameter in trained)
        if whole:
            zero.checkpoint_event_prologue()
        pieces = list(self._pieces(_piece_of_weights))
        for piece in pieces:
            if self._follows(piece):
                piece.values.zero_()
        if self._weights is None:
            self._weights = _SumsOfStep(pieces, self._group())
        self._weights.sum_anew(pieces)
        if whole:
            zero.checkpoint_event_epilogue()

    def _follows(self, piece: CopyGradient) -> bool:
        """Whether a slot has a copy that is not the first."""
        return bool(self.placed.placement.copy_of_slot[piece.layer, piece.slot] > 0)

    def _pieces(
        self, part: Callable[[nn.Parameter], tuple[Tensor, int] | None]
    ) -> Iterator[CopyGradient]:
        """What this rank has of the copies' gradients, or of what else `part` finds."""
        placed = self.placed
        for name, layer, parameter in placed.parameters(self._engine.module):
            found = part(parameter)
            if found is None:
                continue
            values, start = found
            row = full_shape(parameter)[1:].numel()
            for slot, expert in enumerate(placed.held_S(layer).tolist()):
                if expert < 0 or placed.placement.logical_count[layer, expert] < 2:
                    continue
                first = max(start, slot * row)
                last = min(start + len(values), (slot + 1) * row)
                if first < last:
                    yield CopyGradient(
                        layer=layer,
                        name=name,
                        expert=expert,
                        slot=placed.ep_rank * placed.placement.slots_per_rank + slot,
                        values=values[first - start : last - start],
                        start=first - slot * row,
                    )

    def _reduced(self, parameter: nn.Parameter) -> tuple[Tensor, int] | None:
        """Flat gradient, and where it begins in the flattened parameter; None of others' parts."""
        if not self._engine.zero_optimization():
            return None if parameter.grad is None else (parameter.grad.view(-1), 0)
        zero = self._engine.optimizer
        if self._engine.zero_optimization_partition_weights():
            if id(parameter) not in self._place:
                return None
            group, index = self._place[id(parameter)]
            return _in_piece(parameter, zero.averaged_gradients[group][index])
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return gradient.view(-1), mapping.lp_fragment_address.start

    def _group(self) -> dist.ProcessGroup:
        """Ranks that together hold all pieces of all copies once."""
        groups = self.placed.process_groups
        if self._engine.zero_optimization() and groups.expert_data_parallel.size() > 1:
            everyone: dist.ProcessGroup = dist.group.WORLD
            return everyone
        return groups.expert_parallel


def _piece_of_weights(parameter: nn.Parameter) -> tuple[Tensor, int]:
    return _in_piece(parameter, parameter.ds_tensor.detach())


def _in_piece(parameter: nn.Parameter, values: Tensor) -> tuple[Tensor, int]:
    piece = without_padding(parameter, values.view(-1))
    return piece.values, piece.start


class _SumsOfStep(CopySums):
    """Sums of gradients that have memory of their own in each step."""

    def sum_anew(self, pieces: Sequence[CopyGradient]) -> None:
        """Sum the same pieces as ever, elsewhere in memory; collective."""
        assert [piece.place for piece in pieces] == [piece.place for piece in self._pieces]
        self._pieces = pieces
        self.sum()


def clip_gradients(engine: Any) -> None:
    """Clip by the norm over all experts, each counted once; collective over the EP group.

    DeepSpeed takes the mean of the ranks' norms at ZeRO 0, which depends on the placement.

    Args:
        engine: At ZeRO 0, with placed experts and reduced gradients.
    """
    placed: PlacedExperts = engine.placed_experts
    of_experts = {id(parameter) for _, _, parameter in placed.parameters(engine.module)}
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    squares = []
    for here in (True, False):
        gradients = [p.grad for p in trained if (id(p) in of_experts) == here]
        norm = torch.nn.utils.get_total_norm(gradients).to(torch.float32)
        squares.append(norm.to(trained[0].device).square())
    dist.all_reduce(squares[0], group=placed.process_groups.expert_parallel)
    total = torch.stack(squares).sum().sqrt()
    torch.nn.utils.clip_grads_with_norm_(trained, engine.gradient_clipping(), total)
    engine._global_grad_norm = total


def _check(engine: Any) -> None:
    zero = engine.optimizer
    obstacles = {
        "gradients in mixed precision at ZeRO 0 are not kept with the parameters": (
            not engine.zero_optimization() and not isinstance(zero, torch.optim.Optimizer),
            "Train at ZeRO 1 or 2",
        ),
        "ZeRO takes the norm of gradients before copies are summed where they are offloaded": (
            any(getattr(zero, name, False) for name in ("cpu_offload", "offload_optimizer")),
            "Remove zero_optimization.offload_optimizer",
        ),
        "offloaded parameters come and go": (
            getattr(zero, "offload_param", False),
            "Remove zero_optimization.offload_param",
        ),
        "the optimizer keeps gradients by itself": (
            engine.zero_optimization() and not hasattr(zero, "averaged_gradients"),
            "Train at ZeRO 1 or 2 with gradients in the precision of the model",
        ),
    }
    for problem, (present, do) in obstacles.items():
        if present:
            raise ConfigError(
                explain(
                    f"copies of one expert would be trained apart: {problem}",
                    where=WHERE,
                    got=f"a plan with copies of experts, and {type(zero).__name__}",
                    do=f"{do}, or make the plan with --redundant-slots 0",
                )
            )
