"""Run a benchmark theme, or all: `python -m benchmarks.run THEME [flags]`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import all_themes, tracking
from benchmarks.base import comparison, run_at
from benchmarks.registry import Result, Table, cell, markdown, theme_module, themes, write_json
from semantic_ep.errors import SemanticEPError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, and write what was asked for.

    Returns:
        0, 1 if a theme of `all` failed, or 2 after an error that the user can act on.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    args = _parser(chosen).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if args.theme == "all":
        return all_themes.run_all(args)
    try:
        theirs = run_at(args.base, _without_output(arguments)) if args.base else None
        result = theme_module(args.theme).run(args)
        if theirs is not None:
            result = dataclasses.replace(
                result,
                protocol={**result.protocol, "base": theirs["commit"]},
                tables=[*result.tables, comparison(theirs, result.rows)],
            )
        for table in result.tables:
            _print(table)
        _write(result, args)
    except SemanticEPError as error:
        print(f"benchmarks.run {args.theme}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    known = themes()
    subparsers = parser.add_subparsers(dest="theme", metavar="THEME", required=True)
    for name, summary in known.items():
        theme = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            theme_module(name).add_arguments(theme)
        theme.add_argument(
            "--base", metavar="COMMIT", help="run the same at another commit, too, and compare"
        )
        output = theme.add_argument_group("output")
        output.add_argument("--json", type=Path, help="write all rows, protocol and environment")
        output.add_argument(
            "--png", type=Path, help="write the charts (default: beside --json; needs matplotlib)"
        )
        output.add_argument("--markdown", type=Path, help="write the tables")
        tracking.add_arguments(output)
    every = subparsers.add_parser("all", help=all_themes.SUMMARY, description=all_themes.SUMMARY)
    all_themes.add_arguments(every)
    return parser


def _without_output(arguments: Sequence[str]) -> list[str]:
    """Arguments for the other commit, which does not compare and writes where it is told."""
    dropped = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--base", "--json", "--png", "--markdown", "--track", "--wandb"):
        dropped.add_argument(flag)
    return dropped.parse_known_args(list(arguments))[1]


def _print(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title)
    columns = list(table.rows[0]) if table.rows else []
    for name in columns:
        text = isinstance(table.rows[0][name], str)
        drawn.add_column(name, justify="left" if text else "right", no_wrap=text)
    for row in table.rows:
        drawn.add_row(*(cell(row.get(name)) for name in columns))
    # A pipe has no width: give tables the room they need.
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(drawn)


def _write(result: Result, args: argparse.Namespace) -> None:
    document = result.document(seed=getattr(args, "seed", None))
    if args.track and not args.json:
        args.json = args.track / f"{result.theme}.json"
    if args.json:
        write_json(document, args.json)
    if args.markdown:
        args.markdown.write_text("\n".join(markdown(table) for table in result.tables))
    picture = args.png or (args.json.with_suffix(".png") if args.json else None)
    if picture and result.charts:
        from benchmarks.plots import draw

        draw(result.charts, picture)
    if args.track:
        tracking.record(result, document, args, written=args.json, picture=picture)


if __name__ == "__main__":
    sys.exit(main())
