import argparse

import pytest

from benchmarks.bench_lookahead import add_arguments, run
from semantic_ep.errors import ConfigError


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
