"""Gradients of experts with several copies, finalised so that all copies take the same step.

Megatron reduces the gradients of a slot over the ranks that train the same slot, scaled so that
sums over all tokens are means. What is left is to add up the copies of an expert, each of which has
seen tokens of its own: a plain sum, before gradients are clipped and the optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import distributed as dist
from torch import nn

from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.megatron.copies import GOT, WHERE, rows_of
from semantic_ep.integrations.megatron.layer import PlacedLayers, SemanticMoELayer
from semantic_ep.runtime.collectives import from_all_ranks
from semantic_ep.runtime.copies import CopyGradient, CopySums
from semantic_ep.runtime.groups import create_groups


class FinalizeWithCopies:
    """Takes the place of Megatron's `finalize_model_grads` where experts have copies.

    Attributes:
        sums_copies: Tells a layer that its copies are not trained apart.
    """

    sums_copies = True

    def __init__(self) -> None:
        """Learn the model from the first call, and again where its experts have moved."""
        self._chunks: list[nn.Module] = []
        self._layers: list[SemanticMoELayer] = []
        self._group: dist.ProcessGroup | None = None
        self._placed: list[PlacedLayers] = []
        self._sums: CopySums | None = None

    def __call__(self, model: Sequence[nn.Module], *args: Any, **kwargs: Any) -> None:
        """Finalise the gradients of a step; collective over all ranks.

        Args:
            model: The `DistributedDataParallel` chunks of this rank.
            *args: As for Megatron's `finalize_model_grads`.
            **kwargs: Likewise.

        Raises:
            ConfigError: Gradients are kept in a way that copies cannot be summed in.
            PeerFailureError: Another rank died or did not answer in time.
        """
        if [*model] != self._chunks:
            _check(model)
            self._chunks, self._group, self._sums = [*model], _group(model[0]), None
            self._layers = [layer for chunk in model for layer in _layers(chunk)]
        placed = [layer.placed for layer in self._layers]
        if self._sums is None or placed != self._placed:
            # The ranks of the group have the same layers, and learn of another placement together.
            self._sums, self._placed = CopySums(list(_gradients(model)), self._group), placed
        finalize_model_grads(list(model), *args, **kwargs)
        self._sums.sum()


def _layers(chunk: nn.Module) -> Iterator[SemanticMoELayer]:
    return (module for module in chunk.modules() if isinstance(module, SemanticMoELayer))


def _gradients(model: Sequence[nn.Module]) -> Iterator[CopyGradient]:
    """What this rank holds of the gradients of copies, once Megatron has reduced them."""
    for chunk in model:
        owned = _owned(chunk)
        for layer in _layers(chunk):
            number = layer.placed.row_of(layer.layer_number)
            experts_S = layer.placed.placement.experts_of_rank(number, layer.ep_group.rank())
            count_E = layer.placed.placement.logical_count[number]
            first = layer.ep_group.rank() * len(experts_S)
            for name, of_slots in rows_of(layer.experts, where=WHERE).items():
                for slot, parameter in enumerate(of_slots):
                    expert = int(experts_S[slot])
                    if count_E[expert] > 1 and parameter in owned:
                        start, end = owned[parameter]
                        yield CopyGradient(
                            layer=number,
                            name=name,
                            expert=expert,
                            slot=first + slot,
                            values=parameter.main_grad.view(-1)[start:end],
                            start=start,
                        )


def _owned(chunk: nn.Module) -> dict[nn.Parameter, tuple[int, int]]:
    """Where the reduced gradient of each trained expert tensor is valid on this rank."""
    owned = {}
    for buffer in chunk.expert_parallel_buffers:
        if not _is_divided(chunk):
            owned |= {parameter: (0, parameter.numel()) for parameter in buffer.params}
            continue
        for of_buckets in DistributedOptimizer._build_gbuf_range_map(buffer).values():
            for bucket in of_buckets:
                for parameter, ranges in bucket["param_map"].items():
                    owned[parameter] = (ranges["param"].start, ranges["param"].end)
    return owned


def _is_divided(chunk: nn.Module) -> bool:
    """Whether ranks that train the same slots divide their gradients among them."""
    return bool(chunk.ddp_config.use_distributed_optimizer) and chunk.expt_dp_group.size() > 1


def _group(chunk: nn.Module) -> dist.ProcessGroup:
    """Ranks that together hold all pieces of all copies once; collective over all ranks."""
    if not _is_divided(chunk):
        # Every EP group has them all, with the same values.
        group: dist.ProcessGroup = chunk.ep_group
        return group
    mine = [dist.get_process_group_ranks(group) for group in (chunk.ep_group, chunk.expt_dp_group)]
    everyone = from_all_ranks(mine, "gathering of expert groups")
    together = {
        tuple(sorted({rank for member in experts for rank in everyone[member][1]}))
        for experts, _ in everyone
    }
    return create_groups(sorted(together))


def _check(model: Sequence[nn.Module]) -> None:
    """Refuse gradients that are kept in another way than is known here."""
    for chunk in model:
        if not hasattr(chunk, "expert_parallel_buffers"):
            raise ConfigError(
                explain(
                    "gradients of copies are summed in the buffers of DistributedDataParallel",
                    where=f"the wrapper of the model, and {WHERE}",
                    got=f"{type(chunk).__name__}, with {GOT}",
                    allowed="megatron.core.distributed.DistributedDataParallel",
                    do="Drop --use-megatron-fsdp or --use-torch-fsdp2, or make the plan with "
                    "--redundant-slots 0",
                )
            )
        instances = getattr(chunk.ddp_config, "num_distributed_optimizer_instances", 1)
        if instances > 1:
            raise ConfigError(
                explain(
                    "gradients of copies are not summed over several distributed optimizers",
                    where=f"--num-distributed-optimizer-instances, and {WHERE}",
                    got=f"{instances}, with {GOT}",
                    allowed=1,
                    do="Set it to 1, or make the plan with --redundant-slots 0",
                )
            )
