"""Put `SemanticMoELayer` in the place of `MoELayer` in a layer spec.

Megatron-core 0.16 describes an MoE layer by a `ModuleSpec`, 0.18 and later by a partial call of
its class; both are understood.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from semantic_ep.errors import ConfigError, explain
from semantic_ep.integrations.megatron.dispatcher import Exchange
from semantic_ep.integrations.megatron.layer import PlacedLayers, SemanticMoELayer


def place_experts(
    spec: ModuleSpec | TransformerBlockSubmodules,
    placed: PlacedLayers,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    exchange: Exchange | None = None,
) -> Any:
    """Return a copy of a spec whose MoE layers follow a placement.

    Args:
        spec: Spec of one layer (used for every layer) or of the whole decoder block. With pipeline
            stages the latter is of the stage, and may have dense layers alone.
        placed: The placement, found by layer number when the model is built.
        pg_collection: The groups given to the model, where they are not Megatron's global ones.
        exchange: What sends the tokens; None means Megatron's own dispatcher.

    Raises:
        ConfigError: The spec has no MoE layer, or an MoE layer of an unknown kind.
    """
    replaced: list[Any] = []
    extra: dict[str, Any] = {"placed": placed}
    if exchange is not None:
        extra["exchange"] = exchange

    def of_layer(layer: ModuleSpec) -> ModuleSpec:
        mlp = getattr(layer.submodules, "mlp", None)
        placed_mlp = _placed(mlp, extra, pg_collection)
        if placed_mlp is None:
            return layer
        replaced.append(placed_mlp)
        layer = copy.copy(layer)
        layer.submodules = copy.copy(layer.submodules)
        layer.submodules.mlp = placed_mlp
        return layer

    if isinstance(spec, TransformerBlockSubmodules):
        result = copy.copy(spec)
        result.layer_specs = [of_layer(layer) for layer in spec.layer_specs]
    else:
        result = of_layer(spec)
    if not replaced and not _may_be_dense_stage(spec):
        raise ConfigError(
            explain(
                "the layer spec has no MoE layer to place",
                got=type(spec).__name__,
                do="Pass the spec with --num-experts set, before the model is built",
            )
        )
    return result


def _may_be_dense_stage(spec: Any) -> bool:
    return (
        isinstance(spec, TransformerBlockSubmodules)
        and parallel_state.model_parallel_is_initialized()
        and parallel_state.get_pipeline_model_parallel_world_size() > 1
    )


def _placed(
    mlp: Any, extra: Mapping[str, Any], pg_collection: ProcessGroupCollection | None
) -> Any:
    """The placed form of the description of an MLP; None for a dense one."""
    if isinstance(mlp, functools.partial):
        target, keywords = mlp.func, mlp.keywords
    elif isinstance(mlp, ModuleSpec):
        target, keywords = mlp.module, mlp.params
    else:
        return None
    if not (isinstance(target, type) and issubclass(target, MoELayer)):
        return None
    if target is not MoELayer:
        raise ConfigError(
            explain(
                "this MoE layer has been replaced already",
                got=f"{target.__module__}.{target.__name__}",
                allowed="megatron.core.transformer.moe.moe_layer.MoELayer",
                do="Pass the spec as Megatron makes it",
            )
        )
    if isinstance(mlp, functools.partial):
        return functools.partial(SemanticMoELayer, *mlp.args, **{**keywords, **extra})
    # 0.16 hands its groups to the exact class MoELayer only, so a subclass needs them here.
    if pg_collection is not None:
        extra = {**extra, "pg_collection": pg_collection}
    return ModuleSpec(
        module=SemanticMoELayer,
        params={**keywords, **extra},
        submodules=mlp.submodules,
        metainfo=mlp.metainfo,
    )
