"""The first screen: should this be turned on, and what does one get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fewer bytes saved than this are not worth a restart with another placement.
WORTHWHILE_SHARE = 0.05
# A larger imbalance than this is said in words.
NOTABLE_SHARE = 0.05


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """Answer from served counters where there are any, else from the plan's held-out estimate."""
    if report["serve"] is not None:
        return _served(report["serve"])
    if report["plan"] is not None:
        return _planned(report["plan"])
    return {
        "answer": "unknown",
        "sentence": "This run has no plan yet, so there is nothing to compare.",
        "notes": [],
        "basis": "",
        "numbers": [],
    }


def _served(serve: Mapping[str, Any]) -> dict[str, Any]:
    before, after = serve["modes"]["before"], serve["modes"]["after"]
    source = serve["source"]
    numbers = [
        _number(
            "lar",
            "Local activation rate",
            before["lar_mean"],
            after["lar_mean"],
            better="higher",
            unit="share",
            source=f"{source}: modes.*.lar",
            how=f"mean over layers, {serve['ep_size']} ranks",
        ),
        _number(
            "remote_copies",
            "Remote copies of a token",
            before["remote_copies_mean"],
            after["remote_copies_mean"],
            better="lower",
            unit="copies",
            source=f"{source}: modes.*.remote_copies",
            how="mean over layers",
        ),
        _number(
            "wire_bytes",
            "All-to-all traffic",
            before["wire_bytes_total"],
            after["wire_bytes_total"],
            better="lower",
            unit="bytes",
            source=f"{source}: modes.*.bytes_dispatch + bytes_combine, off the diagonal",
            how="sum over layers and ranks, as sent",
        ),
        _number(
            "busiest_rank",
            "Busiest rank, expert load",
            before["busiest_rank_mean"],
            after["busiest_rank_mean"],
            better="lower",
            unit="ratio",
            source=f"{source}: modes.*.rank_load",
            how="max over mean of activations a rank, mean over layers",
        ),
    ]
    same = serve["identical_outputs"]
    saved = -(numbers[2]["change"] or 0.0)
    straggler = _change(before["straggler_bytes"], after["straggler_bytes"]) or 0.0
    identical = same["between_modes"] and same["to_single_process"]
    worth_it = identical and saved >= WORTHWHILE_SHARE and straggler <= 0
    return {
        "answer": "yes" if worth_it else "no",
        "sentence": _sentence(serve["ep_size"], saved, straggler, same),
        "notes": _notes(before, after),
        "basis": "served",
        "numbers": numbers,
    }


def _estimate(plan: Mapping[str, Any]) -> str:
    saved = plan["remote_copies_saved"]
    verdict = "worth turning on" if plan["worth_it"] else "not worth turning on"
    change = f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} remote copies"
    return f"Estimated {verdict}: {change} on {plan['ep_size']} ranks, not yet served."


def _best_baseline(plan: Mapping[str, Any]) -> list[str]:
    """What the four numbers do not say: they are against contiguous placement."""
    best = plan["best_baseline"]
    if best is None:
        return []
    saved = best["remote_copies_saved"]
    return [
        f"Against the best baseline, {best['policy']} with home ranks {best['schedule']}: "
        f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} remote copies."
    ]


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What the four numbers do not say: the price in balance, and time on this machine."""
    notes = []
    load = _change(before["busiest_rank_mean"], after["busiest_rank_mean"])
    if load is not None and load > NOTABLE_SHARE:
        notes.append(f"The busiest rank computes {load:.0%} more.")
    seconds = _change(before["seconds"]["total"], after["seconds"]["total"])
    if seconds is not None:
        direction = "less" if seconds < 0 else "more"
        notes.append(f"MoE layers took {abs(seconds):.0%} {direction} time on this machine.")
    return notes


def _sentence(ep_size: int, saved: float, straggler: float, same: Mapping[str, Any]) -> str:
    if not same["between_modes"]:
        return "Do not use this plan: outputs changed between contiguous and semantic placement."
    if not same["to_single_process"]:
        return "Do not use this set-up: outputs differ from the model in a single process."
    change = f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} all-to-all bytes"
    if saved >= WORTHWHILE_SHARE and straggler > 0:
        # The slowest rank sets the time of an all-to-all.
        return (
            f"Not worth turning on as it is: {change} on {ep_size} ranks, but the busiest rank "
            f"sends or receives {straggler:.0%} more."
        )
    if saved >= WORTHWHILE_SHARE:
        return f"Worth turning on: {change} on {ep_size} ranks, with identical outputs."
    return f"Not worth turning on here: {change} on {ep_size} ranks, with identical outputs."


def _planned(plan: Mapping[str, Any]) -> dict[str, Any]:
    rows = plan["policies"]
    before = next(row for row in rows if row["policy"] == "contiguous")
    after = rows[-1]
    source = f"{plan['source']}: meta.verdict.policies"
    kind = "held-out" if plan["held_out"] else "in-sample"
    how = f"mean over layers, {plan['tokens']} {kind} tokens"
    labels = {
        "lar": ("Local activation rate", "share", "higher"),
        "remote_copies": ("Remote copies of a token", "copies", "lower"),
        "load_max_over_mean": ("Busiest rank, expert load", "ratio", "lower"),
        "tokens_max_over_mean": ("Fullest rank, tokens", "ratio", "lower"),
    }
    return {
        "answer": "yes" if plan["worth_it"] else "no",
        "sentence": _estimate(plan),
        "notes": _best_baseline(plan),
        "basis": kind,
        "numbers": [
            _number(
                name,
                label,
                before[name],
                after[name],
                better=better,
                unit=unit,
                source=source,
                how=how,
            )
            for name, (label, unit, better) in labels.items()
        ],
    }


def _number(
    identity: str,
    label: str,
    before: float,
    after: float,
    *,
    better: str,
    unit: str,
    source: str,
    how: str,
) -> dict[str, Any]:
    return {
        "id": identity,
        "label": label,
        "unit": unit,
        "before": before,
        "after": after,
        "change": after - before if unit == "share" else _change(before, after),
        "better": better,
        "source": source,
        "how": how,
    }


def _change(before: float, after: float) -> float | None:
    return after / before - 1 if before else None
