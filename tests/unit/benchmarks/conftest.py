"""What several benchmarks are tested on."""

from __future__ import annotations

import json

import numpy as np
import pytest

VOCAB, LAYERS, EXPERTS = 60, 3, 8
KINDS = ("python", "english")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A run's folder whose model has attention that adds nothing."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        initializer_range=0.5,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / "model")
    draw = np.random.default_rng(0)
    data = root / "data"
    data.mkdir()
    np.save(data / "train.npy", draw.integers(0, VOCAB, 12 * 40).astype(np.uint16))
    rows = [json.dumps({"first": 40 * n, "tokens": 40, "kind": KINDS[n % 2]}) for n in range(12)]
    (data / "documents.jsonl").write_text("\n".join(rows))
    texts = [" ".join(f"w{n}" for n in draw.integers(0, VOCAB, 30)) for _ in range(8)]
    held_out = [json.dumps({"text": t, "kind": KINDS[n % 2]}) for n, t in enumerate(texts)]
    (data / "holdout.jsonl").write_text("\n".join(held_out))
    return root
