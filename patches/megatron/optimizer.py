"""Resuming Megatron-core's distributed optimizer where it runs on torch's own Adam."""

from __future__ import annotations

import functools
from typing import Any

from semantic_ep.patches.registry import Seam


def _fused_adam_present() -> str | None:
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return "Transformer Engine or Apex is installed, whose Adam keeps its step elsewhere"
    return None


def _wrap_state_dict(original: Any) -> Any:
    """Give a fresh optimizer the (zero) state that its step is read from and loaded into."""

    @functools.wraps(original)
    def state_dict(self: Any) -> Any:
        if self.optimizer is not None and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self)

    return state_dict


def _wrap_set_states(original: Any) -> Any:
    """Give each parameter a step of its own: one is loaded, and shared, by a whole group."""

    @functools.wraps(original)
    def set_states(self: Any, model_param: Any, tensors: Any) -> Any:
        if "step" not in tensors:
            group, order = self.model_param_group_index_map[model_param]
            main_param = self.optimizer.param_groups[group]["params"][order]
            state = self.optimizer.state[main_param]
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        return original(self, model_param, tensors)

    return set_states


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

SEAMS: tuple[Seam, ...] = (
    Seam(
        name="megatron.resume_torch_adam",
        package="megatron-core",
        versions=">=0.16,<0.20",
        target=f"{_OPTIMIZER}.state_dict",
        parameters=("self",),
        why="without Transformer Engine or Apex a fresh optimizer has no step to describe, and a "
        "checkpoint cannot be loaded into it",
        remove_when="`state_dict` of a fresh `DistributedOptimizer` works on torch's Adam",
        wrap=_wrap_state_dict,
        inactive=_fused_adam_present,
    ),
    Seam(
        name="megatron.resume_torch_adam_step",
        package="megatron-core",
        versions=">=0.16,<0.20",
        target=f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        parameters=("self", "model_param", "tensors"),
        why="torch's Adam counts steps by parameter; the checkpoint has one, which all would share "
        "and each advance",
        remove_when="a `fully_reshardable` checkpoint loads into torch's Adam",
        wrap=_wrap_set_states,
        inactive=_fused_adam_present,
    ),
)
