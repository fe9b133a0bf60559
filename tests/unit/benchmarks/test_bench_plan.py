"""The benchmark of placements follows its protocol and counts what it says."""

import json

import numpy as np
import pytest

from benchmarks import bench_plan, plan_loads
from benchmarks.run import main
from semantic_ep.errors import ConfigError

ROW_KEYS = {
    "trace", "method", "ep_size", "profile_fraction", "seed", "layer", "lar", "remote_copies",
    "node_copies", "load_max_over_mean", "tokens_max_over_mean", "solve_seconds", "peak_mb",
}  # fmt: skip


@pytest.fixture
def trace_file(tmp_path):
    """40 requests of 64 tokens whose ids decide their experts, in 2 layers of 8 experts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 32, 40 * 64)
    first = (ids * 5) % 8
    routes = np.stack([np.stack([first, (first + shift) % 8], axis=1) for shift in (1, 3)], axis=1)
    np.savez(
        tmp_path / "toy.npz",
        experts=routes.astype(np.uint8),
        offsets=np.arange(41) * 64,
        token_id=ids.astype(np.int32),
    )
    return tmp_path / "toy.npz"


def run_rows(tmp_path, *flags):
    assert main(["plan", *map(str, flags), "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())["rows"]


def test_rows_have_the_agreed_keys_for_each_layer_seed_and_method(tmp_path, trace_file):
    rows = run_rows(
        tmp_path, "--trace", trace_file, "--ep", 2, "--seeds", 2, "--methods", "eplb", "semantic"
    )
    assert all(set(row) >= ROW_KEYS for row in rows)
    assert {row["layer"] for row in rows} == {0, 1, "mean"}
    assert len(rows) == 2 * 2 * 3
    assert (tmp_path / "out.png").exists()


def test_routes_that_follow_token_ids_are_found(tmp_path, trace_file):
    rows = run_rows(
        tmp_path, "--trace", trace_file, "--ep", 2, "--seeds", 1, "--num-experts", 8,
        "--methods", "contiguous", "semantic",
    )  # fmt: skip
    lar = {row["method"]: row["lar"] for row in rows if row["layer"] == "mean"}
    assert lar["contiguous"] == pytest.approx(0.5, abs=0.05)
    assert lar["semantic"] > 0.75


def test_without_token_ids_only_placements_are_compared():
    names = [method.name for method in bench_plan.chosen_methods(["all"], token_ids=False)]
    assert "eplb" in names
    assert not any("semantic" in name or "schedule" in name for name in names)


def test_every_registered_policy_is_a_method():
    from semantic_ep.plan.policies import policies

    assert {method.policy for method in bench_plan.methods().values()} == set(policies())


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "greedy"'):
        bench_plan.chosen_methods(["gredy"], token_ids=True)


def test_balance_splits_load_evenly_over_copies():
    slots = np.array([[0, 1, 0, 2]])
    load = np.array([[4.0, 1, 3]])
    # Rank 0: 2 + 1, rank 1: 2 + 3.
    assert plan_loads.mean_over_max(slots, load, 2).tolist() == [4 / 5]


def test_an_empty_slot_carries_no_load():
    slots = np.array([[0, -1, 1, 2]])
    assert plan_loads.mean_over_max(slots, np.array([[2.0, 1, 1]]), 2).tolist() == [1.0]


@pytest.fixture
def load_files(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.lognormal(0, 0.7, (3, 32))
    for name in ("a", "b"):
        drifted = base * rng.lognormal(0, 0.3, base.shape)
        count = np.vstack([np.zeros((1, 32)), np.rint(drifted * 1000)])
        (tmp_path / f"{name}.json").write_text(json.dumps({"logical_count": count.tolist()}))
    return tmp_path / "a.json", tmp_path / "b.json"


def test_loads_are_planned_on_one_workload_and_weighed_on_the_other(tmp_path, load_files):
    rows = run_rows(
        tmp_path, "--loads", load_files[0], "--plan-on", load_files[1], "--ep", 4,
        "--redundant-slots", 4,
    )  # fmt: skip
    assert {row["method"] for row in rows} == {"contiguous", "greedy", "eplb", "semantic"}
    assert {(row["plan_on"], row["loads"]) for row in rows} == {("b", "a")}
    balance = {row["method"]: row["balance_mean_over_max"] for row in rows}
    assert balance["contiguous"] < min(balance["eplb"], balance["semantic"])


def test_several_loads_are_compared_in_every_ordered_pair(tmp_path, load_files):
    rows = run_rows(
        tmp_path, "--loads", load_files[0], "--loads", load_files[1], "--ep", 4,
        "--redundant-slots", 4,
    )  # fmt: skip
    assert {(row["plan_on"], row["loads"]) for row in rows} == {("a", "b"), ("b", "a")}


def test_one_load_alone_is_refused(tmp_path, load_files, capsys):
    assert main(["plan", "--loads", str(load_files[0]), "--ep", "4"]) == 2
    assert "--plan-on" in capsys.readouterr().err
