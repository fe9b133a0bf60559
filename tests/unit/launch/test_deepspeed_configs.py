"""Every DeepSpeed configuration of the repository is one that we and DeepSpeed accept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_ep.config import SemanticEPConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FILES = sorted([*CONFIGS.glob("deepspeed/*.json"), *CONFIGS.glob("debug/*.json")])


def test_there_are_configurations():
    assert {file.name for file in FILES} >= {
        "cpu_2rank.json",
        "autoep_zero2_bf16.json",
        "placed_zero2_bf16.json",
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_configuration_is_accepted(file):
    auto_ep_config = pytest.importorskip("deepspeed.module_inject.auto_ep_config")
    from semantic_ep.integrations.deepspeed.training import check_possible

    config = json.loads(file.read_text())
    settings = SemanticEPConfig.from_deepspeed(config)
    assert settings.enabled
    check_possible(settings, config)
    if settings.plan.artifact != "auto":
        return
    expert_parallel = auto_ep_config.parse_autoep_config(config["expert_parallel"])
    assert expert_parallel.enabled
    assert settings.groups.ep_size in ("auto", expert_parallel.autoep_size)
    auto_ep_config.validate_autoep_config(
        expert_parallel, world_size=expert_parallel.autoep_size, pp_size=1, tp_size=1, sp_size=1
    )
