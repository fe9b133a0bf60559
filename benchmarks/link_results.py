"""What the ranks of the slow_links theme measured, checked, in rows, tables and charts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.link_bytes import SLACK_BYTES, SLACK_SHARE, Sent, accounted, messages
from benchmarks.registry import Chart, Row, Table
from semantic_ep.errors import BackendError, explain

# Mode -> placement policy.
MODES = {"contiguous": "contiguous", "semantic": "semantic-requests"}
BASELINE = "contiguous"
UNLIMITED = "unlimited"


def rows_of(
    ranks: Sequence[Mapping[str, Any]], rates: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """One row a link and mode: times of the slowest rank, medians of rounds; bytes of all hosts.

    Args:
        ranks: What each rank left; the first round warms up.
        rates: Link -> Gb/s; None without a limit.

    Raises:
        BackendError: Tokens differ, or bytes are not explained.
    """
    cells: dict[tuple[str, str], list[Sequence[Mapping[str, Any]]]] = {}
    for calls in zip(*(rank["calls"] for rank in ranks), strict=True):
        if calls[0]["round"]:
            cells.setdefault((calls[0]["link"], calls[0]["mode"]), []).append(calls)
    return [
        {"link": link, **_row(mode, cells[link, mode], layers=ranks[0]["layers"], gigabits=rate)}
        for link, rate in rates.items()
        for mode in MODES
    ]


def _row(
    mode: str,
    rounds: Sequence[Sequence[Mapping[str, Any]]],
    *,
    layers: int,
    gigabits: float | None,
) -> dict[str, Any]:
    """`rounds` holds the calls of all ranks, by round."""
    steps = rounds[0][0]["steps"]
    bytes_of_rounds = [_bytes(mode, calls, layers) for calls in rounds]
    sent = {name: statistics.fmean(one[name] for one in bytes_of_rounds) for name in _BYTES}
    layer_ms = {
        phase: [
            max(call["seconds"][phase] for call in calls) / steps / layers * 1e3 for calls in rounds
        ]
        for phase in ("dispatch", "experts", "combine")
    }
    whole_ms = [
        max(sum(call["seconds"][phase] for phase in layer_ms) for call in calls)
        / steps / layers * 1e3
        for calls in rounds
    ]  # fmt: skip
    tokens = sum(call["tokens"] for call in rounds[0])
    per_second = [tokens / max(call["seconds"]["total"] for call in calls) for calls in rounds]
    # In a round every host's link is busy for this long, whatever waits for it.
    busiest = max(one["busiest_wire"] for one in bytes_of_rounds)
    link_ms = None if gigabits is None else busiest * 8 / gigabits / 1e6 / steps / layers
    median = statistics.median(whole_ms)
    return {
        "block": "serving",
        "mode": mode,
        "n": len(rounds),
        "steps": steps,
        "layer_median_ms": median,
        "layer_p20_ms": float(np.percentile(whole_ms, 20)),
        "layer_p80_ms": float(np.percentile(whole_ms, 80)),
        **{f"{phase}_median_ms": statistics.median(of) for phase, of in layer_ms.items()},
        "compute_share": statistics.median(layer_ms["experts"]) / median,
        "link_share": None if link_ms is None else link_ms / median,
        "new_tokens_per_second": statistics.median(per_second),
        "new_tokens_per_second_p20": float(np.percentile(per_second, 20)),
        "new_tokens_per_second_p80": float(np.percentile(per_second, 80)),
        "seconds": statistics.median(max(c["seconds"]["total"] for c in calls) for calls in rounds),
        **{f"bytes_{name}": value for name, value in sent.items()},
        "protocol_share": sent["interface"] / sent["counted"] - 1,
        "wire_share": sent["wire"] / sent["counted"] - 1,
        "same_tokens": True,
    }


_BYTES = ("rows", "metadata", "counted", "gloo", "again", "other", "headers", "interface", "wire")


def _bytes(mode: str, calls: Sequence[Mapping[str, Any]], layers: int) -> dict[str, int]:
    """Bytes that all hosts sent in a round, and those of the busiest on the wire.

    Raises:
        BackendError: Tokens differ, or a host sent what nothing explains.
    """
    total: dict[str, int] = dict.fromkeys(_BYTES, 0)
    busiest = 0
    for rank, call in enumerate(calls):
        if call["different"]:
            raise BackendError(
                explain(
                    "served tokens differ from those of transformers in one process",
                    where=f"{mode}, rank {rank}",
                    got=f"requests {call['different'][:8]}",
                    allowed="equal tokens",
                )
            )
        exchanged = messages(steps=call["steps"], layers=layers, ranks=len(calls))
        found = accounted(
            Sent(**call["sent"]), counted=sum(call["counted"].values()), messages=exchanged
        )
        if not found["explained"]:
            raise BackendError(
                explain(
                    "counters and protocols do not explain what the interface sent",
                    where=f"{mode}, {call['link']}, rank {rank}",
                    got=f"{found}, {exchanged} messages",
                    allowed=f'"other" within {SLACK_SHARE:.1%} of the counted bytes and '
                    f"{SLACK_BYTES} bytes a message, beside what was sent again",
                )
            )
        for name, value in {**call["counted"], **found}.items():
            if name in total:
                total[name] += value
        busiest = max(busiest, found["wire"])
    return {**total, "busiest_wire": busiest}


def compared(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with what they are of the baseline's, and of themselves without a limit."""
    by_name = {(row["hosts"], row["link"], row["mode"]): row for row in rows}
    found = []
    for row in rows:
        base = by_name[row["hosts"], row["link"], BASELINE]
        free = by_name[row["hosts"], UNLIMITED, row["mode"]]
        found.append(
            {
                **row,
                "bytes_of_baseline": row["bytes_counted"] / base["bytes_counted"],
                "layer_of_baseline": row["layer_median_ms"] / base["layer_median_ms"],
                "throughput_of_baseline": row["new_tokens_per_second"]
                / base["new_tokens_per_second"],
                "unlimited_share": free["layer_median_ms"] / row["layer_median_ms"],
            }
        )
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    """Times, with what they are of contiguous, and bytes, with what they are made of."""
    times = [
        {
            "hosts": row["hosts"],
            "link": row["link"],
            "plan": row["mode"],
            "ms a MoE layer": row["layer_median_ms"],
            "p20..p80": f"{row['layer_p20_ms']:.3g}..{row['layer_p80_ms']:.3g}",
            "dispatch": row["dispatch_median_ms"],
            "experts": row["experts_median_ms"],
            "combine": row["combine_median_ms"],
            "tok/s": row["new_tokens_per_second"],
            "compute": f"{row['compute_share']:.1%}",
            "link busy": "" if row["link_share"] is None else f"{row['link_share']:.0%}",
            "as fast unlimited": f"{row['unlimited_share']:.1%}",
            "bytes": f"{row['bytes_of_baseline']:.3f}",
            "layer time": f"{row['layer_of_baseline']:.3f}",
            "throughput": f"{row['throughput_of_baseline']:.3f}",
        }
        for row in rows
    ]
    sent = [
        {
            "hosts": row["hosts"],
            "link": row["link"],
            "plan": row["mode"],
            "rows MB": row["bytes_rows"] / 1e6,
            "metadata MB": row["bytes_metadata"] / 1e6,
            "gloo MB": row["bytes_gloo"] / 1e6,
            "other MB": row["bytes_other"] / 1e6,
            "of it sent again, at most": row["bytes_again"] / 1e6,
            "headers MB": row["bytes_headers"] / 1e6,
            "interfaces MB": row["bytes_interface"] / 1e6,
            "over counted": f"{row['protocol_share']:.2%}",
            "with 1500-byte packets": f"{row['wire_share']:.2%}",
        }
        for row in rows
    ]
    return [
        Table(
            title="Time of a MoE layer in a step, slowest rank, median of rounds; the last three "
            "columns are of contiguous",
            rows=times,
        ),
        Table(title="Bytes that all hosts sent in a round, and what they are", rows=sent),
    ]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Times, and the semantic plan in shares of the baseline."""
    shares = {
        "bytes": "bytes_of_baseline",
        "time of a MoE layer": "layer_of_baseline",
        "throughput": "throughput_of_baseline",
    }
    found = []
    for hosts in dict.fromkeys(row["hosts"] for row in rows):
        here = [row for row in rows if row["hosts"] == hosts]
        found += [
            Chart(
                title=f"{hosts} hosts: time of a MoE layer",
                kind="bars",
                rows=here,
                x="link",
                y="layer_median_ms",
                series="mode",
                y_label="ms",
            ),
            Chart(
                title=f"{hosts} hosts: semantic, in shares of {BASELINE}",
                kind="bars",
                rows=[
                    {"link": row["link"], "what": what, "share": row[figure]}
                    for row in here
                    if row["mode"] != BASELINE
                    for what, figure in shares.items()
                ],
                x="link",
                y="share",
                series="what",
                y_label=f"share of {BASELINE}",
            ),
        ]
    return found
