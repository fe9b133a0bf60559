"""Where the texts of the corpus come from: what any Python machine has, and the user's data."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from semantic_ep.errors import ConfigError, explain

_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
# One file an operator, generated from a template: thousands of near copies.
_GENERATED_HEADERS = "ATen/ops"
_DOCUMENTED_PACKAGES = ("numpy", "scipy", "torch", "setuptools")
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".java", ".js"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A text that may enter the corpus, read only when its turn comes."""

    id: str
    kind: str
    read: Callable[[], str]


def standard_library() -> Iterator[Candidate]:
    """Python source files of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from _files(root, "python", lambda path: path.suffix == ".py")


def torch_headers() -> Iterator[Candidate]:
    """C++ headers that ship with torch, without the generated ones."""
    for root in _package_folders("torch"):
        yield from _files(
            root / "include",
            "cpp",
            lambda path: (
                path.suffix in {".h", ".hpp", ".cuh"}
                and not path.as_posix().startswith(_GENERATED_HEADERS)
            ),
        )


def english_prose() -> Iterator[Candidate]:
    """The language reference, descriptions and licences of packages, and long docstrings."""

    def prose(name: str, read: Callable[[], str]) -> Candidate:
        return Candidate(id=f"english/{name}", kind="english", read=lambda: _sentences(read()))

    for name, text in _language_reference().items():
        yield prose(f"topics/{name}", lambda text=text: text)
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        description = package.metadata.get_payload() or ""
        yield prose(f"description/{name}", lambda text=description: text)
        for file in package.files or ():
            if re.search(r"licen[cs]e|notice", file.name, re.IGNORECASE):
                path = Path(file.locate())
                yield prose(f"licence/{name}/{file.name}", lambda path=path: _read(path))
    for name in _DOCUMENTED_PACKAGES:
        for root in _package_folders(name):
            for found in _files(root, name, lambda path: path.suffix == ".py"):
                yield prose(f"docstrings/{found.id}", lambda read=found.read: _docstrings(read()))


def user_data(source: str) -> Iterator[Candidate]:
    """Texts of a directory (kind: its name) or of a JSONL file (kind: the row's, or its name).

    Raises:
        ConfigError: The path does not exist, or a row is not an object with a "text".
    """
    path = Path(source)
    if path.is_dir():
        kind = path.resolve().name
        yield from _files(path, kind, lambda file: file.suffix.lower() in _TEXT_SUFFIXES)
        return
    if not path.is_file():
        raise ConfigError(
            explain(
                "no such file or directory",
                where="--data",
                got=source,
                allowed="a directory of text files, or a JSONL file",
            )
        )
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                text, kind = str(row["text"]), str(row.get("kind", path.stem))
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    explain(
                        'this row is not a JSON object with a "text"',
                        where=f"{source}:{number}",
                        got=f"{type(error).__name__}: {error}",
                    )
                ) from error
            yield Candidate(
                id=f"{kind}/{path.name}:{number}", kind=kind, read=lambda text=text: text
            )


def _package_folders(name: str) -> list[Path]:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def _files(root: Path, kind: str, wanted: Callable[[Path], bool]) -> Iterator[Candidate]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root)
            if wanted(relative):
                yield Candidate(
                    id=f"{kind}/{relative.as_posix()}",
                    kind=kind,
                    read=lambda path=path: _read(path),
                )


def _read(path: Path) -> str:
    """The text of a file, or "" where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def _language_reference() -> dict[str, str]:
    """Topic -> text of `help()`, which every Python carries as a dictionary literal."""
    source = _read(Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py")
    literals = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict))
    return next((ast.literal_eval(literal) for literal in literals), {})


def _docstrings(source: str) -> str:
    """Triple-quoted texts; a search is 20 times faster than parsing, and errors are no prose."""
    return "\n\n".join(re.findall(r'"""(.{80,}?)"""', source, re.DOTALL))


def _sentences(text: str) -> str:
    """The paragraphs that are prose: no markup, tables, code or doctests."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        letters = sum(char.isalpha() or char == " " for char in paragraph)
        if len(paragraph) >= 60 and letters > 0.88 * len(paragraph) and ">>>" not in paragraph:
            kept.append("\n".join(line.strip() for line in paragraph.splitlines()))
    return "\n\n".join(kept) + "\n"
