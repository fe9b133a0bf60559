"""Numbers of a profile under the tracker's names."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_ep.artifacts import ModelFingerprint
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.summary import routing_metrics
from semantic_ep.tracking import METRICS_FILE, Tracker


@pytest.fixture
def profile():
    """An even layer, and one that uses a single expert of four; a model's layers 1 and 3."""
    fingerprint = ModelFingerprint(architecture="toy", layer_ids=(1, 3), num_experts=4, top_k=1)
    load = np.array([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]])
    return RoutingProfile.from_load(load, fingerprint)


def test_even_and_uneven_layers_are_told_apart(profile):
    metrics = routing_metrics(profile)
    assert metrics["routing/load_max_over_mean/layer_01"] == pytest.approx(1.0)
    assert metrics["routing/load_max_over_mean/layer_03"] == pytest.approx(4.0)
    assert metrics["routing/load_max_over_mean/mean"] == pytest.approx(2.5)
    assert metrics["routing/load_entropy/layer_01"] == pytest.approx(1.0)
    assert metrics["routing/load_entropy/layer_03"] == pytest.approx(0.0)
    assert metrics["routing/tokens"] == profile.tokens


def test_the_tracker_takes_every_name_on_the_axis_of_routing(profile, tmp_path):
    with Tracker.start(tmp_path, job_type="train", wandb="disabled") as tracker:
        tracker.log(routing_metrics(profile), step=7)
    assert '"routing/step": 7' in (tmp_path / METRICS_FILE).read_text()
