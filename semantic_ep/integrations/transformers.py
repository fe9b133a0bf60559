"""Hugging Face models: find their MoE layers and identify them.

Nothing here imports transformers: a model brings its config and its modules along.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import TYPE_CHECKING, Any

from semantic_ep.apply.families import MoEShape, family_of
from semantic_ep.artifacts import ModelFingerprint, hash_arrays
from semantic_ep.errors import CheckpointError, explain

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

_LAYER_PATH = re.compile(r"(?:.*\.)?layers\.(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoELayerSite:
    """Where one MoE layer of a model lives; paths are for `get_submodule` of that model.

    Attributes:
        layer: Model layer index.
        block: Path of the MoE block (router, experts and, where there are any, shared experts).
        router: Path of the router; its `weight` is [E, D] and its output (logits, weights, ids).
        experts: Path of the fused experts; its parameters have experts along the first axis.
        num_experts: Logical experts (E).
        top_k: Experts a token activates (K).
    """

    layer: int
    block: str
    router: str
    experts: str
    num_experts: int
    top_k: int


def moe_shape(model: nn.Module) -> MoEShape:
    """Layers, experts and router groups of a Hugging Face model, from its config.

    Raises:
        CheckpointError: The model has no config, or its family is not in the table.
    """
    return family_of(_config(model)).shape(_config(model))


def find_moe_layers(model: nn.Module) -> list[MoELayerSite]:
    """Find the MoE layers of a Hugging Face model, in layer order.

    Args:
        model: A `PreTrainedModel` of a family in `semantic_ep.apply.families`, with the modules
            of transformers 5 still in place.

    Raises:
        CheckpointError: Unknown family, or the modules are not where the family has them.
    """
    family, shape = family_of(_config(model)), moe_shape(model)
    modules = dict(model.named_modules())
    prefixes = {int(m[1]): path for path in modules if (m := _LAYER_PATH.fullmatch(path))}
    sites = []
    for layer in shape.layer_ids:
        block = f"{prefixes.get(layer, f'layers.{layer}')}.{family.block}"
        site = MoELayerSite(
            layer=layer,
            block=block,
            router=f"{block}.{family.router}",
            experts=f"{block}.experts",
            num_experts=shape.num_experts,
            top_k=shape.top_k,
        )
        absent = [path for path in (site.router, site.experts) if path not in modules]
        if absent:
            raise CheckpointError(
                explain(
                    f"layer {layer} of this {shape.model_type} has no module {absent[0]}",
                    got=type(modules[block]).__name__ if block in modules else None,
                    do="Use transformers >= 5, and call this before another library replaces "
                    "the MoE blocks",
                )
            )
        sites.append(site)
    return sites


def decoder_layer_of(model: nn.Module, site: MoELayerSite) -> nn.Module:
    """The decoder layer that an MoE block is in: norm, attention, norm, block."""
    return model.get_submodule(site.block.rpartition(".")[0])


def model_fingerprint(model: nn.Module, tokenizer_json: bytes | None = None) -> ModelFingerprint:
    """Identify a Hugging Face model whose router weights are all on this process.

    Args:
        model: See `find_moe_layers`.
        tokenizer_json: Contents of tokenizer.json, or None when unknown.

    Returns:
        The fingerprint that `semantic_ep.apply.checkpoint.checkpoint_fingerprint` computes from
        the same weights on disk at the same precision.

    Raises:
        CheckpointError: As `find_moe_layers`, or a router is sharded, offloaded or on `meta`.
    """
    shape, sites = moe_shape(model), find_moe_layers(model)
    return ModelFingerprint(
        architecture=shape.model_type,
        layer_ids=shape.layer_ids,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        router_sha256=hash_arrays(_router_weight(model, site) for site in sites),
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest() if tokenizer_json else "",
    )


def _router_weight(model: nn.Module, site: MoELayerSite) -> np.ndarray:
    """[E, D] float32."""
    weight = model.get_submodule(site.router).weight
    if weight.is_meta or weight.ndim != 2 or weight.shape[0] != site.num_experts:
        raise CheckpointError(
            explain(
                f"{site.router}.weight is not whole on this process",
                got=f"shape {tuple(weight.shape)} on {weight.device}",
                allowed=f"[{site.num_experts}, hidden]",
                do="Take the fingerprint before the model is sharded (ZeRO 3), or gather it",
            )
        )
    return weight.detach().float().cpu().numpy()


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise CheckpointError(
            explain(
                "this is not a Hugging Face model: it has no config",
                got=type(model).__name__,
                do="Pass the PreTrainedModel itself, not a wrapper around it",
            )
        )
    return dict(config.to_dict())
