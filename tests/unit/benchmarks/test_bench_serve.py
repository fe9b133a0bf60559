"""The theme `serve`: its figures, its checks, and its quick form on two ranks."""

import json

import pytest

from benchmarks.run import main
from benchmarks.serve_results import good_requests, latencies, objective

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.bench_serve import check_generate, check_tokens
from benchmarks.serve_generate import same_length
from benchmarks.serve_ranks import Measured, Run, Served
from semantic_ep.errors import BackendError
from semantic_ep.serve.scheduling.cost import Accelerator


def served(times, tokens, *, arrived=0.0, end="length"):
    return Served(arrived=arrived, times=times, tokens=tokens, rank=0, end=end)


REQUESTS = [
    served([1.0, 1.1, 1.3], [5, 6, 7], arrived=0.5),
    served([2.0], [8], end="stop"),
]


def one_run(requests):
    return Run(plan="semantic", policy="round-robin", load=1.0, requests=requests, counted={})


def test_latencies_count_from_when_a_request_was_due():
    times = latencies(REQUESTS)
    assert times["ttft"].tolist() == pytest.approx([500, 2000])
    assert times["tpot"].tolist() == pytest.approx([150])
    assert times["itl"].tolist() == pytest.approx([100, 200])
    assert times["e2e"].tolist() == pytest.approx([800, 2000])
    assert one_run(REQUESTS).seconds == pytest.approx(2.0)


def test_a_good_request_meets_both_parts_of_the_objective():
    assert good_requests(REQUESTS, (600, 160)) == 1
    assert good_requests(REQUESTS, (600, 140)) == 0
    assert good_requests(REQUESTS, (2100, 160)) == 2
    assert objective(one_run(REQUESTS)) == pytest.approx((5 * 1250, 5 * 150))


def test_tokens_that_differ_from_one_process_fail_the_run():
    def measured(reference):
        return Measured(
            reference=reference,
            light=one_run(REQUESTS[:1]),
            burst_rate=1.0,
            runs=[one_run(REQUESTS)],
            accelerator=Accelerator(teraflops=1, gigabytes_per_second=1),
        )

    check_tokens(measured([[5, 6, 7], [8]]))
    with pytest.raises(BackendError, match=r"plan semantic, policy round-robin.*\[1\] of 2"):
        check_tokens(measured([[5, 6, 7], [9]]))
    with pytest.raises(BackendError, match=r"batches of \[8\]"):
        check_generate([{"batch": 1, "same_tokens": True}, {"batch": 8, "same_tokens": False}])


def test_a_batch_has_prompts_of_one_length():
    assert same_length([[1], [2, 3], [4, 5, 6]], 4) == [[1, 1], [2, 3], [4, 5], [1, 1]]


def test_the_quick_form_serves_every_plan_and_compares_one_rank_with_generate(tmp_path):
    pytest.importorskip("deepspeed")
    output = tmp_path / "out.json"
    command = ["serve", "--quick", "--ranks", "2", "--policies", "semantic", "--loads", "inf"]
    assert main([*command, "--json", str(output), "--png", str(tmp_path / "out.png")]) == 0
    rows = json.loads(output.read_text())["rows"]
    cells = {row["plan"]: row for row in rows if row["block"] == "cells"}
    assert set(cells) == {"contiguous", "eplb", "semantic"}
    for row in cells.values():
        assert row["requests"] == 12
        assert row["new_tokens_per_second"] > 0
        assert 0 <= row["good_share"] <= 1
        assert 0 < row["lar"] < 1
        assert row["mbytes_to_other_ranks"] > 0
    # Topics are planted. Where requests go depends on the machine's load; the prediction does not.
    assert cells["semantic"]["holdout_lar"] > cells["contiguous"]["holdout_lar"]
    sides = [(row["batch"], row["side"]) for row in rows if row["block"] != "cells"]
    assert sides == [(1, "engine"), (1, "generate"), (4, "engine"), (4, "generate")]
    assert (tmp_path / "out.png").stat().st_size > 0
