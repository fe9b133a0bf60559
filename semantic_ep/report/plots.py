"""Pictures of a report, in a light and a dark theme. They draw `report.json` and compute nothing.

Colours are told apart by readers with any colour vision: baseline and result differ in lightness
and hue, ceiling and floor in line style too, and heat maps use one hue from faint to strong.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from semantic_ep.report.units import amount, byte_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
SQUARE = ("bytes_between_ranks",)
Report = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one appearance."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    before: str
    after: str
    ceiling: str
    heat: tuple[str, ...]

    def rc(self) -> Any:
        """Settings for `matplotlib.rc_context`."""
        return {
            "figure.facecolor": self.surface,
            "axes.facecolor": self.surface,
            "savefig.facecolor": self.surface,
            "text.color": self.ink,
            "axes.labelcolor": self.muted,
            "axes.edgecolor": self.grid,
            "axes.titlecolor": self.ink,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.8,
            "xtick.color": self.muted,
            "ytick.color": self.muted,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "font.family": "sans-serif",
            "font.size": 9,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
        }


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#16202c",
    muted="#5b6675",
    grid="#e3e7ec",
    before="#9aa5b1",
    after="#0a66c2",
    ceiling="#b4530a",
    heat=("#f3f7fc", "#9cc3ea", "#2f7fcb", "#0b3b78"),
)
DARK = Theme(
    name="dark",
    surface="#161b22",
    ink="#e6ebf1",
    muted="#9aa7b5",
    grid="#2a323d",
    before="#6f7c8a",
    after="#58b2ff",
    ceiling="#f0a24b",
    heat=("#1b232d", "#1f4b78", "#3f93dd", "#d3eaff"),
)


def draw(report: Report, theme: Theme = LIGHT) -> dict[str, bytes]:
    """PNG of each picture that the run has data for, by name.

    Raises:
        BackendError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pictures: dict[str, bytes] = {}
    painters: dict[str, Callable[[Figure, Report, Theme], bool]] = {
        "lar_by_layer": _by_layer,
        "bytes_between_ranks": _bytes_between_ranks,
        "expert_load": _expert_load,
        "training_loss": _training_loss,
        "load_curves": _load_curves,
    }
    for name, paint in painters.items():
        with rc_context(theme.rc()):
            figure = Figure(layout="compressed" if name in SQUARE else "constrained")
            if paint(figure, report, theme):
                stream = io.BytesIO()
                figure.savefig(stream, format="png", dpi=DPI)
                pictures[name] = stream.getvalue()
    return pictures


def _by_layer(figure: Figure, report: Report, theme: Theme) -> bool:
    planned = {row["id"]: row for row in (report["held_out"] or {"schedules": []})["schedules"]}
    if report["serve"]:
        before, after = (report["serve"]["modes"][side] for side in ("before", "after"))
    elif planned:
        before, after = planned["contiguous"], planned["requests"]
    else:
        return False
    layers = report["model"]["layer_ids"]
    figure.set_size_inches(7.6, 4.1)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _dumbbells(upper, before["lar"], after["lar"], theme)
    x = np.arange(len(layers))
    if planned:
        # Small hollow marks: estimates on other documents than those that were served.
        for name, marker, label in (
            ("tokens", "D", "single tokens, held-out"),
            ("tokens_ceiling", "_", "ceiling, held-out"),
        ):
            colour = theme.ceiling if marker == "_" else theme.after
            upper.plot(
                x,
                planned[name]["lar"],
                linestyle="none",
                marker=marker,
                color=colour,
                markersize=11 if marker == "_" else 5,
                markerfacecolor="none",
                markeredgewidth=2 if marker == "_" else 1.3,
                label=label,
            )
            if marker == "D":
                lower.plot(
                    x,
                    planned[name]["remote_copies"],
                    linestyle="none",
                    marker=marker,
                    color=colour,
                    markersize=5,
                    markerfacecolor="none",
                    markeredgewidth=1.3,
                )
    upper.axhline(
        1 / (report["serve"] or report["plan"])["ep_size"],
        color=theme.muted,
        linestyle=(0, (1, 2)),
        linewidth=1.4,
        label="floor 1/G",
    )
    upper.set_title("Local activation rate (higher is better)", pad=24)
    upper.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    upper.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        ncols=5,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    _dumbbells(lower, before["remote_copies"], after["remote_copies"], theme)
    lower.set_title("Remote copies of a token (lower is better)")
    for axes in (upper, lower):  # after all marks are in: a fixed limit stops autoscaling
        axes.set_ylim(bottom=0)
    every = -(-len(layers) // 30)
    lower.set_xticks(x[::every], [str(layer) for layer in layers[::every]])
    lower.set_xlim(-0.6, len(layers) - 0.4)
    lower.set_xlabel("MoE layer")
    return True


def _dumbbells(axes: Axes, before_L: list[float], after_L: list[float], theme: Theme) -> None:
    x = np.arange(len(before_L))
    size = float(np.clip(800 / len(x), 18, 60))
    axes.vlines(x, before_L, after_L, color=theme.after, linewidth=size**0.5 / 1.6, alpha=0.28)
    axes.scatter(x, before_L, s=size, color=theme.before, zorder=3, label="contiguous")
    axes.scatter(x, after_L, s=1.2 * size, color=theme.after, zorder=4, label="semantic")
    axes.margins(y=0.12)
    axes.grid(axis="y")


def _bytes_between_ranks(figure: Figure, report: Report, theme: Theme) -> bool:
    if report["serve"] is None:
        return False
    modes = report["serve"]["modes"]
    matrices = {
        "Contiguous": np.asarray(modes["before"]["wire_bytes"], dtype=np.float64),
        "Semantic": np.asarray(modes["after"]["wire_bytes"], dtype=np.float64),
    }
    scale, unit = byte_unit(max(matrix.max() for matrix in matrices.values()))
    top = max(matrix.max() for matrix in matrices.values()) / scale or 1.0
    figure.set_size_inches(7.6, 3.6)
    panels = figure.subplots(1, 2)
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        image = _heat(axes, matrix / scale, theme, top=top, square=True)
        axes.set_title(f"{title}: {amount(matrix.sum(), 'bytes')}")
        axes.set_xlabel("to rank")
        axes.set_ylabel("from rank")
        every = -(-len(matrix) // 16)
        axes.set_xticks(range(0, len(matrix), every))
        axes.set_yticks(range(0, len(matrix), every))
    bar = figure.colorbar(image, ax=panels, shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label(unit)
    return True


def _heat(axes: Axes, matrix: np.ndarray, theme: Theme, *, top: float, square: bool) -> Any:
    """Draw [rows, columns] on a scale of 0..top.

    A square matrix is from rank to rank: its diagonal is no traffic and stays empty, and values
    are written in where they are legible.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(theme.name, list(theme.heat))
    shown = np.where(np.identity(len(matrix)) > 0, np.nan, matrix) if square else matrix
    image = axes.imshow(shown, cmap=colours, vmin=0, vmax=top, aspect=1 if square else "auto")
    axes.spines[:].set_visible(False)
    if square and len(matrix) <= 8:
        for (row, column), value in np.ndenumerate(matrix):
            if row == column:
                continue
            axes.text(
                column,
                row,
                f"{value:,.0f}" if top >= 100 else f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color=_legible_on(colours(value / top)),
            )
    return image


def _legible_on(background: tuple[float, ...]) -> str:
    """Pick white or near-black, by WCAG contrast."""
    luminance = relative_luminance(background[:3])
    return "#ffffff" if luminance < 0.2 else "#101820"


def relative_luminance(rgb: tuple[float, ...]) -> float:
    """WCAG relative luminance of sRGB components in 0..1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _expert_load(figure: Figure, report: Report, theme: Theme) -> bool:
    serve = report["serve"]
    if serve is None:
        return False
    layers, ranks = report["model"]["layer_ids"], serve["ep_size"]
    figure.set_size_inches(7.6, min(1.6 + 0.2 * len(layers), 4.6))
    panels = figure.subplots(1, 2, sharey=True)
    loads = []
    for key in ("before", "after"):
        mode = serve["modes"][key]
        load = np.asarray(mode["slot_load"] or mode["rank_load"], dtype=np.float64)
        loads.append(load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12))
    top = max(load.max() for load in loads)
    for axes, load, key in zip(panels, loads, ("before", "after"), strict=True):
        name = {"before": "Contiguous", "after": "Semantic"}[key]
        busiest = serve["modes"][key]["busiest_rank_mean"]
        image = _heat(axes, load, theme, top=top, square=False)
        slots = load.shape[1] // ranks
        for rank in range(1, ranks):
            axes.axvline(rank * slots - 0.5, color=theme.surface, linewidth=12 / (ranks + 2))
        shown = np.arange(0, ranks, -(-ranks // 16))
        axes.set_xticks((shown + 0.5) * slots - 0.5, [str(rank) for rank in shown])
        axes.set_xlabel("experts in the slots of rank")
        axes.set_title(f"{name}: busiest rank {busiest:.2f}× mean")
    every = -(-len(layers) // 16)
    rows = range(0, len(layers), every)
    panels[0].set_yticks(rows, [str(layers[row]) for row in rows])
    panels[0].set_ylabel("MoE layer")
    bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("load / mean of layer")
    return True


def _training_loss(figure: Figure, report: Report, theme: Theme) -> bool:
    from matplotlib.ticker import MaxNLocator

    train = report["train"]
    if train is None:
        return False
    figure.set_size_inches(7.6, 2.5)
    axes = figure.subplots()
    loss = np.array([np.nan if value is None else value for value in train["loss"]])
    axes.plot(train["steps"], loss, color=theme.after, linewidth=1.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_title("Training loss")
    axes.grid(axis="y")
    axes.margins(x=0.01)
    return True


def _load_curves(figure: Figure, report: Report, theme: Theme) -> bool:
    """Latency against throughput: a column a scheduling policy, a colour and mark a plan."""
    section = report["load_curves"]
    if section is None or not section["curves"]:
        return False
    policies, plans = (_unique(section, key) for key in ("policy", "plan"))
    colours = dict(zip(plans, (theme.before, theme.ceiling, theme.after)))
    marks = dict(zip(plans, "so^"))
    latencies = {"ttft_p99_ms": "first token, p99, ms", "tpot_p50_ms": "a token, median, ms"}
    figure.set_size_inches(7.6, 3.9)
    panels = figure.subplots(2, len(policies), sharex=True, sharey="row", squeeze=False)
    for curve in section["curves"]:
        column = policies.index(curve["policy"])
        for axes, name in zip(panels[:, column], latencies):
            shown = [point for point in curve["points"] if point[name] is not None]
            axes.plot(
                [point["new_tokens_per_second"] for point in shown],
                [point[name] for point in shown],
                color=colours.get(curve["plan"], theme.muted),
                marker=marks.get(curve["plan"], "x"),
                markersize=4.5,
                linewidth=1.4,
                label=curve["plan"],
            )
    for axes in panels.ravel():
        axes.grid()
    for axes, label in zip(panels[:, 0], latencies.values()):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    for axes, policy in zip(panels[0], policies):
        axes.set_title(policy, fontsize=8.5)
    figure.supxlabel("new tokens a second", fontsize=9, color=theme.muted)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=len(plans)
    )
    return True


def _unique(section: Mapping[str, Any], key: str) -> list[str]:
    return list(dict.fromkeys(curve[key] for curve in section["curves"]))
