import argparse

import numpy as np
import pytest

from benchmarks.bench_lookahead import LOOK_BACK, NGramPredictor, add_arguments, run
from semantic_ep.errors import ConfigError
from semantic_ep.observe.profile import RoutingProfile
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.plan.placement import Placement
from semantic_ep.plan.predictors import TablePredictor, context_of


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*map(str, argv)])


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
