"""What the documentation says, taken apart: fenced blocks, commands, links."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [
        *ROOT.glob("docs/*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(ROOT / name / "README.md" for name in ("benchmarks", "configs", "patches")),
        ROOT / "semantic_ep/runtime/kernels/README.md",
    ]
)
# A block or a code span that begins with one of these is a command.
PROGRAMS = ("semantic-ep", "deepspeed", "torchrun", "python", "bash", "pip", "wandb")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")
_LINK = re.compile(
    r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\""
)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        """For messages and test ids."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a block: variables set for it, and its words."""

    where: str
    variables: tuple[str, ...]
    words: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """Fenced blocks in order; one without a language that begins with a program is bash."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        language, body = match[1], match[2]
        first = body.split(maxsplit=1)[0] if body.strip() else ""
        if not language and first in PROGRAMS:
            language = "bash"
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page=page, line=line, language=language, text=body))
    return found


def commands(block: Block) -> list[Command]:
    """Commands of a bash block; `&&`, `;` and `|` separate them."""
    found = []
    joined = re.sub(r"\\\n\s*", " ", block.text)
    for line in joined.splitlines():
        words = _words(line)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
            part, words = words[:end], words[end + 1 :]
            count = next(
                (i for i, word in enumerate(part) if not re.match(r"[A-Z_]+=", word)), len(part)
            )
            found.append(
                Command(where=block.where, variables=(*part[:count],), words=(*part[count:],))
            )
    return found


def _words(line: str) -> list[str]:
    """Words of a line; brackets around flags mark what may be left out, and are taken away."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words = [word.removeprefix("[") if word.startswith("[-") else word for word in lexer]
    return [word if "[" in word else word.removesuffix("]") for word in words]


def spans(page: Path) -> list[tuple[str, list[str]]]:
    """Commands in running text and tables: (where, words)."""
    text = page.read_text()
    text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    return [
        (f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}", _words(match[1]))
        for match in _SPAN.finditer(text)
    ]


def links(page: Path) -> list[str]:
    """Targets of links and pictures, those in code left out."""
    text = re.sub(r"`[^`]*`", "", _FENCE.sub("", page.read_text()))
    return [next(filter(None, match.groups())) for match in _LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    text = _FENCE.sub("", page.read_text())
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in _HEADING.findall(text)
    }
