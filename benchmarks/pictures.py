"""Draw the front page's two pictures, and write its tables: `python -m benchmarks.pictures`.

The pipeline is a drawing; the gain is drawn from the committed results of the theme `plan`, and
shown in the README once there are some. Both are SVG, in a light and a dark version, and the same
bytes on every machine. Tables are those of `front_page`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.front_page import MODELS, marks, method_rows, with_part, with_tables
from semantic_ep.report.plots import DARK, LIGHT, Theme

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
# Between these lines the README shows the gain.
GAIN_BEGIN, GAIN_END = marks("gain")
EP_SIZE = 8
# Method of the theme `plan` -> how the picture names it; all baselines, ours last.
METHODS = {
    "contiguous": "contiguous",
    "random": "random",
    "eplb": "EPLB",
    "exflow": "ExFlow",
    "moetuner": "MoETuner",
    "occult": "Occult",
    "grace": "GRACE-MoE",
    "semmoe": "Sem-MoE",
    "semantic-placement-only": "ours: placement",
    "semantic": "ours: with schedule",
}
OURS = ("semantic-placement-only", "semantic")
WIDTH = 860


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures, or check that the committed ones are current."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    args = parser.parse_args(argv)
    rows = method_rows()
    files = {FOLDER / name: text for name, text in pictures(rows).items()}
    readme = ROOT / "README.md"
    files[readme] = with_tables(with_gain(readme.read_text(), rows))
    stale = []
    for path, text in files.items():
        if not path.is_file() or path.read_text() != text:
            stale.append(path.name)
            if not args.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python -m benchmarks.pictures", file=sys.stderr)
        return 1
    return 0


def pictures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """SVG by file name; the gain only where there are rows to draw."""
    drawn = {}
    for theme in (LIGHT, DARK):
        drawn[f"pipeline-{theme.name}.svg"] = pipeline(theme)
        if rows:
            drawn[f"gain-{theme.name}.svg"] = gain(rows, theme)
    return drawn


def with_gain(readme: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The README with the picture of the gain, or without one where there is nothing to draw."""
    shown = ""
    if rows:
        shown = (
            '<picture>\n<source media="(prefers-color-scheme: dark)" '
            'srcset="docs/pictures/gain-dark.svg">\n<img src="docs/pictures/gain-light.svg" '
            'alt="Remote copies of a token on 8 ranks, by placement method, on held-out routing of '
            'public models; fewer are better.">\n</picture>\n'
        )
    return with_part(readme, "gain", shown)


def remote_copies(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Trace -> method -> remote copies a token at `EP_SIZE`, mean over layers and splits."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ep_size"] == EP_SIZE and row["method"] in METHODS:
            found[row["trace"]][row["method"]].append(row["remote_copies"])
    return {
        trace: {name: mean(of[name]) for name in METHODS if name in of}
        for trace, of in sorted(found.items())
    }


def gain(rows: Sequence[Mapping[str, Any]], theme: Theme) -> str:
    """Bars of remote copies, one panel a trace."""
    panels = remote_copies(rows)
    most = max(value for of in panels.values() for value in of.values())
    lines = max(map(len, panels.values()))
    wide = WIDTH / len(panels)
    room = 165, 95  # Left of the bars for names, right of them for values.
    parts = [_text(0, 18, "Rows that the all-to-all moves for a token, 8 ranks", theme, bold=True)]
    for number, (trace, of) in enumerate(panels.items()):
        left = number * wide
        parts.append(_text(left, 46, MODELS.get(trace, trace), theme, color=theme.muted))
        for line, (name, value) in enumerate(of.items()):
            top = 58 + 22 * line
            ours = name in OURS
            length = (wide - sum(room)) * value / most
            colour = theme.after if ours else theme.before
            change = value / of["contiguous"] - 1
            said = f"{value:.2f}" + (f"  {100 * change:+.0f} %" if name != "contiguous" else "")
            parts += [
                _text(left + room[0] - 8, top + 12, METHODS[name], theme, anchor="end", bold=ours),
                f'<rect x="{left + room[0]:.1f}" y="{top}" width="{length:.1f}" height="15" '
                f'rx="2" fill="{colour}"/>',
                _text(
                    left + room[0] + length + 6,
                    top + 12,
                    said.replace("-", "−"),
                    theme,
                    bold=ours,
                    color=theme.ink if ours else theme.muted,
                ),
            ]
    title = "Remote copies of a token by placement method, on held-out routing; fewer are better"
    return _svg(parts, 70 + 22 * lines, theme, title)


STAGES = (
    ("fine-tune", "DeepSpeed,", "Megatron-core"),
    ("observe", "which experts", "each token goes to"),
    ("plan", "experts, requests", "to ranks; a verdict"),
    ("apply", "checkpoints, files", "for other engines"),
    ("run", "dispatch, a row", "a rank it needs"),
    ("serve", "requests go where", "their experts are"),
)


def pipeline(theme: Theme) -> str:
    """The stages, and below them what a plan changes."""
    step = WIDTH / len(STAGES)
    parts = []
    for number, (name, *lines) in enumerate(STAGES):
        left = number * step
        parts.append(
            f'<rect x="{left + 1:.1f}" y="1" width="{step - 22:.1f}" height="72" rx="8" '
            f'fill="none" stroke="{theme.after if name == "plan" else theme.before}" '
            f'stroke-width="{2 if name == "plan" else 1.2}"/>'
        )
        middle = left + (step - 20) / 2
        parts.append(_text(middle, 24, name, theme, anchor="middle", bold=True))
        for line, text in enumerate(lines):
            parts.append(
                _text(
                    middle,
                    43 + 16 * line,
                    text,
                    theme,
                    anchor="middle",
                    size=11.5,
                    color=theme.muted,
                )
            )
        if number < len(STAGES) - 1:
            parts.append(_arrow(left + step - 19, 37, left + step - 1, 37, theme.muted))
    for left, title, experts in (
        (0.0, "contiguous: a token needs experts of several ranks", ("abab", "baba")),
        (WIDTH / 2 + 10, "semantic: what is wanted together lies together", ("aaaa", "bbbb")),
    ):
        parts += _ranks(left, 104, title, experts, theme)
    title = "From a fine-tuning run to serving, and how a plan keeps traffic on its rank"
    return _svg(parts, 262, theme, title)


def _ranks(
    left: float, top: float, title: str, experts: tuple[str, str], theme: Theme
) -> list[str]:
    """Two ranks with four experts each, and two kinds of tokens that want experts of a kind."""
    colours = {"a": theme.after, "b": theme.ceiling}
    parts = [_text(left, top + 6, title, theme, size=12.5, color=theme.muted)]
    places: dict[str, list[tuple[float, int]]] = {"a": [], "b": []}
    for rank, kinds in enumerate(experts):
        begin = left + 205 * rank
        parts.append(
            f'<rect x="{begin + 1:.1f}" y="{top + 18}" width="195" height="132" rx="8" '
            f'fill="none" stroke="{theme.grid}" stroke-width="1.5"/>'
        )
        parts.append(_text(begin + 12, top + 36, f"rank {rank}", theme, size=11.5))
        for number, kind in enumerate(kinds):
            x = begin + 30 + 45 * number
            places[kind].append((x, rank))
            parts.append(
                f'<rect x="{x - 13:.1f}" y="{top + 46}" width="26" height="26" rx="5" '
                f'fill="{colours[kind]}"/>'
            )
    for rank, kind in enumerate("ab"):
        # A token at home on this rank, and two experts of its kind: as near as there are, but one
        # of each rank that has some.
        x, y = left + 205 * rank + 97, top + 132
        near = sorted(places[kind], key=lambda found: abs(found[0] - x))
        first = [next(found for found in near if found[1] == of) for of in {of for _, of in near}]
        wanted = (first if len(first) > 1 else near)[:2]
        for place, of in wanted:
            far = of != rank
            parts.append(
                f'<path d="M{x:.1f} {y - 9} L{place:.1f} {top + 75}" stroke="{colours[kind]}" '
                f'stroke-width="{2.4 if far else 1.6}"'
                + (' stroke-dasharray="5 4"' if far else "")
                + ' fill="none"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="9" fill="{colours[kind]}"/>')
        parts.append(_text(x + 14, y + 4, "tokens", theme, size=11.5, color=theme.muted))
    return parts


def _arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    return (
        f'<path d="M{x:.1f} {y} L{to_x - 5:.1f} {to_y} M{to_x - 7:.1f} {to_y - 4} '
        f'L{to_x - 1:.1f} {to_y} L{to_x - 7:.1f} {to_y + 4}" stroke="{colour}" fill="none" '
        'stroke-width="1.6"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    theme: Theme,
    *,
    anchor: str = "start",
    size: float = 13,
    bold: bool = False,
    color: str | None = None,
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight} '
        f'fill="{color or theme.ink}">{escape(text)}</text>'
    )


def _svg(parts: Iterable[str], height: float, theme: Theme, title: str) -> str:
    """The background stays transparent: the page has its own."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" '
        "font-family=\"system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif\">\n"
        f"<title>{escape(title)}</title>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
