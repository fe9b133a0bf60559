"""Load a Hugging Face checkpoint with only the experts of this rank's slots.

transformers does the loading: names, fusing of per-expert tensors and dtypes stay its business for
every family. It is handed a model whose fused experts have S slots instead of E experts, and a
state dict of lazy tensors in which slot s of a layer answers with the expert that the placement
puts there. Other experts are never read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from semantic_ep.apply.checkpoint import Checkpoint
from semantic_ep.errors import CheckpointError, PlacementError, explain
from semantic_ep.integrations.transformers import find_moe_layers
from semantic_ep.plan.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_expert_shard(
    checkpoint: Checkpoint, *, placement: Placement, rank: int, dtype: torch.dtype
) -> PreTrainedModel:
    """Build the model with S local experts a layer; everything else is complete.

    Args:
        checkpoint: An opened Hugging Face checkpoint, in logical expert order.
        placement: Experts of its L layers on the slots of G ranks.
        rank: EP rank whose slots to load.
        dtype: Of the floating point weights.

    Returns:
        The model on CPU, in evaluation mode. Its expert modules hold slots, so that it cannot run
        before `semantic_ep.integrations.expert_parallel` has replaced them.

    Raises:
        PlacementError: The placement is of another shape.
        CheckpointError: The checkpoint is quantised, or does not fit the model class.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    _check(checkpoint, placement)
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    full = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with contextlib.ExitStack() as stack:
        state = _lazy_state(checkpoint, placement, rank, stack)
        stack.enter_context(_one_tensor_at_a_time())
        model, problems = _with_slots(full, placement.slots_per_rank).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    faulty = {kind: sorted(map(str, names))[:4] for kind, names in problems.items() if names}
    faulty.pop("unexpected_keys", None)  # e.g. multi-token-prediction layers
    if faulty:
        raise CheckpointError(
            explain(
                "the weights do not fit the model",
                where=str(checkpoint.directory),
                got=str(faulty),
                do="Check that config.json belongs to these weights",
            )
        )
    # The loader needed a subclass; what is left is the ordinary class.
    model.__class__ = full
    model.generation_config = _generation_config(checkpoint.directory, model.generation_config)
    return model.eval()


def expert_bytes(model: nn.Module) -> int:
    """Bytes of routed experts that a model holds."""
    modules = (model.get_submodule(site.experts) for site in find_moe_layers(model))
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _check(checkpoint: Checkpoint, placement: Placement) -> None:
    wanted = (len(checkpoint.shape.layer_ids), checkpoint.shape.num_experts)
    found = (placement.num_layers, placement.num_experts)
    if wanted != found:
        raise PlacementError(
            explain(
                "the placement is of another model",
                where=str(checkpoint.directory),
                got=f"{found[0]} MoE layers of {found[1]} experts",
                allowed=f"{wanted[0]} MoE layers of {wanted[1]} experts",
            )
        )
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(
            explain(
                "quantised checkpoints cannot be sharded by expert yet",
                where=str(checkpoint.directory / "config.json"),
                got=checkpoint.config["quantization_config"].get("quant_method"),
                do="Save a dequantised checkpoint (bfloat16) with save_pretrained first",
            )
        )


def _with_slots(full: type[PreTrainedModel], slots: int) -> type[PreTrainedModel]:
    """Subclass whose fused expert parameters have `slots` rows; built on the meta device."""

    class WithSlots(full):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for site in find_moe_layers(self):
                experts = self.get_submodule(site.experts)
                for name, parameter in list(experts.named_parameters(recurse=False)):
                    local = parameter.new_empty(slots, *parameter.shape[1:])
                    setattr(experts, name, nn.Parameter(local, parameter.requires_grad))
                experts.num_experts = slots

    WithSlots.__name__ = full.__name__  # transformers looks up weight conversions by it
    return WithSlots


def _lazy_state(
    checkpoint: Checkpoint, placement: Placement, rank: int, stack: contextlib.ExitStack
) -> dict[str, _Lazy]:
    from safetensors import safe_open

    files = {
        shard.file: stack.enter_context(safe_open(shard.file, framework="pt"))
        for shard in checkpoint.shards
    }
    layer_index = {layer: index for index, layer in enumerate(checkpoint.shape.layer_ids)}
    state: dict[str, _Lazy] = {}
    names: dict[tuple[str, int], str] = {}
    for name, entry in checkpoint.tensors.items():
        expert = checkpoint.experts.get(name)
        if expert is None or expert.router:
            state[name] = _Lazy(files[entry.file].get_tensor, name)
        elif expert.expert is None:
            held = placement.experts_of_rank(layer_index[expert.layer], rank)
            state[name] = _Lazy(_read_slots, files[entry.file], name, held)
        else:
            names[expert.part, expert.expert] = name
    for part in sorted({part for part, _ in names}):
        layer = checkpoint.experts[names[part, 0]].layer
        for slot, held in enumerate(placement.experts_of_rank(layer_index[layer], rank)):
            # An empty slot has the shape of any expert.
            name = names[part, max(int(held), 0)]
            handle = files[checkpoint.tensors[name].file]
            state[part.replace("*", str(slot))] = (
                _Lazy(_read_zeros, handle, name) if held < 0 else _Lazy(handle.get_tensor, name)
            )
    return state


class _Lazy:
    """A tensor that is read when transformers indexes it, which it does with `...`."""

    def __init__(self, read: Callable[..., Tensor], *args: Any) -> None:
        self._read, self._args = read, args

    def __getitem__(self, index: Any) -> Tensor:
        return self._read(*self._args)[index]


def _read_slots(handle: Any, name: str, held_S: np.ndarray) -> Tensor:
    """Rows of a tensor that holds all experts of a layer; zeros for empty slots."""
    source = handle.get_slice(name)
    return torch.stack([source[max(e, 0)] * (e >= 0) for e in held_S.tolist()])


def _read_zeros(handle: Any, name: str) -> Tensor:
    return torch.zeros(handle.get_slice(name).get_shape())


@contextlib.contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Keep transformers from reading all tensors ahead of their conversion."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _generation_config(directory: Path, default: Any) -> Any:
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return default
