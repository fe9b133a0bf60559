"""Model families: where the router and the experts live in a checkpoint and in a model.

One table. A Hugging Face checkpoint stores experts in one of two forms, and may mix them:

* per expert, as published on the Hub and as `save_pretrained` writes most families:
  `model.layers.3.mlp.experts.17.up_proj.weight` (quantised companions such as `weight_scale_inv`,
  `qweight` or `scales` sit beside it);
* fused, as the modules of transformers 5 hold them: `model.layers.3.mlp.experts.gate_up_proj`
  with experts along the first axis, whatever the order of the others (gpt-oss stores
  [E, H, 2I] with biases and MXFP4 `_blocks` and `_scales`; the rest store [E, 2I, H]).

Shared experts, dense layers and multi-token-prediction layers beyond `num_hidden_layers` carry no
logical expert of the plan and are never touched.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from semantic_ep.errors import CheckpointError, explain

Config = Mapping[str, Any]

_LAYER = re.compile(r"(?P<prefix>(?:.*\.)?layers)\.(?P<layer>\d+)\.(?P<rest>.+)")
_FUSED = re.compile(r"(?:gate_up_proj|gate_proj|up_proj|down_proj)(?:[._]\w+)*")
_ROUTER = frozenset({"weight", "bias", "e_score_correction_bias"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterGroups:
    """Group-limited routing: only experts of the best `topk_group` groups compete.

    Group g holds the experts g * E/n .. (g + 1) * E/n - 1 with n = `num_groups`, so that a
    permutation keeps the routing only if it maps groups onto groups.
    """

    num_groups: int
    topk_group: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEShape:
    """What a config says about the experts of a model.

    Attributes:
        model_type: Family name.
        layer_ids: Model layer index of each MoE layer, rising; its length is L.
        num_layers: All decoder layers, dense ones included.
        num_experts: Logical experts a layer (E), shared experts not counted.
        top_k: Experts a token activates in a layer (K).
        router_groups: Group-limited routing, or None if any permutation keeps the routing.
    """

    model_type: str
    layer_ids: tuple[int, ...]
    num_layers: int
    num_experts: int
    top_k: int
    router_groups: RouterGroups | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """A checkpoint tensor that carries logical experts.

    Attributes:
        layer: Model layer index.
        part: What is left of the name without layer and expert; equal for tensors that exchange
            contents when experts move.
        expert: Logical expert of a per-expert tensor, or None if the first axis is the expert
            (router rows and biases, fused experts).
        router: Whether it belongs to the router.
    """

    layer: int
    part: str
    expert: int | None
    router: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Where one `model_type` keeps its experts.

    Attributes:
        model_type: As in config.json.
        block: Name of the MoE block in a decoder layer of transformers 5.
        checkpoint_blocks: Names of that block in checkpoints.
        router: Name of the router inside the block; the experts are always `experts`.
        num_experts_keys: Config keys that may hold E; the first one present counts.
        moe_layers: Config -> model layer indices of the MoE layers.
        router_groups: Config -> group limits, or None.
    """

    model_type: str
    block: str = "mlp"
    checkpoint_blocks: tuple[str, ...] = ("mlp",)
    router: str = "gate"
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    moe_layers: Callable[[Config], tuple[int, ...]]
    router_groups: Callable[[Config], RouterGroups | None]

    def shape(self, config: Config) -> MoEShape:
        """Read layers, experts and group limits from a config.

        Raises:
            CheckpointError: A key is missing or the numbers contradict each other.
        """
        num_experts = _required(config, *self.num_experts_keys)
        groups = self.router_groups(config)
        if groups is not None and num_experts % groups.num_groups:
            raise CheckpointError(
                explain(
                    f"n_group = {groups.num_groups} does not divide the {num_experts} experts",
                    where=f"config.json ({self.model_type})",
                )
            )
        return MoEShape(
            model_type=self.model_type,
            layer_ids=self.moe_layers(config),
            num_layers=_required(config, "num_hidden_layers"),
            num_experts=num_experts,
            top_k=_required(config, "num_experts_per_tok"),
            router_groups=groups,
        )

    def expert_tensor(self, name: str) -> ExpertTensor | None:
        """Say which experts a checkpoint tensor carries; None if it carries none.

        Raises:
            CheckpointError: The tensor is inside the router or the experts, and what it means
                there is unknown.
        """
        match = _LAYER.fullmatch(name)
        if match is None:
            return None
        block, _, inside = match["rest"].partition(".")
        module, _, leaf = inside.partition(".")
        if block not in self.checkpoint_blocks or module not in (self.router, "experts"):
            return None
        layer = int(match["layer"])
        part = f"{match['prefix']}.{layer}.{block}.{module}"
        if module == self.router and leaf in _ROUTER:
            return ExpertTensor(layer=layer, part=f"{part}.{leaf}", expert=None, router=True)
        if module == "experts":
            number, _, parameter = leaf.partition(".")
            if number.isdecimal() and parameter:
                return ExpertTensor(
                    layer=layer, part=f"{part}.*.{parameter}", expert=int(number), router=False
                )
            if _FUSED.fullmatch(leaf):
                return ExpertTensor(layer=layer, part=f"{part}.{leaf}", expert=None, router=False)
        raise CheckpointError(
            explain(
                f"tensor {name} is inside the {'experts' if module == 'experts' else 'router'} "
                f"of a {self.model_type} and its meaning there is unknown",
                allowed="router weight, bias, e_score_correction_bias; experts.<n>.<parameter>; "
                "experts.gate_up_proj and experts.down_proj with their biases and scales",
                do="Convert the checkpoint to the layout of transformers 5 first",
            )
        )


def family_of(config: Config) -> ModelFamily:
    """Look up the family of a config (the contents of config.json, or `PreTrainedConfig.to_dict`).

    Raises:
        CheckpointError: The family is not in the table.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in FAMILIES:
        raise CheckpointError(
            explain(
                "the model family is not known",
                where="config.json, model_type",
                got=model_type,
                allowed=sorted(FAMILIES),
                do="Use a checkpoint of one of these families",
            )
        )
    return FAMILIES[model_type]


def _required(config: Config, *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise CheckpointError(
        explain(
            f"the config lacks a positive {' or '.join(keys)}",
            where="config.json",
            got={key: config[key] for key in keys if key in config} or None,
            do="Use the config.json that belongs to this checkpoint",
        )
    )


def _every_layer(config: Config) -> tuple[int, ...]:
    return tuple(range(_required(config, "num_hidden_layers")))


def _sparse_step(config: Config) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer, except those listed as plain MLPs."""
    step = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    layers = range(_required(config, "num_hidden_layers"))
    return tuple(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)


def _after_dense(config: Config) -> tuple[int, ...]:
    """All layers after the first dense ones."""
    dense = config.get("first_k_dense_replace")
    if not isinstance(dense, int):
        raise CheckpointError(
            explain(
                "the config does not say how many first layers are dense",
                where="config.json, first_k_dense_replace",
                got=dense,
                do="Use the config.json that belongs to this checkpoint",
            )
        )
    return tuple(range(dense, _required(config, "num_hidden_layers")))


def _no_groups(config: Config) -> RouterGroups | None:
    return None


def _group_limited(config: Config) -> RouterGroups | None:
    groups, kept = _required(config, "n_group"), _required(config, "topk_group")
    return RouterGroups(num_groups=groups, topk_group=kept) if kept < groups else None


def _group_limited_by_method(config: Config) -> RouterGroups | None:
    """DeepSeek-V2 has the group keys in every config, but uses them for one method only."""
    return _group_limited(config) if config.get("topk_method") == "group_limited_greedy" else None


FAMILIES: Mapping[str, ModelFamily] = {
    family.model_type: family
    for family in (
        ModelFamily(
            model_type="mixtral",
            checkpoint_blocks=("block_sparse_moe", "mlp"),
            num_experts_keys=("num_local_experts",),
            moe_layers=_every_layer,
            router_groups=_no_groups,
        ),
        ModelFamily(model_type="qwen2_moe", moe_layers=_sparse_step, router_groups=_no_groups),
        ModelFamily(model_type="qwen3_moe", moe_layers=_sparse_step, router_groups=_no_groups),
        ModelFamily(
            model_type="deepseek_v2",
            num_experts_keys=("n_routed_experts",),
            moe_layers=_after_dense,
            router_groups=_group_limited_by_method,
        ),
        ModelFamily(
            model_type="deepseek_v3",
            num_experts_keys=("n_routed_experts",),
            moe_layers=_after_dense,
            router_groups=_group_limited,
        ),
        ModelFamily(model_type="olmoe", moe_layers=_every_layer, router_groups=_no_groups),
        ModelFamily(
            model_type="gpt_oss",
            router="router",
            num_experts_keys=("num_local_experts",),
            moe_layers=_every_layer,
            router_groups=_no_groups,
        ),
        ModelFamily(
            model_type="glm4_moe",
            num_experts_keys=("n_routed_experts",),
            moe_layers=_after_dense,
            router_groups=_group_limited,
        ),
    )
}
