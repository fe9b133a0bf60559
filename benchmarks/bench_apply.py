"""Rewriting a checkpoint in the order of a plan against a plain copy of the same files.

Random bytes in the layout of a Qwen3-MoE checkpoint, permuted at random. Rounds are interleaved;
every method ends with its data on disk. CPU seconds say what the work costs where the disk is
shared or slow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.registry import Chart, Result, Row, Table
from semantic_ep.apply.checkpoint import apply_layout, checkpoint_fingerprint, undo_layout
from semantic_ep.apply.layout import Layout

TOP_K = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the theme's flags."""
    parser.add_argument("--layers", type=int, default=4, help="MoE layers, one shard each")
    parser.add_argument("--experts", type=int, default=64, help="experts a layer")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512, help="inner size of an expert")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work (default: temporary files)")


def run(args: argparse.Namespace) -> Result:
    """Measure each form of checkpoint and each method."""
    rows: list[Row] = []
    for form in ("per expert", "fused"):
        with tempfile.TemporaryDirectory(dir=args.directory) as name:
            rows += _measure(form, Path(name), args)
    summary = list(_summary(rows))
    return Result(
        theme="apply",
        protocol={
            "layers": args.layers,
            "experts": args.experts,
            "hidden": args.hidden,
            "inner": args.inner,
            "rounds": args.rounds,
            "bytes": rows[0]["bytes"],
            "copy": "shutil.copyfile of each file, then fsync",
        },
        rows=rows,
        tables=[Table(title=f"Median of {args.rounds} interleaved rounds", rows=summary)],
        charts=[
            Chart(
                title="Rewriting a checkpoint",
                kind="bars",
                rows=summary,
                x="method",
                y="cpu_seconds_per_gb",
                y_label="CPU seconds a GB",
                series="form",
            )
        ],
    )


def _measure(form: str, root: Path, args: argparse.Namespace) -> Iterator[Row]:
    source = root / "source"
    size = _write_source(source, form, args)
    fingerprint = checkpoint_fingerprint(source)
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(args.experts) for _ in range(args.layers)])
    layout = Layout(physical_to_logical_map=order, fingerprint=fingerprint)
    methods: dict[str, Callable[[], object]] = {
        "copy": lambda: _copy(source, root / "copy"),
        "apply": lambda: apply_layout(source, layout, root / "apply"),
        "undo": lambda: undo_layout(root / "apply", root / "undo"),
    }
    for round_ in range(args.rounds):
        for method, action in methods.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            yield {
                "form": form,
                "method": method,
                "round": round_,
                "bytes": size,
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
            }
        for method in methods:
            shutil.rmtree(root / method)


def _summary(rows: list[Row]) -> Iterator[Row]:
    for form, method in dict.fromkeys((row["form"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["form"], row["method"]) == (form, method)]
        rates = [row["bytes"] / row["seconds"] / 1e6 for row in mine]
        yield {
            "form": form,
            "method": method,
            "mb_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "cpu_seconds_per_gb": statistics.median(
                row["cpu_seconds"] / row["bytes"] * 1e9 for row in mine
            ),
        }


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream.fileno())


def _write_source(directory: Path, form: str, args: argparse.Namespace) -> int:
    """Write config, index and one shard a layer; returns the bytes of all tensors."""
    directory.mkdir()
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": args.layers,
        "num_experts": args.experts,
        "num_experts_per_tok": min(TOP_K, args.experts),
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng, weight_map, total = np.random.default_rng(0), {}, 0
    for layer in range(args.layers):
        file = f"model-{layer + 1:05d}-of-{args.layers:05d}.safetensors"
        header, position = {}, 0
        for name, shape in _layer_tensors(layer, form, args).items():
            end = position + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            weight_map[name], position = file, end
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text + rng.bytes(position))
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _layer_tensors(layer: int, form: str, args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    block, experts = f"model.layers.{layer}.mlp", args.experts
    tensors: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (experts, args.hidden)}
    if form == "fused":
        tensors[f"{block}.experts.gate_up_proj"] = (experts, 2 * args.inner, args.hidden)
        tensors[f"{block}.experts.down_proj"] = (experts, args.hidden, args.inner)
        return tensors
    for expert in range(experts):
        for name in ("gate_proj", "up_proj"):
            tensors[f"{block}.experts.{expert}.{name}.weight"] = (args.inner, args.hidden)
        tensors[f"{block}.experts.{expert}.down_proj.weight"] = (args.hidden, args.inner)
    return tensors
