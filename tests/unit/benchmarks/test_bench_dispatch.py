"""The dispatch theme: what it prints on a CPU, and its GPU half as far as it runs without one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import dispatch_gpu
from benchmarks.base import ROOT
from benchmarks.run import main
from benchmarks.virtual_ranks import VirtualRanks, check, random_inputs
from benchmarks.virtual_torch import TorchRanks
from semantic_ep.errors import BackendError
from semantic_ep.runtime.kernels.exchange import load_library

FLAGS = ["--ranks", "2", "--tokens", "40", "--hidden", "16", "--repeats", "2", "--warm-up", "1"]


def load_or_skip():
    try:
        load_library("cpu")
    except BackendError as error:
        pytest.skip(str(error))


def test_the_cpu_half_times_every_variant_in_one_run(tmp_path):
    output = tmp_path / "dispatch.json"
    assert main(["dispatch", "--device", "cpu", *FLAGS, "--json", str(output)]) == 0
    document = json.loads(output.read_text())
    rows = {row["variant"]: row for row in document["rows"]}
    assert list(rows) == ["all_to_all", "ours", "ours+plan", "overlap off", "overlap on"]
    assert all(row["n"] == 2 and row["median_ms"] > 0 for row in rows.values())
    assert rows["ours+plan"]["sent_rows"] <= rows["ours"]["sent_rows"]
    assert rows["ours"]["sent_rows"] < rows["all_to_all"]["sent_rows"]
    assert rows["overlap on"]["sent_rows"] == rows["ours+plan"]["sent_rows"]
    assert rows["overlap on"]["auto_overlaps"] == 0  # 40 tokens do not pay


def test_the_gpu_half_says_what_it_lacks(capsys):
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device")
    assert main(["dispatch", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_script_for_many_gpus_is_skipped_below_two():
    if torch.cuda.device_count() >= 2:
        pytest.skip("there are GPUs enough: run it with torchrun")
    script = ROOT / "benchmarks" / "gpu" / "many_gpus.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipped: fewer than 2 CUDA devices" in done.stdout


def test_the_proof_on_a_gpu_fails_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device")
    script = ROOT / "benchmarks" / "gpu" / "prove.sh"
    done = subprocess.run(["bash", script, sys.executable], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nothing can be proven here" in done.stderr


def test_steps_that_a_gpu_times_run_and_are_rated_against_both_limits():
    load_or_skip()
    ranks, tokens, hidden = 2, 5, 16
    cpu = torch.device("cpu")
    shape = {"slots_per_rank": dispatch_gpu.SLOTS, "topk": dispatch_gpu.TOPK, "hidden": hidden}
    kind = {"dtype": torch.bfloat16, "device": cpu}
    inputs = random_inputs(ranks, tokens=tokens, **shape, **kind)
    virtual = VirtualRanks(num_ranks=ranks, max_tokens=tokens, **shape, **kind)
    received = virtual.dispatch(*inputs)
    virtual.finish()
    y = [here.rows_RD.clone() for here in received]
    steps = dispatch_gpu._steps(virtual, inputs, received, y)
    for step in steps.values():
        step()
        virtual.finish()
    # Every token goes to both ranks: 10 rows in, 10 to the other rank, 20 copies, 80 rows out.
    slot = [torch.cat([s[:, :4] % 32, 32 + s[:, 4:] % 32], 1) for s in inputs[1]]
    traffic = dispatch_gpu._traffic(slot, ranks, hidden)
    assert traffic == {"tokens": 320, "copies": 640, "remote": 320, "routes": 2560}
    medians = dict.fromkeys(steps, 2e-6) | {"launch floor dispatch": 1e-6, "torch dispatch": 5e-6}
    rates = dispatch_gpu._rates("dispatch", medians, traffic, ranks, copy_rate=3840e6)
    assert rates["of_copy"] == pytest.approx(0.5)
    assert (rates["over_floor"], rates["over_torch"]) == pytest.approx((2, 2.5))
    assert rates["wire_gb_s"] == pytest.approx(320 / 2 / 2e-6 / 1e9)
    floor = dispatch_gpu._rates("launch floor dispatch", medians, traffic, ranks, 1e9)
    assert set(floor.values()) == {None}


def test_kernels_and_torch_give_virtual_ranks_the_same_rows_and_sums():
    load_or_skip()
    shape = {"slots_per_rank": 4, "topk": 3, "hidden": 24}
    kind = {"dtype": torch.float32, "device": torch.device("cpu")}
    x, slot, weight = random_inputs(3, tokens=11, **shape, **kind)
    kernels = VirtualRanks(num_ranks=3, max_tokens=11, **shape, **kind)
    received = kernels.dispatch(x, slot, weight)
    kernels.finish()
    check(x, slot, weight, received, shape["slots_per_rank"])
    plain = TorchRanks(slot, shape["slots_per_rank"])
    rows = plain.dispatch(x)
    for ours, theirs in zip(received, rows, strict=True):
        assert torch.equal(ours.rows_RD[: len(theirs)], theirs)
    out = kernels.combine([torch.tanh(here.rows_RD) for here in received], received)
    kernels.finish()
    plain_out = plain.combine([torch.tanh(one) for one in rows], weight)
    for ours, theirs in zip(out, plain_out, strict=True):
        torch.testing.assert_close(ours, theirs)
