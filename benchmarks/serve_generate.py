"""One rank of the engine against transformers' own `generate`, on the same batch, alternating.

All prompts of a batch have the same length, so that `generate` has no padding to compute.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.serve_results import GENERATE
from semantic_ep.plan.placement import Placement
from semantic_ep.serve.engine import SemanticInferenceEngine

SIDES = ("engine", "generate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """What is generated.

    Attributes:
        model: Hugging Face checkpoint.
        prompts: Token ids, of which a batch takes the first.
        sizes: Requests of a batch.
        max_new_tokens: Of each.
        rounds: Timed passes of each side, after one that is not counted.
    """

    model: Path
    prompts: Sequence[Sequence[int]]
    sizes: Sequence[int]
    max_new_tokens: int
    rounds: int


def compare(batches: Batches) -> list[dict[str, Any]]:
    """One row for each side of each batch; runs in a process group of one rank."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        batches.model, dtype=torch.float32, local_files_only=True
    ).eval()
    engine = _engine(batches.model)
    rows = []
    for size in batches.sizes:
        prompts = same_length(batches.prompts, size)
        sides: dict[str, Callable[[], list[list[int]]]] = {
            "engine": lambda prompts=prompts, size=size: (
                engine.generate(
                    prompts, max_new_tokens=batches.max_new_tokens, max_batch_size=size
                ).outputs
            ),
            "generate": lambda prompts=prompts: _generate(model, prompts, batches.max_new_tokens),
        }
        outputs = {name: side() for name, side in sides.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(batches.rounds):
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                start = time.perf_counter()
                sides[name]()
                seconds[name].append(time.perf_counter() - start)
        rows += [
            _row(name, prompts, outputs, seconds[name], statistics.median(seconds["generate"]))
            for name in SIDES
        ]
    return rows


def same_length(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """`size` prompts of the median length: longer ones are cut, shorter ones repeated."""
    length = int(statistics.median(map(len, prompts)))
    picked = (prompts[number % len(prompts)] for number in range(size))
    return [np.resize(np.asarray(prompt), length).tolist() for prompt in picked]


def _engine(model: Path) -> SemanticInferenceEngine:
    from semantic_ep.apply.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    shape = checkpoint.shape
    placement = Placement.contiguous(
        num_layers=len(shape.layer_ids), num_experts=shape.num_experts, ep_size=1
    )
    return SemanticInferenceEngine.from_checkpoint(
        checkpoint, placement=placement, group=dist.group.WORLD
    )


def _generate(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """New tokens up to the one that ends a sequence; the padding after it is cut."""
    ids = torch.tensor(prompts)
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )[:, ids.shape[1] :].tolist()
    eos = model.generation_config.eos_token_id
    stop = set(eos if isinstance(eos, list) else [eos])
    ends = (next((n for n, token in enumerate(row) if token in stop), len(row)) for row in new)
    return [row[: end + 1] for row, end in zip(new, ends, strict=True)]


def _row(
    side: str,
    prompts: list[list[int]],
    outputs: dict[str, list[list[int]]],
    seconds: list[float],
    of_generate: float,
) -> dict[str, Any]:
    tokens = sum(map(len, outputs[side]))
    median = statistics.median(seconds)
    return {
        "block": GENERATE,
        "side": side,
        "batch": len(prompts),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": tokens,
        "median_ms": median * 1e3,
        "p20_ms": float(np.percentile(seconds, 20) * 1e3),
        "p80_ms": float(np.percentile(seconds, 80) * 1e3),
        "n": len(seconds),
        "new_tokens_per_second": tokens / median,
        "against_generate": of_generate / median,
        "same_tokens": outputs["engine"] == outputs["generate"],
    }
