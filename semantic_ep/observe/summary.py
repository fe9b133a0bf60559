"""What a routing profile says, in the few numbers that a tracker keeps."""

from __future__ import annotations

import numpy as np

from semantic_ep.observe.profile import RoutingProfile


def routing_metrics(profile: RoutingProfile) -> dict[str, float]:
    """Numbers of a profile under the tracker's names.

    Returns:
        "routing/tokens" counted (decayed, if they are); and by model layer, with their mean,
        "routing/load_max_over_mean" of experts, "routing/load_entropy" over that of an even load,
        and "routing/dropped_mass", the share of token -> expert counts left out.
    """
    load = profile.load / np.maximum(profile.load.sum(axis=1, keepdims=True), 1e-12)
    logarithm = np.log(load, out=np.zeros_like(load), where=load > 0)
    experts = profile.fingerprint.num_experts
    figures = {
        "load_max_over_mean": load.max(axis=1) * experts,
        "load_entropy": -(load * logarithm).sum(axis=1) / np.log(experts),
        "dropped_mass": profile.dropped_mass,
    }
    metrics = {"routing/tokens": float(profile.tokens)}
    for name, value_L in figures.items():
        metrics[f"routing/{name}/mean"] = float(np.mean(value_L))
        for layer, value in zip(profile.fingerprint.layer_ids, value_L, strict=True):
            metrics[f"routing/{name}/layer_{layer:02d}"] = float(value)
    return metrics
