#!/usr/bin/env python3
"""Record which experts a Hugging Face model sends each token of some prompts to.

    python launch/record.py --model M --prompts prompts.jsonl -o routes.npz

For models that run elsewhere: one process, no expert parallelism, nothing generated. The file is
the plain npz of `semantic-ep import --from npz`; `routes.requests.jsonl` beside it names the
prompts. Routes can reveal text: keep the files as you keep the prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from semantic_ep.errors import ConfigError, SemanticEPError, explain
from semantic_ep.integrations.routes import record_routes
from semantic_ep.observe.formats import write_npz_trace
from semantic_ep.serve.requests import read_requests

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL with "text" in each row')
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="longer ones are cut")
    parser.add_argument("--num-requests", type=int, default=0, help="first rows; 0: all")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.output.suffix != ".npz":
        parser.error(f"--output must end in .npz, and is {args.output}")
    return args


def run(args: argparse.Namespace) -> None:
    """Load, route, write.

    Raises:
        ConfigError: There is no checkpoint. CheckpointError: Its family is not known.
    """
    if not (args.model / "config.json").is_file():
        raise ConfigError(explain("there is no checkpoint here", where=f"--model {args.model}"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    requests = read_requests(
        args.prompts, tokenizer, max_prompt_tokens=args.max_prompt_tokens, limit=args.num_requests
    )
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], local_files_only=True
    )
    model = model.to("cuda" if cuda else "cpu").eval()
    described = [{k: v for k, v in request.row.items() if k != "text"} for request in requests]
    trace = dataclasses.replace(
        record_routes(model, tqdm([r.prompt for r in requests], desc="route", disable=None)),
        requests=tuple(described),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_npz_trace(trace, args.output)
    print(f"{trace.num_tokens} tokens of {trace.num_requests} requests written to {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Record; returns a process exit code."""
    try:
        run(parse_arguments(argv))
    except SemanticEPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
