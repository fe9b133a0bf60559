"""Routes of a Hugging Face model in one process: which experts its routers choose for texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from semantic_ep.integrations.transformers import find_moe_layers, model_fingerprint
from semantic_ep.observe.traces import RoutingTrace


def record_routes(model: Any, requests: Iterable[Sequence[int]]) -> RoutingTrace:
    """Send requests through a model one by one; nothing is generated.

    Args:
        model: A `PreTrainedModel` of a family in `semantic_ep.apply.families`.
        requests: Token ids of each.
    """
    chosen: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(site.router).register_forward_hook(
            lambda _module, _args, output: chosen.append(output[2].cpu())
        )
        for site in find_moe_layers(model)
    ]
    token_ids, routes = [], []
    try:
        with torch.inference_mode():
            for ids in requests:
                chosen.clear()
                # Logits of the last position alone: nobody reads them.
                model(
                    input_ids=torch.tensor([ids], device=model.device),
                    use_cache=False,
                    logits_to_keep=1,
                )
                token_ids.append(np.asarray(ids, dtype=np.int32))
                routes.append(torch.stack(chosen, dim=1).numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return RoutingTrace(
        fingerprint=model_fingerprint(model),
        experts=np.concatenate(routes).astype(np.uint16),
        offsets=np.cumsum([0, *map(len, token_ids)]),
        token_id=np.concatenate(token_ids),
    )
