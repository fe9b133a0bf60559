"""Serve the `semantic_ep` section of a DeepSpeed JSON in a script that does not know of it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from semantic_ep.patches.registry import Seam


def _wrap_initialize(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        from semantic_ep.config import section_of
        from semantic_ep.integrations import deepspeed as integration

        given = dict(signature.bind(*args, **kwargs).arguments)
        namespace = given.get("args")
        config = given.get("config") or given.get("config_params")
        if config is None and getattr(namespace, "deepspeed_config", None) is None:
            return original(*args, **kwargs)
        # The integration calls `deepspeed.initialize` again, with its section taken out.
        if section_of(integration.read_config(config, namespace)) is None:
            return original(*args, **kwargs)
        for name in ("args", "config", "config_params"):
            given.pop(name, None)
        return integration.initialize(namespace, given.pop("model", None), config=config, **given)

    return initialize


SEAMS: tuple[Seam, ...] = (
    Seam(
        name="deepspeed.initialize",
        package="deepspeed",
        versions=">=0.19.4,<0.20",
        target="deepspeed:initialize",
        parameters=(
            "args",
            "model",
            "optimizer",
            "model_parameters",
            "training_data",
            "lr_scheduler",
            "distributed_port",
            "mpu",
            "dist_init_required",
            "collate_fn",
            "config",
            "mesh_param",
            "config_params",
        ),
        why="DeepSpeed ignores the `semantic_ep` section; a script of one's own calls "
        "`semantic_ep.integrations.deepspeed.initialize` and needs no seam",
        remove_when="DeepSpeed has a registry of configuration sections",
        wrap=_wrap_initialize,
    ),
)
