"""What a serving run counted, for people and for the tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(result: Mapping[str, Any]) -> Table:
    """Counters of every mode in a few lines, for people; `result` is the content of serve.json."""
    from rich.table import Table

    modes = result["modes"]
    table = Table(
        "", *modes, title=f"{result['num_requests']} requests on {result['ep_size']} ranks"
    )
    for title, cell in (
        ("local activation rate", lambda m: f"{np.mean(m['lar']):.3f}"),
        ("remote copies a token", lambda m: f"{np.mean(m['remote_copies']):.3f}"),
        ("all-to-all MB", lambda m: f"{wire_bytes(m) / 1e6:.2f}"),
        ("busiest rank / mean", lambda m: f"{busiest_over_mean(m):.2f}"),
        ("seconds in dispatch", lambda m: f"{m['seconds']['dispatch']:.2f}"),
        ("seconds in experts", lambda m: f"{m['seconds']['experts']:.2f}"),
        ("seconds in combine", lambda m: f"{m['seconds']['combine']:.2f}"),
        ("new tokens a second", lambda m: f"{m['tokens_per_second']:.0f}"),
        (
            "expert MB a rank",
            lambda m: in_megabytes(m["expert_bytes_resident"]),
        ),
    ):
        table.add_row(title, *(cell(mode) for mode in modes.values()))
    shuffled = [mode.get("bytes_shuffle", 0) for mode in modes.values()]
    if any(shuffled):
        table.add_row("shuffle MB (attention-TP)", *(f"{size / 1e6:.2f}" for size in shuffled))
    return table


def parity_line(result: Mapping[str, Any]) -> str:
    """Say whether outputs agree, and what memory serving took."""
    same = result["identical_outputs"]
    return (
        f"Outputs identical between modes: {same['between_modes']}; to one process: "
        f"{same['to_single_process']} ({same['checked_requests']} checked). "
        f"Peak memory a rank while serving: {in_megabytes(result['peak_rss_bytes'])} MB."
    )


def in_megabytes(sizes: Sequence[int]) -> str:
    """Sizes of all ranks, the equal ones once."""
    return " / ".join(dict.fromkeys(f"{size / 1e6:.1f}" for size in sizes))


def wire_bytes(mode: Mapping[str, Any]) -> int:
    """Dispatch and combine payload that left its rank."""
    matrices = (np.array(mode[name]) for name in ("bytes_dispatch", "bytes_combine"))
    return int(sum(matrix.sum() - np.trace(matrix) for matrix in matrices))


def busiest_over_mean(mode: Mapping[str, Any]) -> float:
    """Activations of the busiest rank over the mean of ranks, mean over layers."""
    load = np.array(mode["rank_load"])
    return float(np.mean(load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)))


def tracked_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of every mode under the tracker's names."""
    metrics = {}
    for name, mode in result["modes"].items():
        metrics[f"serving/{name}/lar"] = float(np.mean(mode["lar"]))
        metrics[f"serving/{name}/remote_copies"] = float(np.mean(mode["remote_copies"]))
        metrics[f"serving/{name}/wire_bytes"] = wire_bytes(mode)
        metrics[f"serving/{name}/tokens_per_second"] = mode["tokens_per_second"]
        for phase, seconds in mode["seconds"].items():
            metrics[f"serving/{name}/seconds/{phase}"] = seconds
        for kind in ("bytes_dispatch", "bytes_combine", "bytes_metadata"):
            sent = np.array(mode[kind])
            metrics[f"a2a/{name}/{kind}"] = float(sent.sum() - np.trace(sent))
        metrics[f"routing/{name}/busiest_rank_over_mean"] = busiest_over_mean(mode)
        for layer, (lar, copies) in enumerate(zip(mode["lar"], mode["remote_copies"])):
            metrics[f"routing/{name}/lar/layer_{layer:02d}"] = lar
            metrics[f"a2a/{name}/remote_copies/layer_{layer:02d}"] = copies
    return metrics
