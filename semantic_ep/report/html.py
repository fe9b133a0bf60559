"""`report.html`: one file that works offline, prints well, and follows light or dark appearance.

The template places what is handed to it. Numbers come from `report.json`; here they only get
their units.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from semantic_ep.report.units import amount, change, percent

TEMPLATE = "report.html.j2"
# Order and text of the pictures below the first screen; the first screen shows `FIRST_PICTURE`.
FIRST_PICTURE = "lar_by_layer"


def render(report: Mapping[str, Any], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """Return the page.

    Args:
        report: The content of `report.json`.
        light: PNG of each picture by name, for light appearance and print.
        dark: The same pictures for dark appearance.
    """
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
        "integer": lambda value: f"{value:,.0f}",
        "bytes": lambda value: amount(value, "bytes"),
        "milliseconds": lambda value: f"{1e3 * value:,.1f}",
    }
    pictures = {
        name: {"light": _data_uri(light[name]), "dark": _data_uri(dark[name])} for name in light
    }
    return environment.get_template(TEMPLATE).render(
        report=report, pictures=pictures, first_picture=FIRST_PICTURE
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
