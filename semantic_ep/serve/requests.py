"""Requests from a file, and responses to one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import ConfigError, explain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A row of the prompts file, and its token ids."""

    row: dict[str, Any]
    prompt: list[int]


def read_requests(
    path: Path, tokenizer: Any, *, max_prompt_tokens: int, limit: int = 0
) -> list[Request]:
    """Read and tokenise prompts.

    Args:
        path: JSON lines, each an object with "text".
        tokenizer: Of transformers.
        max_prompt_tokens: Longer prompts are cut.
        limit: Rows to take from the start; 0 means all.

    Raises:
        ConfigError: The file cannot be read, or a row is not as it should be.
    """
    where = f"--prompts {path}"
    try:
        lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        texts = [row["text"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            explain(
                f"cannot read the prompts: {type(error).__name__}: {error}",
                where=where,
                allowed='JSON lines, each an object with "text"',
            )
        ) from error
    count = limit or len(rows)
    encoded = [tokenizer(text)["input_ids"][:max_prompt_tokens] for text in texts[:count]]
    if not encoded or not all(encoded):
        empty = [index for index, ids in enumerate(encoded) if not ids][:4]
        raise ConfigError(
            explain("there is no prompt, or an empty one", where=where, got=f"empty rows: {empty}")
        )
    return [Request(row=row, prompt=ids) for row, ids in zip(rows, encoded)]


def write_responses(
    path: Path, requests: Sequence[Request], outputs: Sequence[list[int]], tokenizer: Any
) -> None:
    """Write one JSON line a request: its row without the text, and what was generated."""
    lines = [
        json.dumps(
            {
                **{key: value for key, value in request.row.items() if key != "text"},
                "prompt_tokens": len(request.prompt),
                "tokens": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
        for request, ids in zip(requests, outputs)
    ]
    write_file_atomically(path, ("\n".join(lines) + "\n").encode())
