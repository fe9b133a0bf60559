"""A DeepSpeed engine around a Megatron-core model with experts.

Megatron's layers route, place and exchange by themselves. What DeepSpeed must be told is which
parameters are experts, and over which ranks to reduce their gradients and partition their state.
"""

from __future__ import annotations

from torch import nn

from semantic_ep.errors import ConfigError, PlacementError, explain
from semantic_ep.integrations.deepspeed.placing import expert_group, group_name, register_groups
from semantic_ep.runtime.groups import ProcessGroups


def adopt_experts(model: nn.Module) -> None:
    """Prepare a Megatron-core model for `deepspeed.initialize`, in place.

    The engine refuses to save and load: what Megatron calls by layer and expert, DeepSpeed would
    write for rank 0 only. `megatron.core.dist_checkpointing` stores the model.

    Args:
        model: Built, not wrapped in Megatron's DistributedDataParallel; Megatron's groups are those
            of `megatron.core.parallel_state`.

    Raises:
        ConfigError: The model has no experts, or is spread in a way that DeepSpeed does not reduce.
        PlacementError: It was built under a plan with copies of experts.
    """
    from megatron.core import parallel_state

    spread = {
        "--tensor-model-parallel-size": parallel_state.get_tensor_model_parallel_world_size(),
        "--pipeline-model-parallel-size": parallel_state.get_pipeline_model_parallel_world_size(),
        "--context-parallel-size": parallel_state.get_context_parallel_world_size(),
    }
    for flag, size in spread.items():
        if size > 1:
            raise ConfigError(
                explain(
                    "a DeepSpeed engine reduces over data-parallel ranks only",
                    where=flag,
                    got=size,
                    allowed=1,
                    do="Train with Megatron's own optimizer, or without this parallelism",
                )
            )
    for module in model.modules():
        placed = getattr(module, "placed", None)  # Of the layers that a plan places.
        if placed is not None and placed.placement.has_replicas:
            raise PlacementError(
                explain(
                    "copies of one expert would be trained apart: a DeepSpeed engine sums their "
                    "gradients in Hugging Face models alone",
                    where="semantic_ep.plan.artifact, --semantic-ep-plan-artifact",
                    got="a Megatron model under a plan with copies of experts",
                    do="Train with Megatron's own optimizer, or make the plan with "
                    "--redundant-slots 0",
                )
            )
    # Megatron marks experts as DeepSpeed does.
    experts = [p for p in model.parameters() if not getattr(p, "allreduce", True)]
    if not experts:
        raise ConfigError(
            explain(
                "the model has no expert-parallel parameters",
                got=type(model).__name__,
                do="Set --num-experts and --expert-model-parallel-size > 1, or call "
                "deepspeed.initialize alone",
            )
        )
    groups = ProcessGroups(
        expert_parallel=parallel_state.get_expert_model_parallel_group(),
        expert_data_parallel=parallel_state.get_expert_data_parallel_group(),
    )
    register_groups(groups)
    ep_size = groups.expert_parallel.size()
    for parameter in experts:
        parameter.group_name = group_name(ep_size)
    model.add_module(
        "semantic_ep_group", expert_group(model.config.num_moe_experts, ep_size, stored=False)
    )
