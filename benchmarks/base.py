"""Compare a theme with another commit: the same command, in a git worktree of it."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.registry import Row, Table, rounded
from semantic_ep.errors import ConfigError, explain

ROOT = Path(__file__).resolve().parents[1]


def run_at(commit: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the theme at a commit with this interpreter; returns its document.

    Args:
        commit: Anything that git resolves to a commit.
        arguments: Of `benchmarks.run`, without --base and without output flags.

    Raises:
        ConfigError: The commit does not exist, or its run failed.
    """
    with _worktree(commit) as checkout, tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "base.json")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.run", *arguments, "--json", str(output)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ConfigError(
                explain(
                    "the benchmark failed at the other commit",
                    where=f"--base {commit}",
                    got=(done.stderr.strip().splitlines() or ["no message"])[-1],
                    do="Choose a commit that has this theme and its flags",
                )
            )
        document: dict[str, Any] = json.loads(output.read_text())
    return document


def comparison(theirs: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """One line a numeric column: how this commit's values relate to the other's.

    Rows are the same if all their texts are; among equals, their order decides.

    Args:
        theirs: Document of the other commit.
        rows: Rows of this one.
    """
    # A commit from before rows were rounded has more digits.
    before = dict(_named(rounded(theirs["rows"])))
    pairs = [(before[name], row) for name, row in _named(rows) if name in before]
    columns = dict.fromkeys(key for _, row in pairs for key, value in row.items() if _number(value))
    lines = []
    for column in columns:
        both = [
            (float(old[column]), float(new[column]))
            for old, new in pairs
            if _number(old.get(column)) and _number(new.get(column))
        ]
        ratios = [new / old for old, new in both if old]
        if ratios:
            lines.append(
                {
                    "column": column,
                    "rows": len(both),
                    "equal": sum(old == new for old, new in both),
                    "this / base, median": statistics.median(ratios),
                    "smallest": min(ratios),
                    "largest": max(ratios),
                }
            )
    alone = len(rows) + len(theirs["rows"]) - 2 * len(pairs)
    return Table(
        title=f"Against {theirs['commit']}; {alone} rows are of one commit only", rows=lines
    )


@contextlib.contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "base")
        _git("worktree", "add", "--detach", str(checkout), commit, where=commit)
        try:
            yield checkout
        finally:
            _git("worktree", "remove", "--force", str(checkout), where=commit)


def _git(*arguments: str, where: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            explain(
                "git cannot check out the other commit",
                where=f"--base {where}",
                got=done.stderr.strip(),
            )
        )


def _named(rows: Sequence[Row]) -> Iterator[tuple[tuple[Any, ...], Row]]:
    """Rows with what identifies them: their texts, and the how-manieth of these it is."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        texts = tuple(sorted((k, v) for k, v in row.items() if isinstance(v, str)))
        yield (*texts, seen[texts]), row
        seen[texts] += 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
