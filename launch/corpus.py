#!/usr/bin/env python3
"""Build a text corpus of clearly different kinds from what any Python machine already has.

    python launch/corpus.py --output runs/x/data [--data DIR_OR_JSONL ...]

Kinds: `python` (source of the standard library), `cpp` (headers that ship with torch), `english`
(the language reference, package descriptions, licences, docstrings of installed packages) and one
more for each `--data` (a directory of text files, or JSONL rows with "text" and perhaps "kind").
The same machine gives the same bytes: documents are chosen and split by the hash of their name.

Written to the output directory:
    tokenizer.json   byte-level BPE
    train.npy        [N] token ids of the training documents, one after the other
    documents.jsonl  one row a training document: id, kind, first token, number of tokens
    holdout.jsonl    documents to measure routing on: id, kind, text
    prompts.jsonl    documents to serve: id, kind, text
    corpus.json      counts and settings; written last
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from corpus_sources import (
    Candidate,
    english_prose,
    standard_library,
    torch_headers,
    user_data,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from semantic_ep.errors import ConfigError, SemanticEPError, explain

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
MIN_CHARS, MAX_CHARS = 600, 20_000
# Documents of each kind there should be at least: long ones are cut shorter in a small corpus.
_WANTED_DOCUMENTS = 160


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One text; `id` starts with its kind and never holds an absolute path."""

    id: str
    kind: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """What a corpus is made of.

    Attributes:
        data: Directories and JSONL files of the user.
        max_megabytes: Million characters kept, over all kinds and splits; kinds get equal parts.
        vocab_size: Entries of the tokenizer.
        holdout_per_kind: Documents of each kind for measuring routing.
        prompts_per_kind: Documents of each kind for serving.
        holdout_chars: Length of a holdout text.
        prompt_chars: Length of a prompt.
        seed: Changes which documents are chosen and how they are split.
    """

    data: tuple[str, ...] = ()
    max_megabytes: float = 6.0
    vocab_size: int = 8192
    holdout_per_kind: int = 40
    prompts_per_kind: int = 24
    holdout_chars: int = 1200
    prompt_chars: int = 400
    seed: int = 0


def choose(candidates: Iterable[Candidate], *, max_chars: int, seed: int) -> list[Document]:
    """Read candidates in the order of their hash, without near-duplicates, up to `max_chars`.

    Two texts are near-duplicates when their sketches (the smallest hashes of their runs of eight
    words; A. Broder, "On the resemblance and containment of documents", 1997) share half.
    """
    ordered = sorted(candidates, key=lambda candidate: _hash(candidate.id, seed))
    seen: dict[int, list[int]] = defaultdict(list)
    chosen: list[Document] = []
    chars = 0
    kind = ordered[0].kind if ordered else ""
    with tqdm(
        desc=f"read {kind}",
        total=max_chars,
        unit_scale=True,
        unit=" chars",
        disable=None,
    ) as progress:
        for candidate in ordered:
            if chars >= max_chars:
                break
            text = _shortened(candidate.read(), min(MAX_CHARS, max_chars // _WANTED_DOCUMENTS))
            if len(text) < MIN_CHARS:
                continue
            sketch = _sketch(text)
            shared = Counter(index for value in sketch for index in seen[value])
            if shared and max(shared.values()) * 2 >= len(sketch):
                continue
            for value in sketch:
                seen[value].append(len(chosen))
            chosen.append(Document(id=candidate.id, kind=candidate.kind, text=text))
            chars += len(text)
            progress.update(len(text))
    return chosen


def split(
    documents: list[Document], settings: CorpusSettings
) -> tuple[list[Document], list[Document], list[Document]]:
    """Split the documents of one kind into (train, holdout, prompts); none is in two parts.

    Holdout texts and prompts are windows that start at a random line, since a document's head
    (a licence comment, imports) says little about the rest of it.

    Raises:
        ConfigError: There are too few documents for the three parts.
    """
    holdout, prompts = settings.holdout_per_kind, settings.prompts_per_kind
    if len(documents) <= holdout + prompts:
        raise ConfigError(
            explain(
                f"too few different documents of kind {documents[0].kind if documents else '?'}",
                got=len(documents),
                allowed=f"more than {holdout + prompts} (holdout + prompts)",
                do="Add text with --data, or lower --holdout-per-kind and --prompts-per-kind",
            )
        )
    return (
        documents[holdout + prompts :],
        [_window(d, settings.holdout_chars, settings.seed) for d in documents[:holdout]],
        [
            _window(d, settings.prompt_chars, settings.seed)
            for d in documents[holdout : holdout + prompts]
        ],
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; ids 0 and 1 are the end of a text and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(output: Path, settings: CorpusSettings) -> dict[str, dict[str, int]]:
    """Write the corpus and return its counts: split -> kind -> documents, and tokens.

    Raises:
        ConfigError: The user's data is malformed, or a kind has too few documents.
    """
    train, holdout, prompts = [], [], []
    kinds = _candidates(settings)
    share = round(settings.max_megabytes * 1e6 / len(kinds))
    for candidates in kinds:
        parts = split(choose(candidates, max_chars=share, seed=settings.seed), settings)
        for whole, part in zip((train, holdout, prompts), parts, strict=True):
            whole.extend(part)
    tokenizer = train_tokenizer((document.text for document in train), settings.vocab_size)
    output.mkdir(parents=True, exist_ok=True)
    (output / "corpus.json").unlink(missing_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    tokens = _write_train(output, train, tokenizer)
    for name, part in (("holdout", holdout), ("prompts", prompts)):
        part.sort(key=lambda document: _hash(document.id, settings.seed))
        _write_rows(output / f"{name}.jsonl", (dataclasses.asdict(document) for document in part))
    counts = {
        "train": dict(Counter(document.kind for document in train)),
        "holdout": dict(Counter(document.kind for document in holdout)),
        "prompts": dict(Counter(document.kind for document in prompts)),
        "train_tokens": dict(tokens),
    }
    summary = {
        "counts": counts,
        "vocab_size": tokenizer.get_vocab_size(),
        "settings": dataclasses.asdict(settings),
    }
    (output / "corpus.json").write_text(json.dumps(summary, indent=1))
    return counts


def _candidates(settings: CorpusSettings) -> list[list[Candidate]]:
    """The candidates of each kind; the user's join the built-in ones of the same kind."""
    kinds: dict[str, list[Candidate]] = defaultdict(list)
    for source in (
        standard_library(),
        torch_headers(),
        english_prose(),
        *map(user_data, settings.data),
    ):
        for candidate in source:
            kinds[candidate.kind].append(candidate)
    return list(kinds.values())


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8])


def _sketch(text: str, *, run: int = 8, size: int = 64) -> list[int]:
    words = text.split()
    starts = range(max(len(words) - run + 1, 1))
    return sorted({zlib.crc32(" ".join(words[i : i + run]).encode()) for i in starts})[:size]


def _shortened(text: str, chars: int) -> str:
    """Cut at a line end where there is one in the second half of the allowed length."""
    if len(text) <= chars:
        return text
    cut = text.rfind("\n", chars // 2, chars)
    return text[: cut + 1 if cut > 0 else chars]


def _window(document: Document, chars: int, seed: int) -> Document:
    text = document.text
    latest = max(len(text) - chars, 0)
    starts = [0, *(match.end() for match in re.finditer("\n", text) if match.end() <= latest)]
    start = random.Random(_hash(document.id, seed)).choice(starts)
    return dataclasses.replace(document, text=text[start : start + chars])


def _write_train(output: Path, documents: list[Document], tokenizer: Tokenizer) -> Counter[str]:
    rows, pieces, first = [], [], 0
    tokens: Counter[str] = Counter()
    end = tokenizer.token_to_id(END_OF_TEXT)
    for document in tqdm(documents, desc="tokenize", unit=" documents", disable=None):
        ids = [*tokenizer.encode(document.text).ids, end]
        rows.append({"id": document.id, "kind": document.kind, "first": first, "tokens": len(ids)})
        pieces.append(
            np.asarray(ids, dtype=np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.uint32)
        )
        first += len(ids)
        tokens[document.kind] += len(ids)
    np.save(output / "train.npy", np.concatenate(pieces))
    _write_rows(output / "documents.jsonl", rows)
    return tokens


def _write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the flags are the fields of `CorpusSettings`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--data", action="append", default=[], help="directory or JSONL file")
    for field in dataclasses.fields(CorpusSettings):
        if field.name != "data":
            flag = "--" + field.name.replace("_", "-")
            kind = type(field.default)
            parser.add_argument(flag, type=kind, default=field.default, help="default %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Build a corpus from the command line; returns the exit code."""
    options = vars(parse_arguments(argv))
    output = options.pop("output")
    settings = CorpusSettings(**{**options, "data": tuple(options["data"])})
    try:
        counts = build(output, settings)
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for kind in counts["train"]:
        print(
            f"{kind:>12}: {counts['train'][kind]} training documents "
            f"({counts['train_tokens'][kind]:,} tokens), {counts['holdout'][kind]} holdout, "
            f"{counts['prompts'][kind]} prompts"
        )
    print(f"corpus of {sum(counts['train_tokens'].values()):,} training tokens in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
