"""Layers whose slots hold several copies of some experts.

Copies start alike, are counted once where Megatron counts parameters, and stay alike since they
all get the sum of their gradients (`semantic_ep.integrations.megatron.gradients`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch import distributed as dist

from semantic_ep.errors import ConfigError, explain
from semantic_ep.plan.placement import Placement
from semantic_ep.runtime.exchange import fill_copies

WHERE = "semantic_ep.plan.artifact, --semantic-ep-plan-artifact"
GOT = "a plan with copies of experts"

_NUMBERED = re.compile(r"(.*?)(\d+)")


def check_copies(config: TransformerConfig, placement: Placement, *, has_exchange: bool) -> None:
    """Refuse what copies do not go with, before anything is built.

    Args:
        config: Of the model.
        placement: With copies.
        has_exchange: Whether our dispatcher sends the tokens.

    Raises:
        ConfigError: For each of these.
    """
    mistakes = []
    if not has_exchange:
        mistakes.append(
            explain(
                "Megatron's own dispatchers take exactly one slot an expert",
                where="semantic_ep.dispatch.backend, --semantic-ep-dispatch-backend",
                got=f'"auto", with {GOT}',
                allowed='"torch", "kernels" and other backends of our exchange',
                do="Name a backend, or make the plan with --redundant-slots 0",
            )
        )
    if placement.num_experts % placement.ep_size:
        mistakes.append(
            explain(
                "Megatron divides experts evenly among ranks, before copies are added",
                where="--num-experts, and --expert-model-parallel-size",
                got=f"{placement.num_experts} experts on {placement.ep_size} ranks",
                do="Choose an expert-parallel size that divides the number of experts",
            )
        )
    for flag, setting, why in (
        ("--fp8-param-gather", "fp8_param", "weights in fp8 cannot be sent from slot to slot"),
        ("--fp4-param-gather", "fp4_param", "weights in fp4 cannot be sent from slot to slot"),
        (
            "--init-model-with-meta-device",
            "init_model_with_meta_device",
            "there are no weights yet that copies could share",
        ),
    ):
        if getattr(config, setting, False):
            mistakes.append(
                explain(
                    f"copies of an expert cannot start alike: {why}",
                    where=f"{flag}, and {WHERE}",
                    got=f"{flag}, with {GOT}",
                    do=f"Drop {flag}, or make the plan with --redundant-slots 0",
                )
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def check_summed(config: TransformerConfig) -> None:
    """Refuse to train copies apart.

    Args:
        config: Of the model; Megatron's schedules read `finalize_model_grads_func` from it.

    Raises:
        ConfigError: That function does not sum the gradients of copies.
    """
    finalize = config.finalize_model_grads_func
    while isinstance(finalize, functools.partial):
        finalize = finalize.func
    if not getattr(finalize, "sums_copies", False):
        raise ConfigError(
            explain(
                "copies of one expert would be trained apart: nothing sums their gradients",
                where=f"config.finalize_model_grads_func, and {WHERE}",
                got=getattr(finalize, "__qualname__", repr(finalize)),
                allowed="run.finalize_model_grads of the SemanticRun, or a functools.partial of it",
                do="Set config.finalize_model_grads_func = run.finalize_model_grads where "
                "Megatron's finalize_model_grads is set, or make the plan with --redundant-slots 0",
            )
        )


def with_slots(submodules: MoESubmodules, slots: int) -> MoESubmodules:
    """The description of a layer with `slots` experts on a rank, whatever Megatron counts.

    Args:
        submodules: As `MoELayer` takes them; in 0.16 experts are a spec or a class, in later
            releases anything that builds them.
        slots: S.
    """
    theirs = submodules.experts
    if isinstance(theirs, ModuleSpec):
        kind = theirs.module if isinstance(theirs.module, type) else import_module(theirs.module)
        experts = dataclasses.replace(theirs, module=_of_slots(kind, slots))
    elif isinstance(theirs, type):
        experts = _of_slots(theirs, slots)
    else:

        def experts(_num_local_experts: int, *args: Any, **kwargs: Any) -> nn.Module:
            built: nn.Module = theirs(slots, *args, **kwargs)
            return built

    return dataclasses.replace(submodules, experts=experts)


@functools.cache
def _of_slots(kind: type, slots: int) -> type:
    def build(self: nn.Module, _num_local_experts: int, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, slots, *args, **kwargs)  # type: ignore[misc]

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def start_alike(
    experts: nn.Module, *, placement: Placement, layer: int, group: dist.ProcessGroup
) -> None:
    """Give all copies the weights of the first, and let Megatron count those alone; collective.

    Args:
        experts: Of one layer on this rank.
        placement: Of the model.
        layer: MoE layer.
        group: The EP group.
    """
    rows = rows_of(experts, where=WHERE)
    first = next(experts.parameters())
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda") if on_gpu and not first.is_cuda else first.device
    moved = {name: [row.detach().to(device) for row in of_slots] for name, of_slots in rows.items()}
    fill_copies(moved, placement=placement, layer=layer, group=group)
    for name, of_slots in rows.items():
        for row, weights in zip(of_slots, moved[name], strict=True):
            row.data.copy_(weights)
    count_once(rows, placement=placement, layer=layer, ep_rank=group.rank())


def count_once(
    rows: Mapping[str, Sequence[nn.Parameter]],
    *,
    placement: Placement,
    layer: int,
    ep_rank: int,
    stand_ins: Callable[[nn.Parameter], Iterable[Tensor]] = lambda _: (),
) -> None:
    """Let norms of gradients and numbers of zeros leave out all copies but the first.

    Args:
        rows: See `rows_of`.
        placement: Of the model.
        layer: MoE layer.
        ep_rank: Of this rank.
        stand_ins: What an optimizer has in the place of a parameter, if it exists already.
    """
    slots = placement.slots_per_rank
    copy_S = placement.copy_of_slot[layer, ep_rank * slots : (ep_rank + 1) * slots]
    for of_slots in rows.values():
        for row, copy in zip(of_slots, copy_S, strict=True):
            for each in (row, *stand_ins(row)):
                # As Megatron marks further uses of one weight.
                each.shared = bool(copy)  # type: ignore[attr-defined]


def rows_of(experts: nn.Module, *, where: str) -> dict[str, list[nn.Parameter]]:
    """Parameters of a layer's experts by name, one a slot.

    Args:
        experts: `SequentialMLP`, with a module for each slot, or `TEGroupedMLP`, whose parameters
            end in the number of their slot.
        where: Setting that asks for them, for messages.

    Raises:
        ConfigError: Parameters do not say which slot they are of.
    """
    if isinstance(experts, SequentialMLP):
        of_slot = [dict(expert.named_parameters()) for expert in experts.local_experts]
        return {name: [slot[name] for slot in of_slot] for name in of_slot[0]}
    rows: dict[str, dict[int, nn.Parameter]] = {}
    for name, parameter in experts.named_parameters():
        numbered = _NUMBERED.fullmatch(name)
        if numbered is not None:
            rows.setdefault(numbered[1], {})[int(numbered[2])] = parameter
    slots: Sequence[int] = range(experts.num_local_experts)
    found = {name: sorted(of_slots) for name, of_slots in rows.items()}
    if len(list(experts.parameters())) != len(rows) * len(slots) or any(
        numbers != list(slots) for numbers in found.values()
    ):
        raise ConfigError(
            explain(
                f"the parameters of {type(experts).__name__} do not say which slot they are of",
                where=where,
                got=str([name for name, _ in experts.named_parameters()]),
                do="Build the experts with one parameter for each of them, or unset it",
            )
        )
    return {name: [of_slots[slot] for slot in slots] for name, of_slots in rows.items()}
