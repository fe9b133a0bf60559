"""Write a trained model as a Hugging Face checkpoint, experts in logical order.

AutoEP holds experts [E / G, F, D] as `w1` (gate), `w3` (up) and `w2` (down), each rank a contiguous
block; placed experts are the family's own tensors, with the slots of a rank; transformers holds
them whole, fused. The experts of one decoder layer at a time are gathered
on rank 0, converted by transformers' own rules and written, so that rank 0 never holds more than
its share of the model, one decoder layer, and the shard it fills.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

from semantic_ep.apply.checkpoint.writer import new_directory
from semantic_ep.errors import CheckpointError, explain
from semantic_ep.integrations.deepspeed.placing import PlacedExperts
from semantic_ep.integrations.safetensors_shards import write_shards
from semantic_ep.integrations.transformers import MoELayerSite, find_moe_layers

if TYPE_CHECKING:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer


def save_huggingface_checkpoint(
    engine: Any,
    output: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write what `save_pretrained` would write for the whole model; collective over all ranks.

    Args:
        engine: A DeepSpeed engine around a Hugging Face causal language model, with placed
            experts, AutoEP layers or neither.
        output: Directory to make; it appears whole or not at all.
        tokenizer: Saved beside the model; anything with `save_pretrained`.
        max_shard_bytes: A new file starts before one grows beyond this.

    Raises:
        CheckpointError: The output exists or cannot be written, or a part of the model has no
            place in a Hugging Face checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = engine.module
    with torch.device("meta"):
        reference = type(model)(model.config)
    units = _units(model, reference, getattr(engine, "placed_experts", None))
    if dist.get_rank() != 0:
        for _ in units:  # Takes part in the gathers.
            pass
        return
    with new_directory(Path(output)) as directory:
        stored = (revert_weight_conversion(reference, unit) for unit in units)
        write_shards(
            directory,
            tqdm(stored, desc="export", unit=" parts", disable=None),
            max_shard_bytes=max_shard_bytes,
        )
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)


def _units(
    model: nn.Module, reference: nn.Module, placed: PlacedExperts | None
) -> Iterator[dict[str, Tensor]]:
    """Tensors by the names of transformers' modules, a decoder layer (or a single one) at a time.

    Empty on ranks other than 0.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    modules = dict(model.named_modules())
    replaced = {
        site.block: site
        for site in find_moe_layers(reference)
        if isinstance(modules.get(site.block), AutoEPMoELayer)
    }
    states = dict(model.named_parameters()) | dict(model.named_buffers())
    if placed is not None:
        yield from _placed_units(model, placed)
        spread = {_whole_name(name) for name, _, _ in placed.parameters(model)}
    else:
        spread = set()
    by_unit: dict[str, list[str]] = {}
    for name in _names_once(model, reference):
        if name in spread:
            continue
        block = next((block for block in replaced if name.startswith(f"{block}.")), None)
        unit = block.rpartition(".")[0] if block else name
        by_unit.setdefault(unit, [])
        if block is None:
            by_unit[unit].append(name)
    for unit, names in by_unit.items():
        tensors: dict[str, Tensor] = {}
        for block, site in replaced.items():
            if block.rpartition(".")[0] == unit:
                tensors |= _hugging_face_block(modules[block], site, reference)
        tensors |= {name: _gathered(states[name]) for name in names}
        yield tensors if dist.get_rank() == 0 else {}


def _placed_units(model: nn.Module, placed: PlacedExperts) -> Iterator[dict[str, Tensor]]:
    """The experts of one layer at a time; empty on ranks other than 0."""
    by_layer: dict[int, dict[str, nn.Parameter]] = {}
    for name, layer, parameter in placed.parameters(model):
        by_layer.setdefault(layer, {})[name] = parameter
    for layer, parameters in by_layer.items():
        slots = placed.placement.logical_to_physical_map[layer, :, 0].tolist()
        tensors = {}
        for name, parameter in parameters.items():
            whole = _of_group(
                _gathered(parameter, host=False), placed.process_groups.expert_parallel
            )
            if whole is not None:
                tensors[_whole_name(name)] = whole[slots]
        yield tensors


def _whole_name(name: str) -> str:
    """Name in the family's own model of a parameter of placed experts."""
    return name.replace(".experts.local.", ".experts.")


def _hugging_face_block(
    layer: AutoEPMoELayer, site: MoELayerSite, reference: nn.Module
) -> dict[str, Tensor]:
    """Router, experts and shared experts of an AutoEP layer, by transformers' names."""
    if layer.expert_bias is not None and layer.expert_bias.any():
        raise CheckpointError(
            explain(
                f"{site.block} routes with a load-balancing bias that this family cannot store",
                where="expert_parallel.load_balance_coeff",
                do="Train without it",
            )
        )
    router, experts = layer.router, layer.experts
    tensors = {f"{site.router}.weight": _gathered(router.gate.weight)}
    if router.gate.bias is not None:
        tensors[f"{site.router}.bias"] = _gathered(router.gate.bias)
    if router.e_score_correction_bias is not None:
        tensors[f"{site.router}.e_score_correction_bias"] = _gathered(
            router.e_score_correction_bias
        )
    for name in ("shared_experts", "shared_experts_gate"):
        shared = getattr(layer, name)
        if shared is not None:
            source = _name_in(reference.get_submodule(site.block), shared)
            for key, value in shared.named_parameters():
                tensors[f"{site.block}.{source}.{key}"] = _gathered(value)
    gate, down, up = (_all_experts(layer, w) for w in (experts.w1, experts.w2, experts.w3))
    if gate is None or down is None or up is None:
        return {}
    tensors[f"{site.experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    tensors[f"{site.experts}.down_proj"] = down
    _check_block(tensors, site, reference)
    return tensors


def _check_block(tensors: dict[str, Tensor], site: MoELayerSite, reference: nn.Module) -> None:
    """Raise unless the tensors are those of transformers' block, in name and shape."""
    expected = {
        f"{site.block}.{name}": tuple(tensor.shape)
        for name, tensor in reference.get_submodule(site.block).state_dict().items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise CheckpointError(
            explain(
                f"{site.block} cannot be written in the form of its family",
                got=f"{sorted(found.items() - expected.items())}",
                allowed=f"{sorted(expected.items() - found.items())}",
            )
        )


def _all_experts(layer: AutoEPMoELayer, local: nn.Parameter) -> Tensor | None:
    """[E, ...] on rank 0, gathered over its EP group; None elsewhere."""
    return _of_group(_gathered(local, host=False), layer.ep_group)


def _of_group(part: Tensor, group: dist.ProcessGroup | None) -> Tensor | None:
    """Parts of all EP ranks in their order, on rank 0; None elsewhere."""
    if group is None or dist.get_world_size(group) == 1:
        return part.cpu() if dist.get_rank() == 0 else None
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:
        return None
    parts = [torch.empty_like(part) for _ in ranks] if dist.get_rank() == 0 else None
    dist.gather(part.contiguous(), parts, dst=0, group=group)
    return None if parts is None else torch.cat(parts).cpu()


def _gathered(tensor: Tensor, *, host: bool = True) -> Tensor:
    """The tensor, whole if ZeRO 3 has it in pieces."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        value = tensor.detach().clone()
    return value.cpu() if host else value


def _names_once(model: nn.Module, reference: nn.Module) -> list[str]:
    """Names of the family's state dict, without second names of tied tensors."""
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return [name for name in reference.state_dict() if name not in tied]


def _name_in(block: nn.Module, shared: nn.Module) -> str:
    """Name of the child of transformers' block with the same parameters."""
    form = {name: _full_shape(parameter) for name, parameter in shared.named_parameters()}
    for name, child in block.named_children():
        if {key: _full_shape(parameter) for key, parameter in child.named_parameters()} == form:
            return name
    raise CheckpointError(explain("shared experts have no place in transformers' block"))


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
