"""Slow links: what is made of the ranks' measurements, and a real run on two limited hosts."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from benchmarks.link_bytes import Sent, accounted, messages, sent_to_others
from benchmarks.link_hosts import why_not
from benchmarks.link_results import MODES, UNLIMITED, compared, rows_of
from benchmarks.run import main
from semantic_ep.errors import BackendError

LAYERS, STEPS, RANKS = 2, 5, 2
RATES = {UNLIMITED: None, "1 Gb/s": 1.0}
EXCHANGED = messages(steps=STEPS, layers=LAYERS, ranks=RANKS)


def sent(*, counted, other=0, packets=10, again=0):
    inside = counted + 144 * EXCHANGED + other
    return {
        "interface_bytes": inside + 66 * packets,
        "interface_packets": packets,
        "wire_bytes": inside + 66 * 3 * packets,
        "wire_packets": 3 * packets,
        "segments_again": again,
    }


def call(link, number, mode, *, seconds, counted):
    return {
        "link": link,
        "round": number,
        "mode": mode,
        "seconds": {
            "dispatch": 0.5 * seconds,
            "experts": 0.2 * seconds,
            "combine": 0.3 * seconds,
            "total": 2 * seconds,
        },
        "steps": STEPS,
        "counted": {"rows": counted - 100, "metadata": 100},
        "sent": sent(counted=counted),
        "tokens": 10,
        "different": [],
    }


@pytest.fixture
def ranks():
    """Two ranks, three rounds, the first of them slow; the second rank is the slower one."""
    found = []
    for rank in range(RANKS):
        calls = []
        for number in range(3):
            for link, rate in RATES.items():
                for mode in MODES:
                    counted = 1_000_000 if mode == "contiguous" else 600_000
                    seconds = (9.0 if number == 0 else 1.0) * (1 + rank)
                    seconds *= 1.0 if rate is None else counted / 100_000
                    calls.append(call(link, number, mode, seconds=seconds, counted=counted))
        found.append({"layers": LAYERS, "calls": calls})
    return found


def test_times_are_of_the_slowest_rank_a_layer_and_step_without_the_first_round(ranks):
    rows = {(row["link"], row["mode"]): row for row in rows_of(ranks, RATES)}
    slow = rows["1 Gb/s", "contiguous"]
    assert slow["n"] == 2
    assert slow["layer_median_ms"] == pytest.approx(20 / LAYERS / STEPS * 1e3)
    assert slow["compute_share"] == pytest.approx(0.2)
    assert slow["new_tokens_per_second"] == pytest.approx(2 * 10 / 40)
    on_wire = slow["bytes_wire"] / RANKS
    assert slow["link_share"] == pytest.approx(on_wire * 8 / 1e9 / 20)
    assert rows[UNLIMITED, "contiguous"]["link_share"] is None


def test_bytes_are_of_all_hosts_and_add_up_to_the_interfaces(ranks):
    for row in rows_of(ranks, RATES):
        assert row["bytes_rows"] + row["bytes_metadata"] == row["bytes_counted"]
        parts = ("counted", "gloo", "other", "headers")
        assert sum(row[f"bytes_{part}"] for part in parts) == row["bytes_interface"]
    assert rows_of(ranks, RATES)[0]["bytes_counted"] == RANKS * 1_000_000


def test_rows_are_compared_with_contiguous_and_with_no_limit(ranks):
    rows = compared([{"hosts": 2, **row} for row in rows_of(ranks, RATES)])
    semantic = rows[-1]
    assert (semantic["link"], semantic["mode"]) == ("1 Gb/s", "semantic")
    assert semantic["bytes_of_baseline"] == pytest.approx(0.6)
    assert semantic["layer_of_baseline"] == pytest.approx(0.6)
    assert semantic["throughput_of_baseline"] == pytest.approx(1 / 0.6)
    assert semantic["unlimited_share"] == pytest.approx(1 / 6)


def test_a_wrong_token_in_any_round_fails(ranks):
    ranks[1]["calls"][-1]["different"] = [3]
    with pytest.raises(BackendError, match=r"semantic, rank 1: served tokens differ.*\[3\]"):
        rows_of(ranks, RATES)


@pytest.mark.parametrize(("again", "explained"), [(14, True), (5, False)])
def test_what_tcp_sent_again_is_explained_and_no_more_than_that(ranks, again, explained):
    ranks[0]["calls"][-1]["sent"] = sent(counted=600_000, other=20_000, again=again)
    if not explained:
        with pytest.raises(BackendError, match="semantic, 1 Gb/s, rank 0: counters and protocols"):
            rows_of(ranks, RATES)
        return
    rows = {(row["link"], row["mode"]): row for row in rows_of(ranks, RATES)}
    assert rows["1 Gb/s", "semantic"]["bytes_again"] == pytest.approx(again * 1448 / 2)


@pytest.mark.parametrize("extra", [20_000, -20_000])
def test_bytes_that_neither_counters_nor_protocol_explain_fail(ranks, extra):
    wrong = copy.deepcopy(ranks)
    wrong[0]["calls"][-1]["sent"] = sent(counted=600_000, other=extra)
    with pytest.raises(BackendError, match="do not explain what the interface sent"):
        rows_of(wrong, RATES)


def test_what_is_explained_is_split_into_its_parts():
    found = accounted(Sent(**sent(counted=50_000, other=100)), counted=50_000, messages=EXCHANGED)
    assert found["explained"]
    assert (found["gloo"], found["other"], found["headers"]) == (144 * EXCHANGED, 100, 660)


def test_only_what_leaves_the_rank_is_counted():
    by_rank = np.array([[5, 7], [1, 2]])
    counters = dict.fromkeys(("bytes_dispatch", "bytes_combine", "bytes_metadata"), by_rank)
    assert sent_to_others(counters, rank=0) == {"rows": 18, "metadata": 9}


@pytest.mark.distributed
def test_two_hosts_serve_equal_tokens_and_send_what_was_counted(tmp_path, capsys):
    """Rounds with other bytes or tokens fail inside; DeepSpeed starts the ranks from a hostfile."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    output = tmp_path / "out.json"
    assert main(["slow_links", "--quick", "--rounds", "1", "--json", str(output)]) == 0
    document = json.loads(output.read_text())
    served = [row for row in document["rows"] if row["block"] == "serving"]
    assert [(row["link"], row["mode"]) for row in served] == [
        (link, mode) for link in ("unlimited", "1 Gb/s") for mode in MODES
    ]
    for before, after in (served[:2], served[2:]):
        assert after["bytes_counted"] < before["bytes_counted"] < before["bytes_interface"]
        assert after["bytes_interface"] < before["bytes_interface"]
    # Bytes do not depend on the link.
    assert [row["bytes_counted"] for row in served[:2]] == [
        row["bytes_counted"] for row in served[2:]
    ]
    links = {row["link"]: row for row in document["rows"] if row["block"] == "link"}
    assert links["1 Gb/s"]["mbits"] < 1100
