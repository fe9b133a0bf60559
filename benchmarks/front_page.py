"""The README's tables of measured figures, written from committed results.

Each stands between two comments that name it; `python -m benchmarks.pictures` writes them anew, and
a test fails where the page and the results differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# Share of requests profiled, of the rows shown.
PROFILED = 0.2
# Files of the theme `slow_links` -> how the table names what they serve.
LINKS = {
    "slow_links_cpu_202611.json": "quickstart's model",
    "slow_links_wide_cpu_202611.json": "wide, light experts",
}
MODELS = {"deepseek_v2_lite_chat": "DeepSeek-V2-Lite", "gpt_oss_20b": "gpt-oss-20b"}
# Published placements that hold equally many experts on every rank.
PUBLISHED = {
    "greedy": "greedy",
    "eplb": "EPLB",
    "eplb-global": "EPLB, global",
    "moetuner": "MoETuner",
    "exflow": "ExFlow",
    "occult": "Occult",
    "semmoe": "Sem-MoE",
}
SCHEDULE = "+schedule"

Row = Mapping[str, Any]


def method_rows(folder: Path = RESULTS) -> list[Row]:
    """Rows of all committed results that compare methods on traces, at the share shown."""
    return [
        row
        for file in sorted(folder.glob("plan_*.json"))
        for row in json.loads(file.read_text())["rows"]
        if {"trace", "method", "remote_copies"} <= set(row) and row["profile_fraction"] == PROFILED
    ]


def with_tables(readme: str, folder: Path = RESULTS) -> str:
    """The README with its tables as the results in a folder say; empty where there are none."""
    tables = {
        "methods": list(methods_table(method_rows(folder))),
        "slow links": list(
            links_table(
                {
                    name: json.loads((folder / file).read_text())["rows"]
                    for file, name in LINKS.items()
                    if (folder / file).is_file()
                }
            )
        ),
    }
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, found, rest = readme.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"README.md has no {begin.strip()} ... {end.strip()}")
        readme = before + begin + "".join(f"{line}\n" for line in lines) + end + after
    return readme


def methods_table(rows: Iterable[Row]) -> Iterator[str]:
    """Remote copies, LAR and load of the methods that answer who should use this."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row["layer"] == "mean":
            of = found.setdefault((row["trace"], row["ep_size"]), {})
            of.setdefault(row["method"], []).append(row)
    if not found:
        return
    yield from _head(
        "model, ranks", "contiguous", "EPLB", "fewest of the published", "fewest with our schedule",
        "semantic placement", "semantic, with schedule",
    )  # fmt: skip
    for (trace, ep_size), of in sorted(found.items()):
        scheduled = {f"{name}{SCHEDULE}": called for name, called in PUBLISHED.items()}
        plain = _figure(of["contiguous"], "remote_copies")
        cells = [
            f"{MODELS.get(trace, trace)}, {ep_size}",
            _cell(of["contiguous"]),
            _cell(of.get("eplb"), plain),
            _fewest(of, PUBLISHED, plain),
            _fewest(of, scheduled, plain),
            _cell(of.get("semantic-placement-only"), plain),
            f"**{_cell(of.get('semantic'), plain)}**",
        ]
        yield f"| {' | '.join(cells)} |"


def links_table(results: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """What the semantic plan leaves of contiguous on links of each rate."""
    if not results:
        return
    yield from _head(
        "model", "hosts", "link", "bytes", "time of a MoE layer", "throughput",
        "compute in a layer, contiguous",
    )  # fmt: skip
    for name, rows in results.items():
        cells = {(row["hosts"], row["link"], row["mode"]): row for row in rows if "mode" in row}
        for (hosts, link, mode), row in cells.items():
            if mode == "contiguous":
                continue
            values = (
                name,
                hosts,
                link,
                f"{row['bytes_of_baseline']:.2f}",
                f"{row['layer_of_baseline']:.2f}",
                f"{row['throughput_of_baseline']:.2f}",
                f"{cells[hosts, link, 'contiguous']['compute_share']:.0%}",
            )
            yield f"| {' | '.join(map(str, values))} |"


def _head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"


def _figure(rows: Sequence[Row], name: str) -> float:
    return mean(row[name] for row in rows)


def _cell(rows: Sequence[Row] | None, plain: float | None = None) -> str:
    """Copies (LAR; load), and the change against contiguous."""
    if not rows:
        return "–"
    copies = _figure(rows, "remote_copies")
    said = f"{copies:.2f} ({_figure(rows, 'lar'):.3f}; {_figure(rows, 'load_max_over_mean'):.2f})"
    if plain is None:
        return said
    return f"{said}, {100 * (copies / plain - 1):+.0f} %".replace("-", "−")


def _fewest(of: Mapping[str, Sequence[Row]], names: Mapping[str, str], plain: float) -> str:
    known = [name for name in names if name in of]
    if not known:
        return "–"
    best = min(known, key=lambda name: _figure(of[name], "remote_copies"))
    return f"{names[best]} {_cell(of[best], plain)}"
