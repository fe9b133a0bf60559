"""Requests to replay: arrivals and lengths of public serving traces, texts of public prompts.

Long traces are scaled down, so that the texts at hand suffice: lengths, and the blocks that
requests share, are divided by one number. A conversation keeps to one kind of text: chat (the
held-out prompts of the routing trace themselves, with their true routes), grade-school mathematics
or Python (tokenised here, each token with the route of a random occurrence of its id in the
held-out trace).
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semantic_ep.errors import ConfigError, explain
from semantic_ep.observe.traces import RoutingTrace
from semantic_ep.serve.protocol import EngineRequest, SamplingParams
from semantic_ep.serve.simulation.routing import occurrences
from semantic_ep.serve.simulation.simulator import Arrival

BLOCK = 64  # Tokens of a block of text.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingTrace:
    """A public serving trace.

    Attributes:
        file: Under the data folder.
        scale: What its lengths are divided by.
    """

    file: str
    scale: int


TRACES = {
    # It shares prefixes in blocks of 512 tokens.
    "mooncake": ServingTrace(file="serving/mooncake_conversation.jsonl", scale=512 // BLOCK),
    "azure-code": ServingTrace(file="serving/azure_llm_inference_2023_code.csv", scale=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """One request of a serving trace.

    Attributes:
        seconds: Of its arrival.
        prompt_tokens, new_tokens: Scaled lengths, at least 1.
        blocks: Ids of its prompt's blocks; equal ids are equal text after equal text.
    """

    seconds: float
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """Texts of one kind in a row.

    Attributes:
        ids: [n] token ids.
        positions: [n], token of the routing trace whose route each takes.
    """

    ids: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """Requests without times, and when they came.

    Attributes:
        requests: What the scheduler sees.
        new_tokens: Of each.
        seconds: [R] arrivals, from 0.
        positions: For each request, tokens of the routing trace whose routes its prompt takes; its
            new tokens are routed like its prompt's.
    """

    requests: Sequence[EngineRequest]
    new_tokens: Sequence[int]
    seconds: np.ndarray
    positions: Sequence[np.ndarray]

    def at_rate(self, requests_per_second: float) -> list[Arrival]:
        """The same arrivals, stretched to a mean rate; infinite: all at once."""
        rate = len(self.seconds) / max(float(self.seconds[-1]), 1e-9)
        return [
            Arrival(
                seconds=float(seconds) * rate / requests_per_second,
                request=request,
                new_tokens=new_tokens,
            )
            for seconds, request, new_tokens in zip(
                self.seconds, self.requests, self.new_tokens, strict=True
            )
        ]


def read_texts(data: Path, heldout: RoutingTrace, *, seed: int) -> list[Text]:
    """The three kinds of text.

    Raises:
        ConfigError: A file is missing.
    """
    rng = np.random.default_rng(seed)
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(data / "tokenizers" / "deepseek_v2_lite.json"))
    except Exception as error:  # Of no common type.
        raise ConfigError(
            explain(f"cannot read the tokenizer: {error}", where=f"--data {data}")
        ) from error
    texts = [
        Text(
            ids=heldout.token_id.astype(np.int64),
            positions=np.arange(heldout.num_tokens),
        )
    ]
    for name, fields in (
        ("gsm8k_test.jsonl", ("question", "answer")),
        ("humaneval.jsonl", ("prompt",)),
    ):
        lines = _lines(data / "prompts" / name)
        rows = [json.loads(line) for line in lines]
        encoded = [
            tokenizer.encode("\n".join(row[field] for field in fields), add_special_tokens=False)
            for row in rows
        ]
        ids = np.concatenate([np.array(text.ids, dtype=np.int64) for text in encoded])
        texts.append(Text(ids=ids, positions=occurrences(heldout, ids, rng)))
    return texts


def read_arrivals(data: Path, name: str, *, limit: int) -> list[Recorded]:
    """First `limit` requests of a serving trace of `TRACES`.

    Raises:
        ConfigError: The file is missing.
    """
    trace = TRACES[name]
    lines = _lines(data / trace.file)
    if name == "mooncake":
        rows = [json.loads(line) for line in lines[:limit]]
        return [
            Recorded(
                seconds=row["timestamp"] / 1e3,
                prompt_tokens=max(row["input_length"] // trace.scale, 1),
                new_tokens=max(row["output_length"] // trace.scale, 1),
                blocks=tuple(row["hash_ids"]),
            )
            for row in rows
        ]
    recorded, block = [], 0
    for row in itertools.islice(csv.DictReader(lines), limit):
        length = max(int(row["ContextTokens"]) // trace.scale, 1)
        count = -(-length // BLOCK)
        recorded.append(
            Recorded(
                seconds=datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                prompt_tokens=length,
                new_tokens=max(int(row["GeneratedTokens"]) // trace.scale, 1),
                blocks=tuple(range(block, block + count)),  # Which blocks are shared is unknown.
            )
        )
        block += count
    return recorded


def build(recorded: Sequence[Recorded], texts: Sequence[Text], *, seed: int) -> Workload:
    """Fill the blocks of recorded requests with texts, one kind a conversation.

    A block's text follows that of the block before it. A request that shares no block with an
    earlier one, or only the first of all, begins a conversation.
    """
    rng = np.random.default_rng(seed)
    common = recorded[0].blocks[0]
    content: dict[int, tuple[int, int]] = {}  # block -> kind of text, first token
    requests, positions = [], []
    for number, one in enumerate(recorded):
        spans: list[tuple[int, int]] = []
        for place, block in enumerate(one.blocks):
            if block not in content:
                if place == 0 or one.blocks[place - 1] == common:
                    kind = int(rng.integers(len(texts)))
                    start = int(rng.integers(len(texts[kind].ids)))
                else:
                    kind, start = spans[-1]
                    start += BLOCK
                content[block] = (kind, start)
            spans.append(content[block])
        ids, taken = _joined(texts, spans, one.prompt_tokens)
        requests.append(
            EngineRequest(
                id=str(number),
                prompt_token_ids=ids.tolist(),
                # A user's limit is a round number at or above what comes.
                sampling=SamplingParams(max_tokens=1 << (one.new_tokens - 1).bit_length()),
            )
        )
        positions.append(taken)
    seconds = np.array([one.seconds for one in recorded])
    return Workload(
        requests=requests,
        new_tokens=[one.new_tokens for one in recorded],
        seconds=seconds - seconds[0],
        positions=positions,
    )


def _joined(
    texts: Sequence[Text], spans: Sequence[tuple[int, int]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    ids, positions = [], []
    for kind, start in spans:
        text = texts[kind]
        index = np.arange(start, start + BLOCK) % len(text.ids)
        ids.append(text.ids[index])
        positions.append(text.positions[index])
    return np.concatenate(ids)[:length], np.concatenate(positions)[:length]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            explain(
                f"cannot read {path.name}: {error.strerror}",
                where=f"--data {path.parents[1]}",
                do="Give the folder that holds serving/, prompts/, tokenizers/ and traces/",
            )
        ) from error
