"""The theme `serve_policies`: its workload, and its quick form on the real data."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_serve_policies import VARIANTS
from benchmarks.run import main
from benchmarks.serve_workload import BLOCK, Recorded, Text, build

DATA = Path(__file__).parents[4] / "shared" / "data"


def test_equal_blocks_are_equal_text_and_conversations_go_on():
    texts = [
        Text(
            ids=np.arange(kind * 10_000, kind * 10_000 + 5000),
            positions=np.arange(5000),
        )
        for kind in range(2)
    ]
    turns = [(0, 1, 2), (0, 1, 2, 3), (0, 4)]
    recorded = [
        Recorded(seconds=number, prompt_tokens=len(blocks) * BLOCK - 5, new_tokens=3, blocks=blocks)
        for number, blocks in enumerate(turns)
    ]
    workload = build(recorded, texts, seed=0)
    first, second, third = (request.prompt_token_ids for request in workload.requests)
    assert second[: len(first)] == first
    steps = np.diff(second[BLOCK:])
    assert ((steps == 1) | (steps == 1 - 5000)).all()  # The texts of a kind form a ring.
    assert third[:BLOCK] == first[:BLOCK]
    assert third[BLOCK:] != first[BLOCK : 2 * BLOCK - 5]
    assert [request.sampling.max_tokens for request in workload.requests] == [4, 4, 4]
    rate = workload.at_rate(1.5)
    assert [arrival.seconds for arrival in rate] == [0, 1, 2]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the checkout")
def test_the_quick_form_measures_every_variant_at_every_load(tmp_path):
    pytest.importorskip("tokenizers")
    output = tmp_path / "out.json"
    command = ["serve_policies", "--quick", "--data", str(DATA), "--json", str(output)]
    assert main([*command, "--png", str(tmp_path / "out.png")]) == 0
    rows = json.loads(output.read_text())["rows"]
    replays = [row for row in rows if "variant" in row]
    assert len(replays) == 2 * len(VARIANTS)
    assert all(0 <= row["good_share"] <= 1 and row["ttft_p99_ms"] > 0 for row in replays)
    assert all(row["wait_max_ms"] < 2100 for row in replays)
    assert any("prompt_tokens" in row for row in rows)
    assert (tmp_path / "out.png").stat().st_size > 0
