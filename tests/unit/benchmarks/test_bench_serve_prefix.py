import json

import pytest

from benchmarks.bench_serve_prefix import (
    APART,
    KNOWN,
    OFF,
    ON,
    SHARED,
    Run,
    behind_beginnings,
    check_tokens,
)
from benchmarks.run import main
from benchmarks.serve_ranks import Served
from semantic_ep.errors import BackendError


def test_prompts_go_behind_beginnings_in_turn():
    prompts = [[1, 2], [3], [4, 5]]
    assert behind_beginnings(prompts, 2, 3) == [
        [1, 2, 4, 1, 2],
        [3, 3, 3, 3],
        [1, 2, 4, 4, 5],
    ]


def test_a_token_that_differs_or_a_request_that_ends_early_fails_the_run():
    def served(*tokens, end="length"):
        return [Served(arrived=0.0, times=[1.0], tokens=list(tokens), end=end)]

    def runs(other):
        return [
            Run(load=APART, cache=OFF, requests=served(1, 2), cpu_seconds=1.0),
            Run(load=APART, cache=ON, requests=other, cpu_seconds=1.0),
        ]

    check_tokens(runs(served(1, 2)))
    for other in (served(1, 3), served(1, 2, end="error")):
        with pytest.raises(BackendError, match=f"{APART}, {ON}"):
            check_tokens(runs(other))


def test_shared_beginnings_are_found_and_others_are_not(tmp_path):
    output = tmp_path / "out.json"
    assert main(["serve_prefix", "--quick", "--ranks", "1", "2", "--json", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    found = {(row["ranks"], row["load"], row["cache"]): row["cached_share"] for row in rows}
    assert len(found) == 2 * 2 * 3
    for ranks in (1, 2):
        assert found[ranks, SHARED, OFF] == found[ranks, APART, OFF] == 0
        assert found[ranks, APART, ON] == found[ranks, APART, KNOWN] == 0
        assert found[ranks, SHARED, ON] > 0
    for row in rows:
        assert row["seconds_of_no_cache"] > 0
        assert (row["cpu_seconds_of_no_cache"] == 1) or row["cache"] != OFF
