"""Writes `report.json`, the pictures and `report.html`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import ArtifactError, BackendError, explain

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def write_report(report: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Draw a report; returns the files, `report.html` last.

    Raises:
        BackendError: A drawing library is missing; no file was written.
        ArtifactError: `directory` cannot be written.
    """
    output = Path(directory)
    with _house_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        from semantic_ep.report.html import render
        from semantic_ep.report.plots import DARK, LIGHT, draw

        light, dark = draw(report, LIGHT), draw(report, DARK)
        page = render(report, light, dark)
    except ImportError as error:
        raise BackendError(
            explain(
                f"a report needs {error.name}, which is not installed",
                do='pip install "semantic_ep[report]", or use --json',
            )
        ) from error
    files = {REPORT_JSON: to_json(report).encode()}
    files |= {f"{name}.png": png for name, png in light.items()}
    files[REPORT_HTML] = page.encode()
    with _house_errors(output):
        for name, content in files.items():
            write_file_atomically(output / name, content)
    return [output / name for name in files]


def to_json(report: Mapping[str, Any]) -> str:
    """Return the text of `report.json`; NaN and infinities do not occur in it."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


@contextmanager
def _house_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            explain(
                f"cannot write the report: {error.strerror or error}",
                where=str(output),
                do="Free space or choose a writable directory with -o",
            )
        ) from error
