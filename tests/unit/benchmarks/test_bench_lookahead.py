import argparse
import json

import numpy as np
import pytest

from benchmarks.bench_lookahead import LOOK_BACK, NGramPredictor, add_arguments, run
from semantic_ep.errors import ConfigError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import TablePredictor, context_of

VOCAB, LAYERS, EXPERTS = 60, 3, 8


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*map(str, argv)])


@pytest.fixture(scope="module")
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
    rows = [json.dumps({"first": 40 * n, "tokens": 40}) for n in range(12)]
    (data / "documents.jsonl").write_text("\n".join(rows))
    texts = [" ".join(f"w{n}" for n in draw.integers(0, VOCAB, 30)) for _ in range(8)]
    (data / "holdout.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return root


def test_where_attention_adds_nothing_the_look_ahead_sees_every_route(quickstart):
    result = run(arguments("--run", quickstart, "--ep", 2, "--max-tokens", 32))
    assert result.protocol["look_ahead_recall"] == 1.0
    assert result.protocol["profile"] == "12 training documents, 384 tokens"
    assert result.protocol["holdout"] == "8 documents, 240 tokens"
    rates = {(row["placement"], row["predictor"]): row["lar"] for row in result.rows}
    for kind in ("contiguous", "semantic"):
        # A route is then a matter of the token id alone, which the table knows too.
        assert rates[kind, "none: slices in order"] < rates[kind, "look-ahead"]
        assert 0.95 * rates[kind, "oracle"] < rates[kind, "look-ahead"] <= rates[kind, "oracle"]


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no model.*launch/quickstart.sh"):
        run(arguments("--run", tmp_path))


def test_the_n_gram_follows_devices_where_token_ids_say_nothing():
    draw = np.random.default_rng(1)
    # The rank of layer 2 is that of layer 1; token ids are noise.
    tokens, side = 400, draw.integers(0, 2, 400)
    experts = np.stack([draw.integers(0, 4, tokens), side * 2, side * 2 + 1], axis=1)[..., None]
    from semantic_ep.artifacts import ModelFingerprint

    trace = RoutingTrace(
        fingerprint=ModelFingerprint(
            architecture="x",
            layer_ids=(0, 1, 2),
            num_experts=4,
            top_k=1,
            router_sha256="",
            tokenizer_sha256="",
        ),
        experts=experts.astype(np.uint8),
        offsets=np.array([0, tokens]),
        token_id=draw.integers(0, 3, tokens).astype(np.int32),
    )
    placement = Placement.contiguous(num_layers=3, num_experts=4, ep_size=2)
    table = TablePredictor(profile=RoutingProfile.from_trace(trace, vocab_size=3))
    predictor = NGramPredictor.fit(trace, table, placement)
    scores = predictor.rank_scores(context_of(trace, LOOK_BACK), placement)
    assert (scores.argmax(axis=1) == side).all()
