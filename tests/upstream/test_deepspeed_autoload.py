"""An unmodified DeepSpeed script gets what its `semantic_ep` section asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

from semantic_ep.observe.profile import RoutingProfile

pytestmark = pytest.mark.upstream

ROOT = Path(__file__).parents[2]

# Nothing in it is of this package.
SCRIPT = """
import argparse, os
import deepspeed
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, moe_intermediate_size=16, num_experts=4,
    num_experts_per_tok=2,
))
engine, _, _, _ = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters()
)
for step in range(3):
    token_id = torch.randint(96, (2, 8))
    engine.backward(engine(input_ids=token_id, labels=token_id).loss)
    engine.step()
engine.save_checkpoint(os.environ["CHECKPOINT"])
print(type(engine).__mro__[1].__module__)
"""


def run_script(tmp_path, *, autoload, section):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": 1, "use_grouped_mm": False},
    }
    if section is not None:
        config["semantic_ep"] = section
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (tmp_path / "train.py").write_text(SCRIPT)
    found = subprocess.run(
        [sys.executable, "-m", "semantic_ep.cli", "patches", "autoload"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{found.stdout.strip()}{os.pathsep}{ROOT}",
        "CHECKPOINT": str(tmp_path / "checkpoint"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
        "SEMANTIC_EP_AUTOLOAD": autoload,
    }
    return subprocess.run(
        [sys.executable, "train.py", "--deepspeed", "--deepspeed_config", "ds.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )


def test_the_section_of_an_unmodified_script_is_served(tmp_path):
    section = {"enabled": True, "observe": {"output": str(tmp_path / "profile")}}
    done = run_script(tmp_path, autoload="deepspeed", section=section)
    assert done.returncode == 0, done.stderr
    assert RoutingProfile.read(tmp_path / "profile").tokens == 3 * 2 * 8
    assert done.stdout.splitlines()[-1].startswith("semantic_ep")


def test_without_the_section_an_autoloaded_script_runs_plain_deepspeed(tmp_path):
    done = run_script(tmp_path, autoload="deepspeed", section=None)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.splitlines()[-1].startswith("semantic_ep")


def test_a_wrong_section_ends_an_unmodified_script_with_the_reason(tmp_path):
    done = run_script(tmp_path, autoload="deepspeed", section={"enabled": True, "observ": {}})
    assert done.returncode != 0
    assert 'Did you mean "observe"?' in done.stderr
    assert not (tmp_path / "checkpoint").exists()
