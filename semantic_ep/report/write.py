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
COMPARISON_JSON, COMPARISON_HTML = "comparison.json", "comparison.html"


def write_report(report: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Draw the report of one run; returns the files, `report.html` last.

    Raises:
        BackendError: A drawing library is missing; no file was written.
        ArtifactError: `directory` cannot be written.
    """
    output = _made(directory)
    with _missing_library_explained():
        from semantic_ep.report.html import render
        from semantic_ep.report.plots import DARK, LIGHT, draw

        light, dark = draw(report, LIGHT), draw(report, DARK)
        page = render(report, light, dark)
    pictures = {f"{name}.png": png for name, png in light.items()}
    return _write(output, {REPORT_JSON: to_json(report), **pictures, REPORT_HTML: page})


def write_comparison(comparison: Mapping[str, Any], directory: str | Path) -> list[Path]:
    """Draw the comparison of several runs; returns the files, `comparison.html` last.

    Raises:
        BackendError: A drawing library is missing; no file was written.
        ArtifactError: `directory` cannot be written.
    """
    output = _made(directory)
    with _missing_library_explained():
        from semantic_ep.report.html import render_comparison

        page = render_comparison(comparison)
    return _write(output, {COMPARISON_JSON: to_json(comparison), COMPARISON_HTML: page})


def to_json(report: Mapping[str, Any]) -> str:
    """Return the text of `report.json`; NaN and infinities do not occur in it."""
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def _made(directory: str | Path) -> Path:
    output = Path(directory)
    with _unwritable_explained(output):
        output.mkdir(parents=True, exist_ok=True)
    return output


def _write(output: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    with _unwritable_explained(output):
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            write_file_atomically(output / name, data)
    return [output / name for name in files]


@contextmanager
def _missing_library_explained() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise BackendError(
            explain(
                f"a report needs {error.name}, which is not installed",
                do='pip install "semantic_ep[report]", or use --json',
            )
        ) from error


@contextmanager
def _unwritable_explained(output: Path) -> Iterator[None]:
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
