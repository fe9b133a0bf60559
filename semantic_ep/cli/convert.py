"""`semantic-ep convert`: between Hugging Face and Megatron, and DeepSpeed's to universal form."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from semantic_ep.errors import ConfigError, explain

_WAYS = (("hf", "megatron"), ("megatron", "hf"), ("deepspeed", "universal"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument(
        "--from", dest="source", choices=["hf", "megatron", "deepspeed"], required=True
    )
    parser.add_argument("--to", choices=["hf", "megatron", "universal"], required=True)
    parser.add_argument(
        "--checkpoint", "--model", type=Path, required=True, metavar="DIR", help="what to convert"
    )
    parser.add_argument(
        "-o", "--output", "--out", type=Path, required=True, metavar="DIR", help="new directory"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="DIR",
        help="to hf: take config.json, vocabulary size and tokenizer from this model",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    if (args.source, args.to) not in _WAYS:
        raise ConfigError(
            explain(
                "no such conversion",
                where="--from, --to",
                got=f"{args.source} to {args.to}",
                allowed=", ".join(f"{source} to {to}" for source, to in _WAYS),
            )
        )
    if args.like is not None and args.to != "hf":
        raise ConfigError(
            explain("only a conversion to hf takes a model as pattern", where="--like")
        )
    if args.to == "universal":
        return _to_universal(args)
    from semantic_ep.integrations.conversion import (
        huggingface_to_megatron,
        megatron_to_huggingface,
    )

    if args.to == "hf":
        summary = megatron_to_huggingface(args.checkpoint, args.output, like=args.like)
    else:
        summary = huggingface_to_megatron(args.checkpoint, args.output)
    if args.json:
        print(json.dumps({**dataclasses.asdict(summary), "output": str(summary.output)}))
        return 0
    print(f"Wrote {summary.output}: a {summary.family} model, {summary.tensors} tensors.")
    for name in summary.left_out[:8]:
        print(f"Left out, as Megatron has no place for it: {name}")
    if len(summary.left_out) > 8:
        print(f"... and {len(summary.left_out) - 8} more")
    return 0


def _to_universal(args: argparse.Namespace) -> int:
    from semantic_ep.integrations.deepspeed.universal import convert_to_universal

    experts = convert_to_universal(args.checkpoint, args.output)
    if args.json:
        print(json.dumps({"output": str(args.output), "expert_parameters": experts}))
    else:
        print(
            f"Wrote {args.output}: {experts} parameters of experts by logical expert, and others."
        )
    return 0
