"""What a theme is, what it returns, and how results are written.

A theme is a module `bench_<theme>.py` beside this one with two functions:

    add_arguments(parser)      declares its flags
    run(args) -> Result        measures, and returns rows

Themes are found by file name, so what does not exist is not listed.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from semantic_ep.artifacts import installed_versions

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parent

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows for people: printed, and written as Markdown.

    Attributes:
        title: One line; says what is averaged over what.
        rows: One mapping a row; the keys of the first row are the columns.
    """

    title: str
    rows: Sequence[Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One panel of the PNG.

    Attributes:
        title: One line.
        kind: "bars" (x are categories) or "lines" (x are numbers).
        rows: Rows to draw.
        x: Key of the horizontal axis.
        y: Key of the vertical axis.
        series: Key that separates colours; None for one series.
        y_label: Name and unit of y.
        log: Whether axes of numbers are logarithmic.
    """

    title: str
    kind: Literal["bars", "lines"]
    rows: Sequence[Row]
    x: str
    y: str
    y_label: str
    series: str | None = None
    log: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a theme measured.

    Attributes:
        theme: Name of the theme.
        protocol: What was done, in words and settings, so that anyone can do it again.
        rows: Every measurement, one mapping each; written as JSON.
        tables: Summaries for people.
        charts: Panels of the PNG.
    """

    theme: str
    protocol: Mapping[str, Any]
    rows: Sequence[Row]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()

    def __post_init__(self) -> None:
        # Seven digits are more than any measurement has, and half as many bytes.
        object.__setattr__(self, "rows", rounded(self.rows))

    def document(self, *, seed: int | None = None) -> dict[str, Any]:
        """Return the result as it is written: measurements, protocol and environment.

        Args:
            seed: The theme's seed; None for one that has none, or several in its rows.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "theme": self.theme,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _commit(),
            "seed": seed,
            "command": ["python", "-m", "benchmarks.run", *sys.argv[1:]],
            "environment": environment(),
            "protocol": dict(self.protocol),
            "tables": [{"title": table.title, "rows": list(table.rows)} for table in self.tables],
            "rows": list(self.rows),
        }


def themes() -> dict[str, str]:
    """Themes that exist: name -> first line of the module's docstring, without importing it."""
    found = {}
    for file in sorted(FOLDER.glob("bench_*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem.removeprefix("bench_")] = text.partition("\n")[0]
    return found


def theme_module(name: str) -> ModuleType:
    """Import the module of a theme that `themes` lists."""
    return importlib.import_module(f"benchmarks.bench_{name}")


def environment() -> dict[str, Any]:
    """Hardware and versions of this process; accelerators only if torch is already loaded."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "versions": installed_versions(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["accelerators"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    return facts


def markdown(table: Table) -> str:
    """One table in Markdown."""
    lines = markdown_lines(table.rows) or ["no rows"]
    return f"**{table.title}**\n\n" + "\n".join(lines) + "\n"


def markdown_lines(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of a Markdown table, with the columns of the first; none of no rows."""
    if not rows:
        return []
    columns = list(rows[0])
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(cell(row.get(name)) for name in columns)} |" for row in rows),
    ]


def mean_of(rows: Sequence[Row], figure: str) -> float:
    """Mean of one figure of all rows."""
    return statistics.fmean(row[figure] for row in rows)


def cell(value: Any) -> str:
    """One value as people read it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(document: Mapping[str, Any], path: Path) -> None:
    """Write a document, one row a line so that results differ line by line."""
    rows = document["rows"]
    text = json.dumps({**document, "rows": []}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace('"rows": []\n}', f'"rows": [\n  {lines}\n ]\n}}') + "\n")


def rounded(value: Any) -> Any:
    """A value with all floats in it to seven digits, as rows of results have them."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def _commit() -> str:
    """Commit of the checkout, with "+" after it if files differ; "" outside one."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=FOLDER,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip()


def _processor() -> str:
    """Model of the CPU, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
