"""The routing recorder: share of a training step, and memory at the shape of a large model.

Steps with and without the recorder alternate, on the model that the quickstart trains and on
routers alone at the shape of DeepSeek-V3. The share is stated twice: as the difference of paired
steps, and by a stopwatch in the recorder's calls, which is the steadier one on a busy machine.
Memory is read while routes are counted until the tables are full.

Shapes: T tokens, D hidden, K top-k, E experts, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.observe.counters import RoutedTokens, RoutingCounters
from semantic_ep.observe.recorder import RoutingRecorder

# The defaults of launch/finetune_deepspeed.py, launch/corpus.py and configs/debug/cpu_2rank.json.
QUICKSTART = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "moe_intermediate_size": 192,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
ROWS, LENGTH = 4, 128
PARTS = ("quickstart model", "routers alone", "memory")
# DeepSeek-V3: hidden size, experts, groups of them, groups and experts a token, vocabulary.
HIDDEN, EXPERTS, GROUPS, GROUP_TOP_K, TOP_K, VOCAB = 7168, 256, 8, 4, 8, 129280


@dataclasses.dataclass(kw_only=True)
class Watch:
    """Seconds spent in the recorder's calls."""

    seconds: float = 0.0

    def __call__(self, call: Callable[[], object]) -> None:
        """Run and time a call."""
        started = time.perf_counter()
        call()
        self.seconds += time.perf_counter() - started


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the theme."""
    parser.add_argument("--pairs", type=int, default=60, help="steps with and without, alternating")
    parser.add_argument("--warm-up", type=int, default=5, help="pairs that are not counted")
    parser.add_argument("--router-tokens", type=int, default=2048, help="tokens a step, routers")
    parser.add_argument("--router-layers", type=int, default=2, help="layers, routers and memory")
    parser.add_argument("--memory-steps", type=int, default=200, help="to fill the tables")
    parser.add_argument("--memory-tokens", type=int, default=32768, help="of each of those steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")


def run(args: argparse.Namespace) -> Result:
    """Measure the three parts."""
    if args.quick:
        args.pairs, args.warm_up, args.router_tokens = 2, 1, 256
        args.memory_steps, args.memory_tokens = 10, 4096
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    rows: list[Row] = [
        *_paired(PARTS[0], quickstart_step(rng), args),
        *_paired(PARTS[1], router_step(rng, args), args),
        *_memory(rng, args),
    ]
    steps = [row for row in rows if row["part"] != PARTS[2]]
    full = [row for row in rows if row["part"] == PARTS[2]]
    return Result(
        theme="observe",
        protocol={
            "quickstart model": {**QUICKSTART, "rows": ROWS, "length": LENGTH},
            "quickstart step": "forward, backward, AdamW, fp32, one process, transformers' model",
            "routers alone": f"D {HIDDEN}, E {EXPERTS}, K {TOP_K}, V {VOCAB}, sigmoid scores with "
            f"bias, {GROUP_TOP_K} of {GROUPS} groups; forward and backward, fp32",
            "router_tokens": args.router_tokens,
            "router_layers": args.router_layers,
            "memory": "ids by Zipf's law, routes of an id vary about its own",
            "memory_tokens": args.memory_tokens,
            "pairs": args.pairs,
            "warm_up": args.warm_up,
            "threads": args.threads,
            "order": "with and without alternate, and which comes first alternates too",
        },
        rows=rows,
        tables=[
            Table(title=f"Medians of {args.pairs} pairs of steps", rows=list(_summary(steps))),
            Table(
                title=f"Recorder at E {EXPERTS}, K {TOP_K}, V {VOCAB}, for one MoE layer",
                rows=full,
            ),
        ],
        charts=[
            Chart(
                title="Memory of one layer's counters",
                kind="lines",
                rows=full,
                x="tokens",
                y="mb_per_layer",
                y_label="MB",
            )
        ],
    )


def quickstart_step(rng: np.random.Generator) -> Callable[[Watch | None], None]:
    """One training step of the quickstart's model; observed where it gets a watch."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from semantic_ep.integrations.transformers import find_moe_layers

    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**QUICKSTART))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    recorder = RoutingRecorder(
        num_layers=QUICKSTART["num_hidden_layers"],
        num_experts=QUICKSTART["num_experts"],
        top_k=QUICKSTART["num_experts_per_tok"],
        vocab_size=QUICKSTART["vocab_size"],
    )
    sequence_T = torch.arange(ROWS, dtype=torch.int32).repeat_interleave(LENGTH)
    watches: list[Watch] = []

    def hook(layer: int) -> Callable[..., None]:
        def on_route(_module: nn.Module, _args: Any, output: Any) -> None:
            if watches:
                watches[0](lambda: recorder.record(layer, output[2]))

        return on_route

    for layer, site in enumerate(find_moe_layers(model)):
        model.get_submodule(site.router).register_forward_hook(hook(layer))

    def step(watch: Watch | None) -> None:
        token_id = torch.from_numpy(_token_ids(rng, ROWS * LENGTH, QUICKSTART["vocab_size"]))
        watches[:] = [] if watch is None else [watch]
        if watch is not None:
            watch(lambda: recorder.start_micro_batch(token_id, sequence_T=sequence_T))
        ids = token_id.view(ROWS, LENGTH)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch(recorder.step)

    return step


def router_step(
    rng: np.random.Generator, args: argparse.Namespace
) -> Callable[[Watch | None], None]:
    """Forward and backward of routers alone; observed where it gets a watch."""
    tokens, layers = args.router_tokens, args.router_layers
    weights = [nn.Parameter(torch.randn(EXPERTS, HIDDEN) * HIDDEN**-0.5) for _ in range(layers)]
    bias = torch.zeros(EXPERTS)
    embedding = torch.randn(1024, HIDDEN)
    recorder = RoutingRecorder(
        num_layers=layers, num_experts=EXPERTS, top_k=TOP_K, vocab_size=VOCAB
    )

    def step(watch: Watch | None) -> None:
        token_id = torch.from_numpy(_token_ids(rng, tokens, VOCAB))
        x_TD = embedding[token_id % len(embedding)] + 0.5 * torch.randn(tokens, HIDDEN)
        if watch is not None:
            watch(lambda: recorder.start_micro_batch(token_id))
        for layer, weight in enumerate(weights):
            score_TE = (x_TD @ weight.t()).sigmoid()
            expert_TK = _group_limited(score_TE.detach() + bias)
            if watch is not None:
                watch(lambda layer=layer, e=expert_TK: recorder.record(layer, e))
            score_TE.gather(1, expert_TK).sum().backward()
            weight.grad = None
        if watch is not None:
            watch(recorder.step)

    return step


def _group_limited(score_TE: Tensor) -> Tensor:
    """[T, K] experts from the best groups, which are judged by their two best experts."""
    grouped = score_TE.view(len(score_TE), GROUPS, -1)
    best = grouped.topk(2, dim=2).values.sum(2).topk(GROUP_TOP_K, dim=1).indices
    allowed = torch.zeros(len(score_TE), GROUPS, dtype=torch.bool).scatter_(1, best, True)
    masked = grouped.masked_fill(~allowed[..., None], 0.0).flatten(1)
    return masked.topk(TOP_K, dim=1).indices


def _paired(
    part: str, step: Callable[[Watch | None], None], args: argparse.Namespace
) -> Iterator[Row]:
    for pair in range(-args.warm_up, args.pairs):
        row: dict[str, Any] = {"part": part, "pair": pair}
        for observed in ((True, False), (False, True))[pair % 2]:
            watch = Watch() if observed else None
            started = time.perf_counter()
            step(watch)
            row["with_ms" if observed else "without_ms"] = (time.perf_counter() - started) * 1e3
            if watch is not None:
                row["recorder_ms"] = watch.seconds * 1e3
        if pair >= 0:
            yield row


def _summary(rows: list[Row]) -> Iterator[Row]:
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        without = statistics.median(row["without_ms"] for row in mine)
        share = [(row["with_ms"] - row["without_ms"]) / without for row in mine]
        low, high = np.quantile(share, [0.2, 0.8])
        recorder = statistics.median(row["recorder_ms"] for row in mine)
        yield {
            "part": part,
            "without ms": without,
            "with ms": statistics.median(row["with_ms"] for row in mine),
            "share by difference": f"{statistics.median(share):.2%} ({low:.2%}..{high:.2%})",
            "recorder ms": recorder,
            "share by stopwatch": f"{recorder / without:.2%}",
        }


def _memory(rng: np.random.Generator, args: argparse.Namespace) -> Iterator[Row]:
    """Count synthetic routes until the tables are full."""
    layers, tokens = args.router_layers, args.memory_tokens
    counters = RoutingCounters(
        num_layers=layers, num_experts=EXPERTS, top_k=TOP_K, vocab_size=VOCAB
    )
    sequence = np.arange(tokens) // 4096
    tracemalloc.start()
    done, milliseconds, peak = 0, 0.0, 0
    for reading in range(1, 11):
        for _ in range(done, args.memory_steps * reading // 10):
            ids = _token_ids(rng, tokens, VOCAB)
            routed = RoutedTokens(
                experts={layer: _routes(rng, ids + VOCAB * layer) for layer in range(layers)},
                token_id=ids,
                sequence=sequence,
            )
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.perf_counter()
            counters.add(routed)
            counters.step()
            milliseconds += (time.perf_counter() - started) * 1e3
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
            done += 1
        held_bytes = counters.nbytes
        held = [counters.part(f"table.{layer}") for layer in range(layers)]
        lost = sum(float(part["dropped"][0]) for part in held)
        kept = sum(float(part["counts"].sum()) for part in held)
        yield {
            "part": PARTS[2],
            "tokens": done * tokens,
            "cells_per_layer": sum(len(part["cells"]) for part in held) // layers,
            "mb_per_layer": held_bytes / layers / 1e6,
            "working_mb": peak / 1e6,
            "dropped_mass": lost / (lost + kept),
            "ms_per_1000_tokens_and_layer": milliseconds / done / layers / tokens * 1e3,
        }
    tracemalloc.stop()


def _token_ids(rng: np.random.Generator, tokens: int, vocab: int) -> np.ndarray:
    """[T] ids by Zipf's law, as those of text are."""
    rank = np.exp(rng.random(tokens) * np.log(vocab)).astype(np.int64) - 1
    return np.minimum(rank, vocab - 1)


def _routes(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """[T, K] distinct experts: an id prefers 64 in an order of its own, and contexts add noise."""
    place = np.arange(64)
    first, stride = ids * 2654435761 >> 8, 2 * (ids * 40503 >> 4) + 1  # Odd: no expert twice.
    candidates = (first[:, None] + place * stride[:, None]) % EXPERTS
    score = rng.gumbel(size=candidates.shape) - place / 8
    chosen = np.argpartition(-score, TOP_K, axis=1)[:, :TOP_K]
    return np.take_along_axis(candidates, chosen, axis=1)
