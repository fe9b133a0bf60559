"""Draw the charts of a result as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.registry import Chart
from semantic_ep.errors import ConfigError, explain

_PER_ROW = 2


def draw(charts: Sequence[Chart], path: Path) -> None:
    """Draw one panel a chart.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            explain(
                "a PNG needs matplotlib",
                where="--png",
                do='Install the extra "report": pip install "semantic_ep[report]"',
            )
        ) from error
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = math.ceil(len(charts) / _PER_ROW)
    columns = min(len(charts), _PER_ROW)
    figure, axes = plt.subplots(rows, columns, figsize=(8 * columns, 4.5 * rows), squeeze=False)
    for axis in axes.ravel()[len(charts) :]:
        axis.set_axis_off()
    for chart, axis in zip(charts, axes.ravel()):
        (_bars if chart.kind == "bars" else _lines)(chart, axis)
        axis.set_title(chart.title, fontsize=10)
        axis.set_ylabel(chart.y_label)
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _series(chart: Chart) -> list[object]:
    return [None] if chart.series is None else _unique([row[chart.series] for row in chart.rows])


def _unique(values: list[object]) -> list[object]:
    return list(dict.fromkeys(values))


def _bars(chart: Chart, axis) -> None:  # type: ignore[no-untyped-def]
    """Groups of bars; several rows of one bar are its mean, with their spread as a whisker."""
    categories = _unique([row[chart.x] for row in chart.rows])
    series = _series(chart)
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        values = [
            [
                float(row[chart.y])
                for row in chart.rows
                if row[chart.x] == category and (name is None or row[chart.series] == name)
            ]
            for category in categories
        ]
        at = np.arange(len(categories)) + (number - (len(series) - 1) / 2) * width
        axis.bar(
            at,
            [np.mean(group) if group else np.nan for group in values],
            width,
            yerr=[np.std(group) if group else 0.0 for group in values],
            label=None if name is None else str(name),
        )
    axis.set_xticks(range(len(categories)), [str(c) for c in categories], rotation=35, ha="right")
    if chart.log:
        axis.set_yscale("log")
    if series != [None]:
        axis.legend(fontsize=8)


def _lines(chart: Chart, axis) -> None:  # type: ignore[no-untyped-def]
    """One line a series; several rows at one x are their mean."""
    for name in _series(chart):
        rows = [row for row in chart.rows if name is None or row[chart.series] == name]
        places = sorted({float(row[chart.x]) for row in rows})
        means = [np.mean([row[chart.y] for row in rows if row[chart.x] == x]) for x in places]
        axis.plot(places, means, marker="o", label=None if name is None else str(name))
    axis.set_xlabel(chart.x)
    if chart.log:
        axis.set_xscale("log")
        axis.set_yscale("log")
    if chart.series is not None:
        axis.legend(fontsize=8)
