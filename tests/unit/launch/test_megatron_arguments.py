import importlib.util
import os
from pathlib import Path

import pytest

from semantic_ep.errors import ConfigError

ROOT = Path(__file__).parents[3]
COMMAND = ["@configs/megatron/cpu_2rank.args", "--data-path", "data", "--output", "run"]


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location(
        "megatron_arguments", ROOT / "launch" / "megatron_arguments.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parse(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    return lambda *arguments: module.parse_arguments("test", [*COMMAND, *arguments])


def test_a_file_gives_the_defaults_and_later_arguments_win(parse):
    args = parse("--num-layers", "3")
    assert (args.num_layers, args.num_experts, args.save) == (3, 16, Path("run/checkpoint"))
    assert args.semantic_ep_enabled == "true"


def test_megatrons_own_wandb_flags_name_the_run_that_is_tracked(parse, module, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "of the shell")
    monkeypatch.setenv("WANDB_NAME", "kept")
    monkeypatch.setenv("WANDB_DIR", "here")
    module.name_wandb_run(parse("--wandb-project", "pretraining", "--wandb-save-dir", "elsewhere"))
    found = {name: os.environ[f"WANDB_{name}"] for name in ("PROJECT", "NAME", "DIR")}
    assert found == {"PROJECT": "pretraining", "NAME": "kept", "DIR": "elsewhere"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-experts", "9"), "--expert-model-parallel-size = 2 does not divide --num-experts"),
        (("--num-attention-heads", "7"), "does not divide --hidden-size = 256"),
        (("--moe-router-topk", "17"), "more experts a token than there are"),
        (("--lr-warmup-iters", "300"), "the warm-up takes all the steps"),
        (("--moe-layer-freq", "[0]+[1]*4"), r"got 5 layers.*6 \(--num-layers\)"),
        (("--moe-shared-expert-gate",), "no shared expert to gate"),
    ],
)
def test_contradictions_are_refused(parse, arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("[0]*2+[1]*4", [0, 0, 1, 1, 1, 1]), ("(0,1,1,1,1,1)", [0, 1, 1, 1, 1, 1])],
)
def test_dense_layers_may_be_anywhere(parse, text, value):
    assert parse("--moe-layer-freq", text).moe_layer_freq == value


@pytest.mark.parametrize("text", ["0", "-1", "[2]*6", "len([1])", "[1]*[1]", "[1", "[True]*6"])
def test_a_pattern_of_layers_is_nothing_else(parse, text, capsys):
    with pytest.raises(SystemExit):
        parse("--moe-layer-freq", text)
    assert "--moe-layer-freq" in capsys.readouterr().err


def test_an_unknown_argument_is_an_error_even_if_it_abbreviates_one(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--num-expert", "8")
    assert "unrecognized arguments: --num-expert" in capsys.readouterr().err
