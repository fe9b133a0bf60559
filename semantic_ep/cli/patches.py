"""`semantic-ep patches`: the seams into upstream code, and whether they fit what is installed."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semantic_ep.patches.registry import SeamStatus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "action",
        nargs="?",
        default="list",
        choices=["list", "check", "autoload"],
        help="list: what there is; check: does it fit the installed versions; autoload: the "
        "directory to put on PYTHONPATH for SEMANTIC_EP_AUTOLOAD",
    )
    parser.add_argument("--group", choices=["megatron", "deepspeed"], help="seams of one framework")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print the table of patches/README")


def run(args: argparse.Namespace) -> int:
    """Print the seams; 1 if a check found one that does not fit."""
    from semantic_ep.cli import EXIT_NO, EXIT_OK
    from semantic_ep.patches import registry

    if args.action == "autoload":
        print(Path(registry.__file__).parent / "autoload")
        return EXIT_OK
    chosen = registry.seams(args.group)
    if args.markdown:
        print(registry.markdown_table(chosen), end="")
        return EXIT_OK
    if args.action == "list":
        statuses = [registry.SeamStatus(seam=seam, state="") for seam in chosen]
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            statuses = [registry.check(seam) for seam in chosen]
            logging.disable(logging.NOTSET)
    if args.json:
        print(json.dumps([_row(status) for status in statuses], indent=1))
    else:
        _print_table(statuses)
    return EXIT_NO if any(s.failed and s.state != "not installed" for s in statuses) else EXIT_OK


def _row(status: SeamStatus) -> dict[str, Any]:
    seam = status.seam
    row: dict[str, Any] = {
        "name": seam.name,
        "target": seam.target,
        "package": seam.package,
        "versions": seam.versions,
        "why": seam.why,
        "remove_when": seam.remove_when,
    }
    if status.state:
        row |= {"state": status.state, "detail": status.detail, "found": status.found}
    return row


def _print_table(statuses: list[SeamStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("seam", "versions", "state", "why"):
        table.add_column(column, overflow="fold")
    for status in statuses:
        seam = status.seam
        table.add_row(
            seam.name, f"{seam.package} {seam.versions}", status.state, status.detail or seam.why
        )
    Console().print(table)
