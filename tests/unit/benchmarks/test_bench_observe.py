"""The theme `observe` in its quick form."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import bench_observe
from benchmarks.run import main


def test_the_quick_form_measures_steps_with_and_without_and_the_memory(tmp_path):
    assert main(["observe", "--quick", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    parts = {name: [row for row in rows if row["part"] == name] for name in bench_observe.PARTS}
    for name in bench_observe.PARTS[:2]:
        assert all(0 < row["recorder_ms"] < row["with_ms"] for row in parts[name])
    tokens = [row["tokens"] for row in parts["memory"]]
    assert tokens == sorted(tokens)
    assert all(0 < row["mb_per_layer"] < 64 for row in parts["memory"])
    cells = parts["memory"][-1]["cells_per_layer"]
    assert 8 * 1000 < cells < 8 * tokens[-1]


def test_synthetic_tokens_have_distinct_experts():
    ids = np.arange(0, 10**7, 10**4)
    routes = bench_observe._routes(np.random.default_rng(0), ids)
    assert routes.min() >= 0
    assert routes.max() < bench_observe.EXPERTS
    assert all(len(set(row)) == bench_observe.TOP_K for row in routes.tolist())
