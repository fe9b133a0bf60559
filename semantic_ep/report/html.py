"""`report.html`: one file that works offline, prints well, and follows light or dark appearance.

The template places what is handed to it. Numbers come from `report.json`; here they only get
their units.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from semantic_ep.report.units import (
    amount,
    change,
    duration,
    link_name,
    milliseconds,
    percent,
)

if TYPE_CHECKING:
    from jinja2 import Environment

# The first screen shows this picture; the template places the others.
FIRST_PICTURE = "lar_by_layer"
# A change smaller than this is neither good nor bad.
_INDIFFERENT = 0.005


def render(report: Mapping[str, Any], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """Return the page of one run.

    Args:
        report: The content of `report.json`.
        light: PNG of each picture by name, for light appearance and print.
        dark: The same pictures for dark appearance.
    """
    pictures = {
        name: {"light": _data_uri(light[name]), "dark": _data_uri(dark[name])} for name in light
    }
    template = _environment().get_template("report.html.j2")
    return template.render(report=report, pictures=pictures, first_picture=FIRST_PICTURE)


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """Return the page of several runs from the content of `comparison.json`."""
    return _environment().get_template("compare.html.j2").render(comparison=comparison)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("semantic_ep.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "amount": amount,
        "change": change,
        "percent": percent,
        "milliseconds": milliseconds,
        "link_name": link_name,
        "duration": lambda pair: duration(*pair),
        "integer": lambda value: f"{value:,.0f}",
        "bytes": lambda value: amount(value, "bytes"),
        "mood": _mood,
    }
    return environment


def _mood(value: float | None, better: str) -> str:
    """CSS class of a change: "good", "bad", or "" where it is neither."""
    if value is None or abs(value) < _INDIFFERENT:
        return ""
    return "good" if (value > 0) == (better == "higher") else "bad"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
