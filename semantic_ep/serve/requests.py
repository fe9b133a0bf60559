"""Requests: from a file, whether they can be served, and responses to a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semantic_ep.artifacts import write_file_atomically
from semantic_ep.errors import ConfigError, RequestError, explain
from semantic_ep.serve.protocol import EngineRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A row of the prompts file, and its token ids."""

    row: dict[str, Any]
    prompt: list[int]


def check_request(request: EngineRequest, *, max_sequence_tokens: float) -> None:
    """Refuse a request that can never be served.

    Args:
        request: What was asked for.
        max_sequence_tokens: Longest prompt plus output, of the model and of the KV cache.

    Raises:
        RequestError: A value is out of its range, or prompt and output together are too long.
    """
    sampling, prompt = request.sampling, len(request.prompt_token_ids)
    ranges = {
        "prompt_token_ids": (prompt >= 1, "at least 1 token", f"{prompt} tokens"),
        "max_tokens": (sampling.max_tokens >= 1, "at least 1", sampling.max_tokens),
        "temperature": (
            0 <= sampling.temperature < float("inf"),
            "0 (greedy) or more, finite",
            sampling.temperature,
        ),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1", sampling.top_p),
        "top_k": (sampling.top_k >= 0, "0 (all) or more", sampling.top_k),
        "stop": (all(sampling.stop), "texts that are not empty", sampling.stop),
        "logprobs": ((sampling.logprobs or 0) >= 0, "0 or more", sampling.logprobs),
    }
    for name, (valid, allowed, got) in ranges.items():
        if not valid:
            raise RequestError(
                explain("the request cannot be served", where=name, got=got, allowed=allowed)
            )
    if prompt + sampling.max_tokens > max_sequence_tokens:
        raise RequestError(
            explain(
                "the request is too long",
                where="prompt_token_ids, max_tokens",
                got=f"{prompt} tokens and {sampling.max_tokens} to generate",
                allowed=f"{max_sequence_tokens} in all",
                do="Cut the prompt, or lower max_tokens",
            )
        )


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
