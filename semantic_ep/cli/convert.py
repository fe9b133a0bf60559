"""`semantic-ep convert`: a checkpoint of Hugging Face for Megatron, or the other way."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from semantic_ep.errors import ConfigError, explain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this verb."""
    parser.add_argument("--from", dest="source", choices=["hf", "megatron"], required=True)
    parser.add_argument("--to", choices=["hf", "megatron"], required=True)
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
    from semantic_ep.integrations.conversion import (
        huggingface_to_megatron,
        megatron_to_huggingface,
    )

    if args.source == args.to:
        raise ConfigError(explain("nothing to convert", where="--from, --to", got=args.to))
    if args.to == "hf":
        summary = megatron_to_huggingface(args.checkpoint, args.output, like=args.like)
    elif args.like is None:
        summary = huggingface_to_megatron(args.checkpoint, args.output)
    else:
        raise ConfigError(
            explain("only a conversion to hf takes a model as pattern", where="--like")
        )
    if args.json:
        print(json.dumps({**dataclasses.asdict(summary), "output": str(summary.output)}))
        return 0
    print(f"Wrote {summary.output}: a {summary.family} model, {summary.tensors} tensors.")
    for name in summary.left_out[:8]:
        print(f"Left out, as Megatron has no place for it: {name}")
    if len(summary.left_out) > 8:
        print(f"... and {len(summary.left_out) - 8} more")
    return 0
