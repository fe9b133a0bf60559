"""The README's tables of measured figures, written from committed results.

Each stands between two comments that name it; `python -m benchmarks.pictures` writes them anew, and
a test fails where the page and the results differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.registry import Row, markdown_lines, mean_of

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
        "methods": methods_table(method_rows(folder)),
        "slow links": links_table(
            {
                name: json.loads((folder / file).read_text())["rows"]
                for file, name in LINKS.items()
                if (folder / file).is_file()
            }
        ),
    }
    for name, lines in tables.items():
        readme = with_part(readme, name, "".join(f"{line}\n" for line in lines))
    return readme


def marks(name: str) -> tuple[str, str]:
    """The comments that a part of the README stands between."""
    return f"<!-- {name} -->\n", f"<!-- /{name} -->\n"


def with_part(readme: str, name: str, content: str) -> str:
    """The README with other content between the marks of one part.

    Raises:
        ValueError: It has no such part.
    """
    begin, end = marks(name)
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md has no {begin.strip()} ... {end.strip()}")
    return before + begin + content + end + after


def methods_table(rows: Iterable[Row]) -> list[str]:
    """Remote copies, LAR and load of the methods that answer who should use this, in Markdown."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row["layer"] == "mean":
            of = found.setdefault((row["trace"], row["ep_size"]), {})
            of.setdefault(row["method"], []).append(row)
    lines = []
    for (trace, ep_size), of in sorted(found.items()):
        scheduled = {f"{name}{SCHEDULE}": called for name, called in PUBLISHED.items()}
        plain = mean_of(of["contiguous"], "remote_copies")
        lines.append(
            {
                "model, ranks": f"{MODELS.get(trace, trace)}, {ep_size}",
                "contiguous": _cell(of["contiguous"]),
                "EPLB": _cell(of.get("eplb"), plain),
                "fewest of the published": _fewest(of, PUBLISHED, plain),
                "fewest with our schedule": _fewest(of, scheduled, plain),
                "semantic placement": _cell(of.get("semantic-placement-only"), plain),
                "semantic, with schedule": f"**{_cell(of.get('semantic'), plain)}**",
            }
        )
    return markdown_lines(lines)


def links_table(results: Mapping[str, Sequence[Row]]) -> list[str]:
    """What the semantic plan leaves of contiguous on links of each rate, in Markdown."""
    lines = []
    for name, rows in results.items():
        cells = {(row["hosts"], row["link"], row["mode"]): row for row in rows if "mode" in row}
        for (hosts, link, mode), row in cells.items():
            if mode == "contiguous":
                continue
            plain = cells[hosts, link, "contiguous"]
            lines.append(
                {
                    "model": name,
                    "hosts": hosts,
                    "link": link,
                    "bytes": f"{row['bytes_of_baseline']:.2f}",
                    "time of a MoE layer": f"{row['layer_of_baseline']:.2f}",
                    "throughput": f"{row['throughput_of_baseline']:.2f}",
                    "compute in a layer, contiguous": f"{plain['compute_share']:.0%}",
                }
            )
    return markdown_lines(lines)


def _cell(rows: Sequence[Row] | None, plain: float | None = None) -> str:
    """Copies (LAR; load), and the change against contiguous."""
    if not rows:
        return "–"
    copies = mean_of(rows, "remote_copies")
    said = f"{copies:.2f} ({mean_of(rows, 'lar'):.3f}; {mean_of(rows, 'load_max_over_mean'):.2f})"
    if plain is None:
        return said
    return f"{said}, {100 * (copies / plain - 1):+.0f} %".replace("-", "−")


def _fewest(of: Mapping[str, Sequence[Row]], names: Mapping[str, str], plain: float) -> str:
    known = [name for name in names if name in of]
    if not known:
        return "–"
    best = min(known, key=lambda name: mean_of(of[name], "remote_copies"))
    return f"{names[best]} {_cell(of[best], plain)}"
