"""Every family, through transformers itself: a permuted checkpoint computes the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from semantic_ep.apply.checkpoint import (
    Checkpoint,
    apply_layout,
    checkpoint_fingerprint,
    undo_layout,
)
from semantic_ep.apply.checkpoint.rewrite import CONFIG_KEY
from semantic_ep.apply.families import FAMILIES, RouterGroups, family_of
from semantic_ep.apply.layout import Layout
from semantic_ep.errors import CheckpointError, PlacementError

torch = pytest.importorskip("torch", reason="families are checked against real models")
transformers = pytest.importorskip("transformers", minversion="5.0")

EXPERTS = 8
_BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Wide weights, so that a token sent to a wrong expert shows far above rounding.
    "initializer_range": 0.3,
}
_INNER = {"moe_intermediate_size": 16}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 16,
        **_INNER,
    },
    "qwen3_moe": {"num_experts": EXPERTS, "mlp_only_layers": [1], **_INNER},
    "deepseek_v2": {
        **_MLA,
        **_INNER,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": {**_MLA, **_INNER, "n_group": 4, "topk_group": 2},
    "olmoe": {"num_experts": EXPERTS},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        **_INNER,
    },
}
MOE_LAYERS = {"qwen2_moe": (1,), "qwen3_moe": (0, 2)}
AFTER_DENSE = ("deepseek_v2", "deepseek_v3", "glm4_moe")
GROUPS = {
    "deepseek_v2": RouterGroups(num_groups=4, topk_group=2),
    "deepseek_v3": RouterGroups(num_groups=4, topk_group=2),
    "glm4_moe": RouterGroups(num_groups=2, topk_group=1),
}
FORMS = [(name, form) for name in CONFIGS for form in ("per expert", "fused")]
FORMS.remove(("gpt_oss", "per expert"))  # published and saved in fused form only


@dataclass(frozen=True)
class Saved:
    """A random model and the two forms in which transformers saves it."""

    model: object
    forms: dict[str, Path]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small lose more to thread hand-over than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made: dict[str, Saved] = {}

    def get(model_type: str) -> Saved:
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            torch.manual_seed(0)
            config = transformers.CONFIG_MAPPING[model_type](**{**_BASE, **CONFIGS[model_type]})
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith(("bias", "e_score_correction_bias")):
                    torch.nn.init.normal_(tensor.data, std=0.3)
            forms = {"per expert": root / "experts", "fused": root / "fused"}
            model.save_pretrained(forms["per expert"], max_shard_size="40KB")
            model.save_pretrained(forms["fused"], save_original_format=False)
            made[model_type] = Saved(model=model, forms=forms)
        return made[model_type]

    return get


def load(directory: Path) -> object:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


def logits(model) -> torch.Tensor:
    tokens = torch.arange(48).reshape(2, 24) % 61
    with torch.no_grad():
        return model(tokens).logits


def legal_layout(directory: Path, seed: int = 0) -> Layout:
    """Random permutation of whole router groups and inside each group."""
    checkpoint, rng = Checkpoint.open(directory), np.random.default_rng(seed)
    groups = checkpoint.shape.router_groups or RouterGroups(num_groups=1, topk_group=1)
    size = EXPERTS // groups.num_groups
    rows = [
        np.concatenate(
            [group * size + rng.permutation(size) for group in rng.permutation(groups.num_groups)]
        )
        for _ in checkpoint.shape.layer_ids
    ]
    return Layout(physical_to_logical_map=np.stack(rows), fingerprint=checkpoint.fingerprint())


def test_every_family_of_the_table_is_tested() -> None:
    assert set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize(("model_type", "form"), FORMS)
def test_a_permuted_checkpoint_gives_the_same_logits_and_tokens(
    tmp_path, saved, tree, model_type, form
) -> None:
    source = saved(model_type).forms[form]
    apply_layout(source, legal_layout(source), tmp_path / "applied")
    original, permuted = saved(model_type).model, load(tmp_path / "applied")
    torch.testing.assert_close(logits(permuted), logits(original), atol=1e-5, rtol=1e-5)
    prompt = {"inputs": torch.tensor([[3, 1, 4, 1, 5]]), "max_new_tokens": 12, "do_sample": False}
    assert permuted.generate(**prompt).tolist() == original.generate(**prompt).tolist()
    undo_layout(tmp_path / "applied", tmp_path / "undone")
    assert tree(tmp_path / "undone") == tree(source)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_experts_that_move_without_their_router_row_would_be_noticed(
    tmp_path, saved, model_type
) -> None:
    source = saved(model_type).forms["fused"]
    apply_layout(source, legal_layout(source), tmp_path / "applied")
    permuted = load(tmp_path / "applied")
    original = saved(model_type).model.state_dict()
    routers = {
        name: tensor for name, tensor in original.items() if ".gate." in name or ".router." in name
    }
    permuted.load_state_dict(routers, strict=False)
    difference = (logits(permuted) - logits(saved(model_type).model)).abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("model_type", sorted(GROUPS))
def test_group_limited_routers_refuse_what_would_change_their_choice(
    tmp_path, saved, model_type
) -> None:
    source = saved(model_type).forms["fused"]
    rows = legal_layout(source).physical_to_logical_map.copy()
    rows[-1, [0, EXPERTS - 1]] = rows[-1, [EXPERTS - 1, 0]]
    illegal = Layout(physical_to_logical_map=rows, fingerprint=checkpoint_fingerprint(source))
    with pytest.raises(PlacementError, match="layer 2: the router keeps the best"):
        apply_layout(source, illegal, tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


def test_the_refused_permutation_of_a_group_limited_router_does_change_the_model(saved) -> None:
    model = load(saved("deepseek_v3").forms["fused"])
    before, order = logits(model), torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])
    block = model.model.layers[2].mlp
    for tensor in (*block.gate.parameters(), *block.gate.buffers(), *block.experts.parameters()):
        tensor.data = tensor.data[order]
    assert (logits(model) - before).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", CONFIGS)
def test_config_and_model_agree_on_layers_experts_and_groups(saved, model_type) -> None:
    from semantic_ep.integrations.transformers import find_moe_layers, moe_shape

    source, model = saved(model_type).forms["per expert"], saved(model_type).model
    shape = family_of(json.loads((source / "config.json").read_text())).shape(
        json.loads((source / "config.json").read_text())
    )
    expected = (1, 2) if model_type in AFTER_DENSE else MOE_LAYERS.get(model_type, (0, 1, 2))
    assert shape == moe_shape(model)
    assert (shape.layer_ids, shape.num_experts, shape.top_k) == (expected, EXPERTS, 2)
    assert shape.router_groups == GROUPS.get(model_type)
    sites = find_moe_layers(model)
    assert tuple(site.layer for site in sites) == expected
    for site in sites:
        assert model.get_submodule(site.router).weight.shape == (EXPERTS, 32)
        experts = model.get_submodule(site.experts)
        assert all(len(parameter) == EXPERTS for parameter in experts.parameters())
        assert model.get_submodule(site.block).experts is experts


@pytest.mark.parametrize(("model_type", "form"), FORMS)
def test_the_fingerprint_of_a_model_is_that_of_its_checkpoint(
    tmp_path, saved, model_type, form
) -> None:
    from semantic_ep.integrations.transformers import model_fingerprint

    source = saved(model_type).forms[form]
    assert model_fingerprint(saved(model_type).model) == checkpoint_fingerprint(source)


def test_half_precision_models_and_checkpoints_have_one_fingerprint(tmp_path, saved) -> None:
    from semantic_ep.integrations.transformers import model_fingerprint

    for dtype in (torch.bfloat16, torch.float16):
        model = load(saved("olmoe").forms["fused"]).to(dtype)
        directory = tmp_path / str(dtype)
        model.save_pretrained(directory)
        (directory / "tokenizer.json").write_bytes(b"{}")
        assert model_fingerprint(model, b"{}") == checkpoint_fingerprint(directory)


def test_transformers_keeps_the_mark_of_a_permuted_checkpoint(tmp_path, saved) -> None:
    source = saved("qwen3_moe").forms["fused"]
    apply_layout(source, legal_layout(source), tmp_path / "applied")
    load(tmp_path / "applied").save_pretrained(tmp_path / "saved again")
    assert CONFIG_KEY in json.loads((tmp_path / "saved again" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="already applied"):
        apply_layout(tmp_path / "saved again", legal_layout(source), tmp_path / "twice")


def test_a_model_without_config_or_of_unknown_family_is_refused() -> None:
    from semantic_ep.integrations.transformers import find_moe_layers

    with pytest.raises(CheckpointError, match="it has no config"):
        find_moe_layers(torch.nn.Linear(2, 2))
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)
    with pytest.raises(CheckpointError, match="family is not known"):
        find_moe_layers(transformers.GPT2LMHeadModel(config))


def test_models_whose_blocks_were_replaced_or_sharded_are_refused(saved) -> None:
    from semantic_ep.integrations.transformers import find_moe_layers, model_fingerprint

    model = load(saved("qwen3_moe").forms["fused"])
    router = model.model.layers[2].mlp.gate
    whole, router.weight = router.weight, torch.nn.Parameter(torch.empty(0))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate\.weight is not whole"):
        model_fingerprint(model)
    router.weight = whole
    model.model.layers[2].mlp = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="layer 2 of this qwen3_moe has no module"):
        find_moe_layers(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "family is not known"),
        ({"model_type": "mixtral", "num_hidden_layers": 2}, "positive num_local_experts"),
        ({"model_type": "olmoe", "num_experts": 8}, "positive num_hidden_layers"),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 3, "topk_group": 1},
            "n_group = 3 does not divide the 8 experts",
        ),
        (
            {"model_type": "glm4_moe", "n_routed_experts": 8, "n_group": 1, "topk_group": 1},
            "how many first layers are dense",
        ),
    ],
)
def test_incomplete_configs_are_refused(config, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        family_of(config).shape(config)


def test_groups_that_are_all_kept_limit_nothing() -> None:
    config = {
        "model_type": "deepseek_v2",
        "n_routed_experts": 8,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 4,
    }
    assert family_of(config).shape(config).router_groups is None
    greedy = {**config, "topk_group": 1, "topk_method": "greedy"}
    assert family_of(greedy).shape(greedy).router_groups is None


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight", (0, 3, False)),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", (0, None, True)),
        ("qwen3_moe", "model.layers.11.mlp.experts.127.up_proj.qweight", (11, 127, False)),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert_gate.weight", None),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert.up_proj.weight", None),
        ("deepseek_v3", "model.layers.9.mlp.experts.0.up_proj.weight_scale_inv", (9, 0, False)),
        ("deepseek_v3", "model.layers.9.mlp.gate.e_score_correction_bias", (9, None, True)),
        ("deepseek_v3", "model.layers.0.mlp.gate_proj.weight", None),
        ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj_blocks", (2, None, False)),
        ("gpt_oss", "model.layers.2.mlp.experts.down_proj_bias", (2, None, False)),
        ("gpt_oss", "model.layers.2.mlp.router.bias", (2, None, True)),
        ("glm4_moe", "layers.2.mlp.experts.down_proj", (2, None, False)),
        ("olmoe", "model.embed_tokens.weight", None),
    ],
)
def test_names_as_published_are_understood(model_type, name, expected) -> None:
    tensor = FAMILIES[model_type].expert_tensor(name)
    found = None if tensor is None else (tensor.layer, tensor.expert, tensor.router)
    assert found == expected
