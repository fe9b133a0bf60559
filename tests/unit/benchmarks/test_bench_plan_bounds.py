"""Knowing the true routes is never worse than predicting them."""

from __future__ import annotations

import json

import pytest

from benchmarks.run import main
from semantic_ep.observe.formats import write_npz_trace
from tests.unit.plan.synthetic import planted_trace

LEVELS = {
    "tokens": [
        "contiguous",
        "reached",
        "oracle homes",
        "oracle placement and homes",
        "oracle placement for copies",
    ],
    "requests": [
        "contiguous",
        "reached",
        "oracle homes",
        "oracle placement and homes",
        "oracle placement for LAR",
    ],
}


@pytest.mark.parametrize("mode", LEVELS)
def test_levels_rise_from_contiguous_to_what_an_oracle_reaches(tmp_path, mode):
    write_npz_trace(planted_trace(requests=160, layers=2, seed=3), tmp_path / "toy.npz")
    output = tmp_path / "out.json"
    command = ["plan_bounds", "--trace", str(tmp_path / "toy.npz"), "--ep", "4", "--mode", mode]
    assert main([*command, "--profile-fraction", "0.5", "--json", str(output)]) == 0
    document = json.loads(output.read_text())
    rows = {row["level"]: row for row in document["rows"]}
    assert list(rows) == LEVELS[mode]
    assert rows["contiguous"]["lar"] == pytest.approx(0.25, abs=0.05)
    order = [rows[level]["lar"] for level in LEVELS[mode][:3]]
    assert order == sorted(order)
    assert rows["oracle homes"]["remote_copies"] <= rows["reached"]["remote_copies"]
    for level in LEVELS[mode]:
        assert level in document["protocol"]["levels"]
    assert output.with_suffix(".png").exists()
